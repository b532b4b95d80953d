// Second and first moments of a batch on the GPU: the lower triangle of H and all of the cross-covariance in one launch.
//
// One block computes one 128 x 128 tile of output over the rows of a launch and alone adds it to the running sum, so the
// result does not depend on scheduling. fp16 and bf16 rows go through the tensor cores with fp32 accumulators; fp32 rows,
// and weighted ones (a product with a weight does not fit 16 bits), through fp32 multiply-adds. Column sums are taken
// from the shared-memory tiles by the blocks that hold the columns anyway.
//
// fp32 sums stay short (epmq/statistics.py says for what): a launch takes up to 2048 rows on tensor cores, which add up
// to 16 at a time and cut off instead of rounding (of fp16 rows most, on sm_80), and 1024 otherwise; a column's sum is one
// of sums of sums.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "tiles.h"

namespace epmq {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kTile = 128;     // output rows and columns per block
constexpr int64_t kRowsOnTensorCores = 2048, kRowsElsewhere = 1024;  // per launch
constexpr int kThreads = 256;  // 8 warps: 4 x 2 of 32 x 64 outputs

struct Operand {
  const void* data;
  int64_t row_stride, column_stride;
  int columns;
  bool vector;  // eight neighbouring elements can be read as 16 bytes
};

struct Arguments {
  Operand x, target;
  const float* weights;  // [rows] or null
  int64_t rows;
  float *hessian, *cross;      // [K, K], [P, K]
  float *sum_x, *sum_target;   // [K], [P]
  int h_tiles;
};

// By name: extensions of torch are compiled without the implicit conversions of 16-bit floats.
__device__ float to_float(float value) { return value; }
__device__ float to_float(__half value) { return __half2float(value); }
__device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Depth x 128 elements of `operand` from row m and column c, zero outside; rows of weight 0 are zero whatever they hold.
template <typename T, int Depth>
__device__ void load_tile(const Operand& operand, const float* weights, int64_t rows, int64_t m, int c, T* tile, int ld) {
  constexpr int kWide = 16 / sizeof(T);
  for (int i = threadIdx.x; i < Depth * kTile / kWide; i += kThreads) {
    const int row = i / (kTile / kWide), column = i % (kTile / kWide) * kWide;
    const int64_t from = m + row;
    const bool there = from < rows && (weights == nullptr || weights[from] != 0.0f);
    alignas(16) T values[kWide];
    const T* source = static_cast<const T*>(operand.data) + from * operand.row_stride;
    if (there && operand.vector && c + column + kWide <= operand.columns) {
      *reinterpret_cast<int4*>(values) = *reinterpret_cast<const int4*>(source + c + column);
    } else {
      for (int e = 0; e < kWide; e++)
        values[e] = there && c + column + e < operand.columns ? source[(c + column + e) * operand.column_stride] : T{};
    }
    *reinterpret_cast<int4*>(tile + row * ld + column) = *reinterpret_cast<int4*>(values);
  }
}

// Adds the tile's column sums of the rows in shared memory to this thread's column.
template <typename T, int Depth>
__device__ float column_sum(const T* tile, int ld, const float* weights, int64_t rows, int64_t m) {
  float sum = 0.0f;
  for (int row = 0; row < Depth; row++) {
    const float weight = weights != nullptr && m + row < rows ? weights[m + row] : 1.0f;
    sum += weight * to_float(tile[row * ld + threadIdx.x]);
  }
  return sum;
}

// A sum of tiles' column sums, 16 of them at a time.
struct LongSum {
  float whole = 0.0f, part = 0.0f;
  int parts = 0;

