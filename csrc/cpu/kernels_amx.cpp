// Kernels for x86-64 CPUs with AMX-BF16 beside AVX-512, called only where dispatch.cpp has found them.
#if defined(__x86_64__)
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define EPMQ_AVX512
#include "tile_matmul.h"
#include "tile_product.h"
#include "tile_statistics.h"
#include "word_table.h"

namespace epmq {

const Kernels& amx_kernels() {
  static const RoundedProduct rounded = {TileProduct::words, TileProduct::pack_left, TileProduct::pack_right,
                                         TileProduct::run};
  static const Kernels table = word_kernels<TileStatistics, TileMatmul>("amx", 3, &rounded);
  return table;
}

}  // namespace epmq
#endif
