// The instructions that csrc/cpu/parts.cpp and fixed.cpp use, lane by lane, for a processor that has none of
// them. Sources: Intel's Intrinsics Guide, and volume 2 of its Software Developer's Manual.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

typedef float __m512 __attribute__((vector_size(64)));
typedef long long __m512i __attribute__((vector_size(64)));
typedef short __m512bh __attribute__((vector_size(64)));
typedef long long __m256i __attribute__((vector_size(32)));
typedef long long __m128i __attribute__((vector_size(16)));
typedef uint16_t __mmask16;
typedef uint64_t __mmask64;

inline uint64_t _xgetbv(unsigned) { return ~uint64_t(0); }

namespace emulated {

template <class T, class V>
struct Lanes {
  static constexpr int kSize = sizeof(V) / sizeof(T);
  T lane[kSize];
  Lanes() : lane{} {}
  explicit Lanes(const V& v) { memcpy(lane, &v, sizeof(V)); }
  operator V() const {
    V v;
    memcpy(&v, lane, sizeof(V));
    return v;
  }
};
using Floats = Lanes<float, __m512>;
using Ints = Lanes<int32_t, __m512i>;
using Words = Lanes<uint32_t, __m512i>;
using Halves = Lanes<uint16_t, __m512i>;
using Bytes = Lanes<uint8_t, __m512i>;
using Longs = Lanes<uint64_t, __m512i>;

// Lane i = f(i).
template <class L, class F>
L Make(const F& f) {
  L out;
  for (int i = 0; i < L::kSize; i++) out.lane[i] = f(i);
  return out;
}

inline float Flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
inline float FromBFloat16(uint16_t b) {
  const uint32_t bits = uint32_t(b) << 16;
  float x;
  memcpy(&x, &bits, sizeof(x));
  return Flushed(x);
}
// To the nearest, ties to even; what is not normal becomes zero.
inline uint16_t ToBFloat16(float x) {
  x = Flushed(x);
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  if (x != x) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// Sums of two products of bfloat16.
inline float Dot2(float sum, const uint16_t* a, const uint16_t* b) {
  for (int i = 1; i >= 0; i--)
    sum = Flushed(std::fma(FromBFloat16(a[i]), FromBFloat16(b[i]), Flushed(sum)));
  return sum;
}

// The eight tiles of a thread, of 16 rows of 64 bytes.
struct Tile {
  uint8_t row[16][64];
};
inline thread_local Tile tiles[8];
inline thread_local bool configured = false;

}  // namespace emulated

#define FRNN_BINARY(name, V, L, expression)            \
  inline V name(V x, V y) {                            \
    using namespace emulated;                          \
    const L a(x), b(y);                                \
    return Make<L>([&](int i) { return expression; }); \
  }
FRNN_BINARY(_mm512_add_epi32, __m512i, Words, a.lane[i] + b.lane[i])
FRNN_BINARY(_mm512_sub_epi32, __m512i, Words, a.lane[i] - b.lane[i])
FRNN_BINARY(_mm512_and_si512, __m512i, Words, a.lane[i] & b.lane[i])
FRNN_BINARY(_mm512_xor_si512, __m512i, Words, a.lane[i] ^ b.lane[i])
FRNN_BINARY(_mm512_max_epu32, __m512i, Words, a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i])
FRNN_BINARY(_mm512_mul_ps, __m512, Floats, a.lane[i] * b.lane[i])
FRNN_BINARY(_mm512_sub_ps, __m512, Floats, a.lane[i] - b.lane[i])
// Within 128 bits: the lower or the upper halves of a and b in turn.
FRNN_BINARY(_mm512_unpacklo_epi32, __m512i, Words, (i % 2 ? b : a).lane[i / 4 * 4 + i % 4 / 2])
FRNN_BINARY(_mm512_unpackhi_epi32, __m512i, Words, (i % 2 ? b : a).lane[i / 4 * 4 + 2 + i % 4 / 2])
FRNN_BINARY(_mm512_unpacklo_epi64, __m512i, Longs, (i % 2 ? b : a).lane[i / 2 * 2])
FRNN_BINARY(_mm512_unpackhi_epi64, __m512i, Longs, (i % 2 ? b : a).lane[i / 2 * 2 + 1])
FRNN_BINARY(_mm512_shuffle_epi8, __m512i, Bytes,
            b.lane[i] & 0x80 ? 0 : a.lane[i / 16 * 16 + b.lane[i] % 16])
// The first operand is the index.
FRNN_BINARY(_mm512_permutexvar_epi16, __m512i, Halves, b.lane[a.lane[i] % 32])
#undef FRNN_BINARY