  __device__ void add(float value) {
    part += value;
    if (++parts % 16 == 0) close();
  }
  __device__ float total() {
    close();
    return whole;
  }
  __device__ void close() {
    whole += part;
    part = 0.0f;
  }
};

// Which column sums a tile owes: x by the diagonal of H, target by the first column of the cross-covariance.
__device__ bool owes_sum(const Tile& tile) { return tile.cross ? tile.column == 0 : tile.row == tile.column; }

__device__ void add_sum(const Arguments& a, const Tile& tile, float sum) {
  const int column = tile.row * kTile + threadIdx.x;
  if (tile.cross) {
    if (column < a.target.columns) a.sum_target[column] += sum;
  } else if (column < a.x.columns) {
    a.sum_x[column] += sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) tensor_core_kernel(const Arguments a) {
  using namespace nvcuda;
  constexpr int kDepth = 32, kLd = kTile + 8;  // padding turns the columns of a fragment over the banks
  __shared__ alignas(128) T left[kDepth * kLd];
  __shared__ alignas(128) T right[kDepth * kLd];
  __shared__ alignas(128) float staging[kThreads / 32][16 * 16];

  const Tile tile = tile_at(blockIdx.x, a.h_tiles);
  const Operand rows_of = tile.cross ? a.target : a.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 64;

  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sums[2][4];
  for (auto& line : sums)
    for (auto& fragment : line) wmma::fill_fragment(fragment, 0.0f);
  LongSum sum;
  for (int64_t m = 0; m < a.rows; m += kDepth) {
    load_tile<T, kDepth>(rows_of, nullptr, a.rows, m, tile.row * kTile, left, kLd);
    load_tile<T, kDepth>(a.x, nullptr, a.rows, m, tile.column * kTile, right, kLd);
    __syncthreads();
    if (owes_sum(tile) && threadIdx.x < kTile) sum.add(column_sum<T, kDepth>(left, kLd, nullptr, a.rows, m));
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::col_major> l[2];
      for (int i = 0; i < 2; i++) wmma::load_matrix_sync(l[i], left + k * kLd + warp_row + 16 * i, kLd);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::row_major> r;
        wmma::load_matrix_sync(r, right + k * kLd + warp_column + 16 * j, kLd);
        for (int i = 0; i < 2; i++) wmma::mma_sync(sums[i][j], l[i], r, sums[i][j]);
      }
    }
    __syncthreads();
  }

  float* out = tile.cross ? a.cross : a.hessian;
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      wmma::store_matrix_sync(staging[warp], sums[i][j], 16, wmma::mem_row_major);
      __syncwarp();
      for (int e = lane; e < 16 * 16; e += 32) {
        const int64_t row = tile.row * kTile + warp_row + 16 * i + e / 16;
        const int64_t column = tile.column * kTile + warp_column + 16 * j + e % 16;
        if (row < rows_of.columns && column < a.x.columns) out[row * a.x.columns + column] += staging[warp][e];
      }
      __syncwarp();
    }
  if (owes_sum(tile) && threadIdx.x < kTile) add_sum(a, tile, sum.total());
}

template <typename T>
__global__ void __launch_bounds__(kThreads) fp32_kernel(const Arguments a) {
  constexpr int kDepth = 16, kLd = kTile + 16 / sizeof(T);
  __shared__ alignas(128) T left[kDepth * kLd];
  __shared__ alignas(128) T right[kDepth * kLd];

  const Tile tile = tile_at(blockIdx.x, a.h_tiles);
  const Operand rows_of = tile.cross ? a.target : a.x;
  const int row = threadIdx.x / 16, column = threadIdx.x % 16;  // outputs row + 16 i, column + 16 j

  float sums[8][8] = {};
  LongSum sum;
  for (int64_t m = 0; m < a.rows; m += kDepth) {
    load_tile<T, kDepth>(rows_of, a.weights, a.rows, m, tile.row * kTile, left, kLd);
    load_tile<T, kDepth>(a.x, a.weights, a.rows, m, tile.column * kTile, right, kLd);
    __syncthreads();
    if (owes_sum(tile) && threadIdx.x < kTile) sum.add(column_sum<T, kDepth>(left, kLd, a.weights, a.rows, m));
#pragma unroll 4
    for (int k = 0; k < kDepth; k++) {
      const float weight = a.weights != nullptr && m + k < a.rows ? a.weights[m + k] : 1.0f;
      float l[8], r[8];
#pragma unroll
      for (int i = 0; i < 8; i++) l[i] = to_float(left[k * kLd + row + 16 * i]);
#pragma unroll
      for (int j = 0; j < 8; j++) r[j] = weight * to_float(right[k * kLd + column + 16 * j]);
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) sums[i][j] = fmaf(l[i], r[j], sums[i][j]);
    }
    __syncthreads();
  }

  float* out = tile.cross ? a.cross : a.hessian;
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int64_t r = tile.row * kTile + row + 16 * i, c = tile.column * kTile + column + 16 * j;
      if (r < rows_of.columns && c < a.x.columns) out[r * a.x.columns + c] += sums[i][j];
    }
  if (owes_sum(tile) && threadIdx.x < kTile) add_sum(a, tile, sum.total());
}

