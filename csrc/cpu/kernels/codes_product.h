// Rows x a weight of codes -> fp32: shared by linear_codes and experts_codes.
//
// weight[n][k] = (value(code) - zero) * scale, or code * scale + zero where codes count up. The values of a group are
// multiplied and summed in one fp32 chain over ascending k; a group's sum, less zero * (sum of x), is scaled and added to
// those before it; where codes count up, zero * (sum of x) is added last. So one order holds for any number of rows: few
// rows read the codes in place, of more rows the first keep what they decode for the others.
#pragma once
#include "chunks.h"
#include "codes.h"

namespace fuseline::FL_ISA {
namespace {

constexpr int64_t kFewRows = kTileRows;          // rows for which codes are read in place

// A matrix of codes: codes [P][W][16], scales and zeros [P][G][16], all contiguous.
struct CodedWeight {
  Tensor codes, scales, zeros;
  int64_t num_k, group;
  bool counts_up = false;
  int64_t num_panels() const { return codes.sizes[0]; }
  int64_t panel_words() const { return codes.sizes[1] * kPanel; }
  int64_t num_groups() const { return scales.sizes[1]; }
  const uint32_t* words(int64_t panel) const {
    return static_cast<const uint32_t*>(codes.data) + panel * panel_words();
  }
};

// The part of one expert of a tensor [E, ...] of four dims.
inline Tensor of_expert(const Tensor& t, int64_t expert) {
  if (!t.present()) return t;
  auto* data = static_cast<char*>(t.data) + expert * t.strides[0] * item_size(t.dtype);
  return {data, t.dtype, 3, {t.sizes[1], t.sizes[2], t.sizes[3]}, {t.strides[1], t.strides[2], t.strides[3]}};
}

// kLanes scales or zeros of a group.
FL_INLINE vf of_group(const Tensor& t, int64_t panel, int64_t group, int v) {
  int64_t at = (panel * t.sizes[1] + group) * kPanel + v * kLanes;
  if (t.dtype == DType::bf16) return load(static_cast<const bf16*>(t.data) + at);
  if (t.dtype == DType::f16) return load(static_cast<const f16*>(t.data) + at);
  return load(static_cast<const float*>(t.data) + at);
}

constexpr int64_t kMostCodes = 32;   // that are decoded together

// How rows are packed: as fp32, or on the dot path as words of two bf16. Absent inputs up to a multiple of kMostCodes are 0.
template <bool DOT>
struct Packing {
  using A = float;
  static constexpr int kRow = kPackedRow, kInputs = 1;
  static int64_t step(int64_t rows) { return packed_step(rows); }
  template <class T>
  static void pack(const T* x, int64_t num_k, float* packed, int64_t rows, int64_t r) {
    pack_row(x, num_k, packed, rows, r);
  }
};
template <>
struct Packing<true> {
  using A = uint32_t;
  static constexpr int kRow = kDotRow, kInputs = 2;
  static int64_t step(int64_t rows) { return dot_step(rows); }
  static void pack(const bf16* x, int64_t num_k, uint32_t* packed, int64_t rows, int64_t r) {
    pack_dot_row(x, num_k, packed, rows, r);
  }
};

// Some of `num_packed` packed rows, and the sums of x [rows][G] by group where the weight has zeros.
template <bool DOT>
struct CodedRows {
  using A = typename Packing<DOT>::A;
  int64_t rows, num_packed;
  A* packed;
  float* sums;
  A* at(int64_t depth_block, int64_t r) const {
    return packed + depth_block * Packing<DOT>::step(num_packed) + r * Packing<DOT>::kRow;
  }
};

// Whether a tile holds its totals beside the sums of a group, which saves loading and storing them for each group.
constexpr bool holds_totals(int rows, int vecs) { return rows * vecs <= (kLanes == 16 ? 14 : kLanes == 8 ? 4 : 1); }

// Adds groups of one depth block, inputs [k0, k0 + num_k), to c[ROWS][PANELS * 16]. Without groups, c is the chain
// itself until the last block.
template <int ROWS, int PANELS, bool DOT, class Source>
FL_INLINE void codes_tile(const CodedWeight& weight, const CodedRows<DOT>& block, int64_t r0, const Source& b, int p0,
                          int64_t panel, int64_t k0, int num_k, float* c, int64_t ldc) {
  constexpr int kVecs = PANELS * kPanelVecs, kRow = Packing<DOT>::kRow, kInputs = Packing<DOT>::kInputs;
  constexpr bool kHolds = holds_totals(ROWS, kVecs);
  const auto* a = block.at(k0 / kDepth, r0);
  const uint32_t* panels[PANELS];
  for (int p = 0; p < PANELS; ++p) panels[p] = b.at(p0 + p);
  bool is_whole = weight.group == 0, is_last = k0 + num_k >= weight.num_k;
  int length = is_whole ? num_k : static_cast<int>(weight.group);
  vf totals[kHolds ? ROWS : 1][kHolds ? kVecs : 1];
  load_tile(totals, c, ldc, kHolds && !is_whole && k0 > 0);
  for (int first = 0; first < num_k; first += length) {
    int end = first + length < num_k ? first + length : num_k;
    vf acc[ROWS][kVecs];
    load_tile(acc, c, ldc, is_whole && k0 > 0);
    for (int64_t i = first / Source::kStep; i < (end + Source::kStep - 1) / Source::kStep; ++i) {
      const auto* x = a + i * (Source::kStep / kInputs);
      vu words[kVecs];
      for (int p = 0; p < PANELS; ++p) {
        b.fetch(panels[p] + i * kPanel);
        for (int v = 0; v < kPanelVecs; ++v) words[p * kPanelVecs + v] = load_words(panels[p] + i * kPanel + v * kLanes);
      }
#pragma GCC unroll 8
      for (int j = 0; j < Source::kOperands; ++j) {
        decltype(b.operand(words[0], 0)) y[kVecs];
        for (int v = 0; v < kVecs; ++v) {
          y[v] = b.operand(words[v], j);
          b.keep(p0 + v / kPanelVecs, i * Source::kOperands + j, v % kPanelVecs, y[v]);
        }
        for (int r = 0; r < ROWS; ++r) {
          auto all = x[r * kRow + j] - decltype(y[0] + y[0]){};
          for (int v = 0; v < kVecs; ++v) {
            if constexpr (DOT) acc[r][v] = dot_pairs(acc[r][v], y[v], all);
            else acc[r][v] = fma(all, y[v], acc[r][v]);
          }
        }
      }
    }
    if (is_whole && !is_last) return store_tile(acc, c, ldc);
    int64_t group = is_whole ? 0 : (k0 + first) / weight.group;
    bool is_first = is_whole || k0 + first == 0;
    for (int p = 0; p < PANELS; ++p)
      for (int v = 0; v < kPanelVecs; ++v) {
        vf scale = of_group(weight.scales, panel + p, group, v) * set1(b.unit()), zero{};
        bool has_zeros = weight.zeros.present();
        if (has_zeros) zero = of_group(weight.zeros, panel + p, group, v);
        if (!weight.counts_up) zero = zero * set1(1.0f / b.unit());
        for (int r = 0; r < ROWS; ++r) {
          vf sum = acc[r][p * kPanelVecs + v];
          vf of_x = has_zeros ? set1(block.sums[(r0 + r) * weight.num_groups() + group]) : vf{};
          if (has_zeros && !weight.counts_up) sum = fma(-of_x, zero, sum);
          float* to = c + r * ldc + p * kPanel + v * kLanes;
          vf before{};
          if (kHolds) before = totals[r][p * kPanelVecs + v];
          else if (!is_first) before = load(to);
          vf total = fma(scale, sum, before);
          if (weight.counts_up) total = fma(of_x, zero, total);
          if (kHolds) totals[r][p * kPanelVecs + v] = total;
          else store(to, total);
        }
      }
  }
  if (kHolds) store_tile(totals, c, ldc);
}

// Panels side by side, each with an operand and ROWS sums in registers.
constexpr int codes_panels(int rows) {
  if (kLanes == 16) return rows <= 2 ? 4 : 2;
  return kLanes == 8 && rows <= 2 ? 2 : 1;
}

template <int ROWS, bool DOT, class Source>
[[gnu::noinline]] void codes_strip(const CodedWeight& weight, const CodedRows<DOT>& block, int64_t r0, const Source& b,
                                   int num_panels, int64_t panel, int64_t k0, int num_k, float* c, int64_t ldc) {
  constexpr int kSide = codes_panels(ROWS);
  int p = 0;
  for (; p + kSide <= num_panels; p += kSide)
    codes_tile<ROWS, kSide>(weight, block, r0, b, p, panel + p, k0, num_k, c + p * kPanel, ldc);
  for (; p < num_panels; ++p) codes_tile<ROWS, 1>(weight, block, r0, b, p, panel + p, k0, num_k, c + p * kPanel, ldc);
}

// Rows from LEAST to ROWS.
template <int ROWS, int LEAST = 1, bool DOT, class Source>
FL_INLINE void codes_rows(int rows, const CodedWeight& weight, const CodedRows<DOT>& block, int64_t r0, const Source& b,
                          int num_panels, int64_t panel, int64_t k0, int num_k, float* c, int64_t ldc) {
  if (rows == ROWS) return codes_strip<ROWS>(weight, block, r0, b, num_panels, panel, k0, num_k, c, ldc);
  if constexpr (ROWS > LEAST)
    codes_rows<ROWS - 1, LEAST>(rows, weight, block, r0, b, num_panels, panel, k0, num_k, c, ldc);
}

// c[rows][ldc] of panels from `panel` on. `wide` has room for kMaxPanels decoded panels.
template <bool DOT, class Kind>
void multiply_panels(const CodedWeight& weight, const Kind& kind, const CodedRows<DOT>& block, int64_t panel,
                     int num_panels, float* wide, float* c, int64_t ldc) {
  constexpr int kCodes = Kind::kCodes;
  auto depth = [&](int64_t k0) {
    int64_t left = weight.num_k - k0;
    return static_cast<int>(left < kDepth ? (left + kCodes - 1) / kCodes * kCodes : kDepth);
  };
  if (block.rows <= kFewRows) {
    for (int p = 0; p < num_panels; p += codes_panels(1))
      for (int64_t k0 = 0; k0 < weight.num_k; k0 += kDepth) {
        int width = num_panels - p < codes_panels(1) ? num_panels - p : codes_panels(1);
        InPlace<Kind, DOT> source{kind, weight.words(panel + p) + k0 / kCodes * kPanel, weight.panel_words(),
                                  codes_panels(1) * weight.panel_words()};
        codes_rows<kFewRows>(static_cast<int>(block.rows), weight, block, 0, source, width, panel + p, k0, depth(k0),
                             c + p * kPanel, ldc);
      }
    return;
  }
  auto* decoded = reinterpret_cast<uint32_t*>(wide);
  constexpr int64_t kDecoded = kDepth / Packing<DOT>::kInputs * kPanel;
  // Of groups the sums of a tile are scaled often, so it has as many rows as let it hold its totals.
  constexpr int kLeast = kLanes == 16 ? kTileRows / 4 : kTileRows / 2;
  const int64_t most = weight.group > 0 && kLanes == 16 ? kTileRows / 2 : kTileRows;
  int64_t num_tiles = (block.rows + most - 1) / most;
  for (int64_t k0 = 0; k0 < weight.num_k; k0 += kDepth) {
    Decoding<Kind, DOT> codes{{kind, weight.words(panel) + k0 / kCodes * kPanel, weight.panel_words(), kAhead},
                              decoded, kDecoded};
    Decoded<DOT> source{decoded, kDecoded, Kind::kUnit};
    for (int64_t t = 0; t < num_tiles; ++t) {
      int64_t r = block.rows * t / num_tiles, rows = block.rows * (t + 1) / num_tiles - r;
      auto multiply = [&](const auto& from) {
        codes_rows<kTileRows, kLeast>(static_cast<int>(rows), weight, block, r, from, num_panels, panel, k0, depth(k0),
                                      c + r * ldc, ldc);
      };
      t == 0 ? multiply(codes) : multiply(source);
    }
  }
}

// Any number of rows reads codes of 5 bits decoded: on the path of fp32 alone, since products of integers have the others.
inline void multiply_panels(const CodedWeight& weight, const Fives& kind, const CodedRows<false>& block, int64_t panel,
                            int num_panels, float* wide, float* c, int64_t ldc) {
  constexpr int64_t kDecoded = kDepth * kPanel;
  Decoded<false> source{reinterpret_cast<const uint32_t*>(wide), kDecoded, Fives::kUnit};
  int64_t num_tiles = (block.rows + kTileRows - 1) / kTileRows;
  for (int first = 0; first < num_panels; first += kMaxPanels) {
    int width = num_panels - first < kMaxPanels ? num_panels - first : kMaxPanels;
    for (int64_t k0 = 0; k0 < weight.num_k; k0 += kDepth) {
      int64_t left = weight.num_k - k0, depth = left < kDepth ? (left + Fives::kCodes - 1) / Fives::kCodes * Fives::kCodes : kDepth;
      for (int p = 0; p < width; ++p)
        decode_panel(kind, weight.words(panel + first + p) + k0 / Fives::kCodes * Fives::kWords * kPanel, depth,
                     wide + p * kDecoded);
      for (int64_t t = 0; t < num_tiles; ++t) {
        int64_t r = block.rows * t / num_tiles, rows = block.rows * (t + 1) / num_tiles - r;
        codes_rows<kTileRows>(static_cast<int>(rows), weight, block, r, source, width, panel + first, k0,
                              static_cast<int>(depth), c + r * ldc + first * kPanel, ldc);
      }
    }
  }
}

// Packs a row x[K], its inputs in the weight's order, as row r of the block, and sums its groups.
template <bool DOT, class T>
void pack_codes_row(const CodedWeight& weight, const CodedRows<DOT>& block, const T* x, int64_t r) {
  Packing<DOT>::pack(x, weight.num_k, block.packed, block.num_packed, r);
  int64_t last = weight.num_k / kDepth, inside = weight.num_k % kDepth, words = Packing<DOT>::kInputs;
  if (inside > 0) {
    auto* tail = block.at(last, r);
    for (int64_t i = (inside + words - 1) / words; i < (inside + kMostCodes - 1) / kMostCodes * kMostCodes / words; ++i) tail[i] = 0;
  }
  int64_t group = weight.group ? weight.group : weight.num_k;
  for (int64_t g = 0; weight.zeros.present() && g < weight.num_groups(); ++g) {
    int64_t n = weight.num_k - g * group < group ? weight.num_k - g * group : group;
    vf sum{};
    for_columns(n, [&](int64_t k, int64_t count) { sum += load_some(x + g * group + k, count); });
    block.sums[r * weight.num_groups() + g] = hsum(sum);
  }
}

}  // namespace
}  // namespace fuseline::FL_ISA
