// Second and first moments of a batch, added to running sums; the arithmetic is in statistics_kernel.h and, with
// instructions that multiply bf16 numbers, in tile_statistics.h and dot_statistics.h. A chunk with numbers that are not
// for those goes through the vector kernels.
//
// A batch is walked in chunks of rows. Each chunk is read once: converted to fp32, packed into tiles of columns and
// summed. Both operands of every product are then taken from the packed copy, and of the symmetric Hessian only the
// rectangles that reach the lower triangle are computed.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../ops.h"
#include "dtype.h"
#include "kernels.h"
#include "rectangles.h"

namespace epmq {

namespace {

constexpr int64_t kPacked = 1 << 21;  // floats of packed columns per chunk: few chunks, since threads meet after each
constexpr int64_t kTileSteps = 48;    // steps of 32 rows per chunk and bf16 part

// `dtype`: of all sums of a call.
void check_sum(const Tensor& tensor, const char* name, at::IntArrayRef shape, at::ScalarType dtype) {
  TORCH_CHECK_VALUE((dtype == at::kFloat || dtype == at::kDouble) && tensor.scalar_type() == dtype, name,
                    ": expected float32 or float64, as all sums, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, ": expected ", shape, ", got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, ": expected a contiguous tensor, got strides ", tensor.strides());
}

Sum sum_of(const Tensor& tensor) {
  if (tensor.scalar_type() == at::kDouble) return {nullptr, tensor.mutable_data_ptr<double>()};
  return {tensor.mutable_data_ptr<float>(), nullptr};
}

// Rows that count, with their weights; `uniform` when every one of them weighs 1.
struct Rows {
  std::vector<int64_t> index;
  std::vector<float> weight;
  bool uniform = true;
};

Rows rows_of(int64_t count, const std::optional<Tensor>& row_weights) {
  Rows rows;
  if (!row_weights) {
    for (int64_t m = 0; m < count; m++) rows.index.push_back(m);
    return rows;
  }
  const Tensor weights = row_weights->to(at::kFloat).contiguous();
  const float* weight = weights.const_data_ptr<float>();
  for (int64_t m = 0; m < count; m++) {
    if (weight[m] == 0.0f) continue;
    rows.index.push_back(m);
    rows.weight.push_back(weight[m]);
    rows.uniform = rows.uniform && weight[m] == 1.0f;
  }
  return rows;
}

PackArgs pack_args(const Tensor& source, const char* name) {
  PackArgs args{};
  args.data = source.const_data_ptr();
  args.dtype = dtype_of(source, name);
  args.row_stride = source.stride(0);
  args.column_stride = source.stride(1);
  args.columns = source.size(1);
  return args;
}

// One call: what is read, and the running sums that it is added to.
struct Batch {
  PackArgs x, target;       // sources only
  int64_t columns, targets;
  Sum hessian, cross, sum_x, sum_target;
  const Rows& rows;
};

// Rows [begin, begin + size) of a batch for packing.
PackArgs slice(const PackArgs& source, const Batch& batch, int64_t begin, int64_t size, Sum sum) {
  PackArgs args = source;
  args.rows = batch.rows.index.data() + begin;
  args.weights = batch.rows.uniform ? nullptr : batch.rows.weight.data() + begin;
  args.kept = size;
  args.sum = sum;
  return args;
}

void by_vectors(const Kernels& kernel, const Batch& batch, int64_t begin_row, int64_t end_row, bool with_sums) {
  const int64_t lanes = kernel.lanes, width = kernel.product_columns, columns = batch.columns;
  // Padded to whole rectangles: a product reads all of its tiles.
  const int64_t x_tiles = (columns + width - 1) / width * (width / lanes);
  const int64_t target_tiles = (batch.targets + lanes - 1) / lanes;
  const int64_t chunk = std::min(std::max<int64_t>(kPacked / (x_tiles * lanes), kPackDepth), end_row - begin_row);
  const bool uniform = batch.rows.uniform;
  const auto floats = at::TensorOptions(at::kFloat);
  Tensor plain = at::empty({x_tiles * lanes * chunk}, floats);
  Tensor weighted = at::empty({uniform ? 0 : x_tiles * lanes * chunk}, floats);
  Tensor left = at::empty({target_tiles * lanes * chunk}, floats);
  float* plain_data = plain.mutable_data_ptr<float>();
  float* weighted_data = uniform ? nullptr : weighted.mutable_data_ptr<float>();
  float* left_data = left.mutable_data_ptr<float>();
  const std::vector<Rectangle> work = rectangles(columns, true, batch.targets, width, kernel.product_rows);

  for (int64_t begin = begin_row; begin < end_row; begin += chunk) {
    const int64_t size = std::min(chunk, end_row - begin);
    PackArgs pack_x = slice(batch.x, batch, begin, size, with_sums ? batch.sum_x : Sum{});
    pack_x.tiles = x_tiles;
    pack_x.plain = plain_data;
    pack_x.weighted = weighted_data;
    // The weight enters once per product, through x.
    PackArgs pack_target = slice(batch.target, batch, begin, size, with_sums ? batch.sum_target : Sum{});
    pack_target.tiles = target_tiles;
    pack_target.plain = left_data;
    const int64_t grain = std::max<int64_t>(1, 65536 / (size * lanes));
    at::parallel_for(0, x_tiles, grain, [&](int64_t first, int64_t last) { kernel.pack(pack_x, first, last); });
    at::parallel_for(0, target_tiles, grain,
                     [&](int64_t first, int64_t last) { kernel.pack(pack_target, first, last); });
    at::parallel_for(0, static_cast<int64_t>(work.size()), 4, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++) {
        const Rectangle& rectangle = work[i];
        ProductArgs args{};
        args.left = rectangle.cross ? left_data : plain_data;
        args.right = uniform ? plain_data : weighted_data;
        args.left_tiles = rectangle.cross ? target_tiles : x_tiles;
        args.right_tiles = x_tiles;
        args.kept = size;
        args.row_begin = rectangle.row_begin;
        args.row_end = rectangle.row_end;
        args.column_begin = rectangle.column;
        args.column_end = columns;
        args.out = rectangle.cross ? batch.cross : batch.hessian;
        args.out_stride = columns;
        kernel.product(args);
      }
    });
  }
}

