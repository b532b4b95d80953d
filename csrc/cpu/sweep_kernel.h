// GPTQ over one block of columns, rows as vector lanes. Included once per instruction set.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

struct SweepKernel {
  static constexpr int B = Vec::outer_b, V = Vec::outer_v, L = Vec::lanes;
  static constexpr int tile = V * L;
  static constexpr int64_t depth = 160;  // rows of the panel per pass: a tile's deviations stay in the first cache
  static constexpr int64_t width = epmq::kSweepBlock;

  // Everything of one tile that the recursion rewrites: columns x rows.
  struct Block {
    float adjusted[width * tile];
    float weight[width * tile];
    uint8_t codes[width * tile];
  };

  static void read_weight(const epmq::SweepArgs& a, int64_t t, Block& block) {
    const int64_t rows = a.rows - t * tile < tile ? a.rows - t * tile : tile;
    const int64_t columns = a.stop - a.start;
    for (int r = 0; r < tile; r++) {
      const float* source = a.weight + (t * tile + r) * a.weight_stride + a.start;
      for (int64_t j = 0; j < columns; j++) block.weight[j * tile + r] = r < rows ? source[j] : 0.0f;
    }
    memcpy(block.adjusted, block.weight, sizeof(float) * (size_t)(columns * tile));
  }

  // adjusted += deviation of columns [from, to) times their part of the panel.
  static void gather(const epmq::SweepArgs& a, int64_t t, int64_t from, int64_t to, Block& block) {
    const float* deviation = a.deviation + t * a.columns * tile + from * tile;
    const int64_t quads = (a.stop - a.start + B - 1) / B;
    for (int64_t q = 0; q < quads; q++) {
      OuterTile<B, V> sum;
      sum.clear();
      sum.add(to - from, a.panel + q * a.stop * B + from * B, B, deviation, tile, L);
      EPMQ_UNROLL
      for (int b = 0; b < B; b++)
        EPMQ_UNROLL
        for (int v = 0; v < V; v++) {
          float* place = block.adjusted + (q * B + b) * tile + v * L;
          (Vec::load(place) + sum.acc[b][v]).store(place);
        }
    }
  }

  // Columns B at a time: those before them in the block by outer products, their own triangle one by one.
  static void recurse(const epmq::SweepArgs& a, int64_t t, Block& block) {
    float* deviation = a.deviation + t * a.columns * tile + a.start * tile;
    const Vec none = Vec::zero(), top = Vec::broadcast(a.top);
    const int64_t columns = a.stop - a.start;
    for (int64_t first = 0; first < columns; first += B) {
      const float* factor = a.panel + first / B * a.stop * B + a.start * B;  // [i][B], i from the block's start
      const int64_t count = columns - first < B ? columns - first : B;
      OuterTile<B, V> sum;
      EPMQ_UNROLL
      for (int b = 0; b < B; b++)
        EPMQ_UNROLL
        for (int v = 0; v < V; v++) sum.acc[b][v] = Vec::load(block.adjusted + (first + b) * tile + v * L);
      sum.add(first, factor, B, deviation, tile, L);
      EPMQ_UNROLL
      for (int b = 0; b < B; b++) {
        if (b >= count) break;
        const int64_t g = a.group_of[a.start + first + b];
        const int64_t grid = (t * a.groups + g) * tile;
        EPMQ_UNROLL
        for (int v = 0; v < V; v++) {
          const Vec zero = Vec::load(a.zeros + grid + v * L);
          const Vec nearest = (sum.acc[b][v] * Vec::load(a.inverse + grid + v * L)).round_even();
          const Vec code = (nearest + zero).clamp(none, top);
          const Vec kept = (code - zero) * Vec::load(a.scales + grid + v * L);
          const Vec error = Vec::load(block.weight + (first + b) * tile + v * L) - kept;
          code.store_bytes(block.codes + (first + b) * tile + v * L);
          error.store(deviation + (first + b) * tile + v * L);
          EPMQ_UNROLL
          for (int c = 0; c < B; c++)
            if (c > b)
              sum.acc[c][v] = Vec::fma(Vec::broadcast(factor[(first + b) * B + c]), error, sum.acc[c][v]);
        }
      }
    }
  }

  static void write_codes(const epmq::SweepArgs& a, int64_t t, const Block& block) {
    const int64_t rows = a.rows - t * tile < tile ? a.rows - t * tile : tile;
    for (int64_t r = 0; r < rows; r++) {
      uint8_t* out = a.codes + (t * tile + r) * a.columns + a.start;
      for (int64_t j = 0; j < a.stop - a.start; j++) out[j] = block.codes[j * tile + r];
    }
  }

  // Tiles of one task share each slice of the panel while it is in the second cache.
  static void run(const epmq::SweepArgs& a, int64_t tile_begin, int64_t tile_end) {
    alignas(64) static thread_local Block blocks[epmq::kSweepTilesPerTask];
    for (int64_t begin = tile_begin; begin < tile_end; begin += epmq::kSweepTilesPerTask) {
      const int64_t left = tile_end - begin;
      const int64_t count = left < epmq::kSweepTilesPerTask ? left : epmq::kSweepTilesPerTask;
      for (int64_t t = 0; t < count; t++) read_weight(a, begin + t, blocks[t]);
      for (int64_t from = 0; from < a.start; from += depth) {
        const int64_t to = from + depth < a.start ? from + depth : a.start;
        for (int64_t t = 0; t < count; t++) gather(a, begin + t, from, to, blocks[t]);
      }
      for (int64_t t = 0; t < count; t++) {
        recurse(a, begin + t, blocks[t]);
        write_codes(a, begin + t, blocks[t]);
      }
    }
  }
};

}  // namespace
