// What each instruction set offers to the operators: a table of functions over raw pointers.
#pragma once

#include <stdint.h>

namespace epmq {

// ---- GPTQ sweep -------------------------------------------------------------------------------------------------

constexpr int64_t kSweepBlock = 128;  // columns per block
constexpr int64_t kSweepTilesPerTask = 4;

// Rows live in tiles of `tile` = Kernels::sweep_tile rows, a vector lane per row: element (row r, column k) of a
// tiled [N, K] array is at (r / tile) * K * tile + k * tile + r % tile.
struct SweepArgs {
  const float* weight;      // [N, K], row stride weight_stride
  int64_t weight_stride;
  const float* panel;       // unit upper factor, rows 0..stop of columns start..stop: [(stop-start)/B][stop][B]
  const float* scales;      // tiled [N, G]
  const float* inverse;     // tiled [N, G]
  const float* zeros;       // tiled [N, G]
  const int32_t* group_of;  // [K]
  float* deviation;         // tiled [N, K], columns < start are done
  uint8_t* codes;           // [N, K]
  int64_t rows, columns, groups;
  int64_t start, stop;      // this block of columns
  float top;                // largest code
};

// ---- statistics -------------------------------------------------------------------------------------------------

enum class Dtype : int { kFloat, kHalf, kBfloat };

// Where fp32 sums of a batch are added up: in fp32 or, one of the two being null, in fp64.
struct Sum {
  float* narrow;
  double* wide;

