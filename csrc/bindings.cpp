// Operator schemas, and the few facts that are not tensor operators.
#include <ATen/Parallel.h>
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

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build facts, CPU features and threads; the operators are torch.ops.epmq_native.*";
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
  module.def("get_threads", [] { return at::get_num_threads(); });
  module.def("set_threads", [](int count) {
    if (count < 1) throw py::value_error("threads: expected at least 1, got " + std::to_string(count));
    at::set_num_threads(count);
  }, py::arg("count"));
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