inline __m512 _mm512_set1_ps(float x) {
  return emulated::Make<emulated::Floats>([&](int) { return x; });
}
inline __m512i _mm512_set1_epi32(int x) {
  return emulated::Make<emulated::Ints>([&](int) { return x; });
}
inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512i _mm512_setzero_si512() { return __m512i{}; }
template <class... T>
__m512i _mm512_setr_epi32(T... x) {
  const int32_t lanes[] = {int32_t(x)...};
  static_assert(sizeof(lanes) == 64, "one for each lane");
  return emulated::Make<emulated::Ints>([&](int i) { return lanes[i]; });
}
template <class... T>
__m512i _mm512_set_epi16(T... x) {  // the last lane first
  const uint16_t lanes[] = {uint16_t(x)...};
  static_assert(sizeof(lanes) == 64, "one for each lane");
  return emulated::Make<emulated::Halves>([&](int i) { return lanes[31 - i]; });
}
template <class... T>
__m128i _mm_setr_epi8(T... x) {
  const uint8_t lanes[] = {uint8_t(x)...};
  static_assert(sizeof(lanes) == 16, "one for each lane");
  __m128i v;
  memcpy(&v, lanes, sizeof(v));
  return v;
}
inline __m512i _mm512_broadcast_i32x4(__m128i x) {
  const emulated::Lanes<uint32_t, __m128i> a(x);
  return emulated::Make<emulated::Words>([&](int i) { return a.lane[i % 4]; });
}

// ---- memory ----

namespace emulated {
template <class L, class V, class M>
V MaskedLoad(M mask, const void* p) {
  L out;
  for (int i = 0; i < L::kSize; i++)
    if (mask >> i & 1)
      memcpy(&out.lane[i], static_cast<const char*>(p) + i * sizeof(out.lane[i]),
             sizeof(out.lane[i]));
  return out;
}
template <class L, class V, class M>
void MaskedStore(void* p, M mask, const V& v) {
  const L in(v);
  for (int i = 0; i < L::kSize; i++)
    if (mask >> i & 1)
      memcpy(static_cast<char*>(p) + i * sizeof(in.lane[i]), &in.lane[i], sizeof(in.lane[i]));
}
}  // namespace emulated

inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
  return emulated::MaskedLoad<emulated::Floats, __m512>(mask, p);
}
inline __m512i _mm512_maskz_loadu_epi32(__mmask16 mask, const void* p) {
  return emulated::MaskedLoad<emulated::Words, __m512i>(mask, p);
}
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* p) {
  return emulated::MaskedLoad<emulated::Lanes<uint16_t, __m256i>, __m256i>(mask, p);
}
inline void _mm512_mask_storeu_ps(void* p, __mmask16 mask, __m512 v) {
  emulated::MaskedStore<emulated::Floats>(p, mask, v);
}
inline void _mm512_mask_storeu_epi32(void* p, __mmask16 mask, __m512i v) {
  emulated::MaskedStore<emulated::Words>(p, mask, v);
}
inline void _mm512_mask_storeu_epi16(void* p, uint32_t mask, __m512i v) {
  emulated::MaskedStore<emulated::Halves>(p, mask, v);
}
inline void _mm512_mask_storeu_epi8(void* p, __mmask64 mask, __m512i v) {
  emulated::MaskedStore<emulated::Bytes>(p, mask, v);
}
inline __m512i _mm512_load_si512(const void* p) {  // aligned, or a fault
  if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_trap();
  __m512i v;
  memcpy(&v, p, sizeof(v));
  return v;
}
inline void _mm512_store_si512(void* p, __m512i v) {
  if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_trap();
  memcpy(p, &v, sizeof(v));
}

// ---- arithmetic ----

