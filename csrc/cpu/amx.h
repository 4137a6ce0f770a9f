// Products of float matrices on a processor's tile unit (AMX), whose operands are bfloat16 and whose
// sums are float.
//
// A float is the exact sum of three bfloat16, a = a_0 + a_1 + a_2, of eight bits each. Of the nine
// products a_i b_j the six with i + j <= 2 are summed: the others are below 2^-25 |a b|, less than
// what float rounds away. The five small ones come first, so that the sum is rounded as often as one
// of floats is. Its order depends on the depth K alone.
//
// The tile unit flushes what is smaller than 2^-126 to zero, and inf has no such parts. Operands
// with an element above kLargest (inf and NaN are) are refused by the packing, for the caller to take
// another way; below it, what is flushed changes c by less than 2^-96 per term.
#pragma once
#include <cstdint>

#include "core/params.h"

#if defined(__linux__) && defined(__x86_64__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>)
#define FRNN_HAS_AMX
#endif
#endif

namespace frnn {
namespace amx {

#ifdef FRNN_HAS_AMX
constexpr bool kCompiled = true;
#else
constexpr bool kCompiled = false;
#endif

using Part = uint16_t;  // a bfloat16
constexpr int kRows = 16, kDepth = 32, kParts = 3;
constexpr int kTile = kRows * kDepth;  // Parts of a tile
constexpr float kLargest = 16777216;   // of an element, in magnitude

// Operands are stored as [block of kRows rows or columns][block of kDepth][kParts][kTile].
constexpr int64_t Blocks(int64_t rows) { return (rows + kRows - 1) / kRows; }
constexpr int64_t DepthBlocks(int64_t K) { return (K + kDepth - 1) / kDepth; }
constexpr int64_t BlockSize(int64_t depth_blocks) { return depth_blocks * kParts * kTile; }
constexpr int64_t Size(int64_t rows, int64_t depth_blocks) {
  return Blocks(rows) * BlockSize(depth_blocks);
}

// Whether this machine and system let the process use tiles. FUSED_RNN_CPU_CAPABILITY=avx512 says no.
bool Available();

// The calling thread may use tiles while this lives.
class Session {
 public:
  explicit Session(bool on);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

 private:
  const bool on_;
};

// How the elements of an operand lie in memory: element k of row (or column) r is at r * ld + k, or
// at k * ld + r.
enum class Order { kAlong, kAcross };

// Packs elements [0, rows) x [k0, k1) of an operand, zero from K on, into `out`, which has
// `depth_blocks` from the first one to be filled on. k0 and k1 are multiples of 16 for PackLeft along,
// else k0 is 0. At least one block of rows is written. False if an element is out of range.
bool PackLeft(const float* a, int64_t lda, int64_t rows, int64_t k0, int64_t k1, int64_t K,
              Part* out, int64_t depth_blocks);
bool PackLeftAcross(const float* a, int64_t lda, int64_t rows, int64_t K, Part* out,
                    int64_t depth_blocks);
bool PackRight(const float* b, int64_t ldb, Order order, int64_t columns, int64_t K, Part* out,
               int64_t depth_blocks);

// c[M][N] (+)= a b, over all the depth.
void Multiply(const Part* a, int64_t M, const Part* b, int64_t N, int64_t depth_blocks, float* c,
              int64_t ldc, bool accumulate);

}  // namespace amx
}  // namespace frnn
