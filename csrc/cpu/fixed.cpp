#include "cpu/fixed.h"

#ifdef FRNN_HAS_BF16
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/plan.h"
#include "cpu/unit.h"

#define FRNN_TILE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-int8")))
#define FRNN_TILE_INLINE FRNN_TILE inline __attribute__((always_inline))

namespace frnn {
namespace fixed {
namespace {

using namespace parts;
using Digit = int8_t;
constexpr int kDepth = DepthOf(Cut::kFixed), kDigits = TilesOf(Cut::kFixed), kTile = kRows * kDepth;
// n of the largest element: its digits are 127, 127 and, with a rounding more or less, nearly 0.
constexpr float kMost = 127 * 65536 + 127 * 256;
// Rows whose largest element is below kTiny are scaled up before they are divided by it.
constexpr float kTiny = 0x1p-100f, kUp = 0x1p80f;

Digit* Tiles(const TiledOperand& a) { return reinterpret_cast<Digit*>(a.tiles); }
int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }

// The first n of 16 lanes.
__mmask16 Lanes16(int64_t n) { return __mmask16(Mask(0, n)); }

// ---- measuring ----

// 16 elements along the depth, times their factors.
FRNN_VECTOR_INLINE __m512 LoadAlong(const float* a, const float* factors, int64_t k,
                                    __mmask16 mask) {
  const __m512 x = _mm512_maskz_loadu_ps(mask, a + k);
  return factors ? _mm512_mul_ps(x, _mm512_maskz_loadu_ps(mask, factors + k)) : x;
}

FRNN_VECTOR void MeasureAlong(const float* a, int64_t lda, int64_t rows, int64_t k0, int64_t k1,
                              const float* factors, float* largest, bool more) {
  for (int64_t r = 0; r < rows; r++) {
    __m512i found = _mm512_setzero_si512();
    for (int64_t k = k0; k < k1; k += 16)
      found = Larger(found, LoadAlong(a + r * lda, factors, k, Lanes16(k1 - k)));
    uint32_t bits = _mm512_reduce_max_epu32(found), before;
    std::memcpy(&before, largest + r, sizeof(before));
    if (more && before > bits) bits = before;
    std::memcpy(largest + r, &bits, sizeof(bits));
  }
}
FRNN_VECTOR void MeasureAcross(const float* a, int64_t lda, int64_t rows, int64_t k0, int64_t k1,
                               const float* factors, float* largest, bool more) {
  // Four vectors of columns at once: a line of memory is read before the next one is.
  for (int64_t r = 0; r < rows; r += 64) {
    __m512i found[4];
    __mmask16 mask[4];
    for (int i = 0; i < 4; i++) {
      mask[i] = Lanes16(rows - r - 16 * i);
      found[i] =
          more ? _mm512_maskz_loadu_epi32(mask[i], largest + r + 16 * i) : _mm512_setzero_si512();
    }
    for (int64_t k = k0; k < k1; k++) {
      const __m512 factor = _mm512_set1_ps(factors ? factors[k] : 1);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++)
        found[i] =
            Larger(found[i],
                   _mm512_mul_ps(factor, _mm512_maskz_loadu_ps(mask[i], a + k * lda + r + 16 * i)));
    }
    for (int i = 0; i < 4; i++) _mm512_mask_storeu_epi32(largest + r + 16 * i, mask[i], found[i]);
  }
}

// Adds 16 elements to sums of exponents and to counts.
FRNN_VECTOR_INLINE void AddSizes(__m512 x, __m512i& exponents, __m512i& counts) {
  const __m512i bits = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
  const __mmask16 some = _mm512_test_epi32_mask(bits, bits);
  exponents =
      _mm512_mask_add_epi32(exponents, some, exponents,
                            _mm512_sub_epi32(_mm512_srli_epi32(bits, 23), _mm512_set1_epi32(127)));
  counts = _mm512_mask_add_epi32(counts, some, counts, _mm512_set1_epi32(1));
}

// size_of(k) is the logarithm to base 2 of the size of elements k, in sixteenths, or kNoSize. A factor is
// what lies further than half or twice from their mean: where the other side's elements are alike, what
// one side gains the other one loses, and balancing all of it would lose by the rounding of factors.
constexpr int kNoSize = 1 << 30, kMostExponent = 60;
template <class F>
void FactorsOf(int64_t K, const F& size_of, float* factors, float* inverse) {
  int64_t sum = 0, count = 0;
  for (int64_t k = 0; k < K; k++)
    if (const int size = size_of(k); size != kNoSize) {
      sum += size;
      count++;
    }
  const int mean = count > 0 ? int(sum / count) : 0;
  for (int64_t k = 0; k < K; k++) {
    const int size = size_of(k);
    const int excess = size == kNoSize ? 0 : (size - mean) / 16;  // towards 0
    const int bounded = std::clamp(excess, -kMostExponent, kMostExponent);
    const int exponent = bounded > 0 ? bounded - 1 : (bounded < 0 ? bounded + 1 : 0);
    factors[k] = std::ldexp(1.f, exponent);
    inverse[k] = std::ldexp(1.f, -exponent);
  }
}

// False if an element is out of range.
FRNN_VECTOR bool Fits(const float* largest, int64_t rows) {
  bool fits = true;
  for (int64_t r = 0; r < rows; r++) fits &= largest[r] <= kLargest;
  return fits;
}

// ---- packing ----

// n = x * up * per_unit.
struct Scale {
  __m512 up, per_unit;
};
FRNN_VECTOR_INLINE Scale ScaleOf(__m512 largest) {
  const __m512 up =
      _mm512_mask_blend_ps(_mm512_cmp_ps_mask(largest, _mm512_set1_ps(kTiny), _CMP_LT_OQ),
                           _mm512_set1_ps(1), _mm512_set1_ps(kUp));
  const __mmask16 some = _mm512_cmp_ps_mask(largest, _mm512_setzero_ps(), _CMP_GT_OQ);
  return {up, _mm512_maskz_div_ps(some, _mm512_set1_ps(kMost), _mm512_mul_ps(largest, up))};
}

// The digits of n in the three lower bytes of each lane, the lowest first: adding 128 to each digit makes
// all bytes unsigned and carries at once.
FRNN_VECTOR_INLINE __m512i Digits(__m512 x, const Scale& scale) {
  const __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_mul_ps(x, scale.up), scale.per_unit));
  const __m512i middle = _mm512_set1_epi32(0x808080);
  return _mm512_xor_si512(_mm512_add_epi32(n, middle), middle);
}

