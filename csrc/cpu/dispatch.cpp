// Chooses the instruction set once, at run time.
#include <c10/util/Exception.h>

#include <cstdlib>
#include <string>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../ops.h"
#include "kernels.h"

namespace epmq {

namespace {

struct Level {
  const char* name;
  bool runs;
  const Kernels& (*table)();
};

#if defined(__x86_64__)
// Matrix tiles with bf16: the CPU has them, and Linux lets this process use their registers.
bool has_tiles() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  if ((d & (bf16 | tile)) != (bf16 | tile)) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned states = 1u << 17 | 1u << 18;
  if ((low & states) != states) return false;
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}
#endif

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
    found.push_back({"avx512bf16", avx512 && __builtin_cpu_supports("avx512bf16"), avx512bf16_kernels});
    found.push_back({"amx", avx512 && has_tiles(), amx_kernels});
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
      TORCH_CHECK_VALUE(level.runs, "EPMQ_CPU=", wanted,
                        " asks for instructions that this CPU does not have or this system does not allow.");
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

std::string cpu_vendor() {
  // Asked once: a virtual machine may have to leave itself for the answer.
  static const std::string name = []() -> std::string {
#if defined(__x86_64__)
    unsigned a, letters[3];
    if (__get_cpuid(0, &a, &letters[0], &letters[2], &letters[1]))
      return std::string(reinterpret_cast<const char*>(letters), sizeof(letters));
#endif
    return {};
  }();
  return name;
}

}  // namespace epmq
