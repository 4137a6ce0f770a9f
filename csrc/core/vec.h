// Vectors of N lanes as the compiler's own vector types: operators are built in, and one source
// gives SSE2, AVX2, AVX-512 or NEON by the flags of the translation unit. A scalar is the vector of
// one lane, so all math is written once for V.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/macros.h"

namespace frnn {

template <class T, int N>
struct VecType {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N>
using Vec = typename VecType<T, N>::type;

// Lanes<V>: element type T, lane count kSize, integer Int of the size of T, and the vector I of
// them (what comparisons give).
template <class V>
struct Lanes {
  using T = std::remove_reference_t<decltype(V{}[0])>;
  static constexpr int kSize = sizeof(V) / sizeof(T);
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  using I = decltype(V{} < V{});
};
template <>
struct Lanes<float> {
  using T = float;
  static constexpr int kSize = 1;
  using Int = int32_t;
  using I = int32_t;
};
template <>
struct Lanes<double> {
  using T = double;
  static constexpr int kSize = 1;
  using Int = int64_t;
  using I = int64_t;
};

// s - 0 is s for every s, -0 included, so the compiler makes it a broadcast (0 + s would be an
// addition).
template <class V>
FRNN_HD V splat(typename Lanes<V>::T s) {
  return s - V{};
}

template <class To, class From>
FRNN_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Whether to write the instructions of the next two functions. Tests that emulate a processor do not.
#ifndef FRNN_BOUNDS_BY_ASM
#if defined(__AVX512F__) && !defined(__CUDACC__)
#define FRNN_BOUNDS_BY_ASM 1
#else
#define FRNN_BOUNDS_BY_ASM 0
#endif
#endif

// bound where the lane of x is less, or more, and x elsewhere: NaN in x stays NaN.
template <class V>
FRNN_HD V at_least(V x, V bound) {
#if FRNN_BOUNDS_BY_ASM
  // Compilers make a comparison and a move under its mask of it, in four times the latency.
  if constexpr (sizeof(V) == 64) {
    if constexpr (sizeof(typename Lanes<V>::T) == 4)
      asm("vmaxps {%0, %1, %0|%0, %1, %0}" : "+v"(x) : "v"(bound));
    else
      asm("vmaxpd {%0, %1, %0|%0, %1, %0}" : "+v"(x) : "v"(bound));
    return x;
  }
#endif
  return x < bound ? bound : x;
}
template <class V>
FRNN_HD V at_most(V x, V bound) {
#if FRNN_BOUNDS_BY_ASM
  if constexpr (sizeof(V) == 64) {
    if constexpr (sizeof(typename Lanes<V>::T) == 4)
      asm("vminps {%0, %1, %0|%0, %1, %0}" : "+v"(x) : "v"(bound));
    else
      asm("vminpd {%0, %1, %0|%0, %1, %0}" : "+v"(x) : "v"(bound));
    return x;
  }
#endif
  return x > bound ? bound : x;
}

// p need not be aligned.
template <class V>
FRNN_HD V load(const typename Lanes<V>::T* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
FRNN_HD void store(typename Lanes<V>::T* p, const V& v) {
  memcpy(p, &v, sizeof(V));
}
}  // namespace frnn
