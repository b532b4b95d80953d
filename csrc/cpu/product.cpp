// out -= a * b: checks and threads. With 16 significant bits on matrix tiles (tile_product.h); in fp32 through the
// packing and the products of the statistics, which compute sums of outer products too.
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <optional>
#include <vector>

#include "../ops.h"
#include "kernels.h"
#include "rectangles.h"

namespace epmq {

namespace {

void check_matrix(const Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.dim() == 2, name, ": expected 2 dimensions, got ", tensor.dim());
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat, name, ": expected float32, got ", tensor.scalar_type());
}

void check_out(const Tensor& out, int64_t rows, int64_t columns) {
  TORCH_CHECK_VALUE(out.sizes() == at::IntArrayRef({rows, columns}), "out: expected [", rows, ", ", columns,
                    "], got ", out.sizes());
  TORCH_CHECK_VALUE(out.stride(1) == 1 || columns <= 1, "out: expected rows without gaps, got strides ",
                    out.strides());
  at::assert_no_internal_overlap(out);
}

// One operand: its columns (rows of a, columns of b) packed depth by depth, `weights` times if there are any.
struct Operand {
  PackArgs args{};
  Tensor plain, weighted;

  Operand(const Tensor& tensor, int depth_axis, int64_t tiles, int64_t lanes, const std::vector<int64_t>& depth,
          bool with_plain, const float* weights) {
    args.data = tensor.const_data_ptr();
    args.dtype = Dtype::kFloat;
    args.row_stride = tensor.stride(depth_axis);
    args.column_stride = tensor.stride(1 - depth_axis);
    args.columns = tensor.size(1 - depth_axis);
    args.tiles = tiles;
    args.rows = depth.data();
    args.kept = static_cast<int64_t>(depth.size());
    args.weights = weights;
    const auto place = [&](Tensor& owner) {
      owner = at::empty({tiles * lanes * args.kept}, at::TensorOptions(at::kFloat));
      return owner.mutable_data_ptr<float>();
    };
    if (with_plain) args.plain = place(plain);
    if (weights) args.weighted = place(weighted);
  }
};

// `lower`: b is aᵀ, and only the rectangles that reach the lower triangle are computed.
void by_vectors(const Kernels& kernel, Tensor& out, const Tensor& a, const Tensor& b, bool lower) {
  const int64_t rows = a.size(0), columns = b.size(1), lanes = kernel.lanes, width = kernel.product_columns;
  std::vector<int64_t> depth(a.size(1));
  std::iota(depth.begin(), depth.end(), 0);
  const std::vector<float> minus(depth.size(), -1.0f);
  const int64_t right_tiles = (columns + width - 1) / width * (width / lanes);
  const int64_t left_tiles = lower ? right_tiles : (rows + lanes - 1) / lanes;
  Operand right(b, 0, right_tiles, lanes, depth, lower, minus.data());
  const int64_t grain = std::max<int64_t>(1, 65536 / (right.args.kept * lanes));
  const auto pack = [&](const PackArgs& args) {
    at::parallel_for(0, args.tiles, grain, [&](int64_t begin, int64_t end) { kernel.pack(args, begin, end); });
  };
  pack(right.args);
  std::optional<Operand> left;
  if (!lower) pack(left.emplace(a, 1, left_tiles, lanes, depth, true, nullptr).args);

  const std::vector<Rectangle> work = rectangles(columns, lower, lower ? 0 : rows, width, kernel.product_rows);
  std::atomic<size_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (size_t i = next++; i < work.size(); i = next++) {
      ProductArgs args{};
      args.left = lower ? right.args.plain : left->args.plain;
      args.right = right.args.weighted;
      args.left_tiles = left_tiles;
      args.right_tiles = right_tiles;
      args.kept = right.args.kept;
      args.row_begin = work[i].row_begin;
      args.row_end = work[i].row_end;
      args.column_begin = work[i].column;
      args.column_end = columns;
      args.out = {out.mutable_data_ptr<float>(), nullptr};
      args.out_stride = out.stride(0);
      kernel.product(args);
    }
  });
}

void by_tiles(const RoundedProduct& rounded, Tensor& out, const Tensor& a, const Tensor& b) {
  SubtractArgs args{};
  args.rows = a.size(0);
  args.depth = a.size(1);
  args.columns = b.size(1);
  args.a = a.const_data_ptr<float>();
  args.a_row_stride = a.stride(0);
  args.a_column_stride = a.stride(1);
  args.b = b.const_data_ptr<float>();
  args.b_row_stride = b.stride(0);
  args.b_column_stride = b.stride(1);
  args.out = out.mutable_data_ptr<float>();
  args.out_stride = out.stride(0);
  const auto words = at::TensorOptions(at::kBFloat16);
  const Tensor left = at::empty({rounded.subtract_words(args, args.rows)}, words);
  const Tensor right = at::empty({rounded.subtract_words(args, args.columns)}, words);
  args.left = static_cast<uint16_t*>(left.mutable_data_ptr());
  args.right = static_cast<uint16_t*>(right.mutable_data_ptr());
  const auto pairs = [](int64_t count) { return (count + 31) / 32; };  // of tiles of 16 rows or columns
  at::parallel_for(0, 2 * pairs(args.rows), 4,
                   [&](int64_t begin, int64_t end) { rounded.pack_left(args, begin, end); });
  at::parallel_for(0, 2 * pairs(args.columns), 4,
                   [&](int64_t begin, int64_t end) { rounded.pack_right(args, begin, end); });
  at::parallel_for(0, pairs(args.rows), 1, [&](int64_t begin, int64_t end) { rounded.subtract(args, begin, end); });
}

}  // namespace

void subtract_product(Tensor& out, const Tensor& a, const Tensor& b) {
  check_matrix(out, "out");
  check_matrix(a, "a");
  check_matrix(b, "b");
  TORCH_CHECK_VALUE(b.size(0) == a.size(1), "b: expected [", a.size(1), ", n], got ", b.sizes());
  check_out(out, a.size(0), b.size(1));
  if (out.numel() == 0 || a.size(1) == 0) return;
  const Kernels& kernel = kernels();
  if (kernel.rounded != nullptr) return by_tiles(*kernel.rounded, out, a, b);
  by_vectors(kernel, out, a, b, false);
}

void subtract_gram(Tensor& out, const Tensor& a) {
  check_matrix(out, "out");
  check_matrix(a, "a");
  check_out(out, a.size(0), a.size(0));
  if (a.numel() != 0) by_vectors(kernels(), out, a, a.t(), true);
}

}  // namespace epmq
