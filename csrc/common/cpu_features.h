// Which build of a CPU kernel runs: the best this processor has, or the one asked for by name.
#pragma once

#include <string>
#include <vector>

namespace clipvip {

enum class CpuCapability : int { plain = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };

// Read once from CLIPVIP_CPU, else from cpuid. Throws std::invalid_argument on a name that is
// unknown, not built, or that this processor cannot run.
CpuCapability cpu_capability();
void set_cpu_capability(const std::string& name);
const char* cpu_capability_name(CpuCapability capability);
// Built into this module and runnable here, from the plainest to the fastest.
std::vector<std::string> cpu_capabilities();

}  // namespace clipvip

// Declares one kernel in the namespace of every instruction set, and `name(params...)` in
// clipvip, which calls the chosen one. Used once per entry point, inside namespace clipvip.
#if defined(CLIPVIP_X86)
#define CLIPVIP_CPU_KERNEL(name, Params)                                                  \
  namespace plain { void name(const Params&); }                                           \
  namespace avx2 { void name(const Params&); }                                            \
  namespace avx512 { void name(const Params&); }                                          \
  namespace avx512bf16 { void name(const Params&); }                                      \
  inline void name(const Params& params) {                                                \
    static constexpr void (*builds[])(const Params&) = {plain::name, avx2::name,          \
                                                        avx512::name, avx512bf16::name};  \
    builds[static_cast<int>(cpu_capability())](params);                                   \
  }
#else
#define CLIPVIP_CPU_KERNEL(name, Params)          \
  namespace plain { void name(const Params&); }   \
  inline void name(const Params& params) { plain::name(params); }
#endif
