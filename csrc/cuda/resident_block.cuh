// What kernels that run all steps (resident.cuh) have in common: their products, the rows of a step, and
// which units and rows a block and its threads have.
#pragma once
#include "cuda/exchange.cuh"
#include "cuda/kernels.cuh"
#include "cuda/quick.h"

namespace frnn {
namespace cuda {

// How many loads of a product are under way at once. Parameters of a cell take their registers.
template <class C>
constexpr int kLoadsOf = C::kParams > 0 ? 4 : 8;

constexpr int DivideUp(int a, int b) { return (a + b - 1) / b; }

// The products of a kernel. kBlocks: of k in h W_hh^T, in a local kernel all, else of one warp where they
// are shared by all.
template <class C, class T, int kBlocks, int kGroups, int kTiles, class E>
struct ResidentProducts {
  static constexpr int kTilesOfW = C::kH * kGroups, kWidth = C::kH * kGroups * kUnits;
  static constexpr int kDeep = E::kShared && !E::kCluster ? kBlocks : kWarps * kBlocks;
  static constexpr int kSplit = E::kShared ? SplitOf(kTilesOfW, kDeep) : kWarps;
  using Forward =
      ResidentProduct<T, kTilesOfW, DivideUp(kDeep, kSplit), kTiles, kSplit, kLoadsOf<C>>;

  // Backward: all k and the units of a block; or the k of a block, and in a cluster all units.
  static constexpr int kDeepBack =
      E::kShared ? DivideUp(kWidth * int(sizeof(T)), kBlockBytes) : C::kH * kDeep;
  static constexpr int kMostUnits = kDeep * kBlockBytes / int(sizeof(T));
  static constexpr int kTilesBack =
      E::kCluster ? kWarps * DivideUp(kMostUnits, kWarps* kUnits) : kGroups;
  static constexpr int kSplitBack = E::kCluster  ? 1
                                    : E::kShared ? SplitOf(kTilesBack, kDeepBack)
                                                 : kWarps;
  using Backward = ResidentProduct<T, kTilesBack, DivideUp(kDeepBack, kSplitBack), kTiles,
                                   kSplitBack, kLoadsOf<C>>;
  // What a block adds up then.
  using Sums = PartialSums<kTilesOfW, kTiles, E::kShared>;
  using SumsBack = PartialSums<kGroups, kTiles, E::kShared>;
  static constexpr int kPartsBack = E::kCluster ? int(kClusterBlocks) : kSplitBack;
};

// Steps [begin, end) of both directions. Step s of a direction is time start + s * way.
struct ResidentSteps {
  int64_t H, B, T, begin, end;
  const int64_t* offsets;  // [T + 1] on the card, of ragged sequences: rows of time t; else null
  int copies, dirs;
  Patience patience;
};

// The rows of a time: from `first` on, one for each running sequence.
struct TimeRows {
  int64_t first;
  int running;
};
// Where the rows of a time begin, which is where those of the time before end. Before the first time
// there are none, nor after the last.
__device__ __forceinline__ int64_t RowOf(const ResidentSteps& n, int64_t time) {
  time = time < 0 ? 0 : time > n.T ? n.T : time;
  return n.offsets != nullptr ? n.offsets[time] : time * n.B;
}
__device__ __forceinline__ TimeRows RowsOf(const ResidentSteps& n, int64_t time) {
  const int64_t first = RowOf(n, time);
  return {first, int(RowOf(n, time + 1) - first)};
}

// What a block keeps at the beginning of its shared memory.
struct Notes {
  static constexpr int kBytes = 128;  // as LocalPlace wants what comes after
  int64_t edges[4][2];                // of the rows of four steps in turn
  uint32_t gave_up;                   // what Multiply wants
};
static_assert(sizeof(Notes) <= Notes::kBytes);

// The rows of steps to come. Two threads load where they begin and end, when a product is over, and put
// that where all get it after a barrier: nothing of it is in a register while a product needs them all,
// and nobody waits for it while other loads are on their way. (A warp has few barriers for loads, and
// compilers wait for one as soon as they guess that it is over.)
struct RowsAhead {
  Notes& notes;
  int64_t edge = 0;

