// Kernels for x86-64 CPUs with AVX512_BF16 beside AVX-512, called only where dispatch.cpp has found them.
#if defined(__x86_64__)
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define EPMQ_AVX512
#include "dot_matmul.h"
#include "dot_statistics.h"
#include "word_table.h"

namespace epmq {

const Kernels& avx512bf16_kernels() {
  static const Kernels table = word_kernels<DotStatistics, DotMatmul>("avx512bf16", 1, nullptr);
  return table;
}

}  // namespace epmq
#endif
