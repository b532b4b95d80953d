// Kernels for x86-64 CPUs with AMX-BF16 beside AVX-512, called only where dispatch.cpp has found them.
#if defined(__x86_64__)
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define EPMQ_AVX512
#include "tile_matmul.h"
#include "tile_product.h"
#include "tile_statistics.h"

namespace epmq {

// What has no form of its own runs as AVX-512.
const Kernels& amx_kernels() {
  static const PairStatistics pairs = {3, parts_of, TileStatistics::pack, TileStatistics::product};
  static const TileKernels tile = {TileProduct::words, TileProduct::pack_left, TileProduct::pack_right,
                                   TileProduct::run};
  static const WordMatmul words = {TileMatmul::takes,   TileMatmul::shape,   TileMatmul::column_words,
                                   TileMatmul::pair_rows, TileMatmul::scratch, TileMatmul::prepare,
                                   TileMatmul::run};
  static const Kernels table = [] {
    Kernels all = avx512_kernels();
    all.name = "amx";
    all.pairs = &pairs;
    all.words = &words;
    all.tile = &tile;
    return all;
  }();
  return table;
}

}  // namespace epmq
#endif
