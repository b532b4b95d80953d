// Losses of several grids on one weight: checks and threads; the arithmetic is in grid_kernel.h.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "../ops.h"
#include "kernels.h"

namespace epmq {

Tensor grid_losses(const Tensor& weight_any, const Tensor& scales, const Tensor& zeros, int64_t bits,
                   int64_t group_size, double power, const std::optional<Tensor>& importance) {
  TORCH_CHECK_VALUE(weight_any.dim() == 2, "weight: expected 2 dimensions, got ", weight_any.dim());
  const int64_t rows = weight_any.size(0), columns = weight_any.size(1);
  TORCH_CHECK_VALUE(group_size == -1 || group_size > 0, "group_size: expected -1 or a positive size, got ", group_size);
  TORCH_CHECK_VALUE(bits >= 1 && bits <= 8, "bits: expected 1 to 8, got ", bits);
  TORCH_CHECK_VALUE(power > 0.0, "power: expected a positive number, got ", power);
  const int64_t size = group_size == -1 ? columns : std::min(group_size, columns);
  const int64_t groups = columns == 0 ? 0 : (columns + size - 1) / size;
  TORCH_CHECK_VALUE(scales.dim() == 3 && scales.size(1) == rows && scales.size(2) == groups, "scales: expected [S, ",
                    rows, ", ", groups, "], got ", scales.sizes());
  TORCH_CHECK_VALUE(zeros.sizes() == scales.sizes(), "zeros: expected ", scales.sizes(), ", got ", zeros.sizes());
  for (const Tensor* tensor : {&weight_any, &scales, &zeros})
    TORCH_CHECK_VALUE(tensor->scalar_type() == at::kFloat, "expected float32, got ", tensor->scalar_type());
  if (importance)
    TORCH_CHECK_VALUE(importance->scalar_type() == at::kFloat && importance->sizes() == at::IntArrayRef({columns}),
                      "importance: expected float32 [", columns, "], got ", importance->scalar_type(), " ",
                      importance->sizes());
  Tensor losses = at::empty(scales.sizes(), scales.options().memory_format(at::MemoryFormat::Contiguous));
  if (losses.numel() == 0) return losses;

  const Tensor weight = weight_any.stride(1) == 1 || columns == 1 ? weight_any : weight_any.contiguous();
  const Tensor grid = scales.contiguous(), origin = zeros.contiguous();
  const Tensor counts = importance ? importance->contiguous() : Tensor();
  GridArgs args{};
  args.weight = weight.const_data_ptr<float>();
  args.weight_stride = weight.stride(0);
  args.scales = grid.const_data_ptr<float>();
  args.zeros = origin.const_data_ptr<float>();
  args.importance = importance ? counts.const_data_ptr<float>() : nullptr;
  args.losses = losses.mutable_data_ptr<float>();
  args.grids = scales.size(0);
  args.rows = rows;
  args.columns = columns;
  args.groups = groups;
  args.group_size = size;
  args.top = static_cast<float>((1 << bits) - 1);
  args.power = static_cast<float>(power);
  const int64_t grain = std::max<int64_t>(1, 32768 / (columns * args.grids));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { kernels().grid_losses(args, begin, end); });
  return losses;
}

}  // namespace epmq
