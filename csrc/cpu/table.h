// The table of one instruction set. Included last by each kernel file.
#pragma once

#include "grid_kernel.h"
#include "matmul_kernel.h"
#include "statistics_kernel.h"
#include "sweep_kernel.h"

#define EPMQ_KERNEL_TABLE(level)                                                                            \
  namespace epmq {                                                                                          \
  const Kernels& level##_kernels() {                                                                        \
    static const Kernels table = {#level,                                                                   \
                                  Vec::lanes,                                                               \
                                  SweepKernel::tile,                                                        \
                                  SweepKernel::B,                                                           \
                                  SweepKernel::run,                                                         \
                                  StatisticsKernel::B,                                                      \
                                  StatisticsKernel::V * Vec::lanes,                                         \
                                  StatisticsKernel::pack,                                                   \
                                  StatisticsKernel::product,                                                \
                                  MatmulKernel::RM,                                                         \
                                  MatmulKernel::panel_rows,                                                 \
                                  MatmulKernel::scratch,                                                    \
                                  MatmulKernel::prepare,                                                    \
                                  MatmulKernel::run,                                                        \
                                  GridKernel::losses,                                                       \
                                  nullptr,                                                                  \
                                  nullptr,                                                                  \
                                  nullptr};                                                                 \
    return table;                                                                                           \
  }                                                                                                         \
  }
