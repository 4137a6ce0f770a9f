// The product of a step in kernels that keep their weights (resident.cuh): D [16 units, 8 rows] += A B
// with mma.sync, A from the weights, B from what is published, its sums split over the warps of a block,
// or the blocks of a cluster, and added up in shared memory in their order.
#pragma once
#include <algorithm>

#include "cuda/device.h"
#include "cuda/plan.h"

namespace frnn {
namespace cuda {

constexpr uint32_t kUnwritten = ~0u;  // a NaN in every type

// How long a block waits for another. All of them are on the card together, so the time is a matter of
// microseconds; when it is a minute, something is wrong, and it would be worse to wait for ever. A
// block that gives up takes what is not written for the NaNs that it looks like, so that what depends
// on it is NaN, does not wait again, and leaves word to the host.
struct Patience {
  uint32_t* alarm;  // in memory that the host reads
  int polls;        // of one product

  static constexpr int kPolls = 1 << 27;
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

// Where a local kernel has element k of a row in shared memory: rows begin at multiples of 128 bytes,
// and of each 128 bytes pieces change places, so that no two lanes meet in a bank that read rows 2i and
// 2i + 1 (64 bytes of each) or write 8 units of rows 0, 2, 4 and 6, or 1, 3, 5 and 7.
template <class T>
FRNN_HD int LocalPlace(int row, int k) {
  return k ^ ((row / 2 % 4) ^ (row % 2 * 2)) * 2 * int(16 / sizeof(T));
}
template <class T>
FRNN_HD constexpr int64_t LocalStride(int64_t width) {
  return RoundUp(width, 128 / sizeof(T));
}

// Sums that are added up from several parts in their order: of kM tiles of 16 units by kTiles of 8 rows,
// as lanes have them in the fragments of a product, four elements each.
template <int kM, int kTiles, bool kWhole>
struct PartialSums {
  float* data;  // [parts][kM][kTiles][4][32]; or, so that a lane's are 16 bytes, [32][4] at the end
  static constexpr int kSize = kM * kTiles * kUnits * kTileRows;  // of a part

  __device__ __forceinline__ float* At(int part, int m, int tile) const {
    const int lane = int(threadIdx.x % 32) * (kWhole ? 4 : 1);
    return data + part * kSize + (m * kTiles + tile) * kUnits * kTileRows + lane;
  }
  // Element j is at j ^ lane / 8 of 16 bytes, so that lanes that read the same one meet in no bank.
  __device__ __forceinline__ static int Turn() { return int(threadIdx.x % 32 / 8); }
  __device__ __forceinline__ static uint4 Turned(const float (&d)[4]) {
    const uint32_t a = __float_as_uint(d[0]), b = __float_as_uint(d[1]);
    const uint32_t c = __float_as_uint(d[2]), e = __float_as_uint(d[3]);
    const bool one = Turn() & 1, two = Turn() & 2;
    const uint4 v{one ? b : a, one ? a : b, one ? e : c, one ? c : e};
    return {two ? v.z : v.x, two ? v.w : v.y, two ? v.x : v.z, two ? v.y : v.w};
  }
  __device__ __forceinline__ void Put(int part, int m, int tile, const float (&d)[4]) const {
    if constexpr (kWhole) {
      *reinterpret_cast<uint4*>(At(part, m, tile)) = Turned(d);
    } else {
      FRNN_UNROLL
      for (int j = 0; j < 4; j++) At(part, m, tile)[j * 32] = d[j];
    }
  }
  // Of `parts`, which are kMost at most.
  template <int kMost>
  __device__ __forceinline__ float Sum(int parts, int m, int tile, int j) const {
    const float* at = At(0, m, tile) + (kWhole ? j ^ Turn() : j * 32);
    float sum = 0;
    FRNN_UNROLL
    for (int part = 0; part < kMost; part++) sum += part < parts ? at[part * kSize] : 0;
    return sum;
  }
};

// D [16 kM, 8 kTiles] = A B by all warps: kSplit of them share the blocks of k, kBlocks each, the
// others the tiles of A. A is in registers.
template <class T, int kM, int kBlocks, int kTiles, int kSplit, int kLoads>
struct ResidentProduct {
  using O = Operand<T>;
  static constexpr int kParts = kSplit;
  static constexpr int kOwn = kM * kSplit / kWarps;  // tiles of A of a warp
  static_assert(kOwn * kWarps == kM * kSplit, "every warp has as many");
  // Sums of so many products are under way at once, as the next product of a sum waits for the last:
  // of all tiles of A, of kChunk tiles of rows, and where these are few, kWays of each.
  static constexpr int kChains = 4;
  static constexpr int kChunk = std::min(kTiles, std::max(1, kChains / kOwn));
  static constexpr int kWays =
      std::min(2 * kBlocks, (kChains + kOwn * kChunk - 1) / (kOwn * kChunk));
  static_assert(kTiles % kChunk == 0, "tiles are a power of two");
  // What is read at once, up to kLoads times 16 bytes: kRound pieces, a block of k of kChunk tiles each.
  static constexpr int kPieces = kBlocks * kTiles / kChunk;
  static constexpr int kRound = std::min(kPieces, std::max(1, kLoads / kChunk));

  uint32_t w[kOwn][kBlocks][2][4];