// Of 64 adjacent k, the digits of one order each: line[p] has those of order 2 - p.
FRNN_VECTOR_INLINE void GatherAlong(const __m512i (&n)[4], __m512i (&line)[kDigits]) {
  // In each 128-bit lane, the four bytes of an order in a row: lane dwords are r, q, p, none.
  const __m512i by_order =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m512i sorted[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) sorted[i] = _mm512_shuffle_epi8(n[i], by_order);
#pragma GCC unroll 3
  for (int p = 0; p < kDigits; p++) {
    const int d = kDigits - 1 - p;
    const __m512i index = _mm512_setr_epi32(d, 4 + d, 8 + d, 12 + d, 16 + d, 20 + d, 24 + d, 28 + d,
                                            0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i low = _mm512_permutex2var_epi32(sorted[0], index, sorted[1]);
    const __m512i high = _mm512_permutex2var_epi32(sorted[2], index, sorted[3]);
    line[p] = _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1);
  }
}
// Byte i of each lane from the i-th.
FRNN_VECTOR_INLINE __m512i Blend(__m512i a, __m512i b, __m512i c, __m512i d) {
  constexpr __mmask64 kSecond = 0x2222222222222222, kThird = 2 * kSecond, kFourth = 4 * kSecond;
  return _mm512_mask_blend_epi8(
      kFourth, _mm512_mask_blend_epi8(kThird, _mm512_mask_blend_epi8(kSecond, a, b), c), d);
}
// Of 16 rows at four adjacent k: lanes are rows, bytes the k.
FRNN_VECTOR_INLINE void GatherAcross(const __m512i (&n)[4], __m512i (&line)[kDigits]) {
  line[2] = Blend(n[0], _mm512_slli_epi32(n[1], 8), _mm512_slli_epi32(n[2], 16),
                  _mm512_slli_epi32(n[3], 24));
  line[1] = Blend(_mm512_srli_epi32(n[0], 8), n[1], _mm512_slli_epi32(n[2], 8),
                  _mm512_slli_epi32(n[3], 16));
  line[0] = Blend(_mm512_srli_epi32(n[0], 16), _mm512_srli_epi32(n[1], 8), n[2],
                  _mm512_slli_epi32(n[3], 8));
}