inline __m512 _mm512_fmadd_ps(__m512 x, __m512 y, __m512 z) {
  using namespace emulated;
  const Floats a(x), b(y), c(z);
  return Make<Floats>([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
}
inline __m512 _mm512_maskz_div_ps(__mmask16 mask, __m512 x, __m512 y) {
  using namespace emulated;
  const Floats a(x), b(y);
  return Make<Floats>([&](int i) { return mask >> i & 1 ? a.lane[i] / b.lane[i] : 0; });
}
inline __m512i _mm512_mask_add_epi32(__m512i src, __mmask16 mask, __m512i x, __m512i y) {
  using namespace emulated;
  const Words s(src), sum(_mm512_add_epi32(x, y));
  return Make<Words>([&](int i) { return mask >> i & 1 ? sum.lane[i] : s.lane[i]; });
}
inline __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 x, __m512 y) {
  using namespace emulated;
  const Floats a(x), b(y);
  return Make<Floats>([&](int i) { return mask >> i & 1 ? b.lane[i] : a.lane[i]; });
}
inline __m512i _mm512_mask_blend_epi8(__mmask64 mask, __m512i x, __m512i y) {
  using namespace emulated;
  const Bytes a(x), b(y);
  return Make<Bytes>([&](int i) { return mask >> i & 1 ? b.lane[i] : a.lane[i]; });
}
inline __m512i _mm512_slli_epi32(__m512i x, unsigned n) {
  using namespace emulated;
  const Words a(x);
  return Make<Words>([&](int i) { return a.lane[i] << n; });
}
inline __m512i _mm512_srli_epi32(__m512i x, unsigned n) {
  using namespace emulated;
  const Words a(x);
  return Make<Words>([&](int i) { return a.lane[i] >> n; });
}
inline int _mm512_reduce_add_epi32(__m512i x) {
  const emulated::Words a(x);
  uint32_t sum = 0;
  for (uint32_t lane : a.lane) sum += lane;
  return int(sum);
}
inline uint32_t _mm512_reduce_max_epu32(__m512i x) {
  const emulated::Words a(x);
  uint32_t most = 0;
  for (uint32_t lane : a.lane) most = lane > most ? lane : most;
  return most;
}

// ---- comparisons ----

#define _CMP_LT_OQ 0x11
#define _CMP_GT_OQ 0x1e
#define _MM_CMPINT_NLE 6
inline __mmask16 _mm512_cmp_ps_mask(__m512 x, __m512 y, int how) {
  const emulated::Floats a(x), b(y);
  unsigned mask = 0;
  for (int i = 0; i < 16; i++)
    mask |= unsigned(how == _CMP_LT_OQ ? a.lane[i] < b.lane[i] : a.lane[i] > b.lane[i]) << i;
  return __mmask16(mask);
}
inline __mmask16 _mm512_cmp_epu32_mask(__m512i x, __m512i y, int) {
  const emulated::Words a(x), b(y);
  unsigned mask = 0;
  for (int i = 0; i < 16; i++) mask |= unsigned(a.lane[i] > b.lane[i]) << i;
  return __mmask16(mask);
}
inline __mmask16 _mm512_test_epi32_mask(__m512i x, __m512i y) {
  const emulated::Words a(x), b(y);
  unsigned mask = 0;
  for (int i = 0; i < 16; i++) mask |= unsigned((a.lane[i] & b.lane[i]) != 0) << i;
  return __mmask16(mask);
}

// ---- lanes ----

inline __m512i _mm512_shuffle_i32x4(__m512i x, __m512i y, int control) {  // of 128 bits
  using namespace emulated;
  const Words a(x), b(y);
  return Make<Words>([&](int i) {
    const int from = control >> (i / 4 * 2) & 3;
    return (i < 8 ? a : b).lane[from * 4 + i % 4];
  });
}
inline __m512i _mm512_permutex2var_epi32(__m512i x, __m512i index, __m512i y) {
  using namespace emulated;
  const Words a(x), b(y), at(index);
  return Make<Words>([&](int i) { return (at.lane[i] & 16 ? b : a).lane[at.lane[i] % 16]; });
}
inline __m512i _mm512_inserti64x4(__m512i x, __m256i y, int half) {
  memcpy(reinterpret_cast<char*>(&x) + 32 * half, &y, sizeof(y));
  return x;
}
inline __m256i _mm512_extracti64x4_epi64(__m512i x, int half) {
  __m256i out;
  memcpy(&out, reinterpret_cast<char*>(&x) + 32 * half, sizeof(out));
  return out;
}

// ---- conversions ----

inline __m512i _mm512_castps_si512(__m512 x) { return (__m512i)x; }
inline __m512 _mm512_castsi512_ps(__m512i x) { return (__m512)x; }
inline __m256i _mm512_castsi512_si256(__m512i x) { return _mm512_extracti64x4_epi64(x, 0); }
inline __m512 _mm512_cvtepi32_ps(__m512i x) {
  const emulated::Ints a(x);
  return emulated::Make<emulated::Floats>([&](int i) { return float(a.lane[i]); });
}
inline __m512i _mm512_cvtps_epi32(__m512 x) {  // to the nearest; what is no int32 becomes -2^31
  const emulated::Floats a(x);
  return emulated::Make<emulated::Ints>([&](int i) {
    const float n = std::nearbyint(a.lane[i]);
    return n >= -0x1p31f && n < 0x1p31f ? int32_t(n) : INT32_MIN;
  });
}
inline __m512i _mm512_cvtepu16_epi32(__m256i x) {
  const emulated::Lanes<uint16_t, __m256i> a(x);
  return emulated::Make<emulated::Words>([&](int i) { return uint32_t(a.lane[i]); });
}
inline __m512 _mm512_cvtph_ps(__m256i x) {
  const emulated::Lanes<uint16_t, __m256i> a(x);
  return emulated::Make<emulated::Floats>([&](int i) {
    _Float16 half;
    memcpy(&half, &a.lane[i], sizeof(half));
    return float(half);
  });
}
inline __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  using namespace emulated;
  const Floats a(low), b(high);
  const __m512i out =
      Make<Halves>([&](int i) { return ToBFloat16(i < 16 ? a.lane[i] : b.lane[i - 16]); });
  return (__m512bh)out;
}
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh x, __m512bh y) {
  using namespace emulated;
  const Floats s(sum);
  const Lanes<uint16_t, __m512bh> a(x), b(y);
  return Make<Floats>([&](int i) { return Dot2(s.lane[i], a.lane + 2 * i, b.lane + 2 * i); });
}

