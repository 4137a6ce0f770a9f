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
//   forward   a block has kGroups * 16 units; h_{t-1} [B, H] by W_hh [kH H, H], all gates of a unit
//             in one block. Published: h_t, into the rows that the backward reads.
//   backward  the same units; dgh_t [B, kH H] by W_hh^T [H, kH H]. Published: the gate gradients.
//
// A product: D [16 units, 8 rows] += A B with mma.sync; A from the weights, B from what is published,
// its sums split over the warps of a block, added up in shared memory in the order of the warps.
#pragma once
#include <algorithm>

#include "cuda/kernels.cuh"
#include "cuda/plan.h"
#ifndef FUSED_RNN_EMULATE
#include "cuda/primitives.h"
#endif

namespace frnn {
namespace cuda {

constexpr int kWarps = 8, kUnits = 16, kTileRows = 8;
constexpr uint32_t kUnwritten = ~0u;      // a NaN in every type
constexpr unsigned kPatience = 1u << 27;  // polls, some ten seconds: then something is broken

// How a type goes through mma.sync. A lane takes 16 bytes of a row at a time, a block of k is 64
// bytes; which k an instruction calls by which name does not matter as long as A and B agree.
template <class T>
struct Operand {
  static constexpr int kBlock = 64 / sizeof(T), kLane = 16 / sizeof(T);  // elements
  static constexpr int kPacked = 4 / sizeof(T);                          // of a word

  __device__ static void Multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (kStorage<T> == Storage::kBFloat16)
      MmaBf16(d, a, b0, b1);
    else if constexpr (kStorage<T> == Storage::kHalf)
      MmaF16(d, a, b0, b1);
    else
      MmaTf32(d, a, b0, b1);
  }
  // A word as it goes into the product: float32 is rounded to TF32.
  __device__ static uint32_t Word(uint32_t w) {
    if constexpr (sizeof(T) == 4) return ToTf32(__uint_as_float(w));
    return w;
  }
  __device__ static uint32_t Bits(T v) {
    if constexpr (kStorage<T> == Storage::kBFloat16)
      return __bfloat16_as_ushort(v);
    else if constexpr (kStorage<T> == Storage::kHalf)
      return __half_as_ushort(v);
    else
      return __float_as_uint(v);
  }
};

// Publishes v at p, by lanes whose units alternate between lane and lane ^ 4. NaNs that look like
// kUnwritten become other NaNs.
template <class T>
__device__ __forceinline__ void PublishUnit(T* p, T v, bool valid) {
  uint32_t word = Operand<T>::Bits(v);
  bool writes = valid;
  if constexpr (sizeof(T) == 2) {  // two units in a word; valid is the same for both
    word |= __shfl_xor_sync(~0u, word, 4) << 16;
    writes = valid && (threadIdx.x & 4) == 0;
  }
  if (word == kUnwritten) word = sizeof(T) == 4 ? 0x7FFFFFFFu : 0x7FFF7FFFu;
  if (writes) StoreRelaxed(reinterpret_cast<uint32_t*>(p), word);
}

// The weights of a warp: of 16 kM rows of A and its own kBlocks blocks of k, all in registers.
// kSums floats of each block of shared memory: [kWarps][kM][kTiles][4][32].
template <class T, int kM, int kBlocks, int kTiles>
struct ResidentProduct {
  using O = Operand<T>;
  static constexpr int kSums = kWarps * kM * kTiles * 4 * 32;
  // What is under way at once: kLoad blocks of kChunk tiles, at most 8 loads of 16 bytes and 64 sums.
  static constexpr int Divisor(int of, int most) {
    return of % most == 0 ? most : Divisor(of, most - 1);
  }
  static constexpr int kLoad = Divisor(kBlocks, 8);
  static constexpr int kChunk = Divisor(kTiles, std::max(1, std::min(8 / kLoad, 16 / kM)));

  uint32_t w[kM][kBlocks][2][4];

