// Kernels of the `resident` engine: one launch for a whole sequence. Each block owns some units and
// keeps their weights in registers over all steps; per step it multiplies what the other blocks
// published by them (tensor cores), does the gate math, and publishes its own part.
//
// A copy is a set of blocks that hold all units once. Copies share the batch and never talk to each
// other. Within a copy blocks talk through memory without flags: what is published is filled with
// kUnwritten before the launch, and a reader polls the words that it needs until none is that. Each
// word vouches for itself alone, so relaxed accesses do. All blocks must be resident: a cooperative
// launch.
//
// Where the blocks of a copy are a cluster they store what they publish into each other's shared memory,
// and where a block has all units it talks to itself alone: a local kernel. Copies need not be resident
// together then.
//
//   forward   a block has kGroups * 16 units; h_{t-1} [B, H] by W_hh [kH H, H], all gates of a unit
//             in one block. Published: h_t, into the rows that the backward reads.
//   backward  the same units; dgh_t [B, kH H] by W_hh^T [H, kH H]. Published: the gate gradients. Or
//             in shared memory, of which there is less traffic: dgh_t of the block's own units by the
//             W_hh that it has in the forward, too. Published: these parts of dh_{t-1}, to the blocks
//             that have those units, who add them up.
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

// What the units of an item keep of their states in a step.
template <class C, class Block, class Stages, class T>
__device__ __forceinline__ void FetchZones(const Block& at, const TimeRows& rows, int i,
                                           const Stages& stages, T (&zones)[C::kStates]) {
  const int64_t place = stages.one_row ? at.Unit(i) : at.Wide(at.Place(rows, i), i, C::kStates);
  FRNN_UNROLL
  for (int j = 0; j < C::kStates; j++) zones[j] = stages.zones[place + j * at.H];
}

// Numbers that a launch carries, so that a graph keeps them.
struct OffsetsPart {
  static constexpr int kSize = 448;
  int64_t values[kSize];
};
static __global__ void StoreOffsets(const __grid_constant__ OffsetsPart part, int count,
                                    int64_t* to) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) to[i] = part.values[i];
}

// hs of the row in which each sequence starts = h0, or zero where it is reset before step 0. Backwards
// in time that is its last one. And `left` likewise, as a mask leaves it.
template <class T>
__global__ void StartStates(ResidentSteps n, bool backwards, const T* h0, const uint8_t* reset,
                            T* hs, const T* mask, T* left) {
  ForEach(n.B, n.H, [&](int64_t b, int64_t unit) {
    int64_t start = 0, end = backwards ? n.T : 1;  // b runs at `start`, and no more at `end`
    while (end - start > 1) {
      const int64_t middle = (start + end) / 2;
      (b < RowsOf(n, middle).running ? start : end) = middle;
    }
    T h = h0 && !(reset && reset[b]) ? h0[b * n.H + unit] : Narrow<T>(0);
    if (Widen(h) != Widen(h)) h = Narrow<T>(__int_as_float(0x7FFFFFFF));  // a NaN, not kUnwritten
    const int64_t place = (RowsOf(n, start).first + b) * n.H + unit;
    hs[place] = h;
    if (mask) left[place] = Masked<T>(h, mask[b * n.H + unit]);
  });
}

// left [rows, H] = hs as a mask [B, H] leaves it.
template <class T>
__global__ void MaskStates(ResidentSteps n, const T* hs, const T* mask, T* left) {
  ForEach(n.T * n.B, n.H, [&](int64_t i, int64_t unit) {
    const int64_t b = i % n.B;
    const TimeRows rows = RowsOf(n, i / n.B);
    if (b >= rows.running) return;
    const int64_t place = (rows.first + b) * n.H + unit;
    left[place] = Masked<T>(hs[place], mask[b * n.H + unit]);
  });
}

// cuts [T, B]: whether the states of a row go on from a step as zeros, by `reset` of rows.
static __global__ void FindCuts(ResidentSteps n, int64_t start, int64_t way, const uint8_t* reset,
                                uint8_t* cuts) {
  ForEach(n.T, n.B, [&](int64_t s, int64_t b) {
    const int64_t time = start + s * way;  // of the step; flags are those of the later time
    const TimeRows rows = RowsOf(n, way > 0 ? time + 1 : time);
    const bool goes_on = s + 1 < n.T && b < rows.running;
    cuts[s * n.B + b] = goes_on && reset[rows.first + b];
  });
}

