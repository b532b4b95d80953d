// Matmul with packed weights: checks, activations, threads; the arithmetic is in matmul_kernel.h, dot_matmul.h and
// tile_matmul.h.
//
// Instructions that multiply bf16 numbers count denormals as zero and do not overflow as fp32 does, so a row of x with
// numbers that could lead there goes through the vector kernels. That depends on the row alone, not on its batch.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "../ops.h"
#include "dtype.h"
#include "kernels.h"

namespace epmq {

namespace {

// For each zero point, the low and the high bytes of bf16(q - z), q = 0..15: exact, |q - z| < 256.
const uint8_t* code_tables() {
  static const std::array<uint8_t, 256 * 32> tables = [] {
    std::array<uint8_t, 256 * 32> filled{};
    for (int zero = 0; zero < 256; zero++)
      for (int code = 0; code < 16; code++) {
        const float value = static_cast<float>(code - zero);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        filled[zero * 32 + code] = static_cast<uint8_t>(bits >> 16);
        filled[zero * 32 + 16 + code] = static_cast<uint8_t>(bits >> 24);
      }
    return filled;
  }();
  return tables.data();
}

// The whole numbers as 16-bit bf16, each table twice: a byte shuffle of words looks at five bits.
const uint16_t* code_words() {
  static const std::array<uint16_t, 256 * 32> words = [] {
    std::array<uint16_t, 256 * 32> filled{};
    for (int zero = 0; zero < 256; zero++)
      for (int code = 0; code < 32; code++) {
        const uint8_t* table = code_tables() + zero * 32 + code % 16;
        filled[zero * 32 + code] = static_cast<uint16_t>(table[0] | table[16] << 8);
      }
    return filled;
  }();
  return words.data();
}

void check(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& zeros,
           const std::optional<Tensor>& bias, int64_t bits, int64_t group_size) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x: expected 2 dimensions, got ", x.dim());
  TORCH_CHECK_VALUE(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits: expected 2, 3, 4 or 8, got ", bits);
  TORCH_CHECK_VALUE(group_size == -1 || group_size > 0, "group_size: expected -1 or a positive size, got ", group_size);
  const int64_t k = x.size(1), words = (k * bits + 31) / 32;
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kInt && packed.dim() == 2 && packed.size(1) == words,
                    "packed: expected int32 [N, ", words, "], got ", packed.scalar_type(), " ", packed.sizes());
  // Not by adding group_size - 1, which may be any number.
  const int64_t n = packed.size(0), groups = group_size == -1 ? 1 : k == 0 ? 0 : (k - 1) / group_size + 1;
  TORCH_CHECK_VALUE(scales.sizes() == at::IntArrayRef({n, groups}), "scales: expected [", n, ", ", groups, "], got ",
                    scales.sizes());
  if (zeros)
    TORCH_CHECK_VALUE(zeros->scalar_type() == at::kByte && zeros->sizes() == scales.sizes(), "zeros: expected uint8 ",
                      scales.sizes(), ", got ", zeros->scalar_type(), " ", zeros->sizes());
  if (bias)
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == n, "bias: expected [", n, "], got ", bias->sizes());
}

Tensor rows_contiguous(const Tensor& tensor) {
  return tensor.size(1) <= 1 || tensor.stride(1) == 1 ? tensor : tensor.contiguous();
}

// fp32 [M, N] through the vector kernels.
Tensor by_vectors(const Kernels& kernel, MatmulArgs args, const Tensor& x) {
  const int64_t block = 8 * kernel.lanes, padded = (args.k + block - 1) / block * block;
  args.x = x.const_data_ptr();
  args.m = x.size(0);
  args.x_row_stride = x.stride(0);
  args.x_column_stride = x.stride(1);
  Tensor out = at::empty({args.m, args.n}, x.options().dtype(at::kFloat));
  Tensor prepared = at::empty({args.m * padded}, out.options());
  args.prepared = prepared.mutable_data_ptr<float>();
  args.out = out.mutable_data_ptr<float>();
  const int64_t tiles = (args.m + kernel.inner_m - 1) / kernel.inner_m;
  at::parallel_for(0, tiles, std::max<int64_t>(1, 32768 / padded),
                   [&](int64_t begin, int64_t end) { kernel.prepare(args, begin, end); });
  // Threads take whole panels; a panel's arithmetic does not depend on where it starts.
  const int64_t rows = kernel.panel_rows, panels = (args.n + rows - 1) / rows;
  const int64_t grain = std::max<int64_t>(1, 65536 / (rows * padded * (args.m + 1)));
  at::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
    Tensor scratch = at::empty({kernel.matmul_scratch(args)}, out.options());
    kernel.matmul(args, begin * rows, std::min(end * rows, args.n), scratch.mutable_data_ptr<float>());
  });
  return out;
}

