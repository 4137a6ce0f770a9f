// What the products of cpu/parts.cpp and cpu/fixed.cpp share: vectors of AVX-512 beside the tile unit.
// For these two files, which say themselves whether it is compiled.
#pragma once
#include <immintrin.h>

#include <cstdint>

#ifndef __clang__  // gcc's own vector headers (bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// Functions that use vectors; the rest of a file runs anywhere.
#define FRNN_VECTOR __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define FRNN_VECTOR_INLINE FRNN_VECTOR inline __attribute__((always_inline))

namespace frnn {
namespace parts {

constexpr int kBytesPerRow = 64;  // of a tile

// The tile intrinsics do not tell the compiler which memory they read and write.
inline void MemoryFence() { asm volatile("" ::: "memory"); }

// Lanes [begin, end) of 64, or of as many as the mask that this becomes has.
inline uint64_t Mask(int64_t begin, int64_t end) {
  const auto below = [](int64_t n) {
    return n <= 0 ? uint64_t(0) : (n >= 64 ? ~uint64_t(0) : (uint64_t(1) << n) - 1);
  };
  return below(end) & ~below(begin);
}

// The larger magnitudes, as integers, which are ordered as floats are, with NaN above inf.
FRNN_VECTOR_INLINE __m512i Larger(__m512i largest, __m512 x) {
  return _mm512_max_epu32(largest,
                          _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
}

FRNN_VECTOR_INLINE void Transpose16(__m512i (&v)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // v[4 g + j] has column 4 l + j of rows 4 g .. 4 g + 3 in its 128-bit lane l.
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const __m512i a = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88);  // lanes 0 2 of both
    const __m512i b = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd);  // lanes 1 3
    const __m512i c = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) v[i] = t[i];
}

}  // namespace parts
}  // namespace frnn