// to [columns, rows] = from^T, in squares of 32 by 32.
template <class T>
__global__ void Transpose(int64_t rows, int64_t columns, const T* from, T* to) {
  FRNN_SHARED(square, T[32][33]);
  const int64_t row = int64_t(blockIdx.y) * 32, column = int64_t(blockIdx.x) * 32;
  for (int i = threadIdx.y; i < 32; i += blockDim.y)
    if (row + i < rows && column + threadIdx.x < columns)
      square[i][threadIdx.x] = from[(row + i) * columns + column + threadIdx.x];
  __syncthreads();
  for (int i = threadIdx.y; i < 32; i += blockDim.y)
    if (column + i < columns && row + threadIdx.x < rows)
      to[(column + i) * rows + row + threadIdx.x] = square[threadIdx.x][i];
}

// They take minutes to compile: libraries that are compiled while somebody waits do without.
#ifdef FRNN_STEPS_ONLY
constexpr bool kCompilesResident = false;
#else
constexpr bool kCompilesResident = true;
#endif
// Whether a cell has resident kernels for a type: blocks tell each other h, which is the output.
template <class C, class T>
constexpr bool kHasResident = kCompilesResident && kStorage<T> != Storage::kDouble && C::kH > 0 &&
                              States<C>::kOutputExtra < 0 && C::kGiven == 0 && C::kOperands == 0;

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

template <class T>
struct ResidentForwardDirection {
  int64_t start, way;           // the time of step 0, +1 or -1
  const T* h0;                  // [B, H] or null
  const T *w_hh, *b_ih, *b_hh;  // [kH H, H], [kX H] or null, [kH H] or null
  const T* params[kMaxParams];  // [H] each
  const Wide<T>* gx;            // [.., kX H], from row gx_row on
  int64_t gx_row;
  T* hs;  // [rows, H]: what a row starts from. Those of step `begin` and those in which sequences
          // start are there, others are kUnwritten
  T* y;   // [rows, dirs H], from the first unit of this direction on
  Wide<T>* c;          // [B, kExtra H]: before step begin, then after step end - 1
  T *h_last, *c_last;  // [B, H], [B, kExtra H]
  Wide<T>* tape;       // [rows, tape H] or null
  // Of kernels with stages:
  ResidentStages<T> stages;
  T* h_kept;  // [rows, H]: with a mask, what a row starts from, where hs has what goes into W_hh
};
template <class T>
struct ResidentForwardArgs {
  ResidentSteps steps;
  ResidentForwardDirection<T> dir[2];
};

// Views of an item, as core/step.h asks for them: what lies in registers, and what goes to memory.
template <class C>
struct ResidentZones {
  bool there;
  const float* zones;  // [kStates]
  FRNN_HD bool Zones() const { return there; }
  FRNN_HD Quick Zone(int j) const { return zones[j]; }
};
template <class C, class SumH>
struct ResidentInputs : ResidentZones<C> {
  const float* gx;
  const Pack<float, C::kX>& b_ih;
  const SumH& gate_h;
  const Pack<float, C::kParams>& params;
  const float& h;
  const Pack<float, States<C>::kExtra>& c;

  FRNN_HD Quick GateX(int q) const { return gx[q] + b_ih[q]; }
  FRNN_HD Quick GateH(int q) const { return gate_h(q); }
  FRNN_HD Quick Param(int k) const { return params[k]; }
  FRNN_HD Quick H() const { return h; }
  FRNN_HD Quick Extra(int e) const { return c[e]; }
};
template <class C, class T>
struct ResidentResults {
  T h_new;
  float& h;
  Pack<float, States<C>::kExtra>& c;
  int64_t H;
  T *y, *h_last, *c_last;  // h_last is null while the sequence goes on
  float* tape;

  FRNN_HD void SetH(Quick) const {
    h = Widen(h_new);
    *y = h_new;
    if (h_last) *h_last = h_new;
  }
  FRNN_HD void SetExtra(int e, Quick v) const {
    c[e] = v.v;
    if (h_last) c_last[e * H] = Narrow<T>(v.v);
  }
  FRNN_HD void Keep(int k, Quick v) const { tape[k * H] = v.v; }
  FRNN_HD void KeepExtra(int e, Quick v) const { Keep(Tape<C>::kC + e, v); }
};