  // row_of(m, row): where that row of A begins, or null for zeros. `depth` of them exist.
  template <class F>
  __device__ __forceinline__ void Load(const F& row_of, int depth) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, q = lane % 4;
    FRNN_UNROLL
    for (int m = 0; m < kM; m++) {
      const T *low = row_of(m, r), *high = row_of(m, r + 8);
      FRNN_UNROLL
      for (int block = 0; block < kBlocks; block++) {
        const int k = (warp * kBlocks + block) * O::kBlock + q * O::kLane;
        uint4 a{}, b{};
        if (low && k < depth) a = *reinterpret_cast<const uint4*>(low + k);
        if (high && k < depth) b = *reinterpret_cast<const uint4*>(high + k);
        const uint32_t words[8] = {a.x, b.x, a.y, b.y, a.z, b.z, a.w, b.w};
        FRNN_UNROLL
        for (int i = 0; i < 8; i++) w[m][block][i / 4][i % 4] = O::Word(words[i]);
      }
    }
  }

  // sums = A B, B[k][row] = from[row * stride + k], waiting until that is written. Rows and k beyond
  // `rows` and `depth` count as zero.
  __device__ __forceinline__ void Multiply(const T* from, int64_t stride, int rows, int depth,
                                           float* sums) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, q = lane % 4;
    unsigned polls = 0;
    FRNN_UNROLL
    for (int tile = 0; tile < kTiles; tile += kChunk) {
      float d[kChunk][kM][4];
      FRNN_UNROLL
      for (int i = 0; i < kChunk * kM * 4; i++) d[i / (kM * 4)][i / 4 % kM][i % 4] = 0;
      FRNN_UNROLL
      for (int first = 0; first < kBlocks; first += kLoad) {
        uint4 b[kChunk][kLoad];
        bool ready;
        do {
          ready = true;
          FRNN_UNROLL
          for (int i = 0; i < kChunk * kLoad; i++) {
            const int row = (tile + i / kLoad) * kTileRows + r;
            const int k = (warp * kBlocks + first + i % kLoad) * O::kBlock + q * O::kLane;
            uint4 v{};
            if (row < rows && k < depth)
              v = LoadRelaxed(reinterpret_cast<const uint4*>(from + row * stride + k));
            b[i / kLoad][i % kLoad] = v;
          }
          FRNN_UNROLL
          for (int i = 0; i < kChunk * kLoad; i++) {
            const uint4& v = b[i / kLoad][i % kLoad];
            ready = ready && v.x != kUnwritten && v.y != kUnwritten && v.z != kUnwritten &&
                    v.w != kUnwritten;
          }
          if (++polls > kPatience) __trap();
        } while (!ready);
        __syncwarp();
        FRNN_UNROLL
        for (int i = 0; i < kLoad; i++) {
          FRNN_UNROLL
          for (int c = 0; c < kChunk; c++) {
            const uint4& v = b[c][i];
            FRNN_UNROLL
            for (int m = 0; m < kM; m++) {
              O::Multiply(d[c][m], w[m][first + i][0], O::Word(v.x), O::Word(v.y));
              O::Multiply(d[c][m], w[m][first + i][1], O::Word(v.z), O::Word(v.w));
            }
          }
        }
      }
      FRNN_UNROLL
      for (int i = 0; i < kChunk * kM * 4; i++) {
        const int c = i / (kM * 4), m = i / 4 % kM, j = i % 4;
        sums[(((warp * kM + m) * kTiles + tile + c) * 4 + j) * 32 + lane] = d[c][m][j];
      }
    }
  }

  // Element j of this lane's fragment, over all warps.
  __device__ __forceinline__ static float Sum(const float* sums, int m, int tile, int j) {
    const int lane = threadIdx.x % 32;
    float sum = 0;
    FRNN_UNROLL
    for (int warp = 0; warp < kWarps; warp++)
      sum += sums[(((warp * kM + m) * kTiles + tile) * 4 + j) * 32 + lane];
    return sum;
  }
};

// Which elements a thread does the gate math of: item i is one of (group, tile, element j of the
// fragment). Lanes of a warp have 8 units by 4 rows.
template <int kGroups, int kTiles>
struct Items {
  static constexpr int kAll = kGroups * kTiles * 4, kItems = (kAll + kWarps - 1) / kWarps;
  __device__ static int Index(int i) { return int(threadIdx.x / 32) + i * kWarps; }
  __device__ static bool Exists(int i) { return Index(i) < kAll; }  // the same for a warp
  __device__ static int J(int i) { return Index(i) % 4; }
  __device__ static int Tile(int i) { return Index(i) / 4 % kTiles; }
  __device__ static int Group(int i) { return Index(i) / 4 / kTiles; }
  __device__ static int Unit(int i) {
    return Group(i) * kUnits + J(i) / 2 * 8 + int(threadIdx.x % 32 / 4);
  }
  __device__ static int Row(int i) {
    return Tile(i) * kTileRows + int(threadIdx.x % 4) * 2 + J(i) % 2;
  }
};

