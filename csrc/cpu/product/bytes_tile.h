// The products of cpu/product/bytes.h, in tiles of registers.
#pragma once
// The instructions for the vectors of a tier. Where processors are emulated (tests/emulated.py) it is
// defined: they have none.
#if defined(FRNN_BYTES_BY)
#elif defined(__AVX512BW__)
#define FRNN_BYTES_BY 512
#elif !defined(__SSE2__)
#define FRNN_BYTES_BY 0
#elif defined(__AVX2__)
#define FRNN_BYTES_BY 256
#else
#define FRNN_BYTES_BY 128
#endif
#if FRNN_BYTES_BY > 0
#include <immintrin.h>
#endif

#include <limits>

#include "cpu/levels.h"
#include "cpu/product/bytes.h"

FRNN_BEGIN
namespace bytes {

using FloatLanes = Vec<float, kLanes>;
using IntLanes = Vec<int32_t, kLanes>;

// A vector of W: Add(sums, a) adds in each lane the sum of its kDepth products with those of `a`.
#if FRNN_BYTES_BY == 512
// The left side is without a sign, see Shift.
struct UnitWeights {
  static constexpr int kRegisters = 1;  // beside sums and those of the left side
  explicit UnitWeights(const int8_t* p) { memcpy(&w, p, sizeof(w)); }
  FRNN_INLINE void Add(IntLanes& sums, const IntLanes& a) const {
    asm("vpdpbusd {%2, %1, %0|%0, %1, %2}" : "+v"(sums) : "v"(a), "v"(w));
  }
  IntLanes w;
};
#endif
#if FRNN_BYTES_BY >= 256
// |w| times a, whose sign becomes that of the product: two sums of at most 127 * 127 fit in 16 bits.
struct SignedWeights {
  static constexpr int kRegisters = 5;
#if FRNN_BYTES_BY == 512
  explicit SignedWeights(const int8_t* p)
      : size(_mm512_abs_epi8(_mm512_loadu_si512(p))),
        is_negative(_mm512_movepi8_mask(_mm512_loadu_si512(p))) {}
  FRNN_INLINE void Add(IntLanes& sums, const IntLanes& a) const {
    const __m512i left = __m512i(a);
    const __m512i turned = _mm512_mask_sub_epi8(left, is_negative, _mm512_setzero_si512(), left);
    const __m512i pairs = _mm512_maddubs_epi16(size, turned);
    sums += IntLanes(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
  __m512i size;
  __mmask64 is_negative;
#else
  explicit SignedWeights(const int8_t* p)
      : w(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), size(_mm256_abs_epi8(w)) {}
  FRNN_INLINE void Add(IntLanes& sums, const IntLanes& a) const {
    const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(__m256i(a), w));
    sums += IntLanes(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  __m256i w, size;
#endif
};
#elif FRNN_BYTES_BY == 128
// Widened to 16 bits, of two units at a time.
struct SignedWeights {
  static constexpr int kRegisters = 6;
  explicit SignedWeights(const int8_t* p) {
    const __m128i w = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i sign = _mm_cmpgt_epi8(_mm_setzero_si128(), w);
    first = _mm_unpacklo_epi8(w, sign);
    second = _mm_unpackhi_epi8(w, sign);
  }
  FRNN_INLINE void Add(IntLanes& sums, const IntLanes& a) const {
    const __m128i sign = _mm_cmpgt_epi8(_mm_setzero_si128(), __m128i(a));
    const __m128i left = _mm_unpacklo_epi8(__m128i(a), sign);
    const __m128 pairs = __m128(_mm_madd_epi16(first, left));
    const __m128 others = __m128(_mm_madd_epi16(second, left));
    sums += IntLanes(_mm_shuffle_ps(pairs, others, _MM_SHUFFLE(2, 0, 2, 0))) +
            IntLanes(_mm_shuffle_ps(pairs, others, _MM_SHUFFLE(3, 1, 3, 1)));
  }
  __m128i first, second;
};
#else
// One of the bytes of each lane after the other, which a shift to the top and back extends.
struct SignedWeights {
  static constexpr int kRegisters = 5;
  explicit SignedWeights(const int8_t* p) { memcpy(&w, p, sizeof(w)); }
  FRNN_INLINE void Add(IntLanes& sums, const IntLanes& a) const {
    FRNN_UNROLL
    for (int shift = 0; shift < 32; shift += 8) sums += ((w << shift) >> 24) * ((a << shift) >> 24);
  }
  IntLanes w;
};
#endif

// Whether the processor has the instruction for such sums (VNNI) and may use it.
inline bool HasUnit() {
#if FRNN_BYTES_BY == 512
  static const bool has = __builtin_cpu_supports("avx512vnni") && HighestLevel() > Level::avx512;
  return has;
#else
  return false;
#endif
}
int Shift() { return HasUnit() ? 128 : 0; }

// Rounded to the nearest, of a tie to the even one.
FRNN_INLINE IntLanes Rounded(const FloatLanes& x) {
#if FRNN_BYTES_BY == 512
  return IntLanes(_mm512_cvtps_epi32(__m512(x)));
#elif FRNN_BYTES_BY == 256
  return IntLanes(_mm256_cvtps_epi32(__m256(x)));
#elif FRNN_BYTES_BY == 128
  return IntLanes(_mm_cvtps_epi32(__m128(x)));
#else
  IntLanes n;
  for (int i = 0; i < kLanes; i++) n[i] = int32_t(__builtin_rintf(x[i]));
  return n;
#endif
}
FRNN_INLINE FloatLanes LoadFloats(const float* p, int64_t n) {
  FloatLanes lanes{};
  if (n >= kLanes)
    memcpy(&lanes, p, sizeof(lanes));
  else
    for (int i = 0; i < int(n); i++) lanes[i] = p[i];
  return lanes;
}

// The largest of a row in magnitude: as integers, where infinity and then NaN are above all numbers.
FRNN_INLINE int32_t LargestBits(const float* a, int64_t K) {
  IntLanes most{};
  for (int64_t k = 0; k < K; k += kLanes) {
    const IntLanes size = bit_cast<IntLanes>(LoadFloats(a + k, K - k)) & 0x7fffffff;
    most = size > most ? size : most;
  }
  int32_t found = 0;
  for (int i = 0; i < kLanes; i++) found = most[i] > found ? most[i] : found;
  return found;
}

void Quantise(const float* a, int64_t lda, int64_t n, int64_t K, int shift, const Rows& out) {
  constexpr int32_t kInfinity = 0x7f800000;
  for (int64_t r = 0; r < n; r++) {
    const float* const row = a + r * lda;
    int8_t* const numbers = out.numbers + r * out.stride;
    const int32_t bits = LargestBits(row, K);
    const float largest = bit_cast<float>(bits);
    const bool fits = bits < kInfinity && largest >= kLeast;
    out.scales[r] = fits               ? largest / kMost
                    : bits < kInfinity ? 0
                                       : std::numeric_limits<float>::quiet_NaN();
    if (!fits) {
      memset(numbers, shift, size_t(PaddedDepth(K)));
      continue;
    }
    const FloatLanes factor = splat<FloatLanes>(kMost / largest);
    for (int64_t k = 0; k < K; k += kLanes) {
      const IntLanes whole = Rounded(LoadFloats(row + k, K - k) * factor) + shift;
      const auto narrow = __builtin_convertvector(whole, Vec<int8_t, kLanes>);
      const int64_t left = PaddedDepth(K) - k;
      memcpy(numbers + k, &narrow, size_t(left < kLanes ? left : kLanes));
    }
  }
}

// The sums of a tile, from all its vectors of W in turn with one of each row.
template <class Weights, int MR, int NV>
FRNN_NOINLINE void Tile(const Rows& a, const int8_t* w, int64_t depth, const float* scales,
                        const int32_t* starts, float* c, int64_t ldc) {
  constexpr int kChains = MR * NV >= 8 ? 1 : (MR * NV >= 3 ? 2 : 4);
  IntLanes sums[kChains][MR][NV];
  FRNN_UNROLL
  for (int u = 0; u < kChains; u++) {
    FRNN_UNROLL
    for (int m = 0; m < MR; m++) {
      FRNN_UNROLL
      for (int v = 0; v < NV; v++) {
        sums[u][m][v] = IntLanes{};
        if (u == 0) memcpy(&sums[u][m][v], starts + v * kLanes, sizeof(IntLanes));
      }
    }
  }
  const auto step = [&](int64_t k, IntLanes(&sum)[MR][NV]) FRNN_INLINE_LAMBDA {
    IntLanes left[MR];
    FRNN_UNROLL
    for (int m = 0; m < MR; m++) {
      int32_t numbers;
      memcpy(&numbers, a.numbers + m * a.stride + k, sizeof(numbers));
      left[m] = numbers - IntLanes{};
    }
    FRNN_UNROLL
    for (int v = 0; v < NV; v++) {
      const Weights row(w + (k / kDepth * NV + v) * kVectorBytes);
      FRNN_UNROLL
      for (int m = 0; m < MR; m++) row.Add(sum[m][v], left[m]);
    }
  };
  int64_t k = 0;
  for (; k + kChains * kDepth <= depth; k += kChains * kDepth) {
    FRNN_UNROLL
    for (int u = 0; u < kChains; u++) step(k + u * kDepth, sums[u]);
  }
  if constexpr (kChains > 1)
    for (; k < depth; k += kDepth) step(k, sums[0]);
  FRNN_UNROLL
  for (int m = 0; m < MR; m++) {
    FRNN_UNROLL
    for (int v = 0; v < NV; v++) {
      IntLanes sum = sums[0][m][v];
      FRNN_UNROLL
      for (int u = 1; u < kChains; u++) sum += sums[u][m][v];
      const FloatLanes product = __builtin_convertvector(sum, FloatLanes) *
                                 splat<FloatLanes>(a.scales[m]) *
                                 load<FloatLanes>(scales + v * kLanes);
      store<FloatLanes>(c + m * ldc + v * kLanes, product);
    }
  }
}

template <class Weights, int NV>
void MultiplyWith(int64_t M, const Rows& a, const int8_t* w, int64_t K, const float* scales,
                  const int32_t* starts, float* c, int64_t ldc) {
  constexpr int kFits = (kRegisters - Weights::kRegisters) / (NV + 1);
  constexpr int kRows = kFits > 12 ? 12 : kFits;
  ForRowBlocks<kRows>(M, [&](int rows, int64_t r) {
    const Rows left{a.numbers + r * a.stride, a.scales + r, a.stride};
    WithConstant<kRows>(rows, [&](auto mr) {
      Tile<Weights, decltype(mr)::value, NV>(left, w, PaddedDepth(K), scales, starts, c + r * ldc,
                                             ldc);
    });
  });
}

template <int NV>
void Multiply(int64_t M, const Rows& a, const int8_t* w, int64_t K, const float* scales,
              const int32_t* starts, float* c, int64_t ldc) {
#if FRNN_BYTES_BY == 512
  if (HasUnit()) return MultiplyWith<UnitWeights, NV>(M, a, w, K, scales, starts, c, ldc);
#endif
  MultiplyWith<SignedWeights, NV>(M, a, w, K, scales, starts, c, ldc);
}
#define FRNN_BYTES(NV)                                                                   \
  template void Multiply<NV>(int64_t, const Rows&, const int8_t*, int64_t, const float*, \
                             const int32_t*, float*, int64_t);
FRNN_BYTES(1)
FRNN_BYTES(2)
FRNN_BYTES(3)
FRNN_BYTES(4)
#undef FRNN_BYTES
#undef FRNN_BYTES_BY

}  // namespace bytes
FRNN_END
