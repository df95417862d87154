#include "common/cpu_features.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace clipvip {
namespace {

constexpr const char* kNames[] = {"plain", "avx2", "avx512", "avx512bf16"};
std::atomic<int> chosen{-1};

bool runs_here(CpuCapability capability) {
#if defined(CLIPVIP_X86)
  switch (capability) {
    case CpuCapability::plain:
      return true;
    case CpuCapability::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case CpuCapability::avx512:
      return runs_here(CpuCapability::avx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case CpuCapability::avx512bf16:
      return runs_here(CpuCapability::avx512) && __builtin_cpu_supports("avx512bf16");
  }
  return false;
#else
  return capability == CpuCapability::plain;
#endif
}

CpuCapability parse(const std::string& name) {
  for (int i = 0; i < 4; ++i) {
    const auto capability = static_cast<CpuCapability>(i);
    if (name == kNames[i] && runs_here(capability)) return capability;
  }
  std::string known;
  for (const std::string& each : cpu_capabilities()) known += (known.empty() ? "" : ", ") + each;
  throw std::invalid_argument("CPU capability '" + name +
                              "' cannot be used here: this build on this processor runs " + known +
                              "; set CLIPVIP_CPU to one of these, or unset it");
}

}  // namespace

const char* cpu_capability_name(CpuCapability capability) {
  return kNames[static_cast<int>(capability)];
}

std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> names;
  for (int i = 0; i < 4; ++i) {
    if (runs_here(static_cast<CpuCapability>(i))) names.emplace_back(kNames[i]);
  }
  return names;
}

void set_cpu_capability(const std::string& name) { chosen = static_cast<int>(parse(name)); }

CpuCapability cpu_capability() {
  int current = chosen.load(std::memory_order_relaxed);
  if (current < 0) {
    const char* asked = std::getenv("CLIPVIP_CPU");
    current = static_cast<int>(parse(asked && *asked ? asked : cpu_capabilities().back()));
    chosen.store(current, std::memory_order_relaxed);
  }
  return static_cast<CpuCapability>(current);
}

}  // namespace clipvip