// Where a block works: its direction, the first of its units and of its rows.
struct ResidentPlace {
  int dir, unit, row, rows;
};
template <int kGroups, int kTiles>
__device__ __forceinline__ ResidentPlace PlaceOf(int64_t H, int64_t B, int copies) {
  const int blocks = int((H + kGroups * kUnits - 1) / (kGroups * kUnits));
  const int copy = blockIdx.x / blocks;
  const int row = copy % copies * kTiles * kTileRows;
  return {copy / copies, int(blockIdx.x) % blocks * kGroups * kUnits, row, int(B) - row};
}

// Steps [begin, end) of padded sequences, both directions. Rows of step s are those of time
// start + s * way.
struct ResidentSteps {
  int64_t H, B, T, begin, end;
  int copies;
};

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

template <class T>
struct ResidentForwardDirection {
  int64_t start, way;           // the time of step 0, +1 or -1
  const T *w_hh, *b_ih, *b_hh;  // [kH H, H], [kX H] or null, [kH H] or null
  const Wide<T>* gx;            // [.., kX H], from the row of time gx_time on
  int64_t gx_time;
  T* hs;  // [T B, H]: what a row starts from; that of step `begin` is there, later ones kUnwritten
  T* y;   // row (t, b) at (t B + b) y_stride
  int64_t y_stride;
  Wide<T>* c;          // [B, kExtra H]: before step begin, then after the last
  T *h_last, *c_last;  // [B, H], [B, kExtra H]: after step T - 1
  Wide<T>* tape;       // [T B, kTape H] or null
};
template <class T>
struct ResidentForwardArgs {
  ResidentSteps steps;
  ResidentForwardDirection<T> dir[2];
};

// The tape of a row, in values per unit: what the cell saved, h_t if its backward reads that, c_{t-1}.
template <class C>
struct Tape {
  static constexpr int kExtra = C::kStates - 1;
  static constexpr int kCell = C::kSaved + (C::kUsesNewH ? 1 : 0);
  static constexpr int kTape = kCell + kExtra;
};

