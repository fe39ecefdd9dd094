// Codes of a byte each, from the bits of a checkpoint and to the words of panels (codes.h).
#include "cpu/parallel.h"
#include "tile.h"

namespace fuseline::FL_ISA {
namespace {

constexpr int64_t kPart = 256;   // codes of a row at a time: those of 16 rows stay in the first cache

// Values of BITS bits in a byte, the lowest first, as bytes of a Word.
template <int BITS, class Word>
void unpack_bytes(const uint8_t* packed, int64_t num, uint8_t* codes) {
  constexpr int kValues = 8 / BITS;
  constexpr Word kMask = static_cast<Word>(~Word{0}) / 255 * ((1 << BITS) - 1);
  for (int64_t i = 0; i < num; ++i) {
    Word spread = packed[i];
    for (int j = 1; j < kValues; ++j) spread |= static_cast<Word>(packed[i]) << (j * (8 - BITS));
    spread &= kMask;
    __builtin_memcpy(codes + i * kValues, &spread, sizeof spread);
  }
}

// Values of runs of bytes: of each the lowest of all of them, then those above, ...
template <int BITS>
FL_INLINE void unpack_runs(const uint8_t* packed, int64_t num, int64_t run, uint8_t* codes) {
  for (int64_t first = 0; first < num; first += run)
    for (int j = 0; j < 8 / BITS; ++j)
      for (int64_t i = 0; i < run; ++i)
        codes[first * (8 / BITS) + j * run + i] = (packed[first + i] >> (j * BITS)) & ((1 << BITS) - 1);
}

template <int BITS, class Word>
void unpack_row(const uint8_t* packed, int64_t num, int64_t run, uint8_t* codes) {
  if (run == 1) return unpack_bytes<BITS, Word>(packed, num, codes);
  if (run % 16) return unpack_runs<BITS>(packed, num, run, codes);
  if (run == 16) return unpack_runs<BITS>(packed, num, 16, codes);   // vectors of a known number
  unpack_runs<BITS>(packed, num, run / 16 * 16, codes);
}

// Eight codes of 4 bits as a word: k = 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on.
inline uint64_t nibbles_of(uint64_t codes) {
  uint64_t pairs = codes & 0x000f000f000f000full, others = codes >> 8 & 0x000f000f000f000full;
  pairs = (pairs | pairs >> 12) & 0x000000ff000000ffull;
  others = (others | others >> 12) & 0x000000ff000000ffull;
  return ((pairs | pairs >> 24) & 0xffff) | (others | others >> 24) << 16;
}

inline uint64_t eight_codes(const uint8_t* codes) {
  uint64_t some;
  __builtin_memcpy(&some, codes, sizeof some);
  return some;
}

// Two bytes, one apart.
inline uint32_t spread(uint64_t bytes) {
  return static_cast<uint32_t>((bytes & 0xff) | (bytes & 0xff00) << 8);
}

// Words of codes of 5 bits (codes.h: Fives).
inline void fives_of(const uint8_t* codes, int64_t num_units, uint32_t* words) {
  for (int64_t i = 0; i < num_units; ++i, words += 5) {
    uint32_t high = 0;
    for (int w = 0; w < 4; ++w, codes += 8) {
      uint64_t some = eight_codes(codes), upper = some >> 4 & 0x0101010101010101ull;
      words[w] = static_cast<uint32_t>(nibbles_of(some));
      high |= (spread(upper) | spread(upper >> 32) << 8) << (2 * w);
      high |= (spread(upper >> 16) | spread(upper >> 48) << 8) << (2 * w + 1);
    }
    words[4] = high;
  }
}

// How codes of so many bits lie: so many in so many words. The first divides kPart.
struct Units {
  int64_t codes, words;
};
inline Units units_of(int64_t bits) {
  return bits == 8 ? Units{4, 1} : bits == 4 ? Units{8, 1} : Units{32, 5};
}

inline void to_words(const uint8_t* codes, int64_t num_units, int64_t bits, uint32_t* words) {
  if (bits == 8) __builtin_memcpy(words, codes, num_units * 4);
  for (int64_t i = 0; bits == 4 && i < num_units; ++i) words[i] = static_cast<uint32_t>(nibbles_of(eight_codes(codes + 8 * i)));
  if (bits == 5) fives_of(codes, num_units, words);
}

// Numbers [n - lo][w] of rows [lo, hi) of a panel as lanes [w][n % 16].
template <class T, class Row>
inline void put_lanes(T* panel, int64_t lo, int64_t hi, int64_t num, const Row& row) {
  const T* rows[kPanel];
  for (int64_t n = lo; n < hi; ++n) rows[n - lo] = row(n);
  T* lanes = panel + lo % kPanel;
  if (hi - lo == kPanel) {
    for (int64_t w = 0; w < num; ++w)
      for (int n = 0; n < kPanel; ++n) lanes[w * kPanel + n] = rows[n][w];
    return;
  }
  for (int64_t w = 0; w < num; ++w)
    for (int64_t n = 0; n < hi - lo; ++n) lanes[w * kPanel + n] = rows[n][w];
}

// Output rows [lo, hi) of one panel; row 0 of the codes is output row `first`.
void pack_panel(const Tensor& panels, const Tensor& codes, int64_t first, int64_t lo, int64_t hi, int64_t bits) {
  int64_t num_k = codes.sizes[1], num_words = panels.sizes[1];
  Units unit = units_of(bits);
  auto* panel = static_cast<uint32_t*>(panels.data) + lo / kPanel * kPanel * num_words;
  alignas(64) uint8_t some[kPart];
  alignas(64) uint32_t words[kPanel][kPart / 4];
  for (int64_t k0 = 0; k0 < num_k; k0 += kPart) {
    int64_t num = num_k - k0 < kPart ? num_k - k0 : kPart, num_units = (num + unit.codes - 1) / unit.codes;
    int64_t whole = num_units * unit.codes, w0 = k0 / unit.codes * unit.words;
    for (int64_t n = lo; n < hi; ++n) {
      const uint8_t* row = static_cast<const uint8_t*>(codes.data) + (n - first) * codes.strides[0] + k0;
      if (num < whole) {
        for (int64_t k = num; k < whole; ++k) some[k] = 0;
        __builtin_memcpy(some, row, num);
        row = some;
      }
      to_words(row, num_units, bits, words[n % kPanel]);
    }
    int64_t count = num_units * unit.words;
    put_lanes(panel + w0 * kPanel, lo, hi, count < num_words - w0 ? count : num_words - w0, [&](int64_t n) { return words[n % kPanel]; });
  }
}

}  // namespace

// t: codes!, packed; i: bits (1, 2 or 4), run. In each run of bytes of a row, the lowest bits of all of them come first.
void unpack_codes(const Tensor* t, const int64_t* i, const double*) {
  const Tensor &codes = t[0], &packed = t[1];
  for (int64_t r = 0; r < packed.sizes[0]; ++r) {
    const uint8_t* from = static_cast<const uint8_t*>(packed.data) + r * packed.strides[0];
    uint8_t* to = static_cast<uint8_t*>(codes.data) + r * codes.strides[0];
    if (i[0] == 4) unpack_row<4, uint16_t>(from, packed.sizes[1], i[1], to);
    else if (i[0] == 2) unpack_row<2, uint32_t>(from, packed.sizes[1], i[1], to);
    else unpack_row<1, uint64_t>(from, packed.sizes[1], i[1], to);
  }
}

// t: panels!, codes; i: row_offset, bits (4, 5 or 8). Row n of the codes, whose columns are contiguous, becomes lane
// (row_offset + n) % 16 of panel (row_offset + n) / 16; other lanes are not written.
void pack_codes(const Tensor* t, const int64_t* i, const double*) {
  int64_t first = i[0], end = first + t[1].sizes[0], p0 = first / kPanel, p1 = (end + kPanel - 1) / kPanel;
  parallel(p1 - p0, [&](int64_t chunk) {
    int64_t lo = (p0 + chunk) * kPanel, hi = lo + kPanel;
    pack_panel(t[0], t[1], first, lo > first ? lo : first, hi < end ? hi : end, i[1]);
  });
}

// t: panels!, rows of bytes; i: row_offset. Numbers of the size that panels [P][X][16 * size] have become lanes.
void pack_lanes(const Tensor* t, const int64_t* i, const double*) {
  const Tensor &panels = t[0], &rows = t[1];
  int64_t first = i[0], end = first + rows.sizes[0], p0 = first / kPanel, p1 = (end + kPanel - 1) / kPanel;
  int64_t size = panels.sizes[2] / kPanel, num = panels.sizes[1];
  parallel(p1 - p0, [&](int64_t chunk) {
    int64_t lo = (p0 + chunk) * kPanel, hi = lo + kPanel;
    lo = lo > first ? lo : first;
    hi = hi < end ? hi : end;
    auto put = [&](auto number) {
      using T = decltype(number);
      T* panel = reinterpret_cast<T*>(static_cast<uint8_t*>(panels.data) + lo / kPanel * panels.strides[0]);
      put_lanes(panel, lo, hi, num, [&](int64_t n) {
        return reinterpret_cast<const T*>(static_cast<const uint8_t*>(rows.data) + (n - first) * rows.strides[0]);
      });
    };
    size == 4 ? put(uint32_t{}) : put(uint16_t{});
  });
}

}  // namespace fuseline::FL_ISA