template <class C, class T, int kBlocks, int kGroups, int kTiles, class E, bool kStages>
__global__ void __launch_bounds__(kWarps * 32, 1)
    ResidentForward(const __grid_constant__ ResidentForwardArgs<T> args) {
  if constexpr (E::kCluster && !kHasClusters) return;
  using Products = ResidentProducts<C, T, kBlocks, kGroups, kTiles, E>;
  using Product = typename Products::Forward;
  using Sums = typename Products::Sums;
  using Block = ResidentBlock<kGroups, kTiles>;
  constexpr int kItems = Block::kItems, kColumns = Block::kColumns, kExtra = States<C>::kExtra;
  Notes& notes = *DynamicShared<Notes>();
  float* sums = DynamicShared<float>() + Notes::kBytes / sizeof(float);  // [2][kParts][Sums::kSize]
  void* rest = sums + 2 * Product::kParts * Sums::kSize;
  const ResidentSteps n = args.steps;
  const Block at(n);
  const ResidentForwardDirection<T>& a = args.dir[at.dir];
  T* const hs = a.hs;
  const int64_t H = at.H;

  Product product;
  product.Load([&](int m, int row, int k) -> const T* {
    const int64_t unit = at.first_unit + m / C::kH * kUnits + row;
    return unit < H && k < H ? a.w_hh + (m % C::kH * H + unit) * H + k : nullptr;
  });

  const auto time = [&](int64_t s) { return a.start + s * a.way; };
  TimeRows rows = RowsOf(n, time(n.begin));
  RowsAhead ahead{notes};
  ahead.Load(n, time(n.begin + 1));
  ahead.Put(n.begin + 1);
  const auto start = [&](int64_t b, int64_t u) -> float {  // h before step begin
    const T* kept = kStages && a.stages.mask ? a.h_kept : a.hs;
    if (b < rows.running) return Widen(kept[(rows.first + b) * H + u]);
    return a.h0 ? Widen(a.h0[b * H + u]) : 0;
  };

  float gx[kItems][C::kX] = {}, h[kItems];
  Pack<float, kExtra> c[kItems];
  Pack<float, C::kX> b_ih[kColumns];
  Pack<float, C::kH> b_hh[kColumns];
  Pack<float, C::kParams> params[kColumns];
  // What does not depend on other blocks is loaded ahead of the wait for them, and not looked at before
  // that is over: a warp that waits for one load waits for all.
  [[maybe_unused]] T zones[kItems][C::kStates] = {};
  [[maybe_unused]] uint8_t cuts[kItems] = {};
  const auto fetch = [&]([[maybe_unused]] int64_t s) {
    FRNN_UNROLL
    for (int i = 0; i < kItems; i++) {
      if (!at.Runs(i, rows)) continue;
      const float* from = a.gx + at.Wide(at.Place(rows, i) - a.gx_row * H, i, C::kX);
      FRNN_UNROLL
      for (int q = 0; q < C::kX; q++) gx[i][q] = from[q * H];
      if constexpr (kStages) {
        if (a.stages.cuts) cuts[i] = a.stages.cuts[s * at.B + at.Batch(i)];
        if (a.stages.zones) FetchZones<C>(at, rows, i, a.stages, zones[i]);
      }
    }
  };
  FRNN_UNROLL
  for (int i = 0; i < kColumns; i++) {
    const int64_t unit = at.Unit(i);
    const bool exists = unit < H;
    FRNN_UNROLL
    for (int q = 0; q < C::kX; q++) b_ih[i][q] = exists && a.b_ih ? Widen(a.b_ih[q * H + unit]) : 0;
    FRNN_UNROLL
    for (int q = 0; q < C::kH; q++) b_hh[i][q] = exists && a.b_hh ? Widen(a.b_hh[q * H + unit]) : 0;
    FRNN_UNROLL
    for (int k = 0; k < C::kParams; k++) params[i][k] = exists ? Widen(a.params[k][unit]) : 0;
  }
  FRNN_UNROLL
  for (int i = 0; i < kItems; i++) {
    FRNN_UNROLL
    for (int j = 0; j < kExtra; j++)
      c[i][j] = at.Exists(i) ? a.c[(at.Batch(i) * kExtra + j) * H + at.Unit(i)] : 0;
    h[i] = (kStages || States<C>::kReadsH) && at.Exists(i) ? start(at.Batch(i), at.Unit(i)) : 0;
  }
  // In shared memory: h of the rows of this block, [kTiles * kTileRows][stride], as LocalPlace says.
  using Box = Mailbox<E::kCluster>;
  const int width = at.blocks * kGroups * kUnits, stride = int(LocalStride<T>(width));
  constexpr int kRowsSize = kTiles * kTileRows * int(sizeof(T));
  const Box box(rest, kRowsSize * stride, kRowsSize * width);
  const auto h_of = [&](int mail) { return reinterpret_cast<T*>(box.Half(mail)); };
  if constexpr (E::kShared) {
    for (int k = threadIdx.x; k < kTiles * kTileRows * int(H); k += kWarps * 32) {
      const int row = k / int(H), u = k % int(H);
      const T v = Narrow<T>(at.first_row + row < n.B ? start(at.first_row + row, u) : 0);
      const int place = row * stride + LocalPlace<T>(row, u);
      h_of(0)[place] = h_of(1)[place] = v;
    }
  }
  if (threadIdx.x == 0) notes.gave_up = 0;
  box.Open();

  for (int64_t s = n.begin; s < n.end; s++) {
    const int mail = int(E::kShared ? s - n.begin : s);
    const bool last = s + 1 == n.end;
    fetch(s);
    if constexpr (E::kShared) {
      if (mail > 0) box.Wait(mail);
      if (!last) box.Expect(mail + 1);
    }
    // Two sets of sums in turn: a warp that is ahead writes the one that no other still reads.
    const Sums now{sums + (mail & 1) * Product::kParts * Sums::kSize};
    product.template Multiply<!E::kShared>(
        E::kShared ? h_of(mail) : hs + (rows.first + at.first_row) * H, E::kShared ? stride : H,
        rows.running - at.first_row, int(H), n.patience, &notes.gave_up,
        [&](int m, int tile, const float (&d)[4]) { now.Put(Product::Part(), m, tile, d); });
    __syncthreads();

    const TimeRows next = ahead.Get(s + 1);
    ahead.Load(n, time(s + 2));
    // Math without branches first, so that items overlap; then what others wait for; then the rest.
    ForwardStep<C, Quick> unit[kItems];
    T h_new[kItems];
    FRNN_UNROLL
    for (int i = 0; i < kItems; i++) {
      if (!Block::Has(i)) continue;
      const int column = Block::Column(i);
      const auto gate_h = [&](int q) {
        return now.template Sum<Product::kParts>(Product::kParts, Block::Group(i) * C::kH + q,
                                                 Block::Tile(i), Block::J(i)) +
               b_hh[column][q];
      };
      float kept[C::kStates];
      FRNN_UNROLL
      for (int j = 0; j < C::kStates && kStages; j++) kept[j] = Widen(zones[i][j]);
      const ResidentInputs<C, decltype(gate_h)> view{{kStages && a.stages.zones, kept},
                                                     gx[i],
                                                     b_ih[column],
                                                     gate_h,
                                                     params[column],
                                                     h[i],
                                                     c[i]};
      unit[i].Load(view);
      if constexpr (kStages)
        unit[i].Compute(view);
      else
        unit[i].Compute();
      h_new[i] = Narrow<T>(unit[i].s_new[C::kRecurrent].v);
    }
    FRNN_UNROLL
    for (int i = 0; i < kItems; i++) {
      if (!Block::Has(i)) continue;
      const bool runs = at.Runs(i, rows);
      const int row = Block::Row(i) * stride;
      if constexpr (E::kCluster) {
        // All rows are sent, so that as many bytes come each time: of those that are yet to start h_0.
        T v = h_new[i];
        if (n.offsets != nullptr && !runs)
          v = h_of(mail)[row + LocalPlace<T>(Block::Row(i), at.Unit(i))];
        const uint4 units = JoinUnits(v);
        constexpr int kUnitsOf16 = Operand<T>::kLane;
        const int number = threadIdx.x % 32 / 4 % kUnitsOf16;  // of the lanes that have these
        const int place = row + LocalPlace<T>(Block::Row(i), at.Unit(i) - number);
        for (int to = last ? at.blocks : number; to < at.blocks; to += kUnitsOf16)
          box.Send(mail + 1, h_of(mail + 1) + place, units, to);
      } else if (E::kShared && runs) {
        h_of(mail + 1)[row + LocalPlace<T>(Block::Row(i), at.Unit(i))] = h_new[i];
      }
      const bool goes_on = runs && at.Batch(i) < next.running;
      if constexpr (kStages) {
        T v = cuts[i] ? Narrow<T>(0) : h_new[i];
        if (a.stages.mask) {
          if (goes_on) a.h_kept[at.Place(next, i)] = v;
          if (goes_on) v = Masked<T>(v, a.stages.mask[at.Batch(i) * H + at.Unit(i)]);
        }
        PublishUnit(hs + at.Place(next, i), v, goes_on);
      } else {
        PublishUnit(hs + at.Place(next, i), h_new[i], goes_on);
      }
    }
    FRNN_UNROLL
    for (int i = 0; i < kItems; i++) {
      if (!at.Runs(i, rows)) continue;
      bool ends = at.Batch(i) >= next.running;
      T* h_last = a.h_last + at.Batch(i) * H + at.Unit(i);
      T* c_last = a.c_last + at.Batch(i) * kExtra * H + at.Unit(i);
      if (kStages && a.stages.every_h) {
        ends = true;
        h_last = a.stages.every_h + at.Place(rows, i);
        c_last = a.stages.every_c + at.Wide(at.Place(rows, i), i, kExtra);
      }
      const ResidentResults<C, T> to{h_new[i],
                                     h[i],
                                     c[i],
                                     H,
                                     a.y + at.Wide(at.Place(rows, i), i, n.dirs),
                                     ends ? h_last : nullptr,
                                     c_last,
                                     a.tape + at.Wide(at.Place(rows, i), i, Tape<C>::kSize)};
      if (a.tape) {
        unit[i].StoreTape(to);
        if (C::kReadsNewH) to.Keep(Tape<C>::kNewH, Widen(h_new[i]));
      }
      unit[i].StoreStates(to);
      if (kStages && cuts[i]) {
        h[i] = 0;
        FRNN_UNROLL
        for (int j = 0; j < kExtra; j++) c[i][j] = 0;
      }
    }
    rows = next;
    ahead.Put(s + 2);
  }

  FRNN_UNROLL
  for (int i = 0; i < kItems; i++) {
    FRNN_UNROLL
    for (int j = 0; j < kExtra; j++)
      if (at.Exists(i)) a.c[(at.Batch(i) * kExtra + j) * H + at.Unit(i)] = c[i][j];
  }
}