// The tiles of one block of rows and depth; `a` is its first element. A left tile is [row][k], a right
// one [k / 4][column][k % 4].
template <Order kOrder, bool kLeft>
FRNN_VECTOR_INLINE void PackTile(const float* a, int64_t lda, int64_t rows, int64_t K,
                                 const float* factors, const float* largest, Digit* out) {
  constexpr bool kAlong = kOrder == Order::kAlong;
  alignas(64) __m512i lines[kDigits][16];
  const Scale across = ScaleOf(_mm512_maskz_loadu_ps(kAlong ? 0 : Lanes16(rows), largest));
  for (int i = 0; i < 16; i++) {
    __m512i n[4], line[kDigits];
    const Scale scale = kAlong ? ScaleOf(_mm512_set1_ps(i < rows ? largest[i] : 0)) : across;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const int64_t k = kAlong ? 16 * j : 4 * i + j;
      if constexpr (kAlong) {
        n[j] = Digits(LoadAlong(a + i * lda, factors, k, i < rows ? Lanes16(K - k) : 0), scale);
      } else {
        const __m512 x = _mm512_maskz_loadu_ps(k < K ? Lanes16(rows) : 0, a + k * lda);
        n[j] = Digits(_mm512_mul_ps(x, _mm512_set1_ps(factors && k < K ? factors[k] : 1)), scale);
      }
    }
    if constexpr (kAlong)
      GatherAlong(n, line);
    else
      GatherAcross(n, line);
#pragma GCC unroll 3
    for (int p = 0; p < kDigits; p++) lines[p][i] = line[p];
  }
  for (int p = 0; p < kDigits; p++) {
    if constexpr (kAlong != kLeft) Transpose16(lines[p]);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm512_store_si512(out + p * kTile + i * kDepth, lines[p][i]);
  }
}

template <Order kOrder, bool kLeft>
FRNN_VECTOR void PackBlocks(const float* a, int64_t lda, int64_t rows, int64_t K,
                            const TiledOperand& out) {
  for (int64_t i = 0; i == 0 || i < Blocks(rows); i++)
    for (int64_t k = 0; k < DepthBlocks(K, Cut::kFixed); k++) {
      const int64_t along = k * kDepth, across = i * kRows;
      PackTile<kOrder, kLeft>(
          a + (kOrder == Order::kAlong ? across * lda + along : along * lda + across), lda,
          Least(rows - across, kRows), Least(K - along, kDepth),
          out.factors ? out.factors + along : nullptr, out.largest + across,
          Tiles(out.Row(across)) + k * kDigits * kTile);
    }
}

FRNN_VECTOR void PackRowsOf(const float* a, int64_t lda, int64_t rows, int64_t k0, int64_t k1,
                            int64_t K, const TiledOperand& out) {
  for (int64_t r = 0; r < rows; r++) {
    const Scale scale = ScaleOf(_mm512_set1_ps(out.largest[r]));
    Digit* row = Tiles(out.Row(r / kRows * kRows)) + r % kRows * kDepth;
    for (int64_t begin = k0 / kDepth * kDepth; begin < k1; begin += kDepth) {
      __m512i n[4], line[kDigits];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const int64_t k = begin + 16 * j;
        const __mmask16 mask = k < k0 ? 0 : Lanes16(Least(k1, K) - k);
        n[j] = Digits(LoadAlong(a + r * lda, out.factors, k, mask), scale);
      }
      GatherAlong(n, line);
      const __mmask64 stored = Mask(k0 - begin, k1 - begin);
#pragma GCC unroll 3
      for (int p = 0; p < kDigits; p++)
        _mm512_mask_storeu_epi8(row + (begin / kDepth * kDigits + p) * kTile, stored, line[p]);
    }
  }
}

