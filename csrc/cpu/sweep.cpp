// GPTQ sweep: lays rows out as vector lanes and walks the blocks of columns; the arithmetic is in sweep_kernel.h.
//
// Work is divided by tiles of rows, and a row's arithmetic does not depend on its tile, so codes are the same for any
// number of threads. The product with the factor is done here rather than by BLAS for the same reason (a BLAS may
// sum differently for another number of rows or threads), and because the deviations already lie as the product
// wants them: no operand is packed but one panel of the factor per block.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "../ops.h"
#include "kernels.h"

namespace epmq {

namespace {

void check(const Tensor& weight, const Tensor& unit_upper, const Tensor& scales, const Tensor& zeros,
           const Tensor& group_of, int64_t bits) {
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight: expected 2 dimensions, got ", weight.dim());
  const int64_t rows = weight.size(0), columns = weight.size(1);
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"weight", weight},
                                     {"unit_upper", unit_upper},
                                     {"scales", scales},
                                     {"zeros", zeros}})
    TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat, name, ": expected float32, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(unit_upper.sizes() == at::IntArrayRef({columns, columns}), "unit_upper: expected [", columns, ", ",
                    columns, "], got ", unit_upper.sizes());
  TORCH_CHECK_VALUE(scales.dim() == 2 && scales.size(0) == rows, "scales: expected [", rows, ", G], got ",
                    scales.sizes());
  TORCH_CHECK_VALUE(zeros.sizes() == scales.sizes(), "zeros: expected ", scales.sizes(), ", got ", zeros.sizes());
  TORCH_CHECK_VALUE(group_of.scalar_type() == at::kInt && group_of.dim() == 1 && group_of.size(0) == columns,
                    "group_of: expected int32 [", columns, "], got ", group_of.scalar_type(), " ", group_of.sizes());
  TORCH_CHECK_VALUE(bits >= 1 && bits <= 8, "bits: expected 1 to 8, got ", bits);
  const int32_t* group = group_of.const_data_ptr<int32_t>();
  for (int64_t j = 0; j < columns; j++)
    TORCH_CHECK_VALUE(group[j] >= 0 && group[j] < scales.size(1), "group_of: column ", j, " is in group ", group[j],
                      ", but scales have ", scales.size(1), " groups");
}

// [N, G] to tiles of rows; rows past the end get the harmless grid 1.
Tensor tiled(const Tensor& source, int64_t tile, bool invert) {
  const int64_t rows = source.size(0), groups = source.size(1);
  const int64_t tiles = (rows + tile - 1) / tile;
  Tensor out = at::empty({tiles, groups, tile}, source.options());
  const float* from = source.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  for (int64_t t = 0; t < tiles; t++)
    for (int64_t g = 0; g < groups; g++)
      for (int64_t r = 0; r < tile; r++) {
        const int64_t row = t * tile + r;
        const float value = row < rows ? from[row * groups + g] : 1.0f;
        *to++ = invert ? 1.0f / value : value;
      }
  return out;
}

// Columns [start, stop) of the factor's rows [0, stop), `quad` columns together: [(stop-start)/quad][stop][quad].
void pack_panel(const float* factor, int64_t stride, int64_t start, int64_t stop, int64_t quad, float* panel) {
  const int64_t quads = (stop - start + quad - 1) / quad;
  at::parallel_for(0, stop, 512, [&](int64_t begin, int64_t end) {
    for (int64_t q = 0; q < quads; q++) {
      const int64_t first = start + q * quad, count = std::min(quad, stop - first);
      for (int64_t i = begin; i < end; i++)
        for (int64_t c = 0; c < quad; c++)
          panel[(q * stop + i) * quad + c] = c < count ? factor[i * stride + first + c] : 0.0f;
    }
  });
}

}  // namespace

Tensor gptq_sweep(const Tensor& weight, const Tensor& unit_upper, const Tensor& scales, const Tensor& zeros,
                  const Tensor& group_of_any, int64_t bits) {
  const Tensor group_of = group_of_any.contiguous();
  check(weight, unit_upper, scales, zeros, group_of, bits);
  const int64_t rows = weight.size(0), columns = weight.size(1);
  Tensor codes = at::empty({rows, columns}, weight.options().dtype(at::kByte));
  if (rows == 0 || columns == 0) return codes;

  const Kernels& kernel = kernels();
  const int64_t tile = kernel.sweep_tile, quad = kernel.sweep_quad;
  const int64_t tiles = (rows + tile - 1) / tile;
  const Tensor source = weight.stride(1) == 1 || columns == 1 ? weight : weight.contiguous();
  const Tensor factor = unit_upper.contiguous();
  const Tensor grid = tiled(scales.contiguous(), tile, false), inverse = tiled(scales.contiguous(), tile, true);
  const Tensor origin = tiled(zeros.contiguous(), tile, false);
  Tensor deviation = at::empty({tiles, columns, tile}, weight.options());
  Tensor panel = at::empty({(kSweepBlock + quad - 1) / quad, columns, quad}, weight.options());

  SweepArgs args{};
  args.weight = source.const_data_ptr<float>();
  args.weight_stride = source.stride(0);
  args.panel = panel.const_data_ptr<float>();
  args.scales = grid.const_data_ptr<float>();
  args.inverse = inverse.const_data_ptr<float>();
  args.zeros = origin.const_data_ptr<float>();
  args.group_of = group_of.const_data_ptr<int32_t>();
  args.deviation = deviation.mutable_data_ptr<float>();
  args.codes = codes.mutable_data_ptr<uint8_t>();
  args.rows = rows;
  args.columns = columns;
  args.groups = scales.size(1);
  args.top = static_cast<float>((1 << bits) - 1);
  for (int64_t start = 0; start < columns; start += kSweepBlock) {
    args.start = start;
    args.stop = std::min(start + kSweepBlock, columns);
    pack_panel(factor.const_data_ptr<float>(), columns, start, args.stop, quad, panel.mutable_data_ptr<float>());
    at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) { kernel.sweep_block(args, begin, end); });
  }
  return codes;
}

}  // namespace epmq
