#include "cpu/parts.h"

#include "cpu/fixed.h"
#include "cpu/plan.h"

#ifdef FRNN_HAS_BF16
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstring>
#include <type_traits>

#include "core/macros.h"
#include "core/sanitize.h"
#include "cpu/levels.h"
#include "cpu/unit.h"

// The functions that use vectors of bfloat16, and those that use tiles besides; the rest of this file
// runs anywhere.
#define FRNN_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define FRNN_BF16_INLINE FRNN_BF16 inline __attribute__((always_inline))
#define FRNN_TILE \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))
#define FRNN_TILE_INLINE FRNN_TILE inline __attribute__((always_inline))

namespace frnn {
namespace parts {
namespace {

// The best of a few measurements of 12 chains of multiply-adds, of bfloat16 pairs or of floats.
template <bool kPairs>
FRNN_BF16 double Seconds() {
  double best = 1;
  for (int measurement = 0; measurement < 10; measurement++) {
    __m512 sums[12] = {};
    const __m512 one = _mm512_set1_ps(1);
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < 200; i++)
#pragma GCC unroll 12
      for (__m512& sum : sums) {
        sum = kPairs ? _mm512_dpbf16_ps(sum, (__m512bh)one, (__m512bh)one)
                     : _mm512_fmadd_ps(one, one, sum);
        FRNN_KEEP_IN_REGISTER(sum);
      }
    for (const __m512& sum : sums) asm volatile("" : : "m"(sum));  // a result that is used
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
    if (passed.count() < best) best = passed.count();
  }
  return best;
}
// Some processors have the instruction at the rate of two floats' multiply-adds, others at that of half
// a one's: then converting to float once is better.
bool PairsPay() { return Seconds<true>() < 1.5 * Seconds<false>(); }

// FUSED_RNN_CPU_CAPABILITY asks for less than there is: amx_bf16 for tiles without fixed point,
// avx512_bf16 for vectors, whether they pay or not, and anything lower for none.
__attribute__((target("xsave"))) MatrixUnit Detect() {
  const Level highest = HighestLevel();
  if (highest < Level::avx512_bf16) return MatrixUnit::kNone;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return MatrixUnit::kNone;
  const uint64_t enabled = _xgetbv(0);  // register states that the system keeps
  constexpr unsigned kVectorState = 0xe6, kTileState = 3u << 17;
  constexpr unsigned kAvx512Bf16 = 1u << 5, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24,
                     kAmxInt8 = 1u << 25;
  if ((enabled & kVectorState) != kVectorState) return MatrixUnit::kNone;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kAvx512Bf16)) return MatrixUnit::kNone;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return MatrixUnit::kNone;
  const bool tiles = (enabled & kTileState) == kTileState &&
                     (d & (kAmxBf16 | kAmxTile)) == (kAmxBf16 | kAmxTile) &&
                     highest >= Level::amx_bf16;
  // Linux gives the 8 KB of state per thread on request only (arch_prctl(2)).
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (tiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0)
    return d & kAmxInt8 && highest >= Level::amx ? MatrixUnit::kFixedTiles : MatrixUnit::kTiles;
  return highest == Level::avx512_bf16 || PairsPay() ? MatrixUnit::kVectors : MatrixUnit::kNone;
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

FRNN_TILE void LoadConfig() { _tile_loadconfig(&kConfig); }
FRNN_TILE void ReleaseTiles() { _tile_release(); }

// ---- what sanitizers do not see ----

// Elements [k0, k1) of each row that is packed.
void ShowInput(const void* a, Storage s, int64_t lda, int64_t rows, int64_t k0, int64_t k1) {
  for (int64_t r = 0; r < rows && kSanitized; r++)
    ShowAccess(static_cast<const char*>(a) + (r * lda + k0) * StorageSize(s),
               (k1 - k0) * StorageSize(s), false);
}
// Columns k0 .. k1 of the rows of a left operand.
void ShowRows(const TiledOperand& out, int64_t rows, int64_t k0, int64_t k1) {
  const int parts = TilesOf(out.cut), depth = DepthOf(out.cut);
  for (int64_t r = 0; r < rows && kSanitized; r++)
    for (int64_t k = k0; k < k1; k += kRows)
      for (int p = 0; p < parts; p++)
        ShowAccess(reinterpret_cast<char*>(out.tiles + r / kRows * out.BlockSize() +
                                           (k / depth * parts + p) * kTile) +
                       r % kRows * kBytesPerRow + k % depth * kBytesPerRow / depth,
                   kRows * kBytesPerRow / depth, true);
}
void ShowProduct(const TiledOperand& a, int64_t M, const TiledOperand& b, int64_t N, const float* c,
                 int64_t ldc) {
  if (!kSanitized) return;
  ShowAccess(a.tiles, Blocks(M) * a.BlockSize() * int64_t(sizeof(TileWord)), false);
  ShowAccess(b.tiles, Blocks(N) * b.BlockSize() * int64_t(sizeof(TileWord)), false);
  for (int64_t m = 0; m < M; m++) ShowAccess(c + m * ldc, N * int64_t(sizeof(float)), true);
}

// ---- packing ----

// 16 parts as floats.
FRNN_BF16_INLINE __m512 Widen(__m256i parts) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(parts), 16));
}