// ---- products ----

// The sums of the three orders of one or two blocks of c, in registers 2 * order and 2 * order + 1.
// Each block of the depth adds them in an order in which none waits for the one before. kTwoLeft: two
// left blocks times one right block, else the other way round.
template <bool kTwo, bool kTwoLeft>
FRNN_TILE_INLINE void SumDigits(const Digit* one, const Digit* two, int64_t step, int64_t depth) {
  for (int64_t k = 0; k < depth; k++) {
    // Register 6 holds digits of the one block, 7 those of either of two.
#define FRNN_ONE(p) _tile_loadd(6, one + p * kTile, kBytesPerRow)
#define FRNN_TWO(p, first, second)                        \
  _tile_loadd(7, two + p * kTile, kBytesPerRow);          \
  if constexpr (kTwoLeft) {                               \
    _tile_dpbssd(first, 7, 6);                            \
  } else {                                                \
    _tile_dpbssd(first, 6, 7);                            \
  }                                                       \
  if constexpr (kTwo) {                                   \
    _tile_loadd(7, two + step + p * kTile, kBytesPerRow); \
    if constexpr (kTwoLeft) {                             \
      _tile_dpbssd(second, 7, 6);                         \
    } else {                                              \
      _tile_dpbssd(second, 6, 7);                         \
    }                                                     \
  }
    FRNN_ONE(2);
    FRNN_TWO(0, 4, 5)
    FRNN_ONE(0);
    FRNN_TWO(0, 0, 1)
    FRNN_TWO(2, 4, 5)
    FRNN_TWO(1, 2, 3)
    FRNN_ONE(1);
    FRNN_TWO(1, 4, 5)
    FRNN_TWO(0, 2, 3)
#undef FRNN_ONE
#undef FRNN_TWO
    one += kDigits * kTile;
    two += kDigits * kTile;
  }
}

FRNN_VECTOR_INLINE __m512 LoadSum(const int32_t* sums, int order, int row) {
  return _mm512_cvtepi32_ps(_mm512_load_si512(sums + (order * kRows + row) * kRows));
}
// c[rows][columns] = or += the sums of one block: [order][row][column].
FRNN_VECTOR_INLINE void Combine(const int32_t* sums, int64_t rows, int64_t columns,
                                const float* largest_a, const float* largest_b, float* c,
                                int64_t ldc, bool accumulate) {
  constexpr float kUnit = 65536.f / kMost;  // of the sum of order 0
  const __mmask16 mask = Lanes16(columns);
  const __m512 per_order = _mm512_set1_ps(1.f / 256), unit = _mm512_set1_ps(kUnit * kUnit);
  const __m512 of_column = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, largest_b), unit);
  for (int r = 0; r < rows; r++) {
    const __m512 low = _mm512_fmadd_ps(LoadSum(sums, 2, r), per_order, LoadSum(sums, 1, r));
    const __m512 n = _mm512_fmadd_ps(low, per_order, LoadSum(sums, 0, r));
    const __m512 scaled = _mm512_mul_ps(n, _mm512_set1_ps(largest_a[r]));
    float* out = c + r * ldc;
    const __m512 before = accumulate ? _mm512_maskz_loadu_ps(mask, out) : _mm512_setzero_ps();
    _mm512_mask_storeu_ps(out, mask, _mm512_fmadd_ps(scaled, of_column, before));
  }
}

