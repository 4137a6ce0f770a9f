// Every function of the engine lives in a namespace named after the instruction set it is compiled
// for (FRNN_TIER, set by the instance): the linker must never merge an AVX-512 copy of an inline
// function into the code of a lesser machine.
#pragma once
#ifndef FRNN_TIER
#error "FRNN_TIER names the instruction set of this translation unit"
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
FRNN_END
