// out -= a * b with 16 significant bits: checks and threads; the arithmetic is in tile_product.h.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "../ops.h"
#include "kernels.h"

namespace epmq {

void subtract_product(Tensor& out, const Tensor& a, const Tensor& b) {
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"out", out}, {"a", a}, {"b", b}}) {
    TORCH_CHECK_VALUE(tensor.dim() == 2, name, ": expected 2 dimensions, got ", tensor.dim());
    TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat, name, ": expected float32, got ", tensor.scalar_type());
  }
  SubtractArgs args{};
  args.rows = a.size(0);
  args.depth = a.size(1);
  args.columns = b.size(1);
  TORCH_CHECK_VALUE(b.size(0) == args.depth, "b: expected [", args.depth, ", n], got ", b.sizes());
  TORCH_CHECK_VALUE(out.sizes() == at::IntArrayRef({args.rows, args.columns}), "out: expected [", args.rows, ", ",
                    args.columns, "], got ", out.sizes());
  TORCH_CHECK_VALUE(out.stride(1) == 1 || args.columns <= 1, "out: expected rows without gaps, got strides ",
                    out.strides());
  if (out.numel() == 0 || args.depth == 0) return;
  const Kernels& kernel = kernels();
  if (kernel.tile == nullptr) {
    out.addmm_(a, b, 1, -1);
    return;
  }
  args.a = a.const_data_ptr<float>();
  args.a_row_stride = a.stride(0);
  args.a_column_stride = a.stride(1);
  args.b = b.const_data_ptr<float>();
  args.b_row_stride = b.stride(0);
  args.b_column_stride = b.stride(1);
  args.out = out.mutable_data_ptr<float>();
  args.out_stride = out.stride(0);
  const TileKernels& tile = *kernel.tile;
  const auto words = at::TensorOptions(at::kBFloat16);
  const Tensor left = at::empty({tile.subtract_words(args, args.rows)}, words);
  const Tensor right = at::empty({tile.subtract_words(args, args.columns)}, words);
  args.left = static_cast<uint16_t*>(left.mutable_data_ptr());
  args.right = static_cast<uint16_t*>(right.mutable_data_ptr());
  const auto pairs = [](int64_t count) { return (count + 31) / 32; };  // of tiles of 16 rows or columns
  at::parallel_for(0, 2 * pairs(args.rows), 4, [&](int64_t begin, int64_t end) { tile.pack_left(args, begin, end); });
  at::parallel_for(0, 2 * pairs(args.columns), 4,
                   [&](int64_t begin, int64_t end) { tile.pack_right(args, begin, end); });
  at::parallel_for(0, pairs(args.rows), 1, [&](int64_t begin, int64_t end) { tile.subtract(args, begin, end); });
}

}  // namespace epmq