template <class C, class T, int kBlocks, int kGroups, int kTiles>
__global__ void __launch_bounds__(kWarps * 32, 1)
    ResidentForward(const __grid_constant__ ResidentForwardArgs<T> args) {
  using Product = ResidentProduct<T, kGroups * C::kH, kBlocks, kTiles>;
  using I = Items<kGroups, kTiles>;
  constexpr int kItems = I::kItems, kExtra = C::kStates - 1;
  float* sums = DynamicShared<float>();  // [2][kSums]
  const ResidentSteps n = args.steps;
  const ResidentPlace at = PlaceOf<kGroups, kTiles>(n.H, n.B, n.copies);
  const ResidentForwardDirection<T>& a = args.dir[at.dir];
  const int64_t H = n.H;

  Product product;
  product.Load(
      [&](int m, int row) -> const T* {
        const int64_t unit = at.unit + m / C::kH * kUnits + row;
        return unit < H ? a.w_hh + (m % C::kH * H + unit) * H : nullptr;
      },
      int(H));

  float c[kItems][kExtra > 0 ? kExtra : 1], h[kItems], gx[kItems][C::kX];
  float b_ih[kItems][C::kX], b_hh[kItems][C::kH];
  const auto valid = [&](int i) {
    return I::Exists(i) && I::Row(i) < at.rows && at.unit + I::Unit(i) < H;
  };
  const auto unit = [&](int i) { return at.unit + I::Unit(i); };
  const auto row = [&](int i, int64_t s) {
    return (a.start + s * a.way) * n.B + at.row + I::Row(i);
  };
  const auto fetch = [&](int64_t s) {  // does not depend on other blocks: ahead of its step
    FRNN_UNROLL
    for (int i = 0; i < kItems; i++) {
      if (!valid(i)) continue;
      const float* from = a.gx + (row(i, s) - a.gx_time * n.B) * C::kX * H + unit(i);
      FRNN_UNROLL
      for (int q = 0; q < C::kX; q++) gx[i][q] = from[q * H];
    }
  };
  FRNN_UNROLL
  for (int i = 0; i < kItems; i++) {
    FRNN_UNROLL
    for (int q = 0; q < C::kX; q++)
      b_ih[i][q] = valid(i) && a.b_ih ? Widen(a.b_ih[q * H + unit(i)]) : 0;
    FRNN_UNROLL
    for (int q = 0; q < C::kH; q++)
      b_hh[i][q] = valid(i) && a.b_hh ? Widen(a.b_hh[q * H + unit(i)]) : 0;
    FRNN_UNROLL
    for (int j = 0; j < kExtra; j++)
      c[i][j] = valid(i) ? a.c[((at.row + I::Row(i)) * kExtra + j) * H + unit(i)] : 0;
    h[i] = C::kUsesH && valid(i) ? Widen(a.hs[row(i, n.begin) * H + unit(i)]) : 0;
  }
  fetch(n.begin);

  for (int64_t s = n.begin; s < n.end; s++) {
    // Two sets of sums in turn: a warp that is ahead writes the one that no other still reads.
    float* now = sums + (s & 1) * Product::kSums;
    product.Multiply(a.hs + ((a.start + s * a.way) * n.B + at.row) * H, H, at.rows, int(H), now);
    __syncthreads();
    FRNN_UNROLL
    for (int i = 0; i < kItems; i++) {
      if (!I::Exists(i)) continue;
      Pack<float, C::kX> x;
      Pack<float, C::kH> g;
      Pack<float, C::kStates> before, after;
      Pack<float, C::kSaved> saved;
      FRNN_UNROLL
      for (int q = 0; q < C::kX; q++) x[q] = gx[i][q] + b_ih[i][q];
      FRNN_UNROLL
      for (int q = 0; q < C::kH; q++)
        g[q] = Product::Sum(now, I::Group(i) * C::kH + q, I::Tile(i), I::J(i)) + b_hh[i][q];
      before[0] = h[i];
      FRNN_UNROLL
      for (int j = 0; j < kExtra; j++) before[j + 1] = c[i][j];

      C::forward(x, g, before, after, saved);

      const bool writes = valid(i);
      const T h_new = Narrow<T>(after[0]);
      if (s + 1 < n.T) PublishUnit(a.hs + row(i, s + 1) * H + unit(i), h_new, writes);
      h[i] = Widen(h_new);
      FRNN_UNROLL
      for (int j = 0; j < kExtra; j++) c[i][j] = after[j + 1];
      if (!writes) continue;
      a.y[row(i, s) * a.y_stride + unit(i)] = h_new;
      if (a.tape) {
        float* tape = a.tape + row(i, s) * Tape<C>::kTape * H + unit(i);
        FRNN_UNROLL
        for (int k = 0; k < C::kSaved; k++) tape[k * H] = saved[k];
        if constexpr (C::kUsesNewH) tape[C::kSaved * H] = h[i];
        FRNN_UNROLL
        for (int j = 0; j < kExtra; j++) tape[(Tape<C>::kCell + j) * H] = before[j + 1];
      }
    }
    if (s + 1 < n.end) fetch(s + 1);
  }

  FRNN_UNROLL
  for (int i = 0; i < kItems; i++) {
    if (!valid(i)) continue;
    const int64_t b = at.row + I::Row(i);
    if (n.end == n.T) a.h_last[b * H + unit(i)] = Narrow<T>(h[i]);
    FRNN_UNROLL
    for (int j = 0; j < kExtra; j++) {
      a.c[(b * kExtra + j) * H + unit(i)] = c[i][j];
      if (n.end == n.T) a.c_last[(b * kExtra + j) * H + unit(i)] = Narrow<T>(c[i][j]);
    }
  }
}

