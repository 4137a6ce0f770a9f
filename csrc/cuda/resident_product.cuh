// The product of a step in kernels that keep their weights (resident.cuh): D [16 units, 8 rows] += A B
// with mma.sync, A from the weights, B from what is published, its sums split over the warps of a block
// and added up in shared memory in the order of the warps.
#pragma once
#include <algorithm>

#include "cuda/device.h"
#include "cuda/plan.h"
#ifndef FUSED_RNN_EMULATE
#include "cuda/primitives.h"
#endif

namespace frnn {
namespace cuda {

constexpr uint32_t kUnwritten = ~0u;  // a NaN in every type

// How long a block waits for another. All of them are on the card together, so the time is a matter of
// microseconds; when it is a minute, something is wrong, and it would be worse to wait for ever. A
// block that gives up takes what is not written for the NaNs that it looks like, so that what depends
// on it is NaN, does not wait again, and leaves word to the host.
struct Patience {
  uint32_t* alarm;  // in memory that the host reads
  unsigned polls;   // of one product

  static constexpr unsigned kPolls = 1u << 27;
};

// Older cards lack the instructions, and no plan sends them here.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasTensorCores = false;
#else
constexpr bool kHasTensorCores = true;
#endif

// How a type goes through mma.sync. A lane takes 16 bytes of a row at a time, a block of k is 64
// bytes; which k an instruction calls by which name does not matter as long as A and B agree.
template <class T>
struct Operand {
  static constexpr int kBlock = kBlockBytes / sizeof(T), kLane = 16 / sizeof(T);  // elements