// Rectangles of at most `height` x `width` outputs: those that reach the lower triangle, then the full matrix.
std::vector<TileProductArgs> tile_rectangles(const Batch& batch, int64_t height, int64_t width) {
  std::vector<TileProductArgs> all;
  for (const bool cross : {false, true}) {
    const int64_t rows = cross ? batch.targets : batch.columns;
    for (int64_t row = 0; row < rows; row += height) {
      const int64_t end = std::min(row + height, rows);
      for (int64_t column = 0; column < (cross ? batch.columns : end); column += width) {
        TileProductArgs args{};
        args.row_begin = row;
        args.row_end = end;
        args.column_begin = column;
        args.column_end = std::min(column + width, batch.columns);
        args.triangle = !cross;
        args.out = cross ? batch.cross : batch.hessian;
        args.out_stride = batch.columns;
        all.push_back(args);
      }
    }
  }
  return all;
}

// The most bf16 parts that a number of an operand takes; weighted rows of x are fp32.
int parts_in(const PairStatistics& form, const Batch& batch) {
  const int x = form.parts(batch.rows.uniform ? batch.x.dtype : Dtype::kFloat);
  return batch.targets == 0 ? x : std::max(x, form.parts(batch.target.dtype));
}

void by_pairs(const Kernels& kernel, const Batch& batch) {
  constexpr int64_t depth = 32, width = 32, words = 512;  // rows per step, columns per pair of tiles, numbers per tile
  const PairStatistics& form = *kernel.pairs;
  const int64_t kept = static_cast<int64_t>(batch.rows.index.size());
  const int64_t x_tiles = (batch.columns + width - 1) / width * 2;
  const int64_t target_tiles = (batch.targets + width - 1) / width * 2;
  const int x_parts = form.parts(batch.x.dtype), target_parts = form.parts(batch.target.dtype);
  const int right_parts = batch.rows.uniform ? x_parts : form.parts(Dtype::kFloat);
  const int64_t chunk_steps = std::min((kept + depth - 1) / depth, kTileSteps / right_parts);
  const auto halves = at::TensorOptions(at::kBFloat16);
  const auto buffer = [&](int64_t tiles, int parts) {
    return at::empty({tiles * chunk_steps * parts * words}, halves);
  };
  const Tensor left = buffer(x_tiles, x_parts), right = buffer(x_tiles, right_parts);
  const Tensor left_target = buffer(target_tiles, target_parts);
  const auto data = [](const Tensor& tensor) { return static_cast<uint16_t*>(tensor.mutable_data_ptr()); };
  // The right operands of a rectangle stay in the second cache while the left ones pass by.
  const bool small = batch.columns + batch.targets <= 1024;
  const std::vector<TileProductArgs> work = tile_rectangles(batch, small ? 192 : 1024, small ? 96 : 256);

  for (int64_t begin = 0; begin < kept; begin += chunk_steps * depth) {
    const int64_t size = std::min(chunk_steps * depth, kept - begin), steps = (size + depth - 1) / depth;
    uint8_t ordinary = 1;
    TilePackArgs pack_x{slice(batch.x, batch, begin, size, batch.sum_x), steps, data(left), data(right), x_parts,
                        right_parts, &ordinary};
    TilePackArgs pack_target{slice(batch.target, batch, begin, size, batch.sum_target), steps, data(left_target),
                             nullptr, target_parts, 0, &ordinary};
    const int64_t grain = std::max<int64_t>(1, 65536 / (size * 16));
    at::parallel_for(0, x_tiles, grain, [&](int64_t first, int64_t last) { form.pack(pack_x, first, last); });
    at::parallel_for(0, target_tiles, grain,
                     [&](int64_t first, int64_t last) { form.pack(pack_target, first, last); });
    if (!ordinary) {
      by_vectors(kernel, batch, begin, begin + size, false);
      continue;
    }
    // Rectangles differ in size: each thread takes the next one that is left.
    std::atomic<size_t> next{0};
    at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
      for (size_t i = next++; i < work.size(); i = next++) {
        TileProductArgs args = work[i];
        args.left = data(args.triangle ? left : left_target);
        args.left_parts = args.triangle ? x_parts : target_parts;
        args.right = data(right);
        args.right_parts = right_parts;
        args.steps = steps;
        form.product(args);
      }
    });
  }
}

}  // namespace

