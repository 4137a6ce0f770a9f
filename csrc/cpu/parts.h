// Products of matrices whose elements are cut into parts that the processor has units for: bfloat16 with
// sums in float, on tiles (AMX) or vectors (AVX512-BF16).
//
// Floats of deep products are cut into int8 instead, cpu/fixed.h. Else a float is the exact sum of
// three bfloat16, a = a_0 + a_1 + a_2, of eight bits each. Of the nine products a_i b_j the six with
// i + j <= 2 are summed: the others are below 2^-25 |a b|, less than what float rounds away. A tile sums
// 32 terms of a product in few roundings: the error against float64 is about half of that of a sum of
// floats (K from 100 to 2048, uniform numbers). The order of the sum depends on K alone. A float16 is two
// parts, a bfloat16 is one.
//
// The units flush what is smaller than 2^-126 to zero, and inf has no such parts. Operands with an
// element above kLargest (inf and NaN are) are refused by the packing, for the caller to take another
// way; below it, what is flushed changes c by less than 2^-96 per term.
#pragma once
#include <cstdint>

#include "core/macros.h"
#include "core/params.h"

#if defined(__linux__) && defined(__x86_64__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>)
#define FRNN_HAS_BF16
#endif
#endif

namespace frnn {
namespace parts {

#ifdef FRNN_HAS_BF16
constexpr bool kCompiled = true;
#else
constexpr bool kCompiled = false;
#endif

using TileWord = uint16_t;  // a bfloat16
constexpr int kRows = 16, kDepth = 32;
// How elements are cut: into one to three bfloat16, or into digits of fixed point (cpu/fixed.h).
enum class Cut { kOne = 1, kTwo, kThree, kFixed };
constexpr int TilesOf(Cut cut) { return cut == Cut::kFixed ? 3 : int(cut); }
constexpr int DepthOf(Cut cut) { return cut == Cut::kFixed ? 2 * kDepth : kDepth; }
constexpr int kTile = kRows * kDepth;  // words of a tile, of 64 bytes a row
constexpr float kLargest = 16777216;   // of an element, in magnitude

// An operand: [block of kRows rows or columns][block of the depth][part][kTile].
struct TiledOperand {
  TileWord* tiles;
  int64_t depth_blocks;
  Cut cut;
  // Cut::kFixed only: of each row or column, the largest element in magnitude, and what all elements k
  // are multiplied by (null: 1).
  float* largest;
  const float* factors;

  int64_t BlockSize() const { return depth_blocks * TilesOf(cut) * kTile; }
  int64_t PaddedDepth() const { return depth_blocks * DepthOf(cut); }
  // The operand from a row (a multiple of kRows), or from a block of the depth, on.
  TiledOperand Row(int64_t row) const {
    return {tiles + row / kRows * BlockSize(), depth_blocks, cut, largest + row, factors};
  }
  TiledOperand Depth(int64_t block) const {
    return {tiles + block * TilesOf(cut) * kTile, depth_blocks, cut, largest,
            factors ? factors + block * parts::DepthOf(cut) : nullptr};
  }
};
constexpr int64_t Blocks(int64_t rows) { return (rows + kRows - 1) / kRows; }
constexpr int64_t DepthBlocks(int64_t K, Cut cut) { return (K + DepthOf(cut) - 1) / DepthOf(cut); }
constexpr int64_t TiledSize(int64_t rows, int64_t depth_blocks, Cut cut) {
  return Blocks(rows) * depth_blocks * TilesOf(cut) * kTile;
}

// What this machine and system let the process multiply with: vectors of bfloat16, tiles of them, tiles
// of int8 besides.
enum class MatrixUnit { kNone, kVectors, kTiles, kFixedTiles };
#ifdef FRNN_HAS_BF16
FRNN_EXPORT MatrixUnit TheUnit();
#else
inline MatrixUnit TheUnit() { return MatrixUnit::kNone; }
#endif
const char* Capability();  // the unit's name, or null for none

// The calling thread may use tiles while this lives.
class FRNN_EXPORT Session {
 public:
#ifdef FRNN_HAS_BF16
  explicit Session(bool on);
  ~Session();
#else
  explicit Session(bool) : on_(false) {}
  ~Session() {}
#endif
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

 private:
  const bool on_;
};

// How the elements of an operand lie in memory: element k of row (or column) r is at r * ld + k, or
// at k * ld + r.
enum class Order { kAlong, kAcross };

// Each packs elements [0, rows) x [0, K) into `out`, the last block of the depth padded with zeros,
// and at least one block of rows. False if an element is out of range. PackRows writes the columns k0
// .. k1 only, multiples of 16, of which those from K on are zero. For `measured` see cpu/fixed.h.
FRNN_EXPORT bool PackRows(const void* a, Storage s, int64_t lda, int64_t rows, int64_t k0,
                          int64_t k1, int64_t K, const TiledOperand& out, bool measured = false);
FRNN_EXPORT bool PackLeftAcross(const float* a, int64_t lda, int64_t rows, int64_t K,
                                const TiledOperand& out);
FRNN_EXPORT bool PackRight(const void* b, Storage s, int64_t ldb, Order order, int64_t columns,
                           int64_t K, const TiledOperand& out, bool measured = false);

// c[M][N] (+)= a b, over all the depth, the blocks of b from the first to the last or backwards. Who
// walks through b again and again does it in turns: what was last is still in the cache.
FRNN_EXPORT void Multiply(const TiledOperand& a, int64_t M, const TiledOperand& b, int64_t N,
                          float* c, int64_t ldc, bool accumulate, bool backwards = false);

}  // namespace parts
}  // namespace frnn
