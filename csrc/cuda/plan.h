// How a layer is run on a card: a pure function of the card and the problem, so that it is tested
// without one (tests/test_cuda_engine.py).
#pragma once
#include <cstdint>
#include <functional>
#include <type_traits>

#include "core/params.h"

namespace frnn {
namespace cuda {

enum class Variant {
  kOne,    // one launch: a single step, of which nothing is kept
  kSteps,  // launch every step
  kGraph,  // replay them from a CUDA graph
  kScan,  // all steps in a few launches, of a cell whose update is affine (scan.cuh), replayed, too
  // One launch with the weights in registers (resident.cuh), replayed from a graph, too.
  kResident,  // blocks share the units and talk through memory
  kCluster,   // or through each other's shared memory
  kLocal,     // a block has all units
};

struct Problem {
  int64_t gates_x, gates_h;  // per unit
  int64_t H, B, T;
  Storage storage;
  int dirs;
  int64_t blocks = 1;  // of W_hh
  bool projected = false, allow_tf32 = false;
  bool has_resident = true;  // the cell has kernels that keep their weights, of this type
  bool aligned = false;      // rows of W_hh can be read 16 bytes at a time
  bool kept = true;          // for a backward, or it is one
  // More happens between two steps: a kernel for one step has nothing of it, those that keep their
  // weights have all but norms, where blocks talk through memory.
  bool stages = false, norms = false;
  bool operands = false;  // W_hh multiplies other values than h, too
  bool affine = false;    // the update is, also with what happens between two steps
};

// Threads of a block of a gate kernel, at most.
constexpr int kGateThreads = 256;
// Rows of the batch that a kernel of one step does at once.
constexpr int kOneStepRows = 4;
// Gates that it has room for, both parts together.
constexpr int64_t kOneStepGates = 8;
// Kernels that keep their weights: warps of a block, units of a group, rows of the batch of a tile,
// bytes of a row in a block of k.
constexpr int kWarps = 8, kUnits = 16, kTileRows = 8, kBlockBytes = 64;
// Blocks of a cluster at most; up to 8 every card with clusters takes.
constexpr int64_t kClusterBlocks = 16;
// Weights that a warp holds at most, in tiles of 16 rows by a block of k; a tile takes 8 registers of
// each lane. And of a block groups times tiles of rows.
constexpr int64_t kWarpTiles = 16, kBlockRows = 4;
// Groups of a local kernel at most, and tiles of a warp, which has much else to hold.
constexpr int64_t kLocalGroups = 8, kLocalTiles = 12;

// The kernels there are, by gates, a warp's blocks of k (of a local one: all), groups and tiles of rows.
constexpr bool IsResidentShape(int64_t gates, int64_t blocks, int64_t groups, int64_t tiles) {
  return groups <= 2 && gates * blocks * groups <= kWarpTiles && groups * tiles <= kBlockRows;
}
// And with stages.
constexpr bool IsStagedShape(int64_t gates, int64_t blocks, int64_t groups, int64_t tiles) {
  return groups == 1 && IsResidentShape(gates, blocks, groups, tiles);
}
constexpr bool IsClusterShape(int64_t gates, int64_t blocks, int64_t groups, int64_t tiles) {
  return groups >= 2 && blocks * groups <= 4 && gates * blocks * groups <= kWarpTiles &&
         groups * tiles <= kBlockRows;
}
constexpr bool IsLocalShape(int64_t gates, int64_t blocks, int64_t groups) {
  return gates * blocks * groups <= kLocalTiles * kWarps;
}

// Blocks that hold all units once, and floats that a block's warps add up for a product of `tiles` tiles
// of weights by one of rows, where `split` of them share k.
constexpr int64_t BlocksOfCopy(int64_t H, int64_t groups) {
  return (H + groups * kUnits - 1) / (groups * kUnits);
}
constexpr int64_t SumsOf(int64_t split, int64_t tiles) {
  return split * tiles * kUnits * kTileRows;
}

// How many warps share the blocks of k, where these are in shared memory: so that what they read, each
// its own blocks, and what they add up are the least.
constexpr int SplitOf(int64_t tiles, int64_t deep) {
  int best = kWarps;
  for (int split = kWarps; split > 0; split /= 2)
    if (tiles * split % kWarps == 0 &&
        4 * deep / split + split * tiles <= 4 * deep / best + best * tiles)
      best = split;
  return best;
}

struct Plan {
  Variant variant;
  int threads_x, threads_y;  // a block of a gate kernel: units by rows
  int streams;               // 2: both directions side by side
  int64_t chunk_steps;       // steps whose input products are computed ahead, together
  // Of a kernel that keeps its weights: a warp's blocks of k in h W_hh^T, a block's groups of units
  // and tiles of rows, and copies of all units, each with its part of the batch.
  int blocks, groups, tiles, copies;
  int64_t stages;       // 0 or 1
  int64_t scan_length;  // steps of a chunk of a scan, or 0

  bool keeps_weights() const { return variant > Variant::kScan; }
};
static_assert(std::has_unique_object_representations_v<Plan>);  // compared byte by byte

// together: how many blocks of the plan's kernel can be on the card at once.
// `force`: "steps", "graph", "scan", "one", "resident", "cluster" or "local" (FUSED_RNN_VARIANT), or null.
// Where the last five cannot be, it is a graph all the same. Throws std::invalid_argument for other words.
FRNN_EXPORT Plan MakePlan(const CudaDevice& device, const Problem& problem, const char* force,
                          const std::function<int64_t(const Plan&)>& together);

}  // namespace cuda
}  // namespace frnn
