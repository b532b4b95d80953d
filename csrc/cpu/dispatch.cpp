// Chooses the instruction set once, at run time.
#include <c10/util/Exception.h>

#include <cstdlib>
#include <string>

#include "../ops.h"
#include "kernels.h"

namespace epmq {

namespace {

struct Level {
  const char* name;
  bool runs;
  const Kernels& (*table)();
};

// Best last. __builtin_cpu_supports also asks whether the operating system saves the wide registers.
const std::vector<Level>& levels() {
  static const std::vector<Level> all = [] {
    std::vector<Level> found = {{"plain", true, plain_kernels}};
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    found.push_back({"avx2", avx2, avx2_kernels});
    found.push_back({"avx512", avx512, avx512_kernels});
#endif
    return found;
  }();
  return all;
}

const Kernels& choose() {
  const char* wanted = std::getenv("EPMQ_CPU");
  if (wanted == nullptr || *wanted == '\0') {
    const Level* best = nullptr;
    for (const Level& level : levels())
      if (level.runs) best = &level;
    return best->table();
  }
  std::string names;
  for (const Level& level : levels()) {
    if (level.name == std::string(wanted)) {
      TORCH_CHECK_VALUE(level.runs, "EPMQ_CPU=", wanted, " asks for instructions that this CPU does not have.");
      return level.table();
    }
    names += (names.empty() ? "" : ", ") + std::string(level.name);
  }
  TORCH_CHECK_VALUE(false, "EPMQ_CPU=", wanted, " is not an instruction set of this build; use one of ", names, ".");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

std::vector<std::string> cpu_levels() {
  std::vector<std::string> names;
  for (const Level& level : levels())
    if (level.runs) names.emplace_back(level.name);
  return names;
}

std::string cpu_level() { return kernels().name; }

}  // namespace epmq
