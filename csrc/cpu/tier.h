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
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
using T = FRNN_SCALAR;
using V = Vec<T, kVectorBytes / sizeof(T)>;
using Bits = Lanes<V>::I;
constexpr int N = Lanes<V>::kSize;
FRNN_END