// [M, N] in x's type through bf16 words; rows that are not for them through the vector kernels.
Tensor by_words(const Kernels& kernel, const MatmulArgs& common, const Tensor& x) {
  const WordMatmul& form = *kernel.word_matmul;
  WordMatmulArgs args{};
  static_cast<MatmulArgs&>(args) = common;
  form.shape(args);
  Tensor out = at::empty({args.m, args.n}, x.options());
  const auto bytes = x.options().dtype(at::kByte);
  // Columns that stand for no row are multiplied too: zero, lest they hold numbers that make it slow.
  const int64_t column_bytes = 2 * form.column_words(args);
  Tensor columns = args.m % args.width == 0 ? at::empty({column_bytes}, bytes) : at::zeros({column_bytes}, bytes);
  std::vector<uint8_t> ordinary(args.m, 1);
  args.words = code_words();
  args.columns = reinterpret_cast<uint16_t*>(columns.mutable_data_ptr<uint8_t>());
  args.ordinary = ordinary.data();
  args.y = out.mutable_data_ptr();
  const int64_t units = (args.k + kWordUnit - 1) / kWordUnit;
  at::parallel_for(0, units, std::max<int64_t>(1, 256 / (args.m * args.parts)),
                   [&](int64_t begin, int64_t end) { form.prepare(args, begin, end); });
  const int64_t rows = form.panel_rows, panels = (args.n + rows - 1) / rows;
  const int64_t grain = std::max<int64_t>(1, 262144 / (rows * args.k));
  at::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
    Tensor scratch = at::empty({form.scratch(args)}, bytes);
    form.matmul(args, begin * rows, std::min(end * rows, args.n), scratch.mutable_data_ptr());
  });

  std::vector<int64_t> rest;
  for (int64_t m = 0; m < args.m; m++)
    if (!ordinary[m]) rest.push_back(m);
  if (!rest.empty()) {
    const Tensor index = at::tensor(rest);
    out.index_copy_(0, index, by_vectors(kernel, common, x.index_select(0, index)).to(x.scalar_type()));
  }
  return out;
}

}  // namespace

Tensor dequant_matmul(const Tensor& x, const Tensor& packed_any, const Tensor& scales_any,
                      const std::optional<Tensor>& zeros_any, const std::optional<Tensor>& bias, int64_t bits,
                      int64_t group_size) {
  check(x, packed_any, scales_any, zeros_any, bias, bits, group_size);
  const Tensor packed = packed_any.contiguous(), scales = rows_contiguous(scales_any);
  const Tensor zeros = zeros_any ? rows_contiguous(*zeros_any) : Tensor();
  const Tensor offset = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  const int64_t m = x.size(0), k = x.size(1), n = packed.size(0);
  if (m == 0 || n == 0) return at::empty({m, n}, x.options());
  if (k == 0) {
    Tensor out = at::zeros({m, n}, x.options());
    return bias ? out.add_(offset) : out;
  }

  MatmulArgs args{};
  args.x = x.const_data_ptr();
  args.x_dtype = dtype_of(x, "x");
  args.x_row_stride = x.stride(0);
  args.x_column_stride = x.stride(1);
  args.packed = reinterpret_cast<const uint8_t*>(packed.const_data_ptr<int32_t>());
  args.row_bytes = packed.size(1) * 4;
  args.scales = scales.const_data_ptr();
  args.scale_dtype = dtype_of(scales, "scales");
  args.scale_stride = scales.stride(0);
  args.zeros = zeros_any ? zeros.const_data_ptr<uint8_t>() : nullptr;
  args.zero_stride = zeros_any ? zeros.stride(0) : 0;
  args.bias = bias ? offset.const_data_ptr<float>() : nullptr;
  args.tables = code_tables();
  args.m = m;
  args.n = n;
  args.k = k;
  args.groups = scales.size(1);
  args.group_size = group_size == -1 ? k : std::min(group_size, k);
  args.bits = static_cast<int>(bits);
  const Kernels& kernel = kernels();
  if (kernel.word_matmul != nullptr && kernel.word_matmul->takes(args)) return by_words(kernel, args, x);
  return by_vectors(kernel, args, x).to(x.scalar_type());
}

}  // namespace epmq
