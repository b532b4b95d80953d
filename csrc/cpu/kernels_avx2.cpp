// Kernels for x86-64 CPUs with AVX2, FMA and F16C, called only where dispatch.cpp has found them.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define EPMQ_AVX2
#include "table.h"

EPMQ_KERNEL_TABLE(avx2)
#endif
