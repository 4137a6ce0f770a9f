// Rows between memory (any storage type) and the computing type.
#pragma once
#include <cstdint>

#include "core/params.h"
#include "core/vec.h"
#include "cpu/tier.h"

FRNN_BEGIN

constexpr Storage kPlain =
    sizeof(T) == 4 ? Storage::kFloat : Storage::kDouble;  // the computing type's
FRNN_INLINE const void* At(const void* p, Storage s, int64_t i) {
  return static_cast<const char*>(p) + i * StorageSize(s);
}
FRNN_INLINE void* At(void* p, Storage s, int64_t i) {
  return static_cast<char*>(p) + i * StorageSize(s);
}

FRNN_NOINLINE inline V LoadLanes(const T* p, int n) {
  V v{};
  for (int i = 0; i < n; i++) v[i] = p[i];
  return v;
}
FRNN_NOINLINE inline void StoreLanes(T* p, V v, int n) {
  for (int i = 0; i < n; i++) p[i] = v[i];
}
// The first n lanes, 0 <= n <= N; the other lanes read as zero.
FRNN_INLINE V load_n(const T* p, int n) { return n == N ? load<V>(p) : LoadLanes(p, n); }
FRNN_INLINE void store_n(T* p, V v, int n) {
  if (n == N)
    store<V>(p, v);
  else
    StoreLanes(p, v, n);
}

// float32 -> nearest even value that bfloat16 / float16 can hold, still as float32. Works on
// vectors and scalars.
template <class X>
FRNN_HD X RoundToBFloat16(X x) {
  using I = typename Lanes<X>::I;
  const I u = bit_cast<I>(x);
  const X rounded = bit_cast<X>(I((u + (((u >> 16) & 1) + 0x7fff)) & int(0xffff0000)));
  return x == x ? rounded : x;
}
template <class X>
FRNN_HD X RoundToHalf(X x) {
  using I = typename Lanes<X>::I;
  const I u = bit_cast<I>(x);
  const X a = bit_cast<X>(I(u & 0x7fffffff));
  // Below 2^-14 float16 has a fixed grid of 2^-24, the grid of float32 in [0.5, 1).
  const X tiny = (a + 0.5f) - 0.5f;
  X r = bit_cast<X>(I((bit_cast<I>(a) + (((u >> 13) & 1) + 0xfff)) & ~0x1fff));
  r = a < splat<X>(6.103515625e-05f) ? tiny : r;
  r = r > splat<X>(65504.0f) ? splat<X>(__builtin_huge_valf()) : r;
  r = bit_cast<X>(I(bit_cast<I>(r) | (u & int(0x80000000))));
  return x == x ? r : x;
}
// h as the storage type will hold it.
template <class X>
FRNN_HD X RoundToStorage(X x, Storage s) {
  if constexpr (sizeof(typename Lanes<X>::T) == 4) {
    if (s == Storage::kBFloat16) return RoundToBFloat16(x);
    if (s == Storage::kHalf) return RoundToHalf(x);
  }
  return x;
}

FRNN_INLINE float FromBFloat16(uint16_t b) { return bit_cast<float>(uint32_t(b) << 16); }
FRNN_INLINE uint16_t ToBFloat16(float x) {
  return x == x ? uint16_t(bit_cast<uint32_t>(RoundToBFloat16(x)) >> 16) : uint16_t(0x7fc0);
}
FRNN_INLINE float FromHalf(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, bits = h & 0x7fff;
  const float tiny = float(bits) * 5.9604644775390625e-08f;  // 2^-24
  const float normal = bit_cast<float>((bits << 13) + (112u << 23));
  const float special = bit_cast<float>((bits << 13) | 0x7f800000u);
  const float a = bits < 0x400 ? tiny : (bits >= 0x7c00 ? special : normal);
  return bit_cast<float>(bit_cast<uint32_t>(a) | sign);
}
FRNN_INLINE uint16_t ToHalf(float x) {
  const float r = RoundToHalf(x);
  const uint32_t u = bit_cast<uint32_t>(r), a = u & 0x7fffffff;
  const uint32_t tiny = uint32_t(bit_cast<float>(a < 0x38800000u ? a : 0u) * 16777216.0f);  // 2^24
  const uint32_t normal = (a >> 13) - (112u << 10);
  const uint32_t bits =
      a > 0x7f800000u ? 0x7e00u : (a == 0x7f800000u ? 0x7c00u : (a < 0x38800000u ? tiny : normal));
  return uint16_t(bits | ((u >> 16) & 0x8000));
}

// Not inlined: called once per row or for the edge of one, and many times over in the source.
FRNN_NOINLINE inline void LoadRow(const void* src, Storage s, T* __restrict dst, int64_t n) {
  if (s == kPlain) {
    memcpy(dst, src, n * sizeof(T));
  } else if constexpr (sizeof(T) == 4) {
    const uint16_t* p = static_cast<const uint16_t*>(src);
    if (s == Storage::kBFloat16) {
#pragma omp simd
      for (int64_t i = 0; i < n; i++) dst[i] = FromBFloat16(p[i]);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; i++) dst[i] = FromHalf(p[i]);
    }
  }
}
// dst[0 .. kN) = elements of src, of which there are n, then zeros. A whole row is a copy of a size
// that the compiler knows: no call.
template <int kN>
FRNN_INLINE void LoadPadded(const void* src, Storage s, int64_t n, T* dst) {
  if (s == kPlain && n >= kN) {
    memcpy(dst, src, kN * sizeof(T));
    return;
  }
  if (n > 0) LoadRow(src, s, dst, n < kN ? n : kN);
  for (int64_t i = n; i < kN; i++) dst[i] = 0;
}
FRNN_NOINLINE inline void StoreRow(void* dst, Storage s, const T* __restrict src, int64_t n) {
  if (s == kPlain) {
    memcpy(dst, src, n * sizeof(T));
  } else if constexpr (sizeof(T) == 4) {
    uint16_t* p = static_cast<uint16_t*>(dst);
    if (s == Storage::kBFloat16) {
#pragma omp simd
      for (int64_t i = 0; i < n; i++) p[i] = ToBFloat16(src[i]);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; i++) p[i] = ToHalf(src[i]);
    }
  }
}

FRNN_END