template <class T>
struct ResidentBackwardDirection {
  int64_t start, way;
  const T* w_hh_t;              // [H, kH H] = W_hh^T
  const T* params[kMaxParams];  // [H] each
  const T* dy;  // (t, b) at t dy_t_stride + b dy_b_stride, ragged row r at r dy_b_stride; or null
  int64_t dy_t_stride, dy_b_stride;
  const T* hs;          // [rows, H]
  const Wide<T>* tape;  // [rows, tape H]
  T *dgx, *dgh;         // [rows, kX H], [rows, kH H]; dgh is kUnwritten. The same for some cells
  Wide<T>*dh, *dc;      // [B, H], [B, kExtra H]: of the last states, then of the first
  Wide<T>* dparams;     // [B, kParams H]
  ResidentStages<const T> stages;  // of kernels with stages
};
template <class T>
struct ResidentBackwardArgs {
  ResidentSteps steps;
  ResidentBackwardDirection<T> dir[2];
};

// Views as in the forward. Gate gradients of W_hh are published before.
template <class C>
struct ResidentGrads : ResidentZones<C> {
  const float* tape;
  const Pack<float, C::kParams>& params;
  const float h;
  const float& dh;
  const Pack<float, States<C>::kExtra>& dc;
  const float dy;

  FRNN_HD Quick Kept(int k) const { return tape[k]; }
  FRNN_HD Quick KeptExtra(int e) const { return tape[Tape<C>::kC + e]; }
  FRNN_HD Quick Param(int k) const { return params[k]; }
  FRNN_HD Quick H() const { return h; }
  FRNN_HD Quick NewH() const { return tape[Tape<C>::kNewH]; }
  FRNN_HD Quick GradH() const { return dh; }
  FRNN_HD Quick GradExtra(int e) const { return dc[e]; }
  FRNN_HD void AddGradOutput(Quick& to) const { to = to + dy; }
};
template <class C, class T, bool kStages>
struct ResidentCarry {
  float& dh;
  Pack<float, States<C>::kExtra>& dc;
  Pack<float, C::kParams>& dparams;
  T* dgx;  // null if it is dgh
  int64_t H;

