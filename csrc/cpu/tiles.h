// Matrix tiles (AMX): 16 rows of 64 bytes, and the numbers that they multiply. Only kernels_amx.cpp includes this.
//
// C[n][m] += sum over 16 pairs p of A[n][2p] B[p][2m] + A[n][2p+1] B[p][2m+1], A and B bf16, C fp32. Products are
// exact; even and odd terms are each summed by fused multiply-adds, then added, then added to C, rounded to nearest.
// Denormal operands and results count as zero whatever the rounding mode register says.
#pragma once

#include "bfloat.h"

namespace {

// Accumulators 0..3 ([left][right] = 2 * right + left), left operands 4 and 5, right operands 6 and 7.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // Right operands and accumulators have `width` columns.
  explicit TileConfig(int64_t width) {
    for (int i = 0; i < 8; i++) {
      rows[i] = kTileRows;
      row_bytes[i] = (uint16_t)(i == 4 || i == 5 ? 64 : 4 * width);
    }
  }
};

// The compiler does not know that tile instructions touch memory: nothing may be moved across them.
EPMQ_INLINE void settle() { __asm__ volatile("" ::: "memory"); }

// Holds the tile registers of this thread for a scope.
struct TileScope {
  explicit TileScope(int64_t width) {
    const TileConfig config(width);
    settle();
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// One left operand pair (tiles 4, 5) against Right right operands (tiles 6, 7), `steps` products deep.
// Strides are in bf16 numbers; right operands and accumulators are `width` columns wide and dense.
template <int Right>
EPMQ_INLINE void multiply_tiles(int64_t steps, const uint16_t* left, int64_t left_stride, const uint16_t* right,
                                int64_t right_stride, int64_t width) {
  settle();
  for (int64_t s = 0; s < steps; s++) {
    _tile_loadd(4, left, 64);
    _tile_loadd(6, right, 4 * width);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, left + left_stride, 64);
    _tile_dpbf16ps(1, 5, 6);
    if (Right == 2) {
      _tile_loadd(7, right + right_stride, 4 * width);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    left += kTileWords;
    right += kTilePairs * 2 * width;
  }
}

// The same in pieces, for full tiles: an operand may serve several products.
EPMQ_INLINE void load_left(const uint16_t* left, int64_t stride) {
  _tile_loadd(4, left, 64);
  _tile_loadd(5, left + stride, 64);
}

EPMQ_INLINE void load_right(const uint16_t* right, int64_t stride) {
  _tile_loadd(6, right, 64);
  _tile_loadd(7, right + stride, 64);
}

EPMQ_INLINE void multiply_loaded() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 5, 6);
  _tile_dpbf16ps(2, 4, 7);
  _tile_dpbf16ps(3, 5, 7);
}

template <int Right>
EPMQ_INLINE void clear_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  if (Right == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
}

// Accumulators to [right][left][16][width].
template <int Right>
EPMQ_INLINE void store_tiles(float* out, int64_t width) {
  const int64_t size = kTileRows * width;
  _tile_stored(0, out, 4 * width);
  _tile_stored(1, out + size, 4 * width);
  if (Right == 2) {
    _tile_stored(2, out + 2 * size, 4 * width);
    _tile_stored(3, out + 3 * size, 4 * width);
  }
  settle();
}

}  // namespace
