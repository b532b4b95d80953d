// Kernels for x86-64 CPUs with AVX512_BF16 beside AVX-512, called only where dispatch.cpp has found them.
#if defined(__x86_64__)
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define EPMQ_AVX512
#include "dot_matmul.h"
#include "dot_statistics.h"

namespace epmq {

// What has no form of its own runs as AVX-512.
const Kernels& avx512bf16_kernels() {
  static const PairStatistics pairs = {1, parts_of, DotStatistics::pack, DotStatistics::product};
  static const WordMatmul words = {DotMatmul::takes,   DotMatmul::shape,   DotMatmul::column_words,
                                   DotMatmul::panel_rows, DotMatmul::scratch, DotMatmul::prepare,
                                   DotMatmul::run};
  static const Kernels table = [] {
    Kernels all = avx512_kernels();
    all.name = "avx512bf16";
    all.pairs = &pairs;
    all.words = &words;
    return all;
  }();
  return table;
}

}  // namespace epmq
#endif