  FRNN_HD void SetGate(int i, Quick d) const {
    if (dgx) ForGatesX<C>(i, [&](int q) { dgx[q * H] = Narrow<T>(d.v); });
  }
  FRNN_HD void SetGradH(Quick d) const { dh = kStages || kGradReachesH<C> ? d.v : 0; }
  FRNN_HD void SetGradExtra(int e, Quick d) const { dc[e] = d.v; }
  FRNN_HD void AddGradParam(int k, Quick d) const { dparams[k] += d.v; }
};

template <class C, class T, int kBlocks, int kGroups, int kTiles, class E, bool kStages>
__global__ void __launch_bounds__(kWarps * 32, 1)
    ResidentBackward(const __grid_constant__ ResidentBackwardArgs<T> args) {
  if constexpr (E::kCluster && !kHasClusters) return;
  using Products = ResidentProducts<C, T, kBlocks, kGroups, kTiles, E>;
  using Product = typename Products::Backward;
  using Sums = typename Products::SumsBack;
  using Block = ResidentBlock<kGroups, kTiles>;
  constexpr int kItems = Block::kItems, kColumns = Block::kColumns, kExtra = States<C>::kExtra,
                kTape = Tape<C>::kSize;
  const ResidentSteps n = args.steps;
  const Block at(n);
  const ResidentBackwardDirection<T>& a = args.dir[at.dir];
  T* const dgh = a.dgh;
  const int64_t H = at.H;

  // In shared memory: parts of dh, from other blocks or from the warps of this one; then where it is
  // not published the dgh of this block, [2][kTiles * kTileRows][kStride], as LocalPlace says.
  using Box = Mailbox<E::kCluster>;
  constexpr int kOwn = kGroups * kUnits, kDepth = C::kH * kOwn;
  constexpr int kStride = int(LocalStride<T>(kDepth)), kOwnHalf = kTiles * kTileRows * kStride;
  const int parts = E::kCluster ? at.blocks : Products::kPartsBack;
  const int half = parts * Sums::kSize * int(sizeof(float));
  Notes& notes = *DynamicShared<Notes>();
  char* const rest = DynamicShared<char>() + Notes::kBytes;
  const Box box(rest, half, half);
  T* const own_dgh = reinterpret_cast<T*>(rest + Box::Bytes(half));

  Product product;
  product.Load([&](int m, int row, int k) -> const T* {
    const int64_t unit = (E::kCluster ? 0 : at.first_unit) + m * kUnits + row;
    // k: of all gate gradients, or of those of this block.
    const int64_t own = at.first_unit + k % kOwn;
    if (unit >= H || (E::kShared ? k >= kDepth || own >= H : k >= C::kH * H)) return nullptr;
    return a.w_hh_t + unit * C::kH * H + (E::kShared ? k / kOwn * H + own : k);
  });

  const auto time = [&](int64_t s) { return a.start + s * a.way; };
  TimeRows rows = RowsOf(n, time(n.end - 1));
  RowsAhead ahead{notes};
  ahead.Load(n, time(n.end - 2));
  ahead.Put(n.end - 2);

  float dh[kItems];
  [[maybe_unused]] float mask[kItems];
  Pack<float, kExtra> dc[kItems];
  Pack<float, C::kParams> params[kColumns], dparams[kItems];
  T dy[kItems] = {}, h_prev[kItems] = {};
  float tape[kItems][kTape] = {};
  [[maybe_unused]] T zones[kItems][C::kStates] = {}, every[kItems][C::kStates] = {};
  [[maybe_unused]] uint8_t cuts[kItems] = {};
  const auto fetch = [&](int64_t s) {  // as in the forward
    const int64_t dy_at = n.offsets ? rows.first * a.dy_b_stride : time(s) * a.dy_t_stride;
    FRNN_UNROLL
    for (int i = 0; i < kItems; i++) {
      if (!at.Runs(i, rows)) continue;
      if (a.dy) dy[i] = a.dy[dy_at + at.Batch(i) * a.dy_b_stride + at.Unit(i)];
      if constexpr (States<C>::kReadsH) h_prev[i] = a.hs[at.Place(rows, i)];
      const float* from = a.tape + at.Wide(at.Place(rows, i), i, kTape);
      FRNN_UNROLL
      for (int k = 0; k < kTape; k++) tape[i][k] = from[k * H];
      if constexpr (kStages) {
        if (a.stages.cuts) cuts[i] = a.stages.cuts[s * at.B + at.Batch(i)];
        if (a.stages.zones) FetchZones<C>(at, rows, i, a.stages, zones[i]);
        if (a.stages.every_h) every[i][0] = a.stages.every_h[at.Place(rows, i)];
        FRNN_UNROLL
        for (int j = 0; j < kExtra && a.stages.every_c; j++)
          every[i][1 + j] = a.stages.every_c[at.Wide(at.Place(rows, i), i, kExtra) + j * H];
      }
    }
  };
  FRNN_UNROLL
  for (int i = 0; i < kColumns; i++) {
    FRNN_UNROLL
    for (int k = 0; k < C::kParams; k++)
      params[i][k] = at.Unit(i) < H ? Widen(a.params[k][at.Unit(i)]) : 0;
  }
  FRNN_UNROLL
  for (int i = 0; i < kItems; i++) {
    dh[i] = at.Exists(i) ? a.dh[at.Batch(i) * H + at.Unit(i)] : 0;
    FRNN_UNROLL
    for (int j = 0; j < kExtra; j++)
      dc[i][j] = at.Exists(i) ? a.dc[(at.Batch(i) * kExtra + j) * H + at.Unit(i)] : 0;
    FRNN_UNROLL
    for (int k = 0; k < C::kParams; k++) dparams[i][k] = 0;
    if (kStages && a.stages.mask)
      mask[i] = at.Exists(i) ? Widen(a.stages.mask[at.Batch(i) * H + at.Unit(i)]) : 0;
  }
  if constexpr (E::kShared) {  // zero for units that are not there
    for (int k = threadIdx.x; k < 2 * kOwnHalf; k += kWarps * 32) own_dgh[k] = Narrow<T>(0);
  }
  if (threadIdx.x == 0) notes.gave_up = 0;
  box.Open();
  fetch(n.end - 1);
  ahead.Load(n, time(n.end - 3));

  for (int64_t s = n.end - 1; s >= n.begin; s--) {
    const int mail = int(E::kShared ? n.end - s : s);
    T* const own = own_dgh + (mail & 1) * kOwnHalf;
    BackwardStep<C, Quick> unit[kItems];
    FRNN_UNROLL
    for (int i = 0; i < kItems; i++) {
      if (!Block::Has(i)) continue;
      if (kStages && at.Runs(i, rows)) {
        dh[i] = (cuts[i] ? 0 : dh[i]) + Widen(every[i][0]);
        FRNN_UNROLL
        for (int j = 0; j < kExtra; j++)
          dc[i][j] = (cuts[i] ? 0 : dc[i][j]) + Widen(every[i][1 + j]);
      }
      float kept[C::kStates];
      FRNN_UNROLL
      for (int j = 0; j < C::kStates && kStages; j++) kept[j] = Widen(zones[i][j]);
      const ResidentGrads<C> view{{kStages && a.stages.zones, kept},
                                  tape[i],
                                  params[Block::Column(i)],
                                  Widen(h_prev[i]),
                                  dh[i],
                                  dc[i],
                                  Widen(dy[i])};
      unit[i].Load(view);
      if constexpr (kStages)
        unit[i].Compute(view);
      else
        unit[i].Compute();
    }
    FRNN_UNROLL
    for (int i = 0; i < kItems; i++) {
      if (!Block::Has(i)) continue;
      const bool runs = at.Runs(i, rows);
      T* to = dgh + at.Wide(at.Place(rows, i), i, C::kH);
      FRNN_UNROLL
      for (int g = 0; g < C::kD; g++)
        ForGatesH<C>(g, [&](int q) {
          const T v = Narrow<T>(unit[i].d[g].v);
          if (E::kShared && runs) {
            const int k = q * kOwn + at.Unit(i) - at.first_unit;
            own[Block::Row(i) * kStride + LocalPlace<T>(Block::Row(i), k)] = v;
          }
          PublishUnit(to + q * H, v, runs);
        });
    }
    FRNN_UNROLL
    for (int i = 0; i < kItems; i++) {
      if (!at.Runs(i, rows)) continue;
      T* dgx = a.dgx == dgh ? nullptr : a.dgx + at.Wide(at.Place(rows, i), i, C::kX);
      const ResidentCarry<C, T, kStages> to{dh[i], dc[i], dparams[i], dgx, H};
      unit[i].Store(to);
    }
    const TimeRows seen = rows;
    rows = ahead.Get(s - 1);
    ahead.Put(s - 2);
    if (s > n.begin) fetch(s - 1);
    const Sums now{reinterpret_cast<float*>(box.Half(mail))};
    box.Expect(mail);
    if constexpr (E::kShared) __syncthreads();
    product.template Multiply<!E::kShared>(
        E::kShared ? own : dgh + (seen.first + at.first_row) * C::kH * H,
        E::kShared ? kStride : C::kH * H, seen.running - at.first_row,
        E::kShared ? kDepth : int(C::kH * H), n.patience, &notes.gave_up,
        [&](int m, int tile, const float (&d)[4]) {
          if constexpr (E::kCluster) {
            const int to = m / kGroups;
            if (to >= at.blocks) return;
            box.Send(mail, now.At(at.rank, m % kGroups, tile), Sums::Turned(d), to);
          } else {
            now.Put(Product::Part(), m, tile, d);
          }
        });
    box.Wait(mail);
    rows = ahead.Get(s - 1);  // again: a product needs the registers
    ahead.Load(n, time(s - 3));
    FRNN_UNROLL
    for (int i = 0; i < kItems; i++)  // nothing for sequences that do not run
      if (Block::Has(i)) {
        float sum = now.template Sum<Products::kPartsBack>(parts, Block::Group(i), Block::Tile(i),
                                                           Block::J(i));
        if (kStages && a.stages.mask) sum *= mask[i];
        dh[i] += sum;
      }
  }

  FRNN_UNROLL
  for (int i = 0; i < kItems; i++) {
    if (!at.Exists(i)) continue;
    a.dh[at.Batch(i) * H + at.Unit(i)] = dh[i];
    FRNN_UNROLL
    for (int j = 0; j < kExtra; j++) a.dc[(at.Batch(i) * kExtra + j) * H + at.Unit(i)] = dc[i][j];
    FRNN_UNROLL
    for (int k = 0; k < C::kParams; k++)
      a.dparams[(at.Batch(i) * C::kParams + k) * H + at.Unit(i)] = dparams[i][k];
  }
}