void accumulate(const Tensor& x, Tensor& hessian, Tensor& sum_x, const std::optional<Tensor>& target,
                const std::optional<Tensor>& cross, const std::optional<Tensor>& sum_target,
                const std::optional<Tensor>& row_weights) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x: expected 2 dimensions, got ", x.dim());
  const int64_t count = x.size(0), columns = x.size(1);
  const at::ScalarType dtype = hessian.scalar_type();
  check_sum(hessian, "hessian", {columns, columns}, dtype);
  check_sum(sum_x, "sum_x", {columns}, dtype);
  const bool crossed = target && cross && sum_target;
  if (crossed)
    TORCH_CHECK_VALUE(target->dim() == 2 && target->size(0) == count, "target: expected [", count, ", P], got ",
                      target->sizes());
  const int64_t targets = crossed ? target->size(1) : 0;
  if (crossed) {
    check_sum(*cross, "cross", {targets, columns}, dtype);
    check_sum(*sum_target, "sum_target", {targets}, dtype);
  }
  if (row_weights)
    TORCH_CHECK_VALUE(row_weights->dim() == 1 && row_weights->size(0) == count, "row_weights: expected [", count,
                      "], got ", row_weights->sizes());

  const Rows rows = rows_of(count, row_weights);
  const int64_t kept = static_cast<int64_t>(rows.index.size());
  if (kept == 0 || columns == 0) return;
  Batch batch{pack_args(x, "x"), {}, columns, targets, sum_of(hessian), {}, sum_of(sum_x), {}, rows};
  if (crossed) {
    batch.target = pack_args(*target, "target");
    batch.cross = sum_of(*cross);
    batch.sum_target = sum_of(*sum_target);
  }
  const Kernels& kernel = kernels();
  const PairStatistics* pairs = kernel.pairs;
  if (pairs != nullptr && parts_in(*pairs, batch) <= pairs->most_parts) return by_pairs(kernel, batch);
  by_vectors(kernel, batch, 0, kept, true);
}

}  // namespace epmq
