// Operator schemas, and the few facts that are not tensor operators.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include "cuda/tiles.h"
#include "ops.h"

namespace py = pybind11;

// Variadic: flags hold commas.
#define EPMQ_TEXT_OF(...) #__VA_ARGS__
#define EPMQ_TEXT(...) EPMQ_TEXT_OF(__VA_ARGS__)

TORCH_LIBRARY(epmq_native, library) {
  library.def(
      "accumulate(Tensor x, Tensor(a!) hessian, Tensor(b!) sum_x, Tensor? target=None, Tensor(c!)? cross=None, "
      "Tensor(d!)? sum_target=None, Tensor? row_weights=None) -> ()");
  library.def(
      "gptq_sweep(Tensor weight, Tensor unit_upper, Tensor scales, Tensor zeros, Tensor group_of, int bits) -> Tensor");
  library.def("subtract_product(Tensor(a!) out, Tensor a, Tensor b) -> ()");
  library.def("subtract_gram(Tensor(a!) out, Tensor a) -> ()");
  library.def(
      "grid_losses(Tensor weight, Tensor scales, Tensor zeros, int bits, int group_size, float power, "
      "Tensor? importance=None) -> Tensor");
  library.def(
      "dequant_matmul(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? bias, int bits, "
      "int group_size) -> Tensor");
}

TORCH_LIBRARY_IMPL(epmq_native, CPU, library) {
  library.impl("accumulate", epmq::accumulate);
  library.impl("gptq_sweep", epmq::gptq_sweep);
  library.impl("subtract_product", epmq::subtract_product);
  library.impl("subtract_gram", epmq::subtract_gram);
  library.impl("grid_losses", epmq::grid_losses);
  library.impl("dequant_matmul", epmq::dequant_matmul);
}

// The tensors among the arguments on the stack that the operator writes to.
static std::vector<at::Tensor> written(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  const auto& arguments = op.schema().arguments();
  std::vector<at::Tensor> found;
  for (size_t i = 0; i < arguments.size(); i++) {
    const c10::AliasInfo* alias = arguments[i].alias_info();
    const c10::IValue& value = stack[stack.size() - arguments.size() + i];
    if (alias != nullptr && alias->isWrite() && value.isTensor()) found.push_back(value.toTensor());
  }
  return found;
}

// As torch's own operators do: a gradient that is not kept track of is refused, and what is written to counts as changed.
static void refuse_gradients(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  for (const at::Tensor& tensor : written(op, *stack))
    TORCH_CHECK(!(at::GradMode::is_enabled() && tensor.requires_grad()), op.schema().name(),
                ": a tensor that requires a gradient cannot be written to; detach it, or use torch.no_grad().");
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

static void count_writes(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const std::vector<at::Tensor> tensors = written(op, *stack);
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }
  for (const at::Tensor& tensor : tensors)
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

constexpr const char* kInPlace[] = {"accumulate", "subtract_product", "subtract_gram"};

TORCH_LIBRARY_IMPL(epmq_native, Autograd, library) {
  for (const char* name : kInPlace) library.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_gradients>());
}

TORCH_LIBRARY_IMPL(epmq_native, ADInplaceOrView, library) {
  for (const char* name : kInPlace) library.impl(name, torch::CppFunction::makeFromBoxedFunction<&count_writes>());
}

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build facts and CPU features; the operators are torch.ops.epmq_native.*";
  module.def("build_info", [] {
    py::dict info;
    info["compiler"] = __VERSION__;
    info["flags"] = EPMQ_TEXT(EPMQ_FLAGS);
    info["torch"] = TORCH_VERSION;
    info["openmp"] =
#ifdef _OPENMP
        true;
#else
        false;
#endif
    info["cuda_archs"] = EPMQ_TEXT(EPMQ_CUDA_ARCHS);
    return info;
  }, "Compiler, flags, torch version and CUDA architectures of this build ('' without CUDA).");
  module.def("cpu_levels", epmq::cpu_levels, "Instruction sets of this build that this CPU runs, best last.");
  module.def("cpu_level", epmq::cpu_level,
             "The instruction set in use; EPMQ_CPU=plain|avx2|avx512|avx512bf16|amx chooses it.");
  module.def("cpu_vendor", epmq::cpu_vendor, "The processor's maker as it names itself, or ''.");
  // The CUDA kernel's index arithmetic, bound so that it is tested without a GPU.
  module.def("statistics_tiles", [](int h_tiles, int cross_tiles) {
    std::vector<std::tuple<int, int, bool>> tiles;
    for (int i = 0; i < epmq::tile_count(h_tiles, cross_tiles); i++) {
      const epmq::Tile tile = epmq::tile_at(i, h_tiles);
      tiles.emplace_back(tile.row, tile.column, tile.cross);
    }
    return tiles;
  }, py::arg("h_tiles"), py::arg("cross_tiles"), "Tiles (row, column, cross) of one CUDA launch, in order.");
}
