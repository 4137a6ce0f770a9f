// What a translation unit of the engine is compiled for: an instruction set and a computing type,
// as its instance says. All that it defines lives in a namespace named after both (FRNN_TIER): the
// linker must never merge an AVX-512 copy of an inline function into the code of a lesser machine.
#pragma once
#include "core/vec.h"

#if !defined(FRNN_TIER) || !defined(FRNN_SCALAR)
#error "FRNN_TIER and FRNN_SCALAR name what this translation unit is compiled for"
#endif
#define FRNN_BEGIN \
  namespace frnn { \
  inline namespace FRNN_TIER {
#define FRNN_END \
  }              \
  }

FRNN_BEGIN
// Bytes of a vector, and registers for them. NEON is part of AArch64, which needs no flag for it:
// there FRNN_GENERIC says that no more is asked for than any processor has.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__) && !defined(FRNN_GENERIC)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif
using T = FRNN_SCALAR;
using V = Vec<T, kVectorBytes / sizeof(T)>;
using Bits = Lanes<V>::I;
constexpr int N = Lanes<V>::kSize;
FRNN_END
