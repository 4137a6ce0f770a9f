#include "cpu/amx.h"

#ifdef FRNN_HAS_AMX
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#ifndef __clang__  // gcc's own vector headers (bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// The functions that use tiles and vectors; the rest of this file runs anywhere.
#define FRNN_AMX \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))
#define FRNN_AMX_INLINE FRNN_AMX inline __attribute__((always_inline))

namespace frnn {
namespace amx {
namespace {

constexpr int kBytesPerRow = 64;  // of a tile

bool Detect() {
  const char* wish = std::getenv("FUSED_RNN_CPU_CAPABILITY");
  if (wish && *wish && std::strcmp(wish, "amx")) return false;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kVectorState = 0xe6, kTileState = 3u << 17;
  if ((low & (kVectorState | kTileState)) != (kVectorState | kTileState)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if ((d & (kAmxBf16 | kAmxTile)) != (kAmxBf16 | kAmxTile)) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5)) return false;  // AVX512-BF16
  // Linux gives the 8 KB of state per thread on request only (arch_prctl(2)).
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Every register is a full tile.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);
constexpr TileConfig kConfig = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

FRNN_AMX void LoadConfig() { _tile_loadconfig(&kConfig); }
FRNN_AMX void ReleaseTiles() { _tile_release(); }

// ---- packing ----

// 16 parts as floats.
FRNN_AMX_INLINE __m512 Widen(__m256i parts) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(parts), 16));
}

// The kParts of 32 floats, each with those of `low` in its lower half.
FRNN_AMX_INLINE void Split(__m512 low, __m512 high, __m512i (&parts)[kParts]) {
#pragma GCC unroll 3
  for (int i = 0; i < kParts; i++) {
    parts[i] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    if (i + 1 < kParts) {
      low = _mm512_sub_ps(low, Widen(_mm512_castsi512_si256(parts[i])));
      high = _mm512_sub_ps(high, Widen(_mm512_extracti64x4_epi64(parts[i], 1)));
    }
  }
}

FRNN_AMX_INLINE void TrackLargest(__m512i& largest, __m512 x) {
  const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
  largest = _mm512_max_epu32(largest, magnitude);
}
FRNN_AMX_INLINE bool Fits(__m512i largest) {
  return _mm512_cmp_epu32_mask(largest, _mm512_castps_si512(_mm512_set1_ps(kLargest)),
                               _MM_CMPINT_NLE) == 0;
}

// Lanes [begin, end) of 32.
inline uint32_t Mask(int64_t begin, int64_t end) {
  const auto below = [](int64_t n) { return n <= 0 ? 0u : (n >= 32 ? ~0u : (1u << n) - 1); };
  return below(end) & ~below(begin);
}

FRNN_AMX_INLINE void Transpose16(__m512i (&v)[16]) {
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

// The kParts tiles of one block of rows and depth. Pairs of adjacent k are 32 bits: a left tile is
// [row][pair], a right one [pair][column].
template <Order kOrder, bool kLeft>
FRNN_AMX_INLINE void PackTile(const float* a, int64_t lda, int64_t rows, int64_t K, Part* out,
                              __m512i& largest) {
  constexpr bool kAlong = kOrder == Order::kAlong;
  // Takes the 16 lanes of two vectors in turn.
  const __m512i interleave =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const uint32_t mask = kAlong ? Mask(0, K) : Mask(0, rows);
  const __mmask16 low_mask = __mmask16(mask), high_mask = kAlong ? __mmask16(mask >> 16) : low_mask;
  alignas(64) __m512i lines[kParts][16];
  for (int i = 0; i < 16; i++) {
    __m512 low = _mm512_setzero_ps(), high = low;
    if constexpr (kAlong) {
      if (i < rows) {
        low = _mm512_maskz_loadu_ps(low_mask, a + i * lda);
        high = _mm512_maskz_loadu_ps(high_mask, a + i * lda + 16);
      }
    } else {
      if (2 * i < K) low = _mm512_maskz_loadu_ps(low_mask, a + 2 * i * lda);
      if (2 * i + 1 < K) high = _mm512_maskz_loadu_ps(high_mask, a + (2 * i + 1) * lda);
    }
    TrackLargest(largest, low);
    TrackLargest(largest, high);
    __m512i parts[kParts];
    Split(low, high, parts);
#pragma GCC unroll 3
    for (int p = 0; p < kParts; p++)
      lines[p][i] = kAlong ? parts[p] : _mm512_permutexvar_epi16(interleave, parts[p]);
  }
  for (int p = 0; p < kParts; p++) {
    if constexpr (kAlong != kLeft) Transpose16(lines[p]);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm512_store_si512(out + p * kTile + i * kDepth, lines[p][i]);
  }
}

template <Order kOrder, bool kLeft>
FRNN_AMX bool PackBlocks(const float* a, int64_t lda, int64_t rows, int64_t K, Part* out,
                         int64_t depth_blocks) {
  constexpr int64_t kRowStep = kRows, kDepthStep = kDepth;
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i == 0 || i < Blocks(rows); i++)
    for (int64_t k = 0; k < DepthBlocks(K); k++) {
      const int64_t along = k * kDepthStep, across = i * kRowStep;
      PackTile<kOrder, kLeft>(
          kOrder == Order::kAlong ? a + across * lda + along : a + along * lda + across, lda,
          rows - across < kRows ? rows - across : kRows, K - along < kDepth ? K - along : kDepth,
          out + i * BlockSize(depth_blocks) + k * kParts * kTile, largest);
    }
  return Fits(largest);
}