// 16 elements of a storage type as floats, zero where the mask is not set.
template <Storage kStorage>
FRNN_BF16_INLINE __m512 LoadFloats(const void* p, int64_t i, __mmask16 mask) {
  if constexpr (kStorage == Storage::kFloat)
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(p) + i);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p) + i);
  return kStorage == Storage::kHalf ? _mm512_cvtph_ps(half) : Widen(half);
}

// The parts of 32 floats, each with those of `low` in its lower half.
template <int kParts>
FRNN_BF16_INLINE void Split(__m512 low, __m512 high, __m512i (&parts)[kParts]) {
#pragma GCC unroll 3
  for (int i = 0; i < kParts; i++) {
    parts[i] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    if (i + 1 < kParts) {
      low = _mm512_sub_ps(low, Widen(_mm512_castsi512_si256(parts[i])));
      high = _mm512_sub_ps(high, Widen(_mm512_extracti64x4_epi64(parts[i], 1)));
    }
  }
}

FRNN_BF16_INLINE bool Fits(__m512i largest) {
  return _mm512_cmp_epu32_mask(largest, _mm512_castps_si512(_mm512_set1_ps(kLargest)),
                               _MM_CMPINT_NLE) == 0;
}

// The tiles of one block of rows and depth; `a` is its first element. Pairs of adjacent k are 32 bits:
// a left tile is [row][pair], a right one [pair][column].
template <Storage kStorage, int kParts, Order kOrder, bool kLeft>
FRNN_BF16_INLINE void PackTile(const void* a, int64_t first, int64_t lda, int64_t rows, int64_t K,
                               TileWord* out, __m512i& largest) {
  constexpr bool kAlong = kOrder == Order::kAlong;
  // Takes the 16 lanes of two vectors in turn.
  const __m512i interleave =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const uint32_t mask = uint32_t(kAlong ? Mask(0, K) : Mask(0, rows));
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
      if constexpr (kLeft) {  // the columns that come next: rows are far apart
        __builtin_prefetch(static_cast<const float*>(a) + first + 2 * i * lda + kRows, 0, 2);
        __builtin_prefetch(static_cast<const float*>(a) + first + (2 * i + 1) * lda + kRows, 0, 2);
      }
      if (2 * i < K) low = LoadFloats<kStorage>(a, first + 2 * i * lda, low_mask);
      if (2 * i + 1 < K) high = LoadFloats<kStorage>(a, first + (2 * i + 1) * lda, high_mask);
    }
    largest = Larger(largest, low);
    largest = Larger(largest, high);
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
FRNN_BF16 bool PackBlocks(const void* a, int64_t lda, int64_t rows, int64_t K,
                          const TiledOperand& out) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i == 0 || i < Blocks(rows); i++)
    for (int64_t k = 0; k < DepthBlocks(K, out.cut); k++) {
      const int64_t along = k * kDepth, across = i * kRows;
      PackTile<kStorage, kParts, kOrder, kLeft>(
          a, kOrder == Order::kAlong ? across * lda + along : along * lda + across, lda,
          rows - across < kRows ? rows - across : kRows, K - along < kDepth ? K - along : kDepth,
          out.tiles + i * out.BlockSize() + k * kParts * kTile, largest);
    }
  return Fits(largest);
}