template <typename T>
void launch(const Arguments& a, int blocks, bool tensor_cores, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (tensor_cores) {
      tensor_core_kernel<T><<<blocks, kThreads, 0, stream>>>(a);
      return;
    }
  }
  fp32_kernel<T><<<blocks, kThreads, 0, stream>>>(a);
}

Operand operand_of(const Tensor& tensor, int64_t element) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const bool vector = tensor.stride(1) == 1 && tensor.stride(0) * element % 16 == 0 && address % 16 == 0;
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), static_cast<int>(tensor.size(1)), vector};
}

// `rows` further rows of `operand`.
Operand advanced(Operand operand, int64_t rows, int64_t element) {
  operand.data = static_cast<const char*>(operand.data) + rows * operand.row_stride * element;
  return operand;
}

float* sums_of(const Tensor& tensor, const char* name, int64_t elements, const Tensor& x) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == elements, name,
                  ": expected a contiguous float32 tensor of ", elements, " elements");
  STD_TORCH_CHECK(tensor.get_device_index() == x.get_device_index(), name, ": expected the device of x");
  return static_cast<float*>(tensor.mutable_data_ptr());
}

void accumulate(const Tensor x, const Tensor hessian, const Tensor sum_x, const std::optional<Tensor> target,
                const std::optional<Tensor> cross, const std::optional<Tensor> sum_target,
                const std::optional<Tensor> row_weights) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) < (1 << 20), "x: expected [M, K] with K < 2^20");
  const int64_t rows = x.size(0), columns = x.size(1);
  const bool crossed = target && cross && sum_target;
  const ScalarType dtype = x.scalar_type();
  const int64_t element = dtype == ScalarType::Float ? 4 : 2;
  Arguments a{};
  a.x = operand_of(x, element);
  a.rows = rows;
  a.hessian = sums_of(hessian, "hessian", columns * columns, x);
  a.sum_x = sums_of(sum_x, "sum_x", columns, x);
  if (crossed) {
    STD_TORCH_CHECK(target->dim() == 2 && target->size(0) == rows && target->size(1) < (1 << 20),
                    "target: expected as many rows as x, and P < 2^20");
    STD_TORCH_CHECK(target->scalar_type() == dtype, "target: expected the dtype of x");
    STD_TORCH_CHECK(target->get_device_index() == x.get_device_index(), "target: expected the device of x");
    a.target = operand_of(*target, element);
    a.cross = sums_of(*cross, "cross", target->size(1) * columns, x);
    a.sum_target = sums_of(*sum_target, "sum_target", target->size(1), x);
  }
  if (row_weights) {
    STD_TORCH_CHECK(row_weights->scalar_type() == ScalarType::Float && row_weights->is_contiguous() &&
                        row_weights->numel() == rows && row_weights->get_device_index() == x.get_device_index(),
                    "row_weights: expected contiguous float32, one per row of x, on its device");
    a.weights = static_cast<const float*>(row_weights->const_data_ptr());
  }
  if (rows == 0 || columns == 0) return;
  a.h_tiles = tiles_of(static_cast<int>(columns), kTile);
  const int blocks = tile_count(a.h_tiles, crossed ? tiles_of(a.target.columns, kTile) : 0);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const auto queue = static_cast<cudaStream_t>(stream);
  const bool tensor_cores = element == 2 && !row_weights;
  const int64_t most = tensor_cores ? kRowsOnTensorCores : kRowsElsewhere;
  for (int64_t start = 0; start < rows; start += most) {
    Arguments part = a;
    part.rows = rows - start < most ? rows - start : most;
    part.x = advanced(a.x, start, element);
    if (crossed) part.target = advanced(a.target, start, element);
    if (row_weights) part.weights = a.weights + start;
    switch (dtype) {
      case ScalarType::Float: launch<float>(part, blocks, tensor_cores, queue); break;
      case ScalarType::Half: launch<__half>(part, blocks, tensor_cores, queue); break;
      case ScalarType::BFloat16: launch<__nv_bfloat16>(part, blocks, tensor_cores, queue); break;
      default: STD_TORCH_CHECK(false, "x: expected float32, float16 or bfloat16");
    }
    const cudaError_t status = cudaGetLastError();
    STD_TORCH_CHECK(status == cudaSuccess, "accumulate: ", cudaGetErrorString(status));
  }
}

}  // namespace
}  // namespace epmq

STABLE_TORCH_LIBRARY_IMPL(epmq_native, CUDA, library) { library.impl("accumulate", TORCH_BOX(&epmq::accumulate)); }