// ---- products ----

// The tile intrinsics do not tell the compiler which memory they read and write.
inline void MemoryFence() { asm volatile("" ::: "memory"); }

// The tile registers are written as literals, as the intrinsics want them. Sums are in 0 .. 3.
// Two by two tiles: the left ones in 4 and 5, the right ones in 6 and 7.
FRNN_AMX_INLINE void LoadLeft(const Part* a, int64_t step) {
  _tile_loadd(4, a, kBytesPerRow);
  _tile_loadd(5, a + step, kBytesPerRow);
}
FRNN_AMX_INLINE void LoadRight(const Part* b, int64_t step) {
  _tile_loadd(6, b, kBytesPerRow);
  _tile_loadd(7, b + step, kBytesPerRow);
}
FRNN_AMX_INLINE void MultiplySquare() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}
FRNN_AMX_INLINE void ZeroSums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

FRNN_AMX_INLINE void StoreSums(float (*sums)[kRows * kRows]) {
  _tile_stored(0, sums[0], kBytesPerRow);
  _tile_stored(1, sums[1], kBytesPerRow);
  _tile_stored(2, sums[2], kBytesPerRow);
  _tile_stored(3, sums[3], kBytesPerRow);
  MemoryFence();
}

// sums[2 i + j] = left block i times right block j; blocks lie `step` apart.
FRNN_AMX void Square(const Part* a, const Part* b, int64_t step, int64_t depth_blocks,
                     float (*sums)[kRows * kRows]) {
  MemoryFence();
  ZeroSums();
  for (int64_t k = 0; k < depth_blocks; k++) {
    const Part *left = a + k * kParts * kTile, *right = b + k * kParts * kTile;
    LoadLeft(left + 2 * kTile, step);
    LoadRight(right, step);
    MultiplySquare();
    LoadLeft(left + kTile, step);
    MultiplySquare();
    LoadRight(right + kTile, step);
    MultiplySquare();
    LoadLeft(left, step);
    MultiplySquare();
    LoadRight(right + 2 * kTile, step);
    MultiplySquare();
  }
  for (int64_t k = 0; k < depth_blocks; k++) {
    LoadLeft(a + k * kParts * kTile, step);
    LoadRight(b + k * kParts * kTile, step);
    MultiplySquare();
  }
  StoreSums(sums);
}

// Up to four tiles of one side times one of the other: `many` tiles lie `step` apart.
template <int kCount, bool kManyLeft>
FRNN_AMX_INLINE void MultiplyStrip(const Part* many, int64_t step, const Part* one) {
  _tile_loadd(7, one, kBytesPerRow);
#define FRNN_STRIP(i, tile)                           \
  if constexpr (kCount > i) {                         \
    _tile_loadd(tile, many + i * step, kBytesPerRow); \
    if constexpr (kManyLeft) {                        \
      _tile_dpbf16ps(i, tile, 7);                     \
    } else {                                          \
      _tile_dpbf16ps(i, 7, tile);                     \
    }                                                 \
  }
  FRNN_STRIP(0, 4)
  FRNN_STRIP(1, 5)
  FRNN_STRIP(2, 6)
  FRNN_STRIP(3, 4)
#undef FRNN_STRIP
}

template <int kCount, bool kManyLeft>
FRNN_AMX void Strip(const Part* many, const Part* one, int64_t step, int64_t depth_blocks,
                    float (*sums)[kRows * kRows]) {
  MemoryFence();
  ZeroSums();
  // The order of the sum in Square, (left part, right part).
  static constexpr int kSmall[5][2] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}};
  for (int64_t k = 0; k < depth_blocks; k++) {
    const Part *m = many + k * kParts * kTile, *o = one + k * kParts * kTile;
#pragma GCC unroll 5
    for (int i = 0; i < 5; i++)
      MultiplyStrip<kCount, kManyLeft>(m + kSmall[i][kManyLeft ? 0 : 1] * kTile, step,
                                       o + kSmall[i][kManyLeft ? 1 : 0] * kTile);
  }
  for (int64_t k = 0; k < depth_blocks; k++)
    MultiplyStrip<kCount, kManyLeft>(many + k * kParts * kTile, step, one + k * kParts * kTile);
  StoreSums(sums);
}