template <Storage kStorage, int kParts>
FRNN_BF16 bool PackRowsOf(const void* a, int64_t lda, int64_t rows, int64_t k0, int64_t k1,
                          int64_t K, const TiledOperand& out) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t r = 0; r < rows; r++)  // outside, so that rows of memory are read in one go
    for (int64_t k = k0 / kDepth; k * kDepth < k1; k++) {
      const int64_t begin = k * kDepth;
      const uint32_t stored = uint32_t(Mask(k0 - begin, k1 - begin)),
                     mask = stored & uint32_t(Mask(0, K - begin));
      const __mmask16 low_mask = __mmask16(mask), high_mask = __mmask16(mask >> 16);
      const __m512 low = LoadFloats<kStorage>(a, r * lda + begin, low_mask);
      const __m512 high = LoadFloats<kStorage>(a, r * lda + begin + 16, high_mask);
      largest = Larger(largest, low);
      largest = Larger(largest, high);
      __m512i parts[kParts];
      Split(low, high, parts);
      TileWord* line =
          out.tiles + r / kRows * out.BlockSize() + k * kParts * kTile + r % kRows * kDepth;
#pragma GCC unroll 3
      for (int i = 0; i < kParts; i++) _mm512_mask_storeu_epi16(line + i * kTile, stored, parts[i]);
    }
  return Fits(largest);
}

// ---- products ----

// Not inlined into lambdas, which have no target.
FRNN_BF16 void CopyMasked(const float* from, float* to, __mmask16 mask) {
  _mm512_mask_storeu_ps(to, mask, _mm512_maskz_loadu_ps(mask, from));
}