template <class T>
struct ResidentBackwardDirection {
  int64_t start, way;
  const T* w_hh_t;  // [H, kH H] = W_hh^T
  const T* dy;      // row (t, b) at t dy_t_stride + b dy_b_stride, or null
  int64_t dy_t_stride, dy_b_stride;
  const T* hs;          // [T B, H]
  const Wide<T>* tape;  // [T B, kTape H]
  T *dgx, *dgh;         // [T B, kX H], [T B, kH H]; dgh is kUnwritten. The same for some cells
  Wide<T>*dh, *dc;  // [B, H], [B, kExtra H]: of the states after step end - 1, then before begin
};
template <class T>
struct ResidentBackwardArgs {
  ResidentSteps steps;
  bool first_dh;  // whether the gradient of the state before step 0 is wanted
  ResidentBackwardDirection<T> dir[2];
};

template <class C, class T, int kBlocks, int kGroups, int kTiles>
__global__ void __launch_bounds__(kWarps * 32, 1)
    ResidentBackward(const __grid_constant__ ResidentBackwardArgs<T> args) {
  using Product = ResidentProduct<T, kGroups, kBlocks, kTiles>;
  using I = Items<kGroups, kTiles>;
  constexpr int kItems = I::kItems, kExtra = C::kStates - 1, kTape = Tape<C>::kTape;
  float* sums = DynamicShared<float>();  // [2][kSums]
  const ResidentSteps n = args.steps;
  const ResidentPlace at = PlaceOf<kGroups, kTiles>(n.H, n.B, n.copies);
  const ResidentBackwardDirection<T>& a = args.dir[at.dir];
  const int64_t H = n.H;

  Product product;
  product.Load(
      [&](int m, int row) -> const T* {
        const int64_t unit = at.unit + m * kUnits + row;
        return unit < H ? a.w_hh_t + unit * C::kH * H : nullptr;
      },
      int(C::kH * H));

  const auto valid = [&](int i) {
    return I::Exists(i) && I::Row(i) < at.rows && at.unit + I::Unit(i) < H;
  };
  const auto unit = [&](int i) { return at.unit + I::Unit(i); };
  const auto row = [&](int i, int64_t s) {
    return (a.start + s * a.way) * n.B + at.row + I::Row(i);
  };
  float dh[kItems], dc[kItems][kExtra > 0 ? kExtra : 1];
  float dy[kItems], h_prev[kItems], tape[kItems][kTape];
  const auto fetch = [&](int64_t s) {
    FRNN_UNROLL
    for (int i = 0; i < kItems; i++) {
      if (!valid(i)) continue;
      dy[i] = a.dy ? Widen(a.dy[(a.start + s * a.way) * a.dy_t_stride +
                                (at.row + I::Row(i)) * a.dy_b_stride + unit(i)])
                   : 0;
      if constexpr (C::kUsesH) h_prev[i] = Widen(a.hs[row(i, s) * H + unit(i)]);
      const float* from = a.tape + row(i, s) * kTape * H + unit(i);
      FRNN_UNROLL
      for (int k = 0; k < kTape; k++) tape[i][k] = from[k * H];
    }
  };
  FRNN_UNROLL
  for (int i = 0; i < kItems; i++) {
    const int64_t b = at.row + I::Row(i);
    dh[i] = valid(i) ? a.dh[b * H + unit(i)] : 0;
    FRNN_UNROLL
    for (int j = 0; j < kExtra; j++) dc[i][j] = valid(i) ? a.dc[(b * kExtra + j) * H + unit(i)] : 0;
    dy[i] = h_prev[i] = 0;
    FRNN_UNROLL
    for (int k = 0; k < kTape; k++) tape[i][k] = 0;
  }
  fetch(n.end - 1);

  for (int64_t s = n.end - 1; s >= n.begin; s--) {
    FRNN_UNROLL
    for (int i = 0; i < kItems; i++) {
      if (!I::Exists(i)) continue;
      Pack<float, C::kSaved> saved;
      Pack<float, C::kStates> before, d_after, d_before;
      Pack<float, C::kD> d;
      FRNN_UNROLL
      for (int k = 0; k < C::kSaved; k++) saved[k] = tape[i][k];
      before[0] = C::kUsesH ? h_prev[i] : 0;
      d_after[0] = dh[i] + dy[i];
      FRNN_UNROLL
      for (int j = 0; j < kExtra; j++) {
        before[j + 1] = tape[i][Tape<C>::kCell + j];
        d_after[j + 1] = dc[i][j];
      }

      C::backward(saved, before, C::kUsesNewH ? tape[i][C::kSaved] : 0.0f, d_after, d, d_before);

      const bool writes = valid(i);
      T* dgh = a.dgh + row(i, s) * C::kH * H + unit(i);
      ForGatesH<C>(std::make_integer_sequence<int, C::kH>(), [&](int q, auto index) {
        PublishUnit(dgh + q * H, Narrow<T>(d[index]), writes);
      });
      dh[i] = C::kUsesH ? d_before[0] : 0;
      FRNN_UNROLL
      for (int j = 0; j < kExtra; j++) dc[i][j] = d_before[j + 1];
      if (writes && a.dgx != a.dgh) {
        T* dgx = a.dgx + row(i, s) * C::kX * H + unit(i);
        ForGatesX<C>(std::make_integer_sequence<int, C::kX>(),
                     [&](int q, auto index) { dgx[q * H] = Narrow<T>(d[index]); });
      }
    }
    if (s == 0 && !args.first_dh) break;
    if (s > n.begin) fetch(s - 1);
    float* now = sums + (s & 1) * Product::kSums;
    product.Multiply(a.dgh + ((a.start + s * a.way) * n.B + at.row) * C::kH * H, C::kH * H, at.rows,
                     int(C::kH * H), now);
    __syncthreads();
    FRNN_UNROLL
    for (int i = 0; i < kItems; i++)
      if (I::Exists(i)) dh[i] += Product::Sum(now, I::Group(i), I::Tile(i), I::J(i));
  }

  FRNN_UNROLL
  for (int i = 0; i < kItems; i++) {
    if (!valid(i)) continue;
    const int64_t b = at.row + I::Row(i);
    a.dh[b * H + unit(i)] = dh[i];
    FRNN_UNROLL
    for (int j = 0; j < kExtra; j++) a.dc[(b * kExtra + j) * H + unit(i)] = dc[i][j];
  }
}

