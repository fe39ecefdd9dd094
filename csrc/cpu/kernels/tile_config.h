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

inline void load_config(const TileConfig& config) {
  asm volatile("" ::"m"(config) : "memory");   // gcc believes that only the first bytes are read
  _tile_loadconfig(&config);
}

}  // namespace
}  // namespace fuseline::FL_ISA
#endif