// c[rows][columns] = or += the product of one or two left blocks and one right block, or of one and two,
// over `depth` blocks of the depth from block `k` on.
template <bool kTwo, bool kTwoLeft>
FRNN_TILE void MultiplyBlock(const TiledOperand& a, const TiledOperand& b, int64_t k, int64_t depth,
                             int64_t rows, int64_t columns, float* c, int64_t ldc,
                             bool accumulate) {
  alignas(64) int32_t sums[1 + kTwo][kDigits][kRows * kRows];
  _tile_zero(0);
  _tile_zero(2);
  _tile_zero(4);
  if constexpr (kTwo) {
    _tile_zero(1);
    _tile_zero(3);
    _tile_zero(5);
  }
  const Digit *left = Tiles(a) + k * kDigits * kTile, *right = Tiles(b) + k * kDigits * kTile;
  MemoryFence();
  SumDigits<kTwo, kTwoLeft>(kTwoLeft ? right : left, kTwoLeft ? left : right,
                            (kTwoLeft ? a : b).BlockSize() * int64_t(sizeof(TileWord)), depth);
  _tile_stored(0, sums[0][0], kBytesPerRow);
  _tile_stored(2, sums[0][1], kBytesPerRow);
  _tile_stored(4, sums[0][2], kBytesPerRow);
  if constexpr (kTwo) {
    _tile_stored(1, sums[1][0], kBytesPerRow);
    _tile_stored(3, sums[1][1], kBytesPerRow);
    _tile_stored(5, sums[1][2], kBytesPerRow);
  }
  MemoryFence();
  Combine(sums[0][0], Least(rows, kRows), columns, a.largest, b.largest, c, ldc, accumulate);
  if constexpr (kTwo && kTwoLeft)
    Combine(sums[1][0], Least(rows - kRows, kRows), columns, a.largest + kRows, b.largest,
            c + kRows * ldc, ldc, accumulate);
  if constexpr (kTwo && !kTwoLeft)
    Combine(sums[1][0], Least(rows, kRows), columns - kRows, a.largest, b.largest + kRows,
            c + kRows, ldc, accumulate);
}

}  // namespace

void Measure(const float* a, int64_t lda, Order order, int64_t rows, int64_t k0, int64_t k1,
             const float* factors, float* largest, bool more) {
  order == Order::kAlong ? MeasureAlong(a, lda, rows, k0, k1, factors, largest, more)
                         : MeasureAcross(a, lda, rows, k0, k1, factors, largest, more);
}

FRNN_VECTOR void MeasureRows(const float* w, int64_t ldw, int64_t K, int64_t begin, int64_t end,
                             ExponentSum* sizes) {
  for (int64_t k = 0; k < K; k++) {
    __m512i exponents = _mm512_setzero_si512(), counts = exponents;
    for (int64_t i = begin; i < end; i += 16)
      AddSizes(_mm512_maskz_loadu_ps(Lanes16(end - i), w + k * ldw + i), exponents, counts);
    sizes[k] = {_mm512_reduce_add_epi32(exponents), _mm512_reduce_add_epi32(counts)};
  }
}

FRNN_VECTOR void MeasureColumns(const float* w, int64_t ldw, int64_t K, int64_t begin, int64_t end,
                                ExponentSum* sizes, bool more) {
  for (int64_t k = 0; k < K; k += 64) {  // a line of memory is read before the next one is
    __m512i exponents[4] = {}, counts[4] = {};
    for (int64_t r = begin; r < end; r++)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++)
        AddSizes(_mm512_maskz_loadu_ps(Lanes16(K - k - 16 * i), w + r * ldw + k + 16 * i),
                 exponents[i], counts[i]);
    alignas(64) int32_t e[64], n[64];
    for (int i = 0; i < 4; i++) {
      _mm512_store_si512(e + 16 * i, exponents[i]);
      _mm512_store_si512(n + 16 * i, counts[i]);
    }
    for (int64_t i = 0; i < 64 && k + i < K; i++) {
      const ExponentSum before = more ? sizes[k + i] : ExponentSum{0, 0};
      sizes[k + i] = {before.exponents + e[i], before.count + n[i]};
    }
  }
}