// The instances: what a plan may ask for. A thread holds kH kBlocks kGroups * 8 words of weights.
template <class C, int kBlocks, int kGroups>
constexpr bool kHasResident = C::kH * kBlocks * kGroups <= kResidentTiles;

template <class C, class T>
class Resident {
 public:
  static void Forward(const Plan& plan, const ResidentForwardArgs<T>& args, cudaStream_t stream) {
    Select(plan, [&](auto blocks, auto groups, auto tiles) {
      using Product = ResidentProduct<T, groups * C::kH, blocks, tiles>;
      LaunchResident(ResidentForward<C, T, blocks, groups, tiles>, Grid(plan, args.steps, groups),
                     kWarps * 32, 2 * Product::kSums * sizeof(float), stream, args);
    });
  }
  static void Backward(const Plan& plan, const ResidentBackwardArgs<T>& args, cudaStream_t stream) {
    Select(plan, [&](auto blocks, auto groups, auto tiles) {
      using Product = ResidentProduct<T, groups, C::kH * blocks, tiles>;
      LaunchResident(ResidentBackward<C, T, C::kH * blocks, groups, tiles>,
                     Grid(plan, args.steps, groups), kWarps * 32,
                     2 * Product::kSums * sizeof(float), stream, args);
    });
  }

 private:
  static unsigned Grid(const Plan& plan, const ResidentSteps& steps, int groups) {
    return unsigned((steps.H + groups * kUnits - 1) / (groups * kUnits) * plan.copies * plan.dirs);
  }
  // f(blocks, groups, tiles), as constants, for the instance of the plan.
  template <class F>
  static void Select(const Plan& plan, const F& f) {
    ForEachOf<1, 2, 4, 8>([&](auto blocks) {
      ForEachOf<1, 2>([&](auto groups) {
        if constexpr (kHasResident<C, blocks, groups>)
          ForEachOf<1, 2, 4>([&](auto tiles) {
            if (plan.blocks == blocks && plan.groups == groups && plan.tiles == tiles)
              f(blocks, groups, tiles);
          });
      });
    });
  }
  template <int... k, class F>
  static void ForEachOf(const F& f) {
    (f(std::integral_constant<int, k>()), ...);
  }
};

}  // namespace cuda
}  // namespace frnn