  explicit operator bool() const { return narrow != nullptr || wide != nullptr; }
};

// Rows per part of a packed chunk: a rectangle's columns of it fit the first cache. No fp32 sum runs over more of them
// before it is added to another, for what a long one loses of a column that hardly varies passes for its variance.
constexpr int64_t kPackDepth = 160;

// Rows of a batch as fp32 in parts of kPackDepth rows, [part][tile of columns][row][lanes], zero beyond `columns`.
struct PackArgs {
  const void* data;
  Dtype dtype;
  int64_t row_stride, column_stride;  // in elements
  int64_t columns, tiles;
  const int64_t* rows;    // [kept] indices of the rows to take
  const float* weights;   // [kept] or null: also write a weighted copy
  int64_t kept;
  float* plain;           // or null
  float* weighted;        // null without weights
  Sum sum;                // [columns] or null, += (weighted) column sums
};

// One rectangle of the product: out[i, j] += sum_m left[m, i] * right[m, j].
struct ProductArgs {
  const float* left;   // packed
  const float* right;  // packed
  int64_t left_tiles, right_tiles;
  int64_t kept;
  int64_t row_begin, row_end;        // i, multiples of outer_b except the end
  int64_t column_begin;              // j; Kernels::product_columns of them, cut at column_end
  int64_t column_end;
  Sum out;
  int64_t out_stride;
};

// The same with bf16 words: rows in steps of 32 (zero beyond `kept`), columns in tiles of 16 and tiles in pairs,
// [tile][step][part][16][32] bf16 numbers; the layout of one part is in pair_packing.h.
struct TilePackArgs : PackArgs {
  int64_t steps;
  uint16_t* left;      // plain
  uint16_t* right;     // weighted, or null
  int left_parts, right_parts;
  uint8_t* ordinary;   // set to 0 by numbers that are not for bf16 parts
};

struct TileProductArgs {
  const uint16_t* left;
  const uint16_t* right;
  int left_parts, right_parts;
  int64_t steps;
  int64_t row_begin, row_end;        // i, begins at a pair of tiles
  int64_t column_begin, column_end;  // j, begins at a pair of tiles
  bool triangle;                     // only j <= i counts
  Sum out;
  int64_t out_stride;
};

struct PairStatistics {
  int most_parts;       // of an operand that it takes
  int (*parts)(Dtype);  // bf16 parts that hold every number of a type
  void (*pack)(const TilePackArgs&, int64_t tile_begin, int64_t tile_end);
  void (*product)(const TileProductArgs&);
};

// ---- int4 matmul ------------------------------------------------------------------------------------------------

// Codes come in chunks of 32 (16 bytes at four bits) and blocks of `lanes / 4` chunks; within a block, vector j of
// eight and lane (c, i) hold code 32 c + 16 h + 4 i + 2 o + p with j = 4 p + 2 h + o. This is the order in which
// nibbles fall out of byte shuffles, so activations are permuted to it once per call instead of the weights.
struct MatmulArgs {
  const void* x;           // [M, K]
  Dtype x_dtype;
  int64_t x_row_stride, x_column_stride;
  float* prepared;         // fp32: tiles of inner_m rows, [tile][step][rows of the tile][lanes]
  const uint8_t* packed;   // [N, row_bytes]
  int64_t row_bytes;
  const void* scales;      // [N, G]
  Dtype scale_dtype;
  int64_t scale_stride;
  const uint8_t* zeros;    // [N, G] or null
  int64_t zero_stride;
  const float* bias;       // [N] or null
  const uint8_t* tables;   // [256][2][16]: low and high bytes of bf16(q - z) for each z
  float* out;              // fp32 [M, N]
  int64_t m, n, k;
  int64_t groups, group_size;  // group_size = k for the whole row
  int bits;
};

// ---- int4 matmul with bf16 words -----------------------------------------------------------------------------------

constexpr int64_t kWordUnit = 128;  // codes of a row that are decoded together: 64 bytes

// The same product by instructions that multiply bf16 numbers: bf16(q - z) is exact, and so is x as a sum of `parts`
// bf16 numbers. On matrix tiles columns are (row of x, part) pairs, `width` to a tile. Codes lie in the order of
// code_words.h.
struct WordMatmulArgs : MatmulArgs {
  const uint16_t* words;   // [256][32]: bf16(q - z) for each z, twice 16 codes
  uint16_t* columns;       // prepared x: on matrix tiles [tile][step][16 pairs of codes][width][2]
  uint8_t* ordinary;       // [M]: 1 where no product or sum of the row can leave the normal numbers
  void* y;                 // [M, N] in x's type; MatmulArgs::out is not used
  int parts;
  int64_t width, tiles;    // columns per tile, number of tiles
};

struct WordMatmul {
  bool (*takes)(const MatmulArgs&);
  void (*shape)(WordMatmulArgs&);                      // fills parts, width and tiles
  int64_t (*column_words)(const WordMatmulArgs&);      // size of `columns`
  int64_t panel_rows;                                  // weight rows per task
  int64_t (*scratch)(const WordMatmulArgs&);           // bytes per thread
  void (*prepare)(const WordMatmulArgs&, int64_t unit_begin, int64_t unit_end);
  void (*matmul)(const WordMatmulArgs&, int64_t row_begin, int64_t row_end, void* scratch);
};

// ---- products with 16 significant bits, on matrix tiles ------------------------------------------------------------

// out [rows, columns] -= a [rows, depth] * b [depth, columns]; strides in elements, rows of `out` without gaps.
struct SubtractArgs {
  const float* a;
  int64_t a_row_stride, a_column_stride;
  const float* b;
  int64_t b_row_stride, b_column_stride;
  float* out;
  int64_t out_stride;
  int64_t rows, columns, depth;
  uint16_t* left;   // packed -a
  uint16_t* right;  // packed b
};

struct RoundedProduct {
  int64_t (*subtract_words)(const SubtractArgs&, int64_t count);  // size of `left` or `right`, by rows or columns
  void (*pack_left)(const SubtractArgs&, int64_t tile_begin, int64_t tile_end);
  void (*pack_right)(const SubtractArgs&, int64_t tile_begin, int64_t tile_end);
  void (*subtract)(const SubtractArgs&, int64_t pair_begin, int64_t pair_end);  // pairs of row tiles
};

// ---- choice of grids --------------------------------------------------------------------------------------------

struct GridArgs {
  const float* weight;      // [N, K]
  int64_t weight_stride;
  const float* scales;      // [S, N, G]
  const float* zeros;       // [S, N, G]
  const float* importance;  // [K], or null for ones
  float* losses;            // [S, N, G]
  int64_t grids, rows, columns, groups, group_size;
  float top, power;
};

struct Kernels {
  const char* name;
  int lanes;

  int sweep_tile;   // rows per tile
  int sweep_quad;   // columns per step of the in-block recursion (B of the panel)
  void (*sweep_block)(const SweepArgs&, int64_t tile_begin, int64_t tile_end);

  int product_rows;     // granularity of ProductArgs::row_begin
  int product_columns;  // columns per rectangle
  void (*pack)(const PackArgs&, int64_t tile_begin, int64_t tile_end);
  void (*product)(const ProductArgs&);

  int inner_m;        // rows per tile of prepared activations
  int panel_rows;     // weight rows that one task dequantizes together
  int64_t (*matmul_scratch)(const MatmulArgs&);  // floats per thread
  void (*prepare)(const MatmulArgs&, int64_t tile_begin, int64_t tile_end);
  void (*matmul)(const MatmulArgs&, int64_t row_begin, int64_t row_end, float* scratch);

  void (*grid_losses)(const GridArgs&, int64_t row_begin, int64_t row_end);

  // Null without instructions that multiply bf16 numbers.
  const PairStatistics* pairs;
  const WordMatmul* word_matmul;
  const RoundedProduct* rounded;  // null without matrix tiles
};

const Kernels& plain_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512bf16_kernels();
const Kernels& amx_kernels();
#endif

// The table in use: the best that this CPU runs, or the one that EPMQ_CPU names.
const Kernels& kernels();

}  // namespace epmq
