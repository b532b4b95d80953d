// Which tiles of output one launch computes: the lower triangle of H, then all of the cross-covariance.
//
// Plain integer arithmetic, shared by the kernel, its launcher and the test (bound as _C.statistics_tiles).
#pragma once

#ifdef __CUDACC__
#define EPMQ_HOST_DEVICE __host__ __device__
#else
#define EPMQ_HOST_DEVICE
#endif

namespace epmq {

struct Tile {
  int row;      // tile row of H or of the cross-covariance
  int column;   // tile column
  bool cross;
};

EPMQ_HOST_DEVICE inline int tiles_of(int size, int tile) { return (size + tile - 1) / tile; }

EPMQ_HOST_DEVICE inline int tile_count(int h_tiles, int cross_tiles) {
  return h_tiles * (h_tiles + 1) / 2 + cross_tiles * h_tiles;
}

// The triangle is numbered row by row: row r starts at r (r + 1) / 2.
EPMQ_HOST_DEVICE inline Tile tile_at(int index, int h_tiles) {
  const int triangle = h_tiles * (h_tiles + 1) / 2;
  if (index >= triangle) {
    const int rest = index - triangle;
    return {rest / h_tiles, rest % h_tiles, true};
  }
  // Bisection: no floating point, the same on host and device, at most 16 steps.
  int low = 0, high = h_tiles - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (middle * (middle + 1) / 2 <= index) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return {low, index - low * (low + 1) / 2, false};
}

}  // namespace epmq