// The instances: what a plan may ask for.
template <class C, class T, int kBlocks, int kGroups, int kTiles, class E, bool kStages = false>
struct ResidentInstance {
  using Products = ResidentProducts<C, T, kBlocks, kGroups, kTiles, E>;
  static constexpr auto kForward = &ResidentForward<C, T, kBlocks, kGroups, kTiles, E, kStages>;
  static constexpr auto kBackward = &ResidentBackward<C, T, kBlocks, kGroups, kTiles, E, kStages>;

  static runtime::Shape Shape(bool backward, int64_t H) {
    runtime::Shape shape =
        backward ? ShapeOf(kBackward, kWarps * 32) : ShapeOf(kForward, kWarps * 32);
    const int64_t blocks = BlocksOfCopy(H, kGroups), rows = kTiles * kTileRows;
    using Box = Mailbox<E::kCluster>;
    constexpr int64_t kFloat = sizeof(float);
    shape.shared = Notes::kBytes;
    if (backward) {
      const int64_t parts = E::kCluster ? blocks : Products::kPartsBack;
      shape.shared += Box::Bytes(parts * Products::SumsBack::kSize * kFloat);
      const int64_t own = 2 * rows * LocalStride<T>(Products::kWidth) * sizeof(T);
      shape.shared += E::kShared ? own : 0;
    } else {
      shape.shared += 2 * Products::Forward::kParts * Products::Sums::kSize * kFloat;
      const int64_t h = rows * LocalStride<T>(blocks * kGroups * kUnits) * sizeof(T);
      shape.shared += E::kShared ? Box::Bytes(h) : 0;
    }
    shape.together = !E::kShared;
    if (E::kCluster) shape.cluster = unsigned(blocks);
    return shape;
  }
  static void Forward(unsigned copies, const ResidentForwardArgs<T>& args, runtime::Stream stream) {
    Start(kForward, Shape(false, args.steps.H), Grid(copies, args.steps.H), stream, args);
  }
  static void Backward(unsigned copies, const ResidentBackwardArgs<T>& args,
                       runtime::Stream stream) {
    Start(kBackward, Shape(true, args.steps.H), Grid(copies, args.steps.H), stream, args);
  }
  static runtime::Grid Grid(unsigned copies, int64_t H) {
    return {copies * unsigned(BlocksOfCopy(H, kGroups))};
  }
};

