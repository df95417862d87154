// Choice of the CPU kernels' build: the fastest that this processor runs, or one by name.
#pragma once

#include <cstdint>
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

// Declares a kernel in the namespace of every instruction set, and name(params) in clipvip, which
// calls the chosen one. Used once per entry point, inside namespace clipvip.
//
// A kernel returns 0 when it has run. Without a workspace (null in params) it does nothing and
// returns how many bytes it needs.
#if defined(CLIPVIP_X86)
#define CLIPVIP_CPU_KERNEL(name, Params)                                                  \
  namespace plain { int64_t name(const Params&); }                                        \
  namespace avx2 { int64_t name(const Params&); }                                         \
  namespace avx512 { int64_t name(const Params&); }                                       \
  namespace avx512bf16 { int64_t name(const Params&); }                                   \
  inline int64_t name(const Params& params) {                                             \
    static constexpr int64_t (*builds[])(const Params&) = {plain::name, avx2::name,       \
                                                           avx512::name, avx512bf16::name};\
    return builds[static_cast<int>(cpu_capability())](params);                            \
  }
#else
#define CLIPVIP_CPU_KERNEL(name, Params)           \
  namespace plain { int64_t name(const Params&); } \
  inline int64_t name(const Params& params) { return plain::name(params); }
#endif
