// Device primitives that CUDA C++ has no short name for, as inline PTX. tests/cpp/emulate.h gives
// the same names on the CPU and holds the list of them; whoever adds to one adds to the other.
//
// All of it is there from sm_80 on, the last section from sm_90 on. Scope is the GPU (.gpu) unless
// said. Weak accesses around a relaxed one are ordered by nothing: what a relaxed load may conclude
// is the word that it read.
#pragma once
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

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

// ---- global memory ----

namespace detail {
template <class To, class From>
__device__ __forceinline__ To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "BitCast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
}  // namespace detail

// 2, 4, 8 or 16 bytes, aligned to their size. 16 bytes are four words, each atomic by itself.
template <class T>
__device__ __forceinline__ T LoadRelaxed(const T* p) {
  const size_t at = __cvta_generic_to_global(p);
  if constexpr (sizeof(T) == 2) {
    uint16_t v;
    asm volatile("ld.relaxed.gpu.global.u16 %0, [%1];" : "=h"(v) : "l"(at) : "memory");
    return detail::BitCast<T>(v);
  } else if constexpr (sizeof(T) == 4) {
    uint32_t v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return detail::BitCast<T>(v);
  } else if constexpr (sizeof(T) == 8) {
    uint64_t v;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(at) : "memory");
    return detail::BitCast<T>(v);
  } else {
    static_assert(sizeof(T) == 16, "2, 4, 8 or 16 bytes");
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at)
                 : "memory");
    return detail::BitCast<T>(v);
  }
}

template <class T>
__device__ __forceinline__ T LoadAcquire(const T* p) {
  const size_t at = __cvta_generic_to_global(p);
  if constexpr (sizeof(T) == 4) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return detail::BitCast<T>(v);
  } else {
    static_assert(sizeof(T) == 8, "4 or 8 bytes");
    uint64_t v;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(at) : "memory");
    return detail::BitCast<T>(v);
  }
}

template <class T>
__device__ __forceinline__ void StoreRelaxed(T* p, std::common_type_t<T> value) {
  const size_t at = __cvta_generic_to_global(p);
  if constexpr (sizeof(T) == 2) {
    asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(at),
                 "h"(detail::BitCast<uint16_t>(value))
                 : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at),
                 "r"(detail::BitCast<uint32_t>(value))
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(at),
                 "l"(detail::BitCast<uint64_t>(value))
                 : "memory");
  } else {
    static_assert(sizeof(T) == 16, "2, 4, 8 or 16 bytes");
    const uint4 v = detail::BitCast<uint4>(value);
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.x),
                 "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
  }
}

template <class T>
__device__ __forceinline__ void StoreRelease(T* p, std::common_type_t<T> value) {
  const size_t at = __cvta_generic_to_global(p);
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(at),
                 "r"(detail::BitCast<uint32_t>(value))
                 : "memory");
  } else {
    static_assert(sizeof(T) == 8, "4 or 8 bytes");
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(at),
                 "l"(detail::BitCast<uint64_t>(value))
                 : "memory");
  }
}

__device__ __forceinline__ void ReduceAddRelease(uint32_t* p, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)),
               "r"(value)
               : "memory");
}

// For poll loops in which many threads wait long; a short wait is shorter without it.
__device__ __forceinline__ void SpinPause() { __nanosleep(20); }

// ---- barriers ----

// threads: a multiple of 32. All lanes of a warp come together.
__device__ __forceinline__ void NamedBarrier(unsigned id, unsigned threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void NamedBarrierArrive(unsigned id, unsigned threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// All threads of a cooperative launch.
__device__ __forceinline__ void GridSync() { cooperative_groups::this_grid().sync(); }

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
// To nearest, ties to even; low in bits 0..15.
__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  uint32_t v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
__device__ __forceinline__ uint32_t PackF16(float low, float high) {
  uint32_t v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}

// Four 8x8 matrices of 16-bit elements; row: of row lane % 8 of matrix lane / 8, 16 bytes.
__device__ __forceinline__ void LoadMatrix4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(detail::SharedAddress(row))
               : "memory");
}
__device__ __forceinline__ void LoadMatrix4Transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(detail::SharedAddress(row))
               : "memory");
}

// ---- asynchronous copies, global to shared ----

template <int kBytes>
__device__ __forceinline__ void CopyAsync(void* shared, const void* global) {
  const uint32_t to = detail::SharedAddress(shared);
  const size_t from = __cvta_generic_to_global(global);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  } else {
    static_assert(kBytes == 4 || kBytes == 8, "4, 8 or 16 bytes");
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes)
                 : "memory");
  }
}
__device__ __forceinline__ void CopyAsyncCommit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kGroups of the calling thread's groups are under way.
template <int kGroups>
__device__ __forceinline__ void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// ---- clusters ----

__device__ __forceinline__ unsigned ClusterRank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ unsigned ClusterSize() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// All threads of the cluster that have not exited; the warp comes together (.aligned).
__device__ __forceinline__ void ClusterArrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void ClusterWait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void ClusterSync() {
  ClusterArrive();
  ClusterWait();
}

namespace detail {
__device__ __forceinline__ uint32_t PeerAddress(const void* p, unsigned rank) {
  uint32_t at;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(SharedAddress(p)), "r"(rank));
  return at;
}
}  // namespace detail

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
__device__ __forceinline__ void MbarrierArrive(uint64_t* bar) {
  asm volatile(
      "mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(detail::SharedAddress(bar))
      : "memory");
}
__device__ __forceinline__ void MbarrierArriveRemote(uint64_t* bar, unsigned rank) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                   detail::PeerAddress(bar, rank))
               : "memory");
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
__device__ __forceinline__ void MbarrierWait(uint64_t* bar, unsigned parity) {
  while (!MbarrierTryWait(bar, parity)) {
  }
}

// 4, 8 or 16 bytes to where CTA rank has p; they count at the bar of that CTA.
template <class T>
__device__ __forceinline__ void StoreAsync(T* p, std::common_type_t<T> value, uint64_t* bar,
                                           unsigned rank) {
  const uint32_t to = detail::PeerAddress(p, rank), at = detail::PeerAddress(bar, rank);
  if constexpr (sizeof(T) == 4) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(to),
        "r"(detail::BitCast<uint32_t>(value)), "r"(at)
        : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u64 [%0], %1, [%2];" ::"r"(to),
        "l"(detail::BitCast<uint64_t>(value)), "r"(at)
        : "memory");
  } else {
    static_assert(sizeof(T) == 16, "4, 8 or 16 bytes");
    const uint4 v = detail::BitCast<uint4>(value);
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
        "[%5];" ::"r"(to),
        "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(at)
        : "memory");
  }
}

// A multiple of 16 bytes, 16-byte aligned, into this CTA; they count at bar.
__device__ __forceinline__ void CopyBulk(void* shared, const void* global, unsigned bytes,
                                         uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(detail::SharedAddress(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(detail::SharedAddress(bar))
      : "memory");
}
#endif
}  // namespace frnn::cuda