void Factors(const ExponentSum* sizes, int64_t stride, int count, int64_t K, float* factors,
             float* inverse) {
  const auto size_of = [&](int64_t k) {
    ExponentSum size{0, 0};
    for (int i = 0; i < count; i++) {
      size.exponents += sizes[i * stride + k].exponents;
      size.count += sizes[i * stride + k].count;
    }
    return size.count > 0 ? int(int64_t(size.exponents) * 16 / size.count) : kNoSize;
  };
  FactorsOf(K, size_of, factors, inverse);
}

void Factors(const float* means, int64_t K, float* factors, float* inverse) {
  const auto size_of = [&](int64_t k) {
    uint32_t bits;
    std::memcpy(&bits, means + k, sizeof(bits));
    return bits == 0 ? kNoSize : 16 * (int(bits >> 23) - 127);
  };
  FactorsOf(K, size_of, factors, inverse);
}

FRNN_VECTOR void Largest(const float* measured, int64_t stride, int count, int64_t rows,
                         float* out) {
  for (int64_t r = 0; r < rows; r += 16) {
    const __mmask16 mask = Lanes16(rows - r);
    __m512i found = _mm512_setzero_si512();
    for (int i = 0; i < count; i++)
      found = Larger(found, _mm512_maskz_loadu_ps(mask, measured + i * stride + r));
    _mm512_mask_storeu_epi32(out + r, mask, found);
  }
}

bool PackRows(const float* a, int64_t lda, int64_t rows, int64_t k0, int64_t k1, int64_t K,
              const TiledOperand& out, bool measured) {
  if (!measured)
    Measure(a, lda, Order::kAlong, rows, k0, Least(k1, K), out.factors, out.largest, false);
  PackRowsOf(a, lda, rows, k0, k1, K, out);
  return Fits(out.largest, rows);
}

bool PackLeftAcross(const float* a, int64_t lda, int64_t rows, int64_t K, const TiledOperand& out) {
  Measure(a, lda, Order::kAcross, rows, 0, K, out.factors, out.largest, false);
  PackBlocks<Order::kAcross, true>(a, lda, rows, K, out);
  return Fits(out.largest, rows);
}

bool PackRight(const float* b, int64_t ldb, Order order, int64_t columns, int64_t K,
               const TiledOperand& out, bool measured) {
  if (!measured) Measure(b, ldb, order, columns, 0, K, out.factors, out.largest, false);
  // The padding of c may be computed too: zero times this.
  const int64_t padded = (columns > 0 ? Blocks(columns) : 1) * kRows;
  for (int64_t r = columns > 0 ? columns : 0; r < padded; r++) out.largest[r] = 0;
  if (order == Order::kAlong)
    PackBlocks<Order::kAlong, false>(b, ldb, columns, K, out);
  else
    PackBlocks<Order::kAcross, false>(b, ldb, columns, K, out);
  return Fits(out.largest, columns);
}

void Multiply(const TiledOperand& a, int64_t M, const TiledOperand& b, int64_t N, float* c,
              int64_t ldc, bool accumulate, bool backwards) {
  const int64_t rows = Blocks(M), columns = Blocks(N), depth = a.depth_blocks;
  constexpr int64_t kAtOnce = cpu::kFixedDepthAtOnce;
  for (int64_t k = 0; k < depth; k += kAtOnce) {
    const int64_t count = Least(depth - k, kAtOnce);
    const auto block = [&](int64_t i, int64_t j, auto two, auto two_left) {
      MultiplyBlock<decltype(two)::value, decltype(two_left)::value>(
          a.Row(i * kRows), b.Row(j * kRows), k, count, M - i * kRows, N - j * kRows,
          c + i * kRows * ldc + j * kRows, ldc, accumulate || k > 0);
    };
    int64_t i = 0;
    for (; i + 1 < rows; i += 2)
      for (int64_t step = 0; step < columns; step++)
        block(i, backwards ? columns - 1 - step : step, std::true_type(), std::true_type());
    if (i == rows) continue;
    int64_t j = 0;
    for (; j + 1 < columns; j += 2) block(i, j, std::true_type(), std::false_type());
    if (j < columns) block(i, j, std::false_type(), std::true_type());
  }
}

}  // namespace fixed
}  // namespace frnn
#endif
