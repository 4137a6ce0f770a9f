// Chooses the instances for this machine, once.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/added.h"
#include "core/params.h"
#include "cpu/levels.h"
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

enum Tier { kGeneric, kAvx2, kAvx512 };  // the first levels

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
  const int highest = int(HighestLevel());
  return highest < tier ? Tier(highest) : tier;
}

Tier tier() {
  static const Tier detected = Detect();
  return detected;
}

#define LEVEL(name) #name,
const char* const kLevels[] = {
#include "cpu/levels.def"
};
#undef LEVEL

AddedCells<CpuKernels> added;

}  // namespace

const char* NameOf(Level level) { return kLevels[int(level)]; }

Level HighestLevel() {
  const char* wish = std::getenv("FUSED_RNN_CPU_CAPABILITY");
  if (!wish || !*wish) return Level::amx;
  std::string names;
  for (const char* const& name : kLevels) {
    if (!std::strcmp(wish, name)) return Level(&name - kLevels);
    names += std::string(names.empty() ? "" : ", ") + name;
  }
  throw std::invalid_argument(std::string("FUSED_RNN_CPU_CAPABILITY is '") + wish +
                              "': use one of " + names);
}

const CpuKernels* FindCpuKernels(const char* cell, Storage storage) {
  for (const Entry& entry : kTable)
    if (!std::strcmp(entry.name, cell)) return entry.kernels[tier()][storage == Storage::kDouble];
  return added.Find(cell, storage == Storage::kDouble ? storage : Storage::kFloat);
}

void AddCpuKernels(const char* cell, Storage computing, const CpuKernels& kernels) {
  added.Add(cell, computing, kernels);
}

const char* CpuCapability() {
#ifdef FRNN_HAS_BF16
  if (tier() == kAvx512 && parts::Capability()) return parts::Capability();
#endif
  return NameOf(Level(tier()));
}

}  // namespace frnn