  __device__ static void Multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (!kHasTensorCores)
      __trap();
    else if constexpr (kStorage<T> == Storage::kBFloat16)
      MmaBf16(d, a, b0, b1);
    else if constexpr (kStorage<T> == Storage::kHalf)
      MmaF16(d, a, b0, b1);
    else
      MmaTf32(d, a, b0, b1);
  }
  // A word as it goes into the product: float32 is rounded to TF32.
  __device__ static uint32_t Word(uint32_t w) {
    if constexpr (sizeof(T) == 4 && kHasTensorCores) return ToTf32(__uint_as_float(w));
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

// D [16 kM, 8 kTiles] = A B by all warps: kSplit of them share the blocks of k, kBlocks each, the
// others the tiles of A. A is in registers.
template <class T, int kM, int kBlocks, int kTiles, int kSplit>
struct ResidentProduct {
  using O = Operand<T>;
  static constexpr int kOwn = kM * kSplit / kWarps;  // tiles of A of a warp
  static constexpr int kSums = int(SumsOf(kSplit, kM* kTiles));
  static_assert(kOwn * kWarps == kM * kSplit, "every warp has as many");
  // What is under way at once: kLoad blocks of kChunk tiles, at most 8 loads of 16 bytes and 64 sums.
  static constexpr int Divisor(int of, int most) {
    return of % most == 0 ? most : Divisor(of, most - 1);
  }
  static constexpr int kLoad = Divisor(kBlocks, 8);
  static constexpr int kChunk = Divisor(kTiles, std::max(1, std::min(8 / kLoad, 16 / kOwn)));

  uint32_t w[kOwn][kBlocks][2][4];

  __device__ static int FirstTile() { return int(threadIdx.x / 32) / kSplit * kOwn; }
  __device__ static int K(int block) {  // of this lane's 16 bytes
    return (int(threadIdx.x / 32) % kSplit * kBlocks + block) * O::kBlock +
           int(threadIdx.x % 4) * O::kLane;
  }
  // Of the sums of warp `part` of those that share k.
  __device__ static int SumAt(int part, int m, int tile, int j) {
    return (((part * kM + m) * kTiles + tile) * 4 + j) * 32 + int(threadIdx.x % 32);
  }

  // row_of(m, row): where that row of A begins, or null for zeros. `depth` of them exist.
  template <class F>
  __device__ __forceinline__ void Load(const F& row_of, int depth) {
    const int r = threadIdx.x % 32 / 4;
    FRNN_UNROLL
    for (int m = 0; m < kOwn; m++) {
      const T *low = row_of(FirstTile() + m, r), *high = row_of(FirstTile() + m, r + 8);
      FRNN_UNROLL
      for (int block = 0; block < kBlocks; block++) {
        const int k = K(block);
        uint4 a{}, b{};
        if (low && k < depth) a = *reinterpret_cast<const uint4*>(low + k);
        if (high && k < depth) b = *reinterpret_cast<const uint4*>(high + k);
        const uint32_t words[8] = {a.x, b.x, a.y, b.y, a.z, b.z, a.w, b.w};
        FRNN_UNROLL
        for (int i = 0; i < 8; i++) w[m][block][i / 4][i % 4] = O::Word(words[i]);
      }
    }
  }

  // sums = A B, B[k][row] = from[row * stride + k]. Rows and k beyond `rows` and `depth` count as
  // zero. kPolls: other blocks write it, wait until they have. gave_up: of the block, in shared memory,
  // 0 at first.
  template <bool kPolls>
  __device__ __forceinline__ void Multiply(const T* from, int64_t stride, int rows, int depth,
                                           float* sums, const Patience& patience,
                                           uint32_t* gave_up) const {
    const int r = threadIdx.x % 32 / 4, part = int(threadIdx.x / 32) % kSplit;
    volatile uint32_t* const over = gave_up;
    unsigned polls = kPolls && *over != 0 ? patience.polls : 0;
    FRNN_UNROLL
    for (int tile = 0; tile < kTiles; tile += kChunk) {
      float d[kChunk][kOwn][4];
      FRNN_UNROLL
      for (int i = 0; i < kChunk * kOwn * 4; i++) d[i / (kOwn * 4)][i / 4 % kOwn][i % 4] = 0;
      FRNN_UNROLL
      for (int first = 0; first < kBlocks; first += kLoad) {
        uint4 b[kChunk][kLoad];
        bool ready;
        do {
          ready = true;
          FRNN_UNROLL
          for (int i = 0; i < kChunk * kLoad; i++) {
            const int row = (tile + i / kLoad) * kTileRows + r, k = K(first + i % kLoad);
            uint4 v{};
            if (row < rows && k < depth) {
              const uint4* at = reinterpret_cast<const uint4*>(from + row * stride + k);
              v = kPolls ? LoadRelaxed(at) : *at;
            }
            b[i / kLoad][i % kLoad] = v;
          }
          FRNN_UNROLL
          for (int i = 0; kPolls && i < kChunk * kLoad; i++) {
            const uint4& v = b[i / kLoad][i % kLoad];
            ready = ready && v.x != kUnwritten && v.y != kUnwritten && v.z != kUnwritten &&
                    v.w != kUnwritten;
          }
        } while (!ready && ++polls < patience.polls);
        __syncwarp();
        FRNN_UNROLL
        for (int i = 0; i < kLoad; i++) {
          FRNN_UNROLL
          for (int c = 0; c < kChunk; c++) {
            const uint4& v = b[c][i];
            FRNN_UNROLL
            for (int m = 0; m < kOwn; m++) {
              O::Multiply(d[c][m], w[m][first + i][0], O::Word(v.x), O::Word(v.y));
              O::Multiply(d[c][m], w[m][first + i][1], O::Word(v.z), O::Word(v.w));
            }
          }
        }
      }
      FRNN_UNROLL
      for (int i = 0; i < kChunk * kOwn * 4; i++) {
        const int c = i / (kOwn * 4), m = i / 4 % kOwn, j = i % 4;
        sums[SumAt(part, FirstTile() + m, tile + c, j)] = d[c][m][j];
      }
    }
    if (kPolls && polls >= patience.polls) {
      *over = 1;
      *static_cast<volatile uint32_t*>(patience.alarm) = 1;
    }
  }

  // Element j of this lane's fragment, over all warps.
  __device__ __forceinline__ static float Sum(const float* sums, int m, int tile, int j) {
    float sum = 0;
    FRNN_UNROLL
    for (int part = 0; part < kSplit; part++) sum += sums[SumAt(part, m, tile, j)];
    return sum;
  }
};

}  // namespace cuda
}  // namespace frnn
