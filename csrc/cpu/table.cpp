// Chooses the instances for this machine, once.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

#include "core/added.h"
#include "core/params.h"
#include "cpu/levels.h"
#include "cpu/parts.h"

namespace frnn {

// TIER(level, cell) for each set of instructions that there are kernels for: the first levels, or as
// many of them as the build says.
#if defined(FRNN_TIERS)
#elif defined(__x86_64__)
#define FRNN_TIERS(TIER, cell) TIER(generic, cell) TIER(avx2, cell) TIER(avx512, cell)
#elif defined(__aarch64__)
#define FRNN_TIERS(TIER, cell) TIER(generic, cell) TIER(neon, cell)
#else
#define FRNN_TIERS(TIER, cell) TIER(generic, cell)
#endif

#define DECLARED(tier, cell) \
  extern const CpuKernels k_##tier##_##cell##_float, k_##tier##_##cell##_double;
#define CELL(name, type, header) FRNN_TIERS(DECLARED, name)
#include "cells/registry.def"
#undef CELL
#undef DECLARED

namespace {

#define COUNTED(tier, cell) +1
constexpr int kTiers = FRNN_TIERS(COUNTED, );
#undef COUNTED

struct Entry {
  const char* name;
  const CpuKernels* kernels[kTiers][2];  // [tier][is_double]
};

#define KERNELS(tier, cell) {&k_##tier##_##cell##_float, &k_##tier##_##cell##_double},
#define CELL(name, type, header) {#name, {FRNN_TIERS(KERNELS, name)}},
const Entry kTable[] = {
#include "cells/registry.def"
};
#undef CELL
#undef KERNELS

// The best tier that the processor has and the process may use.
Level Detect() {
  Level tier = Level::generic;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    tier = Level::avx2;
  if (tier == Level::avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    tier = Level::avx512;
#elif defined(__aarch64__)
  tier = Level::neon;  // which is part of the architecture
#endif
  return std::min({tier, HighestLevel(), Level(kTiers - 1)});
}

Level TheTier() {
  static const Level tier = Detect();
  return tier;
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
  if (!wish || !*wish) return Level(std::size(kLevels) - 1);
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
    if (!std::strcmp(entry.name, cell))
      return entry.kernels[int(TheTier())][storage == Storage::kDouble];
  return added.Find(cell, storage == Storage::kDouble ? storage : Storage::kFloat);
}

void AddCpuKernels(const char* cell, Storage computing, const CpuKernels& kernels) {
  added.Add(cell, computing, kernels);
}

const char* CpuCapability() {
#ifdef FRNN_HAS_BF16
  if (TheTier() == Level::avx512 && parts::Capability()) return parts::Capability();
#endif
  return NameOf(TheTier());
}

}  // namespace frnn