  // Which of those that share k a warp is, and its tile i of A.
  __device__ static int Part() { return int(threadIdx.x / 32) % kSplit; }
  __device__ static int TileOf(int i) {
    return (kSplit < kWarps ? int(threadIdx.x / 32) / kSplit : 0) + i * (kM / kOwn);
  }
  __device__ static int K(int block) {  // of this lane's 16 bytes
    return (Part() * kBlocks + block) * O::kBlock + int(threadIdx.x % 4) * O::kLane;
  }

  // at(m, row, k): where that of A lies, with what comes after it in its 16 bytes; or null for zeros.
  template <class F>
  __device__ __forceinline__ void Load(const F& at) {
    const int r = threadIdx.x % 32 / 4;
    FRNN_UNROLL
    for (int m = 0; m < kOwn; m++) {
      FRNN_UNROLL
      for (int block = 0; block < kBlocks; block++) {
        const T *low = at(TileOf(m), r, K(block)), *high = at(TileOf(m), r + 8, K(block));
        uint4 a{}, b{};
        if (low) a = *reinterpret_cast<const uint4*>(low);
        if (high) b = *reinterpret_cast<const uint4*>(high);
        const uint32_t words[8] = {a.x, b.x, a.y, b.y, a.z, b.z, a.w, b.w};
        FRNN_UNROLL
        for (int i = 0; i < 8; i++) w[m][block][i / 4][i % 4] = O::Word(words[i]);
      }
    }
  }

  // put(m, tile, d): a lane's four of A B, of a tile of A and one of rows, over the k of this part.
  // B[k][row] = from[row * stride + k]. Rows and k beyond `rows` and `depth` count as zero. kPolls:
  // other blocks write it, wait until they have; else it is in shared memory, as LocalPlace says.
  // gave_up: of the block, in shared memory, 0 at first.
  template <bool kPolls, class F>
  __device__ __forceinline__ void Multiply(const T* from, int64_t stride, int rows, int depth,
                                           const Patience& patience, uint32_t* gave_up,
                                           const F& put) const {
    const int r = threadIdx.x % 32 / 4;
    const T* own = from + r * stride + (kPolls ? K(0) : 0);
    uint4 b[kRound][kChunk];
    const auto load = [&](int first, int i) {
      const int piece = first + i, block = piece % kBlocks;
      FRNN_UNROLL
      for (int c = 0; c < kChunk; c++) {
        const int row = (piece / kBlocks * kChunk + c) * kTileRows;
        uint4 v{};
        if (piece < kPieces && row + r < rows && K(block) < depth) {
          const int place = kPolls ? block * O::kBlock : LocalPlace<T>(r, K(block));
          const auto* at = reinterpret_cast<const uint4*>(own + row * stride + place);
          v = kPolls ? LoadRelaxed(at) : *at;
        }
        b[i][c] = v;
      }
    };
    const auto is_written = [&] {  // without branches: what is loaded ahead would be waited for
      unsigned unwritten = 0;
      FRNN_UNROLL
      for (int i = 0; i < kRound * kChunk; i++) {
        const uint4& v = b[i / kChunk][i % kChunk];
        unwritten |=
            (v.x == kUnwritten) | (v.y == kUnwritten) | (v.z == kUnwritten) | (v.w == kUnwritten);
      }
      return unwritten == 0;
    };

    volatile uint32_t* const over = gave_up;
    int polls = kPolls && *over == 0 ? patience.polls : 0;  // that are left
    float d[kWays][kChunk][kOwn][4];
    FRNN_UNROLL
    for (int first = 0; first < kPieces; first += kRound) {
      if (first == 0 || (kPolls && !is_written())) {
        do {
          FRNN_UNROLL
          for (int i = 0; i < kRound; i++) load(first, i);
        } while (kPolls && !is_written() && --polls > 0);
      }
      __syncwarp();
      FRNN_UNROLL
      for (int i = 0; i < kRound; i++) {
        const int piece = first + i, block = piece % kBlocks;
        if (piece >= kPieces) break;
        FRNN_UNROLL
        for (int k = 0; k < kWays * kChunk * kOwn * 4 && block == 0; k++)
          d[k / 4 / kOwn / kChunk][k / 4 / kOwn % kChunk][k / 4 % kOwn][k % 4] = 0;
        FRNN_UNROLL
        for (int half = 0; half < 2; half++) {
          FRNN_UNROLL
          for (int c = 0; c < kChunk; c++) {
            const uint4& v = b[i][c];
            FRNN_UNROLL
            for (int m = 0; m < kOwn; m++)
              O::Multiply(d[(block * 2 + half) % kWays][c][m], w[m][block][half],
                          O::Word(half ? v.z : v.x), O::Word(half ? v.w : v.y));
          }
        }
        if (first + kRound < kPieces) load(first + kRound, i);  // while others are multiplied
        FRNN_UNROLL
        for (int k = 0; k < kChunk * kOwn && block == kBlocks - 1; k++) {
          const int c = k / kOwn, m = k % kOwn;
          FRNN_UNROLL
          for (int j = 0; j < 4; j++) {
            FRNN_UNROLL
            for (int ways = kWays / 2; ways > 0; ways /= 2) {
              FRNN_UNROLL
              for (int way = 0; way < ways; way++) d[way][c][m][j] += d[way + ways][c][m][j];
            }
          }
          put(TileOf(m), piece / kBlocks * kChunk + c, d[0][c][m]);
        }
      }
    }
    if (kPolls && polls <= 0) {
      *over = 1;
      *static_cast<volatile uint32_t*>(patience.alarm) = 1;
    }
  }
};

}  // namespace cuda
}  // namespace frnn
