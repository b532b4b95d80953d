// The tensor operators. Definitions and shapes: epmq/reference.py, which these are held to.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

namespace epmq {

using at::Tensor;

// x [M, K] fp32|fp16|bf16; hessian [K, K], sum_x [K] fp32; target [M, P], cross [P, K], sum_target [P] or none of the
// three; row_weights [M] or none. In place; only the lower triangle of hessian is defined. Exact to reordering, but where
// bf16 numbers are multiplied (EPMQ_CPU=avx512bf16, amx) a product below 2^-126 may count as zero.
void accumulate(const Tensor& x, Tensor& hessian, Tensor& sum_x, const std::optional<Tensor>& target,
                const std::optional<Tensor>& cross, const std::optional<Tensor>& sum_target,
                const std::optional<Tensor>& row_weights);

// weight [N, K], unit_upper [K, K], scales and zeros [N, G] fp32, group_of int32 [K] -> uint8 codes [N, K].
Tensor gptq_sweep(const Tensor& weight, const Tensor& unit_upper, const Tensor& scales, const Tensor& zeros,
                  const Tensor& group_of, int64_t bits);

// out [N, n] -= a [N, k] b [k, n], fp32; rows of out without gaps. On matrix tiles (EPMQ_CPU=amx) every product of two
// numbers may be off by 3 * 2^-16 of its size.
void subtract_product(Tensor& out, const Tensor& a, const Tensor& b);

// The lower triangle of out [N, N] -= a [N, k] aᵀ, fp32; rows of out without gaps. What becomes of the upper one is not
// defined.
void subtract_gram(Tensor& out, const Tensor& a);

// weight [N, K], scales and zeros [S, N, G], importance [K] or none, fp32 -> losses [S, N, G].
Tensor grid_losses(const Tensor& weight, const Tensor& scales, const Tensor& zeros, int64_t bits, int64_t group_size,
                   double power, const std::optional<Tensor>& importance);

// x [M, K] fp32|fp16|bf16, packed int32 [N, ceil(K bits / 32)], scales [N, G] fp32|fp16|bf16, zeros uint8 [N, G] or
// none, bias [N] or none -> [M, N] in x's dtype.
Tensor dequant_matmul(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& zeros,
                      const std::optional<Tensor>& bias, int64_t bits, int64_t group_size);

// Instruction sets that this CPU runs, best last, and the one in use.
std::vector<std::string> cpu_levels();
std::string cpu_level();
std::string cpu_vendor();  // as the CPU names it, or nothing

}  // namespace epmq
