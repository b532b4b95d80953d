// The dtypes that kernels read, from a tensor's.
#pragma once

#include "../ops.h"
#include "kernels.h"

namespace epmq {

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Dtype::kFloat;
    case at::kHalf: return Dtype::kHalf;
    case at::kBFloat16: return Dtype::kBfloat;
    default: TORCH_CHECK_VALUE(false, name, ": expected float32, float16 or bfloat16, got ", tensor.scalar_type());
  }
}

}  // namespace epmq