template <bool kManyLeft>
FRNN_AMX void StripOf(int64_t count, const Part* many, const Part* one, int64_t step,
                      int64_t depth_blocks, float (*sums)[kRows * kRows]) {
  switch (count) {
    case 1:
      return Strip<1, kManyLeft>(many, one, step, depth_blocks, sums);
    case 2:
      return Strip<2, kManyLeft>(many, one, step, depth_blocks, sums);
    case 3:
      return Strip<3, kManyLeft>(many, one, step, depth_blocks, sums);
    default:
      return Strip<4, kManyLeft>(many, one, step, depth_blocks, sums);
  }
}

// c[rows][columns] (+)= sum, at most one tile.
FRNN_AMX_INLINE void Deliver(const float* sum, int64_t rows, int64_t columns, float* c, int64_t ldc,
                             bool accumulate) {
  const __mmask16 mask = __mmask16(Mask(0, columns < kRows ? columns : kRows));
  for (int64_t r = 0; r < rows && r < kRows; r++) {
    __m512 v = _mm512_load_ps(sum + r * kRows);
    if (accumulate) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, c + r * ldc));
    _mm512_mask_storeu_ps(c + r * ldc, mask, v);
  }
}

}  // namespace

bool Available() {
  static const bool available = Detect();
  return available;
}

Session::Session(bool on) : on_(on) {
  if (on_) LoadConfig();
}
Session::~Session() {
  if (on_) ReleaseTiles();
}

FRNN_AMX bool PackLeft(const float* a, int64_t lda, int64_t rows, int64_t k0, int64_t k1, int64_t K,
                       Part* out, int64_t depth_blocks) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t k = k0 / kDepth; k * kDepth < k1; k++) {
    const int64_t begin = k * kDepth;
    const uint32_t stored = Mask(k0 - begin, k1 - begin), mask = stored & Mask(0, K - begin);
    const __mmask16 low_mask = __mmask16(mask), high_mask = __mmask16(mask >> 16);
    for (int64_t r = 0; r < rows; r++) {
      const float* p = a + r * lda + begin;
      const __m512 low = _mm512_maskz_loadu_ps(low_mask, p);
      const __m512 high = _mm512_maskz_loadu_ps(high_mask, p + 16);
      TrackLargest(largest, low);
      TrackLargest(largest, high);
      __m512i parts[kParts];
      Split(low, high, parts);
      Part* line =
          out + r / kRows * BlockSize(depth_blocks) + k * kParts * kTile + r % kRows * kDepth;
#pragma GCC unroll 3
      for (int i = 0; i < kParts; i++) _mm512_mask_storeu_epi16(line + i * kTile, stored, parts[i]);
    }
  }
  return Fits(largest);
}

bool PackLeftAcross(const float* a, int64_t lda, int64_t rows, int64_t K, Part* out,
                    int64_t depth_blocks) {
  return PackBlocks<Order::kAcross, true>(a, lda, rows, K, out, depth_blocks);
}

bool PackRight(const float* b, int64_t ldb, Order order, int64_t columns, int64_t K, Part* out,
               int64_t depth_blocks) {
  return order == Order::kAlong
             ? PackBlocks<Order::kAlong, false>(b, ldb, columns, K, out, depth_blocks)
             : PackBlocks<Order::kAcross, false>(b, ldb, columns, K, out, depth_blocks);
}

FRNN_AMX void Multiply(const Part* a, int64_t M, const Part* b, int64_t N, int64_t depth_blocks,
                       float* c, int64_t ldc, bool accumulate) {
  const int64_t step = BlockSize(depth_blocks), rows = Blocks(M), columns = Blocks(N);
  alignas(64) float sums[4][kRows * kRows];
  // The right operand is the larger one: walk it once.
  for (int64_t j = 0; j < columns; j += 2) {
    const bool pair = j + 1 < columns;
    for (int64_t i = 0; i < rows;) {
      const int64_t left = rows - i;
      int64_t done_rows, done_columns = 1;
      if (pair && left >= 2) {
        Square(a + i * step, b + j * step, step, depth_blocks, sums);
        done_rows = done_columns = 2;
      } else if (pair) {
        StripOf<false>(2, b + j * step, a + i * step, step, depth_blocks, sums);
        done_rows = 1;
        done_columns = 2;
      } else {
        done_rows = left < 4 ? left : 4;
        StripOf<true>(done_rows, a + i * step, b + j * step, step, depth_blocks, sums);
      }
      for (int64_t u = 0; u < done_rows; u++)
        for (int64_t v = 0; v < done_columns; v++)
          Deliver(sums[u * done_columns + v], M - (i + u) * kRows, N - (j + v) * kRows,
                  c + (i + u) * kRows * ldc + (j + v) * kRows, ldc, accumulate);
      i += done_rows;
    }
  }
}

}  // namespace amx
}  // namespace frnn
#endif
