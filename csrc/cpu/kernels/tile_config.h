// Shapes of the eight tile registers of AMX.
#pragma once
#include "tile.h"

#if defined(__AMX_TILE__)
namespace fuseline::FL_ISA {
namespace {

constexpr int kTile = 16;   // rows, outputs, and words of inputs

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 hold sums of `first` and `second` rows by two panels, 4 and 5 those rows, 6 and 7 the panels, of `words` of
// inputs each.
inline void configure_tiles(int words, int64_t first, int64_t second) {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    bool is_panel = t >= 6, is_second = t == 2 || t == 3 || t == 5;
    config.rows[t] = static_cast<uint8_t>(is_panel ? words : is_second ? second : first);
    config.row_bytes[t] = static_cast<uint16_t>(config.rows[t] == 0 ? 0 : t == 4 || t == 5 ? words * 4 : 64);
  }
  asm volatile("" ::"m"(config) : "memory");   // gcc believes that only the first bytes are read
  _tile_loadconfig(&config);
}

}  // namespace
}  // namespace fuseline::FL_ISA
#endif
