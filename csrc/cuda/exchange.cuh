// How the blocks of a copy (resident.cuh) tell each other what they have computed.
#pragma once
#include "cuda/resident_product.cuh"

namespace frnn {
namespace cuda {

// Through memory of the card, which a reader polls until all of it is written.
struct InMemory {
  static constexpr bool kShared = false, kCluster = false;
};
// There is one block, which has it all in its shared memory.
struct InBlock {
  static constexpr bool kShared = true, kCluster = false;
};
// Blocks of a cluster store it into each other's shared memory. The card has all of a cluster or none.
struct InCluster {
  static constexpr bool kShared = true, kCluster = true;
};

// Older cards have no clusters, and no plan sends such kernels there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif

// A block's shared memory for what the blocks of its copy send to it, itself among them. Mails are
// counted from 1 on and take one of two halves in turn: who sends one has got all of the one before,
// so that nobody still reads the one before that. Number 0 is what lies there at the start.
//
// In a cluster each half has a barrier, which counts the bytes that have come. To wait for one is
// cheaper than for a barrier of the cluster, which waits for stores to memory, too.
template <bool kCluster>
class Mailbox {
 public:
  // bytes: of what comes to a half each time.
  __device__ __forceinline__ Mailbox(void* data, int half, int bytes)
      : data_(static_cast<char*>(data)), half_(half), bytes_(bytes) {}
  static constexpr int64_t Bytes(int64_t half) { return 2 * half + (kCluster ? 16 : 0); }

  __device__ __forceinline__ char* Half(int mail) const { return data_ + (mail & 1) * half_; }

  // By all threads, when number 0 is there, and before any is sent.
  __device__ __forceinline__ void Open() const {
    if constexpr (kCluster) {
      if (threadIdx.x < 2) InitBarrier(Barrier(threadIdx.x));
      ClusterSync();
    } else {
      __syncthreads();
    }
  }
  // All that is to come. Once for each mail, when the one two before is there.
  __device__ __forceinline__ void Expect(int mail) const {
    if (kCluster && threadIdx.x == 0) ExpectBytes(Barrier(mail), unsigned(bytes_));
  }
  // `p` is where it belongs in this block's own box. Of a cluster alone: others write there.
  __device__ __forceinline__ void Send(int mail, void* p, const uint4& v, unsigned to) const {
    StoreAsync(static_cast<uint4*>(p), v, Barrier(mail), to);
  }
  __device__ __forceinline__ void Wait(int mail) const {
    if constexpr (kCluster)
      WaitForBytes(Barrier(mail), (mail - 1) / 2 % 2);
    else
      __syncthreads();
  }

 private:
  __device__ __forceinline__ uint64_t* Barrier(int mail) const {
    return reinterpret_cast<uint64_t*>(data_ + 2 * half_) + (mail & 1);
  }
  char* data_;
  int half_, bytes_;
};

// 16 bytes of a row, of adjacent units, of which each lane has one: those of lanes that differ in the
// bits from 4 on.
template <class T>
__device__ __forceinline__ uint4 JoinUnits(T v) {
  uint32_t words[4] = {Operand<T>::Bits(v)};
  int bit = 4;
  if constexpr (sizeof(T) == 2) {
    const uint32_t other = __shfl_xor_sync(~0u, words[0], bit);
    words[0] = threadIdx.x & bit ? other | words[0] << 16 : words[0] | other << 16;
    bit *= 2;
  }
  FRNN_UNROLL
  for (int n = 1; n < 4; n *= 2, bit *= 2) {
    FRNN_UNROLL
    for (int i = 0; i < n; i++) {
      const uint32_t other = __shfl_xor_sync(~0u, words[i], bit);
      words[n + i] = threadIdx.x & bit ? words[i] : other;
      words[i] = threadIdx.x & bit ? other : words[i];
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

}  // namespace cuda
}  // namespace frnn
