// Products of packed columns on matrix tiles.
//
// Products of parts l and r are exact and are formed for l + r <= 2; what is left out is below 2^-23 of the
// whole product: two roundings. fp32 accumulators run over one chunk of rows and are then added to the running sums: no
// more than 144 additions of what an instruction has summed from zero (tiles.h), which is less than kPackDepth.
#pragma once

#include "pair_packing.h"
#include "tiles.h"

namespace {

struct TileStatistics : PairPacking {
  // Products of parts (l, r) with l + r <= 2, each with one operand of the one before, which stays in its tiles; the
  // largest comes last.
  struct Product {
    int l, r;
    bool load_left, load_right;
  };

  static int products_of(int left_parts, int right_parts, Product (&all)[6]) {
    int count = 0, held_l = -1, held_r = -1;
    const auto add = [&](int l, int r) {
      all[count++] = {l, r, l != held_l, r != held_r};
      held_l = l;
      held_r = r;
    };
    for (int l = 0, r = right_parts - 1; l < left_parts && r >= 0; l + r < 2 && l + 1 < left_parts ? l++ : r--)
      if (l + r > 0) add(l, r);
    add(0, 0);
    return count;
  }

  static void product(const epmq::TileProductArgs& a) {
    const TileScope scope(16);
    Product products[6];
    const int count = products_of(a.left_parts, a.right_parts, products);
    const int64_t left_step = a.left_parts * kTileWords, right_step = a.right_parts * kTileWords;
    const int64_t left_tile = a.steps * left_step, right_tile = a.steps * right_step;
    alignas(64) float sums[4 * kTileRows * 16];
    for (int64_t row = a.row_begin; row < a.row_end; row += pair)
      for (int64_t column = a.column_begin; column < a.column_end; column += pair) {
        if (a.triangle && column > row) break;
        const uint16_t* left = a.left + row / 16 * left_tile;
        const uint16_t* right = a.right + column / 16 * right_tile;
        clear_tiles<2>();
        for (int64_t step = 0; step < a.steps; step++, left += left_step, right += right_step)
          for (int i = 0; i < count; i++) {
            const Product& p = products[i];
            if (p.load_left) load_left(left + p.l * kTileWords, left_tile);
            if (p.load_right) load_right(right + p.r * kTileWords, right_tile);
            multiply_loaded();
          }
        store_tiles<2>(sums, 16);
        add(a, row, column, sums);
      }
  }
};

}  // namespace
