// Kernels for x86-64 CPUs with AVX-512 F, BW, DQ and VL, called only where dispatch.cpp has found them.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define EPMQ_AVX512
#include "table.h"

EPMQ_KERNEL_TABLE(avx512)
#endif
