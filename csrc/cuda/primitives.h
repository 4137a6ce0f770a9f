// Device primitives that CUDA C++ has no short name for, as inline PTX. tests/cpp/emulate.h gives
// the same names on the CPU; whoever adds to one adds to the other.
//
// All of it is there from sm_80 on, clusters from sm_90 on. Scope is the GPU (.gpu). Weak accesses around a relaxed one are
// ordered by nothing: what a relaxed load may conclude is the word that it read.
#pragma once
#include <cstdint>

namespace frnn::cuda {

template <class T>
using Type = T;
// A shared variable of a CTA: FRNN_SHARED(sums, float[4][32]);
#define FRNN_SHARED(name, ...) __shared__::frnn::cuda::Type<__VA_ARGS__> name

// The dynamic shared memory of the launch, 16-byte aligned.
template <class T>
__device__ __forceinline__ T* DynamicShared() {
  extern __shared__ uint4 dynamic_shared[];
  return reinterpret_cast<T*>(dynamic_shared);
}

// A value that is the same for a whole warp, in a register. What launches carry is otherwise read again
// wherever it is needed, from memory for constants, which costs as much as shared memory does. The
// compiler must not see where it comes from: from lane 0, while others seem to have something else.
__device__ __forceinline__ uint32_t InRegister(uint32_t v) {
  return __shfl_sync(~0u, threadIdx.x % 2 == 0 ? v : 0, 0);
}

// ---- global memory ----

// Four words, each atomic by itself.
__device__ __forceinline__ uint4 LoadRelaxed(const uint4* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(p))
               : "memory");
  return v;
}
__device__ __forceinline__ void StoreRelaxed(uint32_t* p, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(value)
               : "memory");
}

// ---- tensor cores ----

// d += a b, a whole warp. Fragments as in the PTX manual; r = lane / 4, q = lane % 4.
// d: (r, 2q), (r, 2q+1), (r+8, 2q), (r+8, 2q+1). a, two k in a word: (r, 2q..), (r+8, 2q..),
// (r, 2q+8..), (r+8, 2q+8..); b: (2q.., r), (2q+8.., r).
__device__ __forceinline__ void MmaBf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void MmaF16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// a: (r, q), (r+8, q), (r, q+4), (r+8, q+4); b: (q, r), (q+4, r). The low 13 bits are ignored.
__device__ __forceinline__ void MmaTf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// To nearest, ties away from zero.
__device__ __forceinline__ uint32_t ToTf32(float x) {
  uint32_t v;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(v) : "f"(x));
  return v;
}

// ---- clusters ----

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
namespace detail {
__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ uint32_t PeerAddress(const void* p, unsigned rank) {
  uint32_t at;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(SharedAddress(p)), "r"(rank));
  return at;
}
}  // namespace detail

// All threads of the cluster, and what they wrote before. It waits for stores to global memory, too:
// too slow for every step.
__device__ __forceinline__ void ClusterSync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// An mbarrier in shared memory, whose phase is over when one ExpectBytes and as many bytes have come.
// Before others store to it: ClusterSync.
__device__ __forceinline__ void InitBarrier(uint64_t* barrier) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n"
      "fence.mbarrier_init.release.cluster;" ::"r"(detail::SharedAddress(barrier))
      : "memory");
}
__device__ __forceinline__ void ExpectBytes(uint64_t* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   detail::SharedAddress(barrier)),
               "r"(bytes)
               : "memory");
}
// Until the phase of this parity is over; the first has parity 0. What came is in shared memory, which
// has no cache before it, so that the scope of the block does.
__device__ __forceinline__ void WaitForBytes(uint64_t* barrier, unsigned parity) {
  uint32_t over;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(over)
        : "r"(detail::SharedAddress(barrier)), "r"(parity)
        : "memory");
  } while (over == 0);
}
// To where block `rank` of the cluster has p; counts at the barrier of that block.
__device__ __forceinline__ void StoreAsync(uint4* p, const uint4& v, uint64_t* barrier,
                                           unsigned rank) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(detail::PeerAddress(p, rank)),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(detail::PeerAddress(barrier, rank))
      : "memory");
}
#else  // No plan sends a kernel with them here.
__device__ __forceinline__ void ClusterSync() { __trap(); }
__device__ __forceinline__ void InitBarrier(uint64_t*) { __trap(); }
__device__ __forceinline__ void ExpectBytes(uint64_t*, unsigned) { __trap(); }
__device__ __forceinline__ void WaitForBytes(uint64_t*, unsigned) { __trap(); }
__device__ __forceinline__ void StoreAsync(uint4*, const uint4&, uint64_t*, unsigned) { __trap(); }
#endif
}  // namespace frnn::cuda
