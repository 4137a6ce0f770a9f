// Chooses the instances for this machine, once.
#include <cstdlib>
#include <cstring>

#include "core/params.h"
#include "cpu/parts.h"

namespace frnn {

#define CELL(name, type, header) \
  extern const CpuKernels k_generic_##name##_float, k_generic_##name##_double;
#include "cells/registry.def"
#undef CELL
#ifdef __x86_64__
#define CELL(name, type, header)                                                                  \
  extern const CpuKernels k_avx2_##name##_float, k_avx2_##name##_double, k_avx512_##name##_float, \
      k_avx512_##name##_double;
#include "cells/registry.def"
#undef CELL
#endif

namespace {

enum Tier { kGeneric, kAvx2, kAvx512 };

struct Entry {
  const char* name;
  const CpuKernels* kernels[3][2];  // [tier][is_double]
};

const Entry kTable[] = {
#ifdef __x86_64__
#define CELL(name, type, header)                             \
  {#name,                                                    \
   {{&k_generic_##name##_float, &k_generic_##name##_double}, \
    {&k_avx2_##name##_float, &k_avx2_##name##_double},       \
    {&k_avx512_##name##_float, &k_avx512_##name##_double}}},
#else
#define CELL(name, type, header)                             \
  {#name,                                                    \
   {{&k_generic_##name##_float, &k_generic_##name##_double}, \
    {nullptr, nullptr},                                      \
    {nullptr, nullptr}}},
#endif
#include "cells/registry.def"
#undef CELL
};

// FUSED_RNN_CPU_CAPABILITY=generic|avx2|avx512|avx512_bf16|amx_bf16 asks for less than the machine has
// (never for more).
Tier Detect() {
  Tier tier = kGeneric;
#ifdef __x86_64__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    tier = kAvx2;
  if (tier == kAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    tier = kAvx512;
#endif
  const char* wish = std::getenv("FUSED_RNN_CPU_CAPABILITY");
  if (wish && !std::strcmp(wish, "generic")) return kGeneric;
  if (wish && !std::strcmp(wish, "avx2") && tier > kAvx2) return kAvx2;
  return tier;
}

Tier tier() {
  static const Tier detected = Detect();
  return detected;
}

}  // namespace

const CpuKernels* FindCpuKernels(const char* cell, int is_double) {
  for (const Entry& entry : kTable)
    if (!std::strcmp(entry.name, cell)) return entry.kernels[tier()][is_double];
  return nullptr;
}

const char* CpuCapability() {
#ifdef FRNN_HAS_BF16
  if (tier() == kAvx512 && parts::Capability()) return parts::Capability();
#endif
  static const char* const kNames[] = {"generic", "avx2", "avx512"};
  return kNames[tier()];
}

}  // namespace frnn
