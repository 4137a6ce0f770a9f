#include "cpu/amx.h"

#ifdef FRNN_HAS_AMX
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "core/sanitize.h"

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

// ---- what sanitizers do not see ----

int64_t BytesOf(Storage s) { return s == Storage::kFloat ? 4 : 2; }

// Elements [k0, k1) of each row that is packed.
void ShowInput(const void* a, Storage s, int64_t lda, int64_t rows, int64_t k0, int64_t k1) {
  for (int64_t r = 0; r < rows && kSanitized; r++)
    ShowAccess(static_cast<const char*>(a) + (r * lda + k0) * BytesOf(s), (k1 - k0) * BytesOf(s),
               false);
}
// Columns k0 .. k1 of the rows of a left operand.
void ShowRows(const Operand& out, int64_t rows, int64_t k0, int64_t k1) {
  for (int64_t r = 0; r < rows && kSanitized; r++)
    for (int64_t k = k0; k < k1; k += kRows)
      for (int p = 0; p < out.parts; p++)
        ShowAccess(out.tiles + r / kRows * out.BlockSize() + (k / kDepth * out.parts + p) * kTile +
                       r % kRows * kDepth + k % kDepth,
                   kRows * sizeof(Part), true);
}
void ShowProduct(const Operand& a, int64_t M, const Operand& b, int64_t N, const float* c,
                 int64_t ldc) {
  if (!kSanitized) return;
  ShowAccess(a.tiles, Blocks(M) * a.BlockSize() * int64_t(sizeof(Part)), false);
  ShowAccess(b.tiles, Blocks(N) * b.BlockSize() * int64_t(sizeof(Part)), false);
  for (int64_t m = 0; m < M; m++) ShowAccess(c + m * ldc, N * int64_t(sizeof(float)), true);
}

// ---- packing ----

// 16 parts as floats.
FRNN_AMX_INLINE __m512 Widen(__m256i parts) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(parts), 16));
}

// 16 elements of a storage type as floats, zero where the mask is not set.
template <Storage kStorage>
FRNN_AMX_INLINE __m512 LoadFloats(const void* p, int64_t i, __mmask16 mask) {
  if constexpr (kStorage == Storage::kFloat)
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(p) + i);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p) + i);
  return kStorage == Storage::kHalf ? _mm512_cvtph_ps(half) : Widen(half);
}

// The parts of 32 floats, each with those of `low` in its lower half.
template <int kParts>
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

// The tiles of one block of rows and depth; `a` is its first element. Pairs of adjacent k are 32 bits:
// a left tile is [row][pair], a right one [pair][column].
template <Storage kStorage, int kParts, Order kOrder, bool kLeft>
FRNN_AMX_INLINE void PackTile(const void* a, int64_t first, int64_t lda, int64_t rows, int64_t K,
                              Part* out, __m512i& largest) {
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
        low = LoadFloats<kStorage>(a, first + i * lda, low_mask);
        high = LoadFloats<kStorage>(a, first + i * lda + 16, high_mask);
      }
    } else {
      if (2 * i < K) low = LoadFloats<kStorage>(a, first + 2 * i * lda, low_mask);
      if (2 * i + 1 < K) high = LoadFloats<kStorage>(a, first + (2 * i + 1) * lda, high_mask);
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

template <Storage kStorage, int kParts, Order kOrder, bool kLeft>
FRNN_AMX bool PackBlocks(const void* a, int64_t lda, int64_t rows, int64_t K, const Operand& out) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i == 0 || i < Blocks(rows); i++)
    for (int64_t k = 0; k < DepthBlocks(K); k++) {
      const int64_t along = k * kDepth, across = i * kRows;
      PackTile<kStorage, kParts, kOrder, kLeft>(
          a, kOrder == Order::kAlong ? across * lda + along : along * lda + across, lda,
          rows - across < kRows ? rows - across : kRows, K - along < kDepth ? K - along : kDepth,
          out.tiles + i * out.BlockSize() + k * kParts * kTile, largest);
    }
  return Fits(largest);
}