template <int... k, class F>
void ForEachOf(const F& f) {
  (f(std::integral_constant<int, k>()), ...);
}

// f(instance) for the instance of the plan.
template <class C, class T, class F>
void WithResidentInstance(const Plan& plan, const F& f) {
  bool found = false;
  const auto offer = [&](bool wanted, auto instance) {
    if (!wanted) return;
    found = true;
    f(instance);
  };
  ForEachOf<1, 2, 4, 8>([&](auto blocks) {
    ForEachOf<1, 2, 4>([&](auto groups) {
      ForEachOf<1, 2, 4>([&](auto tiles) {
        if constexpr (IsResidentShape(C::kH, blocks, groups, tiles))
          offer(plan.variant == Variant::kResident && !plan.stages && plan.blocks == blocks &&
                    plan.groups == groups && plan.tiles == tiles,
                ResidentInstance<C, T, blocks, groups, tiles, InMemory>());
        if constexpr (IsStagedShape(C::kH, blocks, groups, tiles))
          offer(plan.variant == Variant::kResident && plan.stages && plan.blocks == blocks &&
                    plan.groups == groups && plan.tiles == tiles,
                ResidentInstance<C, T, blocks, groups, tiles, InMemory, true>());
        if constexpr (IsClusterShape(C::kH, blocks, groups, tiles))
          offer(plan.variant == Variant::kCluster && plan.blocks == blocks &&
                    plan.groups == groups && plan.tiles == tiles,
                ResidentInstance<C, T, blocks, groups, tiles, InCluster>());
      });
    });
  });
  ForEachOf<1, 2, 4, 8>([&](auto groups) {
    constexpr int kBlocks = DivideUp(groups * kUnits * int(sizeof(T)), kBlockBytes);
    if constexpr (IsLocalShape(C::kH, kBlocks, groups))
      offer(plan.variant == Variant::kLocal && plan.groups == groups,
            ResidentInstance<C, T, kBlocks, groups, 1, InBlock>());
  });
  if (!found) throw std::logic_error("fused_rnn: a plan without a kernel");
}

}  // namespace cuda
}  // namespace frnn