// The products of parts (left, right) that are summed for a block of the depth, in this order. Each
// shares a part with the one before, so that one operand stays in its registers.
struct Pair {
  int left, right;
};
template <int kLeftParts, int kRightParts>
constexpr auto kPairs = std::array<Pair, 1>{{{0, 0}}};
template <>
constexpr auto kPairs<3, 3> = std::array<Pair, 6>{{{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}}};
template <>
constexpr auto kPairs<2, 2> = std::array<Pair, 3>{{{1, 0}, {0, 0}, {0, 1}}};
template <>
constexpr auto kPairs<2, 1> = std::array<Pair, 2>{{{1, 0}, {0, 0}}};

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// The sums of a block of tiles of c, two by two or up to four in a row or column, in registers 0 .. 3.
// The intrinsics want registers as literals.
template <int kCount>
FRNN_TILE_INLINE void LoadSums(float* const (&c)[4], int64_t bytes_per_row) {
  _tile_loadd(0, c[0], bytes_per_row);
  if constexpr (kCount > 1) _tile_loadd(1, c[1], bytes_per_row);
  if constexpr (kCount > 2) _tile_loadd(2, c[2], bytes_per_row);
  if constexpr (kCount > 3) _tile_loadd(3, c[3], bytes_per_row);
}
template <int kCount>
FRNN_TILE_INLINE void StoreSums(float* const (&c)[4], int64_t bytes_per_row) {
  _tile_stored(0, c[0], bytes_per_row);
  if constexpr (kCount > 1) _tile_stored(1, c[1], bytes_per_row);
  if constexpr (kCount > 2) _tile_stored(2, c[2], bytes_per_row);
  if constexpr (kCount > 3) _tile_stored(3, c[3], bytes_per_row);
}
FRNN_TILE_INLINE void ZeroSums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// sums += left blocks times right blocks, two of each, over `depth` blocks of the depth.
template <int kLeftParts, int kRightParts>
FRNN_TILE_INLINE void MultiplySquare(const TiledOperand& a, const TiledOperand& b, int64_t depth) {
  constexpr auto& pairs = kPairs<kLeftParts, kRightParts>;
  const TileWord *left = a.tiles, *right = b.tiles;
  const int64_t left_step = a.BlockSize(), right_step = b.BlockSize();
  for (int64_t k = 0; k < depth; k++) {
#pragma GCC unroll 6
    for (size_t i = 0; i < pairs.size(); i++) {
      if (i == 0 || pairs[i].left != pairs[i - 1].left) {
        _tile_loadd(4, left + pairs[i].left * kTile, kBytesPerRow);
        _tile_loadd(5, left + left_step + pairs[i].left * kTile, kBytesPerRow);
      }
      if (i == 0 || pairs[i].right != pairs[i - 1].right) {
        _tile_loadd(6, right + pairs[i].right * kTile, kBytesPerRow);
        _tile_loadd(7, right + right_step + pairs[i].right * kTile, kBytesPerRow);
      }
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    left += kLeftParts * kTile;
    right += kRightParts * kTile;
  }
}

// Up to four blocks of one side times one of the other: the `many` lie `step` apart.
template <int kCount, bool kManyLeft>
FRNN_TILE_INLINE void MultiplyTiles(const TileWord* many, int64_t step, const TileWord* one) {
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
template <int kLeftParts, int kRightParts, int kCount, bool kManyLeft>
FRNN_TILE_INLINE void MultiplyStrip(const TiledOperand& a, const TiledOperand& b, int64_t depth) {
  constexpr auto& pairs = kPairs<kLeftParts, kRightParts>;
  const TileWord *left = a.tiles, *right = b.tiles;
  const int64_t step = kManyLeft ? a.BlockSize() : b.BlockSize();
  for (int64_t k = 0; k < depth; k++) {
#pragma GCC unroll 6
    for (size_t i = 0; i < pairs.size(); i++) {
      const TileWord *l = left + pairs[i].left * kTile, *r = right + pairs[i].right * kTile;
      MultiplyTiles<kCount, kManyLeft>(kManyLeft ? l : r, step, kManyLeft ? r : l);
    }
    left += kLeftParts * kTile;
    right += kRightParts * kTile;
  }
}

// c[rows][columns] = or += the product of kRowTiles left blocks and kColumnTiles right ones over `depth`
// blocks of the depth. The last of either may be cut short by the edge of c.
template <int kLeftParts, int kRightParts, int kRowTiles, int kColumnTiles>
FRNN_TILE void MultiplyBlock(const TiledOperand& a, const TiledOperand& b, int64_t depth,
                             int64_t rows, int64_t columns, float* c, int64_t ldc,
                             bool accumulate) {
  constexpr int kCount = kRowTiles * kColumnTiles;
  const bool whole = rows >= kRowTiles * kRows && columns >= kColumnTiles * kRows;
  alignas(64) float edge[kCount][kRows * kRows];
  float* tiles[4];
  for (int i = 0; i < kCount; i++)
    tiles[i] = whole ? c + i / kColumnTiles * kRows * ldc + i % kColumnTiles * kRows : edge[i];
  // f(row of c, row of an edge tile, columns) for all that there is of c.
  const auto for_rows = [&](const auto& f) {
    for (int i = 0; i < kCount; i++) {
      const int64_t row = i / kColumnTiles * kRows, column = i % kColumnTiles * kRows;
      for (int64_t r = 0; r < kRows && row + r < rows; r++)
        f(c + (row + r) * ldc + column, edge[i] + r * kRows, __mmask16(Mask(0, columns - column)));
    }
  };
  const int64_t bytes_per_row = whole ? ldc * int64_t(sizeof(float)) : kBytesPerRow;
  if (accumulate && !whole)
    for_rows([](float* of_c, float* of_edge, __mmask16 mask) { CopyMasked(of_c, of_edge, mask); });
  MemoryFence();
  if (accumulate)
    LoadSums<kCount>(tiles, bytes_per_row);
  else
    ZeroSums();
  if constexpr (kRowTiles == 2 && kColumnTiles == 2)
    MultiplySquare<kLeftParts, kRightParts>(a, b, depth);
  else
    MultiplyStrip<kLeftParts, kRightParts, kCount, (kColumnTiles == 1)>(a, b, depth);
  StoreSums<kCount>(tiles, bytes_per_row);
  MemoryFence();
  if (!whole)
    for_rows([](float* of_c, float* of_edge, __mmask16 mask) { CopyMasked(of_edge, of_c, mask); });
}

// The same on vectors: rows of one left block, 16 columns of each of the right ones.
template <int kLeftParts, int kRightParts, int kRowCount, int kColumnTiles>
FRNN_BF16 void MultiplyVectors(const TiledOperand& a, int64_t row, const TiledOperand& b,
                               int64_t columns, float* c, int64_t ldc, bool accumulate) {
  constexpr auto& pairs = kPairs<kLeftParts, kRightParts>;
  const TileWord *left = a.tiles + row * kDepth, *right = b.tiles;
  const int64_t right_step = b.BlockSize();
  const auto mask_of = [&](int j) { return __mmask16(Mask(0, columns - j * kRows)); };
  __m512 sum[kRowCount][kColumnTiles];
#pragma GCC unroll 8
  for (int r = 0; r < kRowCount; r++)
#pragma GCC unroll 4
    for (int j = 0; j < kColumnTiles; j++)
      sum[r][j] = accumulate ? _mm512_maskz_loadu_ps(mask_of(j), c + r * ldc + j * kRows)
                             : _mm512_setzero_ps();
  for (int64_t k = 0; k < a.depth_blocks; k++) {
#pragma GCC unroll 2
    for (size_t i = 0; i < pairs.size(); i++) {
      const TileWord* l = left + pairs[i].left * kTile;
      const TileWord* w = right + pairs[i].right * kTile;
      for (int pair = 0; pair < kDepth / 2; pair++) {
        __m512bh line[kColumnTiles];
#pragma GCC unroll 4
        for (int j = 0; j < kColumnTiles; j++)
          line[j] = (__m512bh)_mm512_load_si512(w + j * right_step + pair * 2 * kRows);
#pragma GCC unroll 8
        for (int r = 0; r < kRowCount; r++) {
          int32_t two;  // adjacent k of this row
          std::memcpy(&two, l + r * kDepth + 2 * pair, sizeof(two));
          const __m512bh value = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
          for (int j = 0; j < kColumnTiles; j++)
            sum[r][j] = _mm512_dpbf16_ps(sum[r][j], value, line[j]);
        }
      }
    }
    left += kLeftParts * kTile;
    right += kRightParts * kTile;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRowCount; r++)
#pragma GCC unroll 4
    for (int j = 0; j < kColumnTiles; j++)
      _mm512_mask_storeu_ps(c + r * ldc + j * kRows, mask_of(j), sum[r][j]);
}

}  // namespace

MatrixUnit TheUnit() {
  static const MatrixUnit unit = Detect();
  return unit;
}

const char* Capability() {
  constexpr const char* kNames[] = {nullptr, "avx512_bf16", "amx_bf16", "amx"};
  return kNames[int(TheUnit())];
}

Session::Session(bool on) : on_(on && TheUnit() >= MatrixUnit::kTiles) {
  if (on_) LoadConfig();
}
Session::~Session() {
  if (on_) ReleaseTiles();
}

bool PackRows(const void* a, Storage s, int64_t lda, int64_t rows, int64_t k0, int64_t k1,
              int64_t K, const TiledOperand& out, bool measured) {
  ShowInput(a, s, lda, rows, k0, k1 < K ? k1 : K);
  ShowRows(out, rows, k0, k1);
  switch (out.cut) {
    case Cut::kFixed:
      return fixed::PackRows(static_cast<const float*>(a), lda, rows, k0, k1, K, out, measured);
    case Cut::kOne:
      return s == Storage::kFloat ? PackRowsOf<Storage::kFloat, 1>(a, lda, rows, k0, k1, K, out)
                                  : PackRowsOf<Storage::kBFloat16, 1>(a, lda, rows, k0, k1, K, out);
    case Cut::kTwo:
      return s == Storage::kFloat ? PackRowsOf<Storage::kFloat, 2>(a, lda, rows, k0, k1, K, out)
                                  : PackRowsOf<Storage::kHalf, 2>(a, lda, rows, k0, k1, K, out);
    default:
      return PackRowsOf<Storage::kFloat, 3>(a, lda, rows, k0, k1, K, out);
  }
}

bool PackLeftAcross(const float* a, int64_t lda, int64_t rows, int64_t K, const TiledOperand& out) {
  ShowInput(a, Storage::kFloat, lda, K, 0, rows);
  if (out.cut == Cut::kFixed) return fixed::PackLeftAcross(a, lda, rows, K, out);
  return out.cut == Cut::kTwo
             ? PackBlocks<Storage::kFloat, 2, Order::kAcross, true>(a, lda, rows, K, out)
             : PackBlocks<Storage::kFloat, 3, Order::kAcross, true>(a, lda, rows, K, out);
}

namespace {
template <Storage kStorage, int kParts>
bool PackRightOf(const void* b, int64_t ldb, Order order, int64_t columns, int64_t K,
                 const TiledOperand& out) {
  return order == Order::kAlong
             ? PackBlocks<kStorage, kParts, Order::kAlong, false>(b, ldb, columns, K, out)
             : PackBlocks<kStorage, kParts, Order::kAcross, false>(b, ldb, columns, K, out);
}
}  // namespace

bool PackRight(const void* b, Storage s, int64_t ldb, Order order, int64_t columns, int64_t K,
               const TiledOperand& out, bool measured) {
  const bool along = order == Order::kAlong;
  ShowInput(b, s, ldb, along ? columns : K, 0, along ? K : columns);
  switch (out.cut) {
    case Cut::kFixed:
      return fixed::PackRight(static_cast<const float*>(b), ldb, order, columns, K, out, measured);
    case Cut::kOne:
      return s == Storage::kFloat
                 ? PackRightOf<Storage::kFloat, 1>(b, ldb, order, columns, K, out)
                 : PackRightOf<Storage::kBFloat16, 1>(b, ldb, order, columns, K, out);
    case Cut::kTwo:
      return s == Storage::kFloat ? PackRightOf<Storage::kFloat, 2>(b, ldb, order, columns, K, out)
                                  : PackRightOf<Storage::kHalf, 2>(b, ldb, order, columns, K, out);
    default:
      return PackRightOf<Storage::kFloat, 3>(b, ldb, order, columns, K, out);
  }
}

namespace {
template <int kLeftParts, int kRightParts>
void MultiplyOnVectors(const TiledOperand& a, int64_t M, const TiledOperand& b, int64_t N, float* c,
                       int64_t ldc, bool accumulate, bool backwards) {
  // `rows` rows from row m on, times the right blocks from j on.
  const auto block = [&](int64_t m, int64_t j, auto rows, auto column_tiles) {
    MultiplyVectors<kLeftParts, kRightParts, decltype(rows)::value, decltype(column_tiles)::value>(
        a.Row(m / kRows * kRows), m % kRows, b.Row(j * kRows), N - j * kRows,
        c + m * ldc + j * kRows, ldc, accumulate);
  };
  const auto strip = [&](int64_t j, auto column_tiles) {
    for (int64_t m = 0; m < M;) {
      const int64_t left = M - m;
      if (left >= 8 && column_tiles < 4) {
        block(m, j, Constant<8>(), column_tiles);
        m += 8;
      } else if (left >= 4) {
        block(m, j, Constant<4>(), column_tiles);
        m += 4;
      } else {
        left >= 2 ? block(m, j, Constant<2>(), column_tiles)
                  : block(m, j, Constant<1>(), column_tiles);
        m += left >= 2 ? 2 : 1;
      }
    }
  };
  // Few rows take more columns, since fewer than a handful of sums wait for each other.
  const int64_t columns = Blocks(N), wide = M < 8 ? 4 : 2, strips = (columns + wide - 1) / wide;
  for (int64_t i = 0; i < strips; i++) {
    const int64_t begin = wide * (backwards ? strips - 1 - i : i);
    const int64_t end = columns - begin < wide ? columns : begin + wide;
    for (int64_t j = begin; j < end;) {
      if (end - j == 4) {
        strip(j, Constant<4>());
        j += 4;
      } else if (end - j >= 2) {
        strip(j, Constant<2>());
        j += 2;
      } else {
        strip(j, Constant<1>());
        j += 1;
      }
    }
  }
}

template <int kLeftParts, int kRightParts>
void MultiplyParts(const TiledOperand& a, int64_t M, const TiledOperand& b, int64_t N, float* c,
                   int64_t ldc, bool accumulate, bool backwards) {
  if constexpr (kRightParts == 1)
    if (TheUnit() == MatrixUnit::kVectors)
      return MultiplyOnVectors<kLeftParts, kRightParts>(a, M, b, N, c, ldc, accumulate, backwards);
  const int64_t rows = Blocks(M), columns = Blocks(N), pairs = columns / 2;
  const int64_t depth = a.depth_blocks,
                at_once = cpu::DepthAtOnce(depth, 2 * b.BlockSize() * int64_t(sizeof(TileWord)));
  // From blocks i, j and k of rows, columns and depth on, as many as the constants say.
  const auto block = [&](int64_t i, int64_t j, int64_t k, int64_t count, auto row_tiles,
                         auto column_tiles) {
    MultiplyBlock<kLeftParts, kRightParts, decltype(row_tiles)::value,
                  decltype(column_tiles)::value>(
        a.Row(i * kRows).Depth(k), b.Row(j * kRows).Depth(k), count, M - i * kRows, N - j * kRows,
        c + i * kRows * ldc + j * kRows, ldc, accumulate || k > 0);
  };
  // The right operand is the larger one: walk it once.
  for (int64_t pair = 0; pair < pairs; pair++) {
    const int64_t j = 2 * (backwards ? pairs - 1 - pair : pair);
    for (int64_t k = 0; k < depth; k += at_once)
      for (int64_t i = 0; i + 1 < rows; i += 2) {
        // Where the next blocks go, while these are computed.
        for (int64_t m = (i + 2) * kRows; m < (i + 4) * kRows && m < M && k == 0; m++) {
          __builtin_prefetch(c + m * ldc + j * kRows, 1);
          __builtin_prefetch(c + m * ldc + (j + 1) * kRows, 1);
        }
        block(i, j, k, depth - k < at_once ? depth - k : at_once, Constant<2>(), Constant<2>());
      }
  }
  // What is left of an odd number of blocks, four at once: fewer wait for each other.
  const int64_t last_row = rows - 1, last_column = columns - 1;
  if (rows % 2)
    for (int64_t j = 0; j < 2 * pairs; j += 4) {
      if (2 * pairs - j < 4)
        block(last_row, j, 0, depth, Constant<1>(), Constant<2>());
      else
        block(last_row, j, 0, depth, Constant<1>(), Constant<4>());
    }
  if (columns % 2)
    for (int64_t i = 0; i < rows; i += 4) {
      if (rows - i == 1)
        block(i, last_column, 0, depth, Constant<1>(), Constant<1>());
      else if (rows - i == 2)
        block(i, last_column, 0, depth, Constant<2>(), Constant<1>());
      else if (rows - i == 3)
        block(i, last_column, 0, depth, Constant<3>(), Constant<1>());
      else
        block(i, last_column, 0, depth, Constant<4>(), Constant<1>());
    }
}
}  // namespace

void Multiply(const TiledOperand& a, int64_t M, const TiledOperand& b, int64_t N, float* c,
              int64_t ldc, bool accumulate, bool backwards) {
  ShowProduct(a, M, b, N, c, ldc);
  if (a.cut == Cut::kFixed) return fixed::Multiply(a, M, b, N, c, ldc, accumulate, backwards);
  switch (int(a.cut) * 4 + int(b.cut)) {
    case 3 * 4 + 3:
      return MultiplyParts<3, 3>(a, M, b, N, c, ldc, accumulate, backwards);
    case 2 * 4 + 2:
      return MultiplyParts<2, 2>(a, M, b, N, c, ldc, accumulate, backwards);
    case 2 * 4 + 1:
      return MultiplyParts<2, 1>(a, M, b, N, c, ldc, accumulate, backwards);
    default:
      return MultiplyParts<1, 1>(a, M, b, N, c, ldc, accumulate, backwards);
  }
}

}  // namespace parts
}  // namespace frnn
#endif