  __device__ __forceinline__ void Load(const ResidentSteps& n, int64_t time) {
    edge = threadIdx.x < 2 ? RowOf(n, time + threadIdx.x) : 0;
  }
  __device__ __forceinline__ void Put(int64_t step) const {
    if (threadIdx.x < 2) notes.edges[step & 3][threadIdx.x] = edge;
  }
  __device__ __forceinline__ TimeRows Get(int64_t step) const {
    const int64_t (&edges)[2] = notes.edges[step & 3];
    return {edges[0], int(edges[1] - edges[0])};
  }
};

// What a block works on: its direction, its units and its rows of the batch. Of these a thread does the
// gate math of kItems: item i is one of (group, tile, element j of the fragment of a product), so that
// the lanes of a warp have 8 units by 4 rows.
template <int kGroups, int kTiles>
struct ResidentBlock {
  static constexpr int kAll = kGroups * kTiles * 4, kItems = (kAll + kWarps - 1) / kWarps;
  // Different units among a thread's items: one, unless they are of several groups.
  static constexpr int kColumns = kGroups > 1 ? kItems : 1;
  static_assert(kWarps % 4 == 0, "a thread's items are the same element of their fragments");

  __device__ __forceinline__ ResidentBlock(const ResidentSteps& n)
      : H(InRegister(uint32_t(n.H))), B(n.B) {
    blocks = int(BlocksOfCopy(n.H, kGroups));
    rank = int(blockIdx.x) % blocks;
    const int copy = blockIdx.x / blocks;
    dir = copy / n.copies;
    first_unit = rank * kGroups * kUnits;
    first_row = copy % n.copies * kTiles * kTileRows;
  }

  // Whether a warp has an item i at all; whether a thread's lies within the layer, and also runs.
  __device__ static bool Has(int i) { return kAll % kWarps == 0 || Index(i) < kAll; }
  __device__ bool Exists(int i) const { return Has(i) && Unit(i) < H && Batch(i) < B; }
  __device__ bool Runs(int i, const TimeRows& rows) const {
    return Exists(i) && Batch(i) < rows.running;
  }

  __device__ static int Column(int i) { return i % kColumns; }
  __device__ static int J(int i) { return Index(i) % 4; }
  __device__ static int Tile(int i) { return Index(i) / 4 % kTiles; }
  __device__ static int Group(int i) { return Index(i) / 4 / kTiles; }
  __device__ static int Row(int i) {
    return Tile(i) * kTileRows + int(threadIdx.x % 4) * 2 + J(i) % 2;
  }
  __device__ int Unit(int i) const {
    return first_unit + Group(i) * kUnits + J(i) / 2 * 8 + int(threadIdx.x % 32 / 4);
  }
  __device__ int Batch(int i) const { return first_row + Row(i); }

  // Where item i lies in rows of one value per unit, and where it begins in those of `width`.
  __device__ int64_t Place(const TimeRows& rows, int i) const {
    return (rows.first + Batch(i)) * H + Unit(i);
  }
  __device__ int64_t Wide(int64_t place, int i, int width) const {
    return (place - Unit(i)) * width + Unit(i);
  }

  int64_t H, B;
  int blocks, rank;  // of a copy, and which of them this is
  int dir, first_unit, first_row;

 private:
  __device__ static int Index(int i) { return int(threadIdx.x / 32) + i * kWarps; }
};

// What happens between two steps beside the cell; each may be null. P: a type in memory, const or not.
template <class P>
struct ResidentStages {
  const uint8_t* cuts;  // [T, B], by steps
  const P* zones;       // [rows, states H], or one row for all
  bool one_row;
  const P* mask;  // [B, H]
  // The states of every step, or in the backward what reaches them: [rows, H], [rows, kExtra H].
  P *every_h, *every_c;
};

// What the units of an item keep of their states in a step.
template <class C, class Block, class Stages, class T>
__device__ __forceinline__ void FetchZones(const Block& at, const TimeRows& rows, int i,
                                           const Stages& stages, T (&zones)[C::kStates]) {
  const int64_t place = stages.one_row ? at.Unit(i) : at.Wide(at.Place(rows, i), i, C::kStates);
  FRNN_UNROLL
  for (int j = 0; j < C::kStates; j++) zones[j] = stages.zones[place + j * at.H];
}

// Of a view of an item, as core/step.h asks for it: what its unit keeps of its states.
template <class C>
struct ResidentZones {
  bool there;
  const float* zones;  // [kStates]
  FRNN_HD bool Zones() const { return there; }
  FRNN_HD Quick Zone(int j) const { return zones[j]; }
};

}  // namespace cuda
}  // namespace frnn
