// out[M, N] = x[M, K] @ weight^T + bias, with a weight of codes: groups of inputs share a scale and a zero (codes.h).
//
// weight[n][k] = (value(code) - zero) * scale. The values of a group are multiplied and summed in one fp32 chain over
// ascending k; a group's sum, less zero * (sum of x), is scaled and added to those before it. So one order holds for
// any number of rows: few rows read the codes in place, more rows decode a block of panels once.
#include "chunks.h"
#include "codes.h"

namespace fuseline::FL_ISA {
namespace {

constexpr int64_t kFewRows = kTileRows;          // rows for which codes are read in place
constexpr int64_t kBlockRows = 16 * kTileRows;   // rows that share a decoded block

struct LinearCodes {
  const Tensor &out, &x, &codes, &scales, &zeros, &order, &bias;
  int64_t num_k, num_out, group;
  int64_t num_panels() const { return codes.sizes[0]; }
  int64_t panel_words() const { return codes.sizes[1] * kPanel; }
  int64_t num_groups() const { return scales.sizes[1]; }
  const uint32_t* words(int64_t panel) const {
    return static_cast<const uint32_t*>(codes.data) + panel * panel_words();
  }
};

// kLanes scales or zeros of a group.
FL_INLINE vf of_group(const Tensor& t, int64_t panel, int64_t group, int v) {
  int64_t at = (panel * t.sizes[1] + group) * kPanel + v * kLanes;
  if (t.dtype == DType::bf16) return load(static_cast<const bf16*>(t.data) + at);
  if (t.dtype == DType::f16) return load(static_cast<const f16*>(t.data) + at);
  return load(static_cast<const float*>(t.data) + at);
}

// How rows are packed: as fp32, or on the dot path as words of two bf16. Absent inputs up to a multiple of 8 are 0.
template <bool DOT>
struct Packing {
  using A = float;
  static constexpr int kRow = kPackedRow, kInputs = 1;
  static int64_t step(int64_t rows) { return packed_step(rows); }
  static void pack(const float* x, int64_t num_k, float* packed, int64_t rows, int64_t r) {
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

// A block of rows: packed, and sums of x [rows][G] by group where the weight has zeros.
template <bool DOT>
struct Block {
  using A = typename Packing<DOT>::A;
  int64_t rows;
  A* packed;
  float* sums;
  const A* at(int64_t depth_block, int64_t r) const {
    return packed + depth_block * Packing<DOT>::step(rows) + r * Packing<DOT>::kRow;
  }
};

// Adds groups of one depth block, inputs [k0, k0 + num_k), to c[ROWS][PANELS * 16]. Without groups, c is the chain
// itself until the last block.
template <int ROWS, int PANELS, bool DOT, class Source>
FL_INLINE void codes_tile(const LinearCodes& job, const Block<DOT>& block, int64_t r0, const Source& b, int p0,
                          int64_t panel, int64_t k0, int num_k, float* c, int64_t ldc) {
  constexpr int kVecs = PANELS * kPanelVecs, kRow = Packing<DOT>::kRow, kInputs = Packing<DOT>::kInputs;
  const auto* a = block.at(k0 / kDepth, r0);
  const uint32_t* panels[PANELS];
  for (int p = 0; p < PANELS; ++p) panels[p] = b.at(p0 + p);
  bool is_whole = job.group == 0, is_last = k0 + num_k >= job.num_k;
  int length = is_whole ? num_k : static_cast<int>(job.group);
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
        for (int v = 0; v < kVecs; ++v) y[v] = b.operand(words[v], j);
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
    int64_t group = is_whole ? 0 : (k0 + first) / job.group;
    bool is_first = is_whole || k0 + first == 0;
    for (int p = 0; p < PANELS; ++p)
      for (int v = 0; v < kPanelVecs; ++v) {
        vf scale = of_group(job.scales, panel + p, group, v) * set1(b.unit()), zero{};
        bool has_zeros = job.zeros.present();
        if (has_zeros) zero = of_group(job.zeros, panel + p, group, v) * set1(1.0f / b.unit());
        for (int r = 0; r < ROWS; ++r) {
          vf sum = acc[r][p * kPanelVecs + v];
          if (has_zeros) sum = fma(set1(-block.sums[(r0 + r) * job.num_groups() + group]), zero, sum);
          float* to = c + r * ldc + p * kPanel + v * kLanes;
          store(to, fma(scale, sum, is_first ? vf{} : load(to)));
        }
      }
  }
}

// Panels side by side, each with an operand and ROWS sums in registers.
constexpr int codes_panels(int rows) {
  if (kLanes == 16) return rows <= 2 ? 4 : 2;
  return kLanes == 8 && rows <= 2 ? 2 : 1;
}

template <int ROWS, bool DOT, class Source>
[[gnu::noinline]] void codes_strip(const LinearCodes& job, const Block<DOT>& block, int64_t r0, const Source& b,
                                   int num_panels, int64_t panel, int64_t k0, int num_k, float* c, int64_t ldc) {
  constexpr int kSide = codes_panels(ROWS);
  int p = 0;
  for (; p + kSide <= num_panels; p += kSide)
    codes_tile<ROWS, kSide>(job, block, r0, b, p, panel + p, k0, num_k, c + p * kPanel, ldc);
  for (; p < num_panels; ++p) codes_tile<ROWS, 1>(job, block, r0, b, p, panel + p, k0, num_k, c + p * kPanel, ldc);
}

template <int ROWS, bool DOT, class Source>
FL_INLINE void codes_rows(int rows, const LinearCodes& job, const Block<DOT>& block, int64_t r0, const Source& b,
                          int num_panels, int64_t panel, int64_t k0, int num_k, float* c, int64_t ldc) {
  if (rows == ROWS) return codes_strip<ROWS>(job, block, r0, b, num_panels, panel, k0, num_k, c, ldc);
  if constexpr (ROWS > 1) codes_rows<ROWS - 1>(rows, job, block, r0, b, num_panels, panel, k0, num_k, c, ldc);
}

// c[rows][ldc] of panels from `panel` on. `wide` has room for kMaxPanels decoded panels.
template <bool DOT, class Kind>
void multiply_panels(const LinearCodes& job, const Kind& kind, const Block<DOT>& block, int64_t panel, int num_panels,
                     float* wide, float* c, int64_t ldc) {
  constexpr int kCodes = Kind::kCodes;
  auto depth = [&](int64_t k0) {
    int64_t left = job.num_k - k0;
    return static_cast<int>(left < kDepth ? (left + kCodes - 1) / kCodes * kCodes : kDepth);
  };
  if (block.rows <= kFewRows) {
    for (int p = 0; p < num_panels; p += codes_panels(1))
      for (int64_t k0 = 0; k0 < job.num_k; k0 += kDepth) {
        int width = num_panels - p < codes_panels(1) ? num_panels - p : codes_panels(1);
        InPlace<Kind, DOT> source{kind, job.words(panel + p) + k0 / kCodes * kPanel, job.panel_words(),
                                  codes_panels(1) * job.panel_words()};
        codes_rows<kFewRows>(static_cast<int>(block.rows), job, block, 0, source, width, panel + p, k0, depth(k0),
                             c + p * kPanel, ldc);
      }
    return;
  }
  auto* decoded = reinterpret_cast<uint32_t*>(wide);
  constexpr int64_t kDecoded = kDepth / Packing<DOT>::kInputs * kPanel;
  int64_t num_tiles = (block.rows + kTileRows - 1) / kTileRows;
  for (int64_t k0 = 0; k0 < job.num_k; k0 += kDepth) {
    for (int p = 0; p < num_panels; ++p)
      decode_panel<DOT>(kind, job.words(panel + p) + k0 / kCodes * kPanel, depth(k0), decoded + p * kDecoded);
    Decoded<DOT> source{decoded, kDecoded, Kind::kUnit};
    for (int64_t t = 0; t < num_tiles; ++t) {
      int64_t r = block.rows * t / num_tiles, rows = block.rows * (t + 1) / num_tiles - r;
      codes_rows<kTileRows>(static_cast<int>(rows), job, block, r, source, num_panels, panel, k0, depth(k0),
                            c + r * ldc, ldc);
    }
  }
}

// Packs a row of x, its inputs in the weight's order, and sums its groups.
template <bool DOT, class T>
void pack_codes_row(const LinearCodes& job, const Block<DOT>& block, int64_t row, int64_t r) {
  const T* x = static_cast<const T*>(job.x.data) + row_offset(job.x, row);
  if (job.order.present()) {
    T* ordered = reinterpret_cast<T*>(chunk_floats(job.num_k));
    for (int64_t k = 0; k < job.num_k; ++k) ordered[k] = x[index_at(job.order, k)];
    x = ordered;
  }
  if constexpr (DOT) {
    pack_dot_row(x, job.num_k, block.packed, block.rows, r);
  } else {
    pack_row(x, job.num_k, block.packed, block.rows, r);
  }
  int64_t last = job.num_k / kDepth, inside = job.num_k % kDepth, words = Packing<DOT>::kInputs;
  if (inside > 0) {
    auto* tail = const_cast<typename Packing<DOT>::A*>(block.at(last, r));
    for (int64_t i = (inside + words - 1) / words; i < (inside + 7) / 8 * 8 / words; ++i) tail[i] = 0;
  }
  int64_t group = job.group ? job.group : job.num_k;
  for (int64_t g = 0; job.zeros.present() && g < job.num_groups(); ++g) {
    int64_t n = job.num_k - g * group < group ? job.num_k - g * group : group;
    vf sum{};
    for_columns(n, [&](int64_t k, int64_t count) { sum += load_some(x + g * group + k, count); });
    block.sums[r * job.num_groups() + g] = hsum(sum);
  }
}

template <bool DOT, class Kind>
void multiply_codes(const LinearCodes& job, const Kind& kind) {
  int64_t all = num_rows(job.x), num_blocks = (all + kBlockRows - 1) / kBlockRows, total = job.num_panels();
  for (int64_t i = 0; i < num_blocks; ++i) {
    int64_t row0 = all * i / num_blocks, rows = all * (i + 1) / num_blocks - row0;
    int64_t size = (job.num_k + kDepth - 1) / kDepth * Packing<DOT>::step(rows);
    float* space = caller_floats(size + rows * job.num_groups());
    Block<DOT> block{rows, reinterpret_cast<typename Packing<DOT>::A*>(space), space + size};
    with_float(job.x.dtype, [&](auto t) {
      if constexpr (!DOT || __is_same(decltype(t), bf16))
        pack_rows(rows, [&](int64_t r) { pack_codes_row<DOT, decltype(t)>(job, block, row0 + r, r); });
    });
    int64_t width = chunk_width(total, job.panel_words() * 4, rows);
    if (rows > kFewRows && width > kMaxPanels) width = kMaxPanels;
    parallel((total + width - 1) / width, [&](int64_t chunk) {
      int64_t p0 = chunk * width, panels = total - p0 < width ? total - p0 : width, ldc = panels * kPanel;
      float* wide = chunk_floats(kWideSize + (rows + 1) * ldc);
      float* bias = wide + kWideSize;
      float* c = bias + ldc;
      multiply_panels<DOT>(job, kind, block, p0, static_cast<int>(panels), wide, c, ldc);
      store_sums(job.out, job.bias, row0, rows, p0 * kPanel, ldc, c, bias);
    });
  }
}

template <class Kind>
void multiply_kind(const LinearCodes& job, const Kind& kind) {
  if constexpr (kHasDot)
    if (job.x.dtype == DType::bf16) return multiply_codes<true>(job, kind);
  multiply_codes<false>(job, kind);
}

}  // namespace

// t: out!, x, codes, scales, zeros?, order?, bias?; i: num_out, group, kind.
void linear_codes(const Tensor* t, const int64_t* i, const double*) {
  LinearCodes job{t[0], t[1], t[2], t[3], t[4], t[5], t[6], last_size(t[1]), i[0], i[1]};
  with_kind(i[2], job.x.dtype, [&](const auto& kind) { multiply_kind(job, kind); });
}

}  // namespace fuseline::FL_ISA