template <Storage kStorage, int kParts>
FRNN_AMX bool PackRowsOf(const void* a, int64_t lda, int64_t rows, int64_t k0, int64_t k1,
                         int64_t K, const Operand& out) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t k = k0 / kDepth; k * kDepth < k1; k++) {
    const int64_t begin = k * kDepth;
    const uint32_t stored = Mask(k0 - begin, k1 - begin), mask = stored & Mask(0, K - begin);
    const __mmask16 low_mask = __mmask16(mask), high_mask = __mmask16(mask >> 16);
    for (int64_t r = 0; r < rows; r++) {
      const __m512 low = LoadFloats<kStorage>(a, r * lda + begin, low_mask);
      const __m512 high = LoadFloats<kStorage>(a, r * lda + begin + 16, high_mask);
      TrackLargest(largest, low);
      TrackLargest(largest, high);
      __m512i parts[kParts];
      Split(low, high, parts);
      Part* line =
          out.tiles + r / kRows * out.BlockSize() + k * kParts * kTile + r % kRows * kDepth;
#pragma GCC unroll 3
      for (int i = 0; i < kParts; i++) _mm512_mask_storeu_epi16(line + i * kTile, stored, parts[i]);
    }
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

// The products of parts (left, right), the small ones first. Each shares a part with the one before.
struct Pair {
  int left, right;
};
template <int kLeftParts, int kRightParts>
struct Pairs;
template <>
struct Pairs<3, 3> {
  static constexpr int kSmall = 5;
  static constexpr Pair kPairs[] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}};
};
template <>
struct Pairs<2, 2> {
  static constexpr int kSmall = 2;
  static constexpr Pair kPairs[] = {{1, 0}, {0, 1}};
};
template <>
struct Pairs<2, 1> {
  static constexpr int kSmall = 1;
  static constexpr Pair kPairs[] = {{1, 0}};
};
template <>
struct Pairs<1, 1> {
  static constexpr int kSmall = 0;
  static constexpr Pair kPairs[] = {{0, 0}};  // not used
};

// sums[2 i + j] = left block i times right block j.
template <int kLeftParts, int kRightParts>
FRNN_AMX void Square(const Operand& a, const Operand& b, float (*sums)[kRows * kRows]) {
  using P = Pairs<kLeftParts, kRightParts>;
  const int64_t a_step = a.BlockSize(), b_step = b.BlockSize();
  MemoryFence();
  ZeroSums();
  for (int64_t k = 0; k < a.depth_blocks && P::kSmall > 0; k++) {
    const Part *left = a.tiles + k * kLeftParts * kTile, *right = b.tiles + k * kRightParts * kTile;
#pragma GCC unroll 5
    for (int i = 0; i < P::kSmall; i++) {
      if (i == 0 || P::kPairs[i].left != P::kPairs[i - 1].left)
        LoadLeft(left + P::kPairs[i].left * kTile, a_step);
      if (i == 0 || P::kPairs[i].right != P::kPairs[i - 1].right)
        LoadRight(right + P::kPairs[i].right * kTile, b_step);
      MultiplySquare();
    }
  }
  for (int64_t k = 0; k < a.depth_blocks; k++) {
    LoadLeft(a.tiles + k * kLeftParts * kTile, a_step);
    LoadRight(b.tiles + k * kRightParts * kTile, b_step);
    MultiplySquare();
  }
  StoreSums(sums);
}

// Up to four tiles of one side times one of the other: the `many` lie `step` apart.
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

