// Primitives beside csrc/cuda/primitives.h that latency.cu measures, as inline PTX: ordered accesses,
// and from sm_90 on clusters, mbarriers and stores into the shared memory of another CTA.
#pragma once
#include <cstdint>

namespace frnn::cuda {

// ---- global memory, scope of the GPU ----

__device__ __forceinline__ uint32_t LoadRelaxed(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];"
               : "=r"(v)
               : "l"(__cvta_generic_to_global(p))
               : "memory");
  return v;
}
__device__ __forceinline__ uint32_t LoadAcquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(v)
               : "l"(__cvta_generic_to_global(p))
               : "memory");
  return v;
}
__device__ __forceinline__ void StoreRelease(uint32_t* p, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(value)
               : "memory");
}
__device__ __forceinline__ void ReduceAddRelease(uint32_t* p, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)),
               "r"(value)
               : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// ---- clusters ----

__device__ __forceinline__ unsigned ClusterRank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Where CTA rank of the cluster has what this CTA has at p. A peer's memory may be used between
// two ClusterSync: the first says that the peer has started, the second that it may exit.
template <class T>
__device__ __forceinline__ T* MapShared(T* p, unsigned rank) {
  uint64_t at;
  asm("mapa.u64 %0, %1, %2;" : "=l"(at) : "l"(reinterpret_cast<uint64_t>(p)), "r"(rank));
  return reinterpret_cast<T*>(at);
}

// ---- mbarriers ----

// A phase is over when count arrivals and all expected bytes have come. Before a peer may use it:
// MbarrierInitFence, then ClusterSync.
__device__ __forceinline__ void MbarrierInit(uint64_t* bar, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(detail::SharedAddress(bar)),
               "r"(count)
               : "memory");
}
__device__ __forceinline__ void MbarrierInitFence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Adds bytes to what this phase expects, then arrives.
__device__ __forceinline__ void MbarrierExpectTx(uint64_t* bar, unsigned bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(detail::SharedAddress(bar)),
      "r"(bytes)
      : "memory");
}
// Whether the phase of this parity is over; the first phase has parity 0. May sleep for a while.
__device__ __forceinline__ bool MbarrierTryWait(uint64_t* bar, unsigned parity) {
  uint32_t over;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(over)
      : "r"(detail::SharedAddress(bar)), "r"(parity)
      : "memory");
  return over != 0;
}

// To where CTA rank has p; the bytes count at the bar of that CTA.
__device__ __forceinline__ void StoreAsync(uint32_t* p, uint32_t value, uint64_t* bar,
                                           unsigned rank) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
                   detail::PeerAddress(p, rank)),
               "r"(value), "r"(detail::PeerAddress(bar, rank))
               : "memory");
}
#endif
}  // namespace frnn::cuda