// ---- tiles ----

inline void _tile_loadconfig(const void* config) {
  const uint8_t* bytes = static_cast<const uint8_t*>(config);
  for (int i = 0; i < 8; i++)  // every register is a full tile: bytes of a row, rows
    if (bytes[16 + 2 * i] != 64 || bytes[17 + 2 * i] != 0 || bytes[48 + i] != 16) __builtin_trap();
  emulated::configured = true;
}
inline void _tile_release() { emulated::configured = false; }
namespace emulated {
inline Tile& At(int i) {
  if (!configured) __builtin_trap();
  return tiles[i];
}
}  // namespace emulated
inline void _tile_zero(int t) { emulated::At(t) = {}; }
inline void _tile_loadd(int t, const void* p, int64_t stride) {
  for (int r = 0; r < 16; r++)
    memcpy(emulated::At(t).row[r], static_cast<const char*>(p) + r * stride, 64);
}
inline void _tile_stored(int t, void* p, int64_t stride) {
  for (int r = 0; r < 16; r++)
    memcpy(static_cast<char*>(p) + r * stride, emulated::At(t).row[r], 64);
}
// sum[m][n] += the products of row m of a [m][k] and column n of b [k / 4][n][k % 4].
inline void _tile_dpbssd(int sum, int left, int right) {
  using namespace emulated;
  int32_t b[64][16];
  for (int k = 0; k < 64; k++)
    for (int n = 0; n < 16; n++) b[k][n] = int8_t(At(right).row[k / 4][4 * n + k % 4]);
  for (int m = 0; m < 16; m++) {
    int32_t row[16];
    memcpy(row, At(sum).row[m], sizeof(row));
    for (int k = 0; k < 64; k++) {
      const int32_t x = int8_t(At(left).row[m][k]);
#pragma omp simd
      for (int n = 0; n < 16; n++) row[n] += x * b[k][n];
    }
    memcpy(At(sum).row[m], row, sizeof(row));
  }
}
// Of each c the products of even k and of odd k are summed apart, and then added to it.
inline void _tile_dpbf16ps(int sum, int left, int right) {
  using namespace emulated;
  float b[32][16];
  for (int k = 0; k < 32; k++)
    for (int n = 0; n < 16; n++) {
      uint16_t part;
      memcpy(&part, At(right).row[k / 2] + 4 * n + k % 2 * 2, sizeof(part));
      b[k][n] = FromBFloat16(part);
    }
  for (int m = 0; m < 16; m++) {
    float row[16], sums[2][16] = {};
    uint16_t a[32];
    memcpy(row, At(sum).row[m], sizeof(row));
    memcpy(a, At(left).row[m], sizeof(a));
    for (int k = 0; k < 32; k++) {
      const float x = FromBFloat16(a[k]);
#pragma omp simd
      for (int n = 0; n < 16; n++) sums[k % 2][n] = Flushed(std::fma(x, b[k][n], sums[k % 2][n]));
    }
    for (int n = 0; n < 16; n++)
      row[n] = Flushed(Flushed(row[n]) + Flushed(sums[0][n] + sums[1][n]));
    memcpy(At(sum).row[m], row, sizeof(row));
  }
}

// The functions around them are compiled for the processor that really is here.
#define target(...)