// sums[i] = the product of block i of the one side with the first block of the other.
template <int kLeftParts, int kRightParts, int kCount, bool kManyLeft>
FRNN_AMX void Strip(const Operand& a, const Operand& b, float (*sums)[kRows * kRows]) {
  using P = Pairs<kLeftParts, kRightParts>;
  const int64_t step = kManyLeft ? a.BlockSize() : b.BlockSize();
  const Part *left = a.tiles, *right = b.tiles;
  MemoryFence();
  ZeroSums();
  for (int64_t k = 0; k < a.depth_blocks && P::kSmall > 0; k++) {
#pragma GCC unroll 5
    for (int i = 0; i < P::kSmall; i++) {
      const Part* l = left + (k * kLeftParts + P::kPairs[i].left) * kTile;
      const Part* r = right + (k * kRightParts + P::kPairs[i].right) * kTile;
      MultiplyStrip<kCount, kManyLeft>(kManyLeft ? l : r, step, kManyLeft ? r : l);
    }
  }
  for (int64_t k = 0; k < a.depth_blocks; k++) {
    const Part *l = left + k * kLeftParts * kTile, *r = right + k * kRightParts * kTile;
    MultiplyStrip<kCount, kManyLeft>(kManyLeft ? l : r, step, kManyLeft ? r : l);
  }
  StoreSums(sums);
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

bool PackRows(const void* a, Storage s, int64_t lda, int64_t rows, int64_t k0, int64_t k1,
              int64_t K, const Operand& out) {
  ShowInput(a, s, lda, rows, k0, k1 < K ? k1 : K);
  ShowRows(out, rows, k0, k1);
  switch (out.parts) {
    case 1:
      return s == Storage::kFloat ? PackRowsOf<Storage::kFloat, 1>(a, lda, rows, k0, k1, K, out)
                                  : PackRowsOf<Storage::kBFloat16, 1>(a, lda, rows, k0, k1, K, out);
    case 2:
      return s == Storage::kFloat ? PackRowsOf<Storage::kFloat, 2>(a, lda, rows, k0, k1, K, out)
                                  : PackRowsOf<Storage::kHalf, 2>(a, lda, rows, k0, k1, K, out);
    default:
      return PackRowsOf<Storage::kFloat, 3>(a, lda, rows, k0, k1, K, out);
  }
}

bool PackLeftAcross(const float* a, int64_t lda, int64_t rows, int64_t K, const Operand& out) {
  ShowInput(a, Storage::kFloat, lda, K, 0, rows);
  return out.parts == 2
             ? PackBlocks<Storage::kFloat, 2, Order::kAcross, true>(a, lda, rows, K, out)
             : PackBlocks<Storage::kFloat, 3, Order::kAcross, true>(a, lda, rows, K, out);
}

namespace {
template <Storage kStorage, int kParts>
bool PackRightOf(const void* b, int64_t ldb, Order order, int64_t columns, int64_t K,
                 const Operand& out) {
  return order == Order::kAlong
             ? PackBlocks<kStorage, kParts, Order::kAlong, false>(b, ldb, columns, K, out)
             : PackBlocks<kStorage, kParts, Order::kAcross, false>(b, ldb, columns, K, out);
}
}  // namespace

bool PackRight(const void* b, Storage s, int64_t ldb, Order order, int64_t columns, int64_t K,
               const Operand& out) {
  const bool along = order == Order::kAlong;
  ShowInput(b, s, ldb, along ? columns : K, 0, along ? K : columns);
  switch (out.parts) {
    case 1:
      return s == Storage::kFloat
                 ? PackRightOf<Storage::kFloat, 1>(b, ldb, order, columns, K, out)
                 : PackRightOf<Storage::kBFloat16, 1>(b, ldb, order, columns, K, out);
    case 2:
      return s == Storage::kFloat ? PackRightOf<Storage::kFloat, 2>(b, ldb, order, columns, K, out)
                                  : PackRightOf<Storage::kHalf, 2>(b, ldb, order, columns, K, out);
    default:
      return PackRightOf<Storage::kFloat, 3>(b, ldb, order, columns, K, out);
  }
}

namespace {
template <int kLeftParts, int kRightParts>
FRNN_AMX void MultiplyParts(const Operand& a, int64_t M, const Operand& b, int64_t N, float* c,
                            int64_t ldc, bool accumulate) {
  const int64_t rows = Blocks(M), columns = Blocks(N);
  alignas(64) float sums[4][kRows * kRows];
  // The right operand is the larger one: walk it once.
  for (int64_t j = 0; j < columns; j += 2) {
    const bool pair = j + 1 < columns;
    const Operand right = b.Row(j * kRows);
    for (int64_t i = 0, done; i < rows; i += done) {
      const Operand left = a.Row(i * kRows);
      done = pair ? (rows - i < 2 ? 1 : 2) : (rows - i < 4 ? rows - i : 4);
      if (pair && done == 2)
        Square<kLeftParts, kRightParts>(left, right, sums);
      else if (pair)
        Strip<kLeftParts, kRightParts, 2, false>(left, right, sums);
      else if (done == 1)
        Strip<kLeftParts, kRightParts, 1, true>(left, right, sums);
      else if (done == 2)
        Strip<kLeftParts, kRightParts, 2, true>(left, right, sums);
      else if (done == 3)
        Strip<kLeftParts, kRightParts, 3, true>(left, right, sums);
      else
        Strip<kLeftParts, kRightParts, 4, true>(left, right, sums);
      const int across = pair ? 2 : 1;
      for (int64_t u = 0; u < done; u++)
        for (int v = 0; v < across; v++)
          Deliver(sums[u * across + v], M - (i + u) * kRows, N - (j + v) * kRows,
                  c + (i + u) * kRows * ldc + (j + v) * kRows, ldc, accumulate);
    }
  }
}
}  // namespace

void Multiply(const Operand& a, int64_t M, const Operand& b, int64_t N, float* c, int64_t ldc,
              bool accumulate) {
  ShowProduct(a, M, b, N, c, ldc);
  switch (a.parts * 4 + b.parts) {
    case 3 * 4 + 3:
      return MultiplyParts<3, 3>(a, M, b, N, c, ldc, accumulate);
    case 2 * 4 + 2:
      return MultiplyParts<2, 2>(a, M, b, N, c, ldc, accumulate);
    case 2 * 4 + 1:
      return MultiplyParts<2, 1>(a, M, b, N, c, ldc, accumulate);
    default:
      return MultiplyParts<1, 1>(a, M, b, N, c, ldc, accumulate);
  }
}

}  // namespace amx
}  // namespace frnn
#endif
