// Every choice that the CPU engine makes by shape, cell and machine, in one place: which
// instructions multiply, how many threads share a layer, what is packed and how many rows are taken
// at a time. Pure functions, which tests/test_cpu_plan.py calls for tables of shapes. Nothing that
// changes the order of a sum depends on the number of threads.
#pragma once
#include <cstdint>

#include "core/macros.h"
#include "core/params.h"
#include "cpu/parts.h"

namespace frnn {
namespace cpu {

// ---- tiles of products on vectors ----

// The vectors of a set of instructions.
struct Vectors {
  int bytes, registers;
};
// Rows of a tile of nv vectors whose accumulators fit in registers beside one row of the right
// operand and a broadcast value, or beside all broadcast values and one vector.
constexpr int RowsByRow(Vectors v, int nv) { return (v.registers - 1 - nv) / nv; }
constexpr int TileRows(Vectors v, int nv) {
  const int by_row = RowsByRow(v, nv);
  const int by_value = (v.registers - 1) / (nv + 1);
  const int rows = by_row > by_value ? by_row : by_value;
  return rows > 12 ? 12 : rows;
}
// The tile of products that have no gates to keep together: as square as registers allow, since of
// such a tile each multiply-add takes the fewest loads (of 4 x 3 vectors 7 for 12, of 6 x 2 they
// are 8).
constexpr int TileVecs(Vectors v) { return v.registers >= 32 ? 4 : (v.bytes == 32 ? 3 : 2); }
// Products of one or two rows are summed in several chains, to hide the latency of the
// multiply-add. How many must not depend on nv up to TileVecs: columns are cut into tiles by the
// number of threads, and results must not.
constexpr int Chains(Vectors v, int rows, int nv) {
  const int vecs = nv > TileVecs(v) ? nv : TileVecs(v);
  const int fits = (v.registers - 2) / (rows * vecs);
  const int wanted = rows == 1 ? 4 : (rows == 2 ? 2 : 1);
  return fits >= wanted ? wanted : (fits >= 2 && wanted >= 2 ? 2 : 1);
}
// A wide tile has few rows: products with it read their right operand many times over, and wait for
// the first of these reads where it comes from the third-level cache. Such a tile calls what comes
// next into the second-level cache beside its own work, a line of memory in so many steps along K:
// where the registers are full one in 24 cycles, which leaves buffers to the tile's own reads (one
// in 12 does not). Tall tiles have no registers left for it, and less need.
constexpr bool CallsAhead(Vectors v, int nv) { return TileRows(v, nv) < 2 * nv; }
constexpr int StepsOfLine(int rows, int nv) { return rows * nv > 12 ? 2 : 4; }

// ---- the passes over time ----

// Rows of gates_h that wait for the gate math: what that stores drains while the next product runs.
constexpr int64_t kRowBlock = 64;
constexpr int64_t kTiledInput = 128;  // rows of x that are packed for tiles at a time
constexpr int64_t kMaxThreads = 256;  // of a team

// What the weights are for a product on vectors. Packing W is one pass over it and makes its rows
// columns, so that a product needs no sums over lanes.
enum class Packing {
  kNone,     // read as they lie in memory
  kOnce,     // packed before the first use
  kEachUse,  // bit by bit just before the only use: they never leave the cache
  kTurned,   // read as they lie, since it is the rows on the other side that become columns
  kGiven,    // packed before the call
};

// ---- one step ----

constexpr int64_t kOneStepRows = 256;  // of more rows it is as a sequence is
constexpr int kTurnedVecs = 2;         // vectors of rows that are multiplied with W at a time

// ---- the backward ----

// Products that are summed one after the other, before their sum is added to others: what keeps a
// tile of the right side in the first-level cache, and the sums of long batches and wide layers as
// accurate as torch.nn's. In one chain the error grows with the square root of its length: 40 eps of
// the largest gradient for 32,000 rows. With AVX2, 256 would take 1.5 % off a training step, and its
// errors would be 1.2 to 1.7 times as large.
constexpr int64_t kSumDepth = 128;

// ---- the gradients of weights, dW = d^T b over all rows ----

constexpr int64_t kGradRows = 512;  // rows of d and b that are packed at a time
constexpr int64_t kTileGroup = 12;  // blocks of 16 rows of dW that are packed for tiles at a time
constexpr int64_t kGradRowsInPlace = 64;  // so few rows of d are not packed
// Rows of dW at a time, some 96: its part stays in the second-level cache.
constexpr int64_t GradGroup(int tile_rows) { return (tile_rows > 4 ? 16 : 24) * tile_rows; }

// ---- products on tiles ----

// Products of less depth do not repay the sums of digits that each ends with.
constexpr int64_t kFixedDepth = 96;
// How the elements of an operand of depth K are cut, on a machine that has tiles or vectors of
// bfloat16.
FRNN_EXPORT parts::Cut CutOf(parts::MatrixUnit unit, Storage s, int64_t K);
// The same for floats that are multiplied with numbers of type s: rounding them to one bfloat16
// would show.
FRNN_EXPORT parts::Cut CutBeside(parts::MatrixUnit unit, Storage s, int64_t K);
// Blocks of the depth that a pair of right blocks has at once, of `bytes` a pair. One of nearly all
// of the first-level cache (48 KB) is cut in two, to stay in it while the left operand passes.
constexpr int64_t DepthAtOnce(int64_t depth_blocks, int64_t bytes) {
  constexpr int64_t kCacheBytes = 48 << 10;
  const bool cut = bytes > kCacheBytes * 3 / 4 && bytes < kCacheBytes * 3 / 2;
  return cut ? (depth_blocks + 1) / 2 : depth_blocks;
}
// The same in fixed point, where a pair of left blocks stays while the right operand passes.
constexpr int64_t kFixedDepthAtOnce = 4;

// ---- plans ----

struct Machine {
  parts::MatrixUnit unit;
  int cores;
  int64_t l2_bytes;  // of a core's second-level cache
  bool crowded;      // other programs take cores from teams, see Crowd in cpu/threads.h
};

// One layer, and the code that is compiled for it.
struct Problem {
  Storage storage;
  int threads;  // at most
  int64_t T, B, I, H, Hout, rows;
  int gates_x, gates_h;
  int scalar_bytes, vector_bytes;
  int panel_vecs;          // vectors of units of a panel
  int64_t panels;          // of the layer: threads own whole ones
  bool h_changes = false;  // between two steps: the first one, too, multiplies with no row of h0
  bool in_blocks = false;  // W_hh is block-diagonal, and Hout the width of a block
  bool norm = false;       // products have other gradients than gates
  bool operands = false;   // W_hh multiplies other values than h, too
  bool packed = false;     // the caller has the weights packed, too
  bool bytes = false;      // .. in bytes, for products of integers
  // Sums are in the same order for any number of rows: none over lanes, all in one chain, none on tiles,
  // where rows have factors in common.
  bool invariant = false;
};

// The same for both passes of a layer.
struct Plan {
  int threads;
  int spins;       // at a barrier, before a thread sleeps
  bool is_short;   // a few milliseconds: nobody waits long for a thread that lost its core
  bool tiled;      // products of matrices of many rows are on the matrix unit
  bool one_chain;  // of products that are summed, also where a row or two would have several
};

struct ForwardPlan : Plan {
  Packing w_ih;
  Packing w_hh;             // never kEachUse
  int64_t gates_rows;       // rows of x W_ih^T that are computed ahead
  bool paired;              // on tiles, two panels at once: an even number of tiles wide
  parts::Cut x_cut, h_cut;  // on tiles, of x W_ih^T and h W_hh^T
};

struct BackwardPlan : Plan {
  Packing w_ih, w_hh;  // never kTurned
  int64_t dx_rows;     // rows of dX at a time, whole blocks of them to a thread
  // On tiles, how the weights and d are cut for dh and dX, and x and d for dW.
  parts::Cut cut, d_cut, grad_cut, d_grad_cut;
};

FRNN_EXPORT ForwardPlan PlanForward(const Problem& p, const Machine& m);
FRNN_EXPORT BackwardPlan PlanBackward(const Problem& p, const Machine& m);

}  // namespace cpu
}  // namespace frnn
