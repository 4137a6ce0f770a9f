// CUDA device code on the CPU: the same .cuh, compiled by g++, every CUDA thread a fiber.
//
// Link emulate.cpp with it. csrc/cuda/primitives.h gives the same list on a card; whoever adds to
// one adds to the other, and to primitives.cu, which compiles all of it.
//
//   primitive, in frnn::cuda                  PTX twin
//   ----------------------------------------  ---------------------------------------------------
//   FRNN_SHARED(name, type);                  .shared variable (static; one per CTA)
//   DynamicShared<T>()                        extern .shared, 16-byte aligned
//   LoadRelaxed(p)         2, 4, 8, 16 bytes  ld.relaxed.gpu.global (16: .v4.u32, atomic per word)
//   LoadAcquire(p)         4, 8 bytes         ld.acquire.gpu.global
//   StoreRelaxed(p, v)     2, 4, 8, 16 bytes  st.relaxed.gpu.global (16: .v4.u32, atomic per word)
//   StoreRelease(p, v)     4, 8 bytes         st.release.gpu.global
//   ReduceAddRelease(p, v) uint32_t           red.release.gpu.global.add.u32
//   SpinPause()                               nanosleep.u32 20
//   NamedBarrier(id, threads)                 bar.sync id, threads
//   NamedBarrierArrive(id, threads)           bar.arrive id, threads
//   GridSync()                                cooperative_groups::this_grid().sync()
//   MmaBf16(d, a, b0, b1)                     mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
//   MmaF16(d, a, b0, b1)                      mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
//   MmaTf32(d, a, b0, b1)                     mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32
//   ToTf32(x)                                 cvt.rna.tf32.f32
//   PackBf16(low, high), PackF16(low, high)   cvt.rn.bf16x2.f32, cvt.rn.f16x2.f32
//   LoadMatrix4(r, row)                       ldmatrix.sync.aligned.m8n8.x4.shared.b16
//   LoadMatrix4Transposed(r, row)             ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16
//   CopyAsync<bytes>(shared, global)          cp.async.ca (4, 8) or .cg (16) .shared.global
//   CopyAsyncCommit()                         cp.async.commit_group
//   CopyAsyncWait<n>()                        cp.async.wait_group n
//   -- sm_90 ------------------------------------------------------------------------------------
//   ClusterRank(), ClusterSize()              %cluster_ctarank, %cluster_nctarank
//   ClusterArrive()                           barrier.cluster.arrive.release.aligned
//   ClusterWait()                             barrier.cluster.wait.acquire.aligned
//   ClusterSync()                             both
//   MapShared(p, rank)                        mapa.u64 (generic address of p in CTA rank)
//   MbarrierInit(bar, count)                  mbarrier.init.shared::cta.b64
//   MbarrierInitFence()                       fence.mbarrier_init.release.cluster
//   MbarrierArrive(bar)                       mbarrier.arrive.release.cta.shared::cta.b64
//   MbarrierArriveRemote(bar, rank)           mbarrier.arrive.release.cluster.shared::cluster.b64
//   MbarrierExpectTx(bar, bytes)              mbarrier.arrive.expect_tx.shared::cta.b64
//   MbarrierTryWait(bar, parity)              mbarrier.try_wait.parity.acquire.cluster
//   MbarrierWait(bar, parity)                 the same until it is true
//   StoreAsync(p, v, bar, rank)  4, 8, 16 B   st.async.shared::cluster.mbarrier::complete_tx::bytes
//   CopyBulk(shared, global, bytes, bar)      cp.async.bulk.shared::cluster.global.mbarrier
//
// Besides: threadIdx and its like, __syncthreads, the warp intrinsics, atomics, __half and
// __nv_bfloat16, bit casts and fast math under CUDA's own names.
//
// Two things a kernel must do for the emulation's sake: declare shared variables by FRNN_SHARED
// (a function's static would be one for all CTAs), and poll through LoadRelaxed, LoadAcquire,
// MbarrierTryWait or an atomic (they let the other threads run; a bare volatile read does not).
//
// What is checked: see Launch below. In a build with the race check (see emulate.cpp) also every
// pair of conflicting accesses that no barrier, mbarrier, __syncwarp, release and acquire orders.
//
// What is not: memory order as such (one host thread runs all fibers, so memory is sequentially
// consistent; the race check finds a relaxed access where release or acquire is needed, but knows
// nothing of __threadfence, whose patterns it takes for races), the fences of the async proxy,
// caches that are not coherent (ld.nc, __ldg of what the kernel writes), .aligned on diverged
// warps, registers, bank conflicts, rounding of the fast intrinsics, the order of sums inside mma,
// speed.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

// ---- keywords ----

#define __global__
#define __device__
#define __host__
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __shared__ _Pragma("GCC error \"declare shared memory by FRNN_SHARED or DynamicShared\"")

// ---- vector types ----

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};

#define FRNN_VECTOR_TYPES(T, name, align2, align4)           \
  struct alignas(align2) name##2 { T x, y; };                \
  struct alignas(align4) name##4 { T x, y, z, w; };          \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
FRNN_VECTOR_TYPES(float, float, 8, 16)
FRNN_VECTOR_TYPES(int, int, 8, 16)
FRNN_VECTOR_TYPES(unsigned, uint, 8, 16)
FRNN_VECTOR_TYPES(unsigned short, ushort, 4, 8)
FRNN_VECTOR_TYPES(double, double, 16, 16)
FRNN_VECTOR_TYPES(unsigned long long, ulonglong, 16, 16)
#undef FRNN_VECTOR_TYPES

// ---- the machine ----

namespace frnn::cuda::emulate {

// What a launch throws, and with it everything that the emulation finds: the message names the
// kernel, the block, the thread and, for a fault, the address and the buffer next to it.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Settings {
  // Warps, lanes and CTAs come in random order, warps are frozen for up to max_stall rounds,
  // asynchronous stores arrive late, 16-byte loads tear; one seed gives one schedule. 0: none of
  // this, every warp runs in its turn. FUSED_RNN_EMULATE_SEED sets the first value.
  uint64_t seed = 1;
  unsigned max_stall = 200;
  unsigned sms = 132;  // of the emulated card; bounds the CTAs of a cooperative launch
};
extern Settings settings;

extern uint3 thread_index, block_index;  // of the running thread
extern dim3 block_dim, grid_dim;
extern uint64_t progress;  // events that may end another thread's wait
extern int poll_budget;    // poll loads until the running thread must let others run

[[noreturn]] void Fail(std::string message);  // ends the launch
void Pause(const char* where);                // lets the other threads run
bool Chance(unsigned n);                      // true once in n; never without a seed
// The race check must not see what the machine itself counts.
#define FRNN_UNCHECKED __attribute__((no_sanitize("thread")))
FRNN_UNCHECKED inline void Progress() { ++progress; }
FRNN_UNCHECKED inline void Poll(const char* where) {
  if (--poll_budget <= 0) Pause(where);
}
template <class T>
inline void CheckAligned(const T* p, size_t bytes = sizeof(T)) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) Fail("access is not aligned");
}

void SyncThreads();
unsigned SyncThreadsReduce(const char* where, bool value);  // how many threads had true

// Waits for the lanes of mask, then the last to come calls finish(slots by lane, mask).
using FinishMeeting = void (*)(void* const* slots, unsigned mask);
void Meet(const char* where, unsigned mask, void* slot, FinishMeeting finish);
void SyncWarp(unsigned mask);
uint64_t ShuffleBits(const char* where, unsigned mask, uint64_t value, int from);
unsigned Ballot(const char* where, unsigned mask, bool value);
int Lane();

template <class T>
T Shuffle(const char* where, unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = ShuffleBits(where, mask, bits, from);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

char* DynamicShared();
char* StaticShared(const void* site, size_t bytes, size_t align);
// Site is the type of a lambda, so each declaration has an offset of its own.
template <class T, class Site>
T& StaticShared(Site) {
  static const char site = 0;
  return *reinterpret_cast<T*>(StaticShared(&site, sizeof(T), alignof(T)));
}

// Memory between two inaccessible pages: one byte past the end faults when align divides bytes.
// Filled with 0xFF, NaN in every type. Writes into what alignment leaves free on either side are
// found at the end of the next launch.
void* Allocate(size_t bytes, size_t align = 16);
void Free(void* p);

template <class T>
class Buffer {
 public:
  explicit Buffer(size_t size, size_t align = 16)
      : data_(static_cast<T*>(Allocate(size * sizeof(T), align))), size_(size) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { Free(data_); }
  T* data() const { return data_; }
  size_t size() const { return size_; }
  T* begin() const { return data_; }
  T* end() const { return data_ + size_; }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  T* data_;
  size_t size_;
};
}  // namespace frnn::cuda::emulate

#define threadIdx (::frnn::cuda::emulate::thread_index)
#define blockIdx (::frnn::cuda::emulate::block_index)
#define blockDim (::frnn::cuda::emulate::block_dim)
#define gridDim (::frnn::cuda::emulate::grid_dim)
#define warpSize 32

// ---- the runtime, as far as an engine needs it ----

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2 };
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t e) { return e ? "an error" : "no error"; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
template <class T>
cudaError_t cudaMalloc(T** p, size_t bytes) {
  *p = static_cast<T*>(::frnn::cuda::emulate::Allocate(bytes));
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* p) {
  ::frnn::cuda::emulate::Free(p);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t = nullptr) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t = nullptr) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}

// ---- intrinsics under CUDA's names ----

inline void __syncthreads() { ::frnn::cuda::emulate::SyncThreads(); }
inline int __syncthreads_count(int value) {
  return int(::frnn::cuda::emulate::SyncThreadsReduce("__syncthreads_count", value != 0));
}
inline int __syncthreads_or(int value) {
  return ::frnn::cuda::emulate::SyncThreadsReduce("__syncthreads_or", value != 0) != 0;
}
inline int __syncthreads_and(int value) {
  return ::frnn::cuda::emulate::SyncThreadsReduce("__syncthreads_and", value == 0) == 0;
}
inline void __syncwarp(unsigned mask = ~0u) { ::frnn::cuda::emulate::SyncWarp(mask); }
inline unsigned __ballot_sync(unsigned mask, int value) {
  return ::frnn::cuda::emulate::Ballot("__ballot_sync", mask, value != 0);
}
inline int __any_sync(unsigned mask, int value) {
  return ::frnn::cuda::emulate::Ballot("__any_sync", mask, value != 0) != 0;
}
inline int __all_sync(unsigned mask, int value) {
  return ::frnn::cuda::emulate::Ballot("__all_sync", mask, value == 0) == 0;
}
// A source outside of the segment of width lanes is the lane itself.
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const int lane = ::frnn::cuda::emulate::Lane(), first = lane & ~(width - 1);
  return ::frnn::cuda::emulate::Shuffle("__shfl_sync", mask, value, first + (from & (width - 1)));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = ::frnn::cuda::emulate::Lane(), first = lane & ~(width - 1);
  const int from = lane - int(delta);
  return ::frnn::cuda::emulate::Shuffle("__shfl_up_sync", mask, value, from < first ? lane : from);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = ::frnn::cuda::emulate::Lane(), end = (lane & ~(width - 1)) + width;
  const int from = lane + int(delta);
  return ::frnn::cuda::emulate::Shuffle("__shfl_down_sync", mask, value, from < end ? from : lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = ::frnn::cuda::emulate::Lane(), end = (lane & ~(width - 1)) + width;
  const int from = lane ^ bits;
  return ::frnn::cuda::emulate::Shuffle("__shfl_xor_sync", mask, value, from < end ? from : lane);
}

template <class T>
T __ldg(const T* p) {
  ::frnn::cuda::emulate::CheckAligned(p);
  return *p;
}
inline void __nanosleep(unsigned) { ::frnn::cuda::emulate::Pause("__nanosleep"); }
[[noreturn]] inline void __trap() { ::frnn::cuda::emulate::Fail("__trap"); }
// Fences order nothing that the host does not order anyway; they keep the compiler from moving.
inline void __threadfence() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

// Atomics are relaxed, as on a card.
namespace frnn::cuda::emulate {
template <class T, class F>
T Update(const char* where, T* p, F f) {
  CheckAligned(p);
  Poll(where);
  T old, now;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do {
    now = f(old);
  } while (!__atomic_compare_exchange(p, &old, &now, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  if (now != old) Progress();
  return old;
}
}  // namespace frnn::cuda::emulate
template <class T>
T atomicAdd(T* p, std::common_type_t<T> v) {
  return ::frnn::cuda::emulate::Update("atomicAdd", p, [&](T old) { return T(old + v); });
}
template <class T>
T atomicMax(T* p, std::common_type_t<T> v) {
  return ::frnn::cuda::emulate::Update("atomicMax", p, [&](T old) { return old < v ? v : old; });
}
template <class T>
T atomicMin(T* p, std::common_type_t<T> v) {
  return ::frnn::cuda::emulate::Update("atomicMin", p, [&](T old) { return v < old ? v : old; });
}
template <class T>
T atomicOr(T* p, std::common_type_t<T> v) {
  return ::frnn::cuda::emulate::Update("atomicOr", p, [&](T old) { return T(old | v); });
}
template <class T>
T atomicExch(T* p, std::common_type_t<T> v) {
  return ::frnn::cuda::emulate::Update("atomicExch", p, [&](T) { return v; });
}
template <class T>
T atomicCAS(T* p, std::common_type_t<T> compare, std::common_type_t<T> v) {
  return ::frnn::cuda::emulate::Update("atomicCAS", p,
                                       [&](T old) { return old == compare ? v : old; });
}

namespace frnn::cuda::emulate {
template <class To, class From>
inline To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
uint16_t HalfBits(float x);  // to nearest, ties to even; NaN gives 0x7FFF
float HalfValue(uint16_t bits);
inline uint16_t Bfloat16Bits(float x) {  // to nearest, ties to even; NaN gives 0x7FFF
  const uint32_t u = BitCast<uint32_t>(x);
  return x != x ? 0x7FFF : uint16_t((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}
inline float Bfloat16Value(uint16_t bits) { return BitCast<float>(uint32_t(bits) << 16); }
}  // namespace frnn::cuda::emulate

inline unsigned __float_as_uint(float x) { return ::frnn::cuda::emulate::BitCast<unsigned>(x); }
inline int __float_as_int(float x) { return ::frnn::cuda::emulate::BitCast<int>(x); }
inline float __uint_as_float(unsigned x) { return ::frnn::cuda::emulate::BitCast<float>(x); }
inline float __int_as_float(int x) { return ::frnn::cuda::emulate::BitCast<float>(x); }
inline long long __double_as_longlong(double x) {
  return ::frnn::cuda::emulate::BitCast<long long>(x);
}
inline double __longlong_as_double(long long x) {
  return ::frnn::cuda::emulate::BitCast<double>(x);
}

struct __half {
  uint16_t bits;
  __half() = default;
  __half(float x) : bits(::frnn::cuda::emulate::HalfBits(x)) {}
  operator float() const { return ::frnn::cuda::emulate::HalfValue(bits); }
};
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) : bits(::frnn::cuda::emulate::Bfloat16Bits(x)) {}
  operator float() const { return ::frnn::cuda::emulate::Bfloat16Value(bits); }
};
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
using half = __half;
using half2 = __half2;
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline float __half2float(__half x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short x) {
  return ::frnn::cuda::emulate::BitCast<__half>(x);
}
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) {
  return ::frnn::cuda::emulate::BitCast<__nv_bfloat16>(x);
}

// Macros, because the C library declares some of these names itself.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline double __fma_rn(double x, double y, double z) { return std::fma(x, y, z); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned((uint64_t(x) * y) >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  return (unsigned long long)((static_cast<unsigned __int128>(x) * y) >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T, class U>
constexpr std::common_type_t<T, U> min(T x, U y) {
  return y < x ? y : x;
}
template <class T, class U>
constexpr std::common_type_t<T, U> max(T x, U y) {
  return x < y ? y : x;
}

// ---- the primitives of the list above ----

namespace frnn::cuda {

template <class T>
using Type = T;
#define FRNN_SHARED(name, ...) \
  auto& name = ::frnn::cuda::emulate::StaticShared<::frnn::cuda::Type<__VA_ARGS__>>([] {})

template <class T>
T* DynamicShared() {
  return reinterpret_cast<T*>(emulate::DynamicShared());
}

namespace emulate {
template <size_t bytes>
using Word = std::conditional_t<
    bytes == 2, uint16_t,
    std::conditional_t<bytes == 8, uint64_t, std::conditional_t<bytes == 1, void, uint32_t>>>;

template <class T>
T Load(const char* where, const T* p, int order) {
  static_assert(std::is_trivially_copyable_v<T>);
  using W = Word<sizeof(T)>;
  CheckAligned(p);
  Poll(where);
  constexpr size_t n = sizeof(T) / sizeof(W);
  W words[n];
  for (size_t i = 0; i < n; i++) {
    if (i > 0 && Chance(16)) Pause(where);  // words are atomic, vectors are not
    const W* word = reinterpret_cast<const W*>(p) + i;
    words[i] = order == __ATOMIC_ACQUIRE ? __atomic_load_n(word, __ATOMIC_ACQUIRE)
                                         : __atomic_load_n(word, __ATOMIC_RELAXED);
  }
  T value;
  std::memcpy(&value, words, sizeof(T));
  return value;
}
template <class T>
void Store(const char* where, T* p, const T& value, int order) {
  static_assert(std::is_trivially_copyable_v<T>);
  using W = Word<sizeof(T)>;
  CheckAligned(p);
  Progress();
  constexpr size_t n = sizeof(T) / sizeof(W);
  W words[n];
  std::memcpy(words, &value, sizeof(T));
  for (size_t i = 0; i < n; i++) {
    if (i > 0 && Chance(16)) Pause(where);
    W* word = reinterpret_cast<W*>(p) + i;
    if (order == __ATOMIC_RELEASE)
      __atomic_store_n(word, words[i], __ATOMIC_RELEASE);
    else
      __atomic_store_n(word, words[i], __ATOMIC_RELAXED);
  }
}
}  // namespace emulate

template <class T>
T LoadRelaxed(const T* p) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  return emulate::Load("LoadRelaxed", p, __ATOMIC_RELAXED);
}
template <class T>
T LoadAcquire(const T* p) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  return emulate::Load("LoadAcquire", p, __ATOMIC_ACQUIRE);
}
template <class T>
void StoreRelaxed(T* p, std::common_type_t<T> value) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  emulate::Store("StoreRelaxed", p, value, __ATOMIC_RELAXED);
}
template <class T>
void StoreRelease(T* p, std::common_type_t<T> value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  emulate::Store("StoreRelease", p, value, __ATOMIC_RELEASE);
}
inline void ReduceAddRelease(uint32_t* p, uint32_t value) {
  emulate::CheckAligned(p);
  emulate::Progress();
  __atomic_fetch_add(p, value, __ATOMIC_RELEASE);
}
inline void SpinPause() { emulate::Pause("SpinPause"); }

void NamedBarrier(unsigned id, unsigned threads);
void NamedBarrierArrive(unsigned id, unsigned threads);
void GridSync();

// Fragments as in the PTX manual; r = lane / 4, q = lane % 4. d: (r, 2q), (r, 2q+1), (r+8, 2q),
// (r+8, 2q+1). a, two k in a word: (r, 2q..), (r+8, 2q..), (r, 2q+8..), (r+8, 2q+8..);
// b: (2q.., r), (2q+8.., r). tf32: a: (r, q), (r+8, q), (r, q+4), (r+8, q+4); b: (q, r), (q+4, r).
void MmaBf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void MmaF16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void MmaTf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
inline uint32_t ToTf32(float x) { return (__float_as_uint(x) + 0x1000u) & ~0x1FFFu; }
inline uint32_t PackBf16(float low, float high) {
  return emulate::Bfloat16Bits(low) | uint32_t(emulate::Bfloat16Bits(high)) << 16;
}
inline uint32_t PackF16(float low, float high) {
  return emulate::HalfBits(low) | uint32_t(emulate::HalfBits(high)) << 16;
}
// row: the address of row lane % 8 of matrix lane / 8, 16 bytes.
void LoadMatrix4(uint32_t (&r)[4], const void* row);
void LoadMatrix4Transposed(uint32_t (&r)[4], const void* row);

namespace emulate {
void CopyAsync(void* shared, const void* global, unsigned bytes);
void CopyAsyncWait(unsigned groups);
void StoreAsync(void* p, const void* value, unsigned bytes, uint64_t* bar, unsigned rank);
void* MapShared(void* p, unsigned rank);
}  // namespace emulate
template <int kBytes>
void CopyAsync(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulate::CopyAsync(shared, global, kBytes);
}
void CopyAsyncCommit();
template <int kGroups>
void CopyAsyncWait() {
  emulate::CopyAsyncWait(kGroups);
}

unsigned ClusterRank();
unsigned ClusterSize();
void ClusterArrive();
void ClusterWait();
inline void ClusterSync() {
  ClusterArrive();
  ClusterWait();
}
template <class T>
T* MapShared(T* p, unsigned rank) {
  return static_cast<T*>(emulate::MapShared(p, rank));
}
void MbarrierInit(uint64_t* bar, unsigned count);
void MbarrierInitFence();
void MbarrierArrive(uint64_t* bar);
void MbarrierArriveRemote(uint64_t* bar, unsigned rank);
void MbarrierExpectTx(uint64_t* bar, unsigned bytes);
bool MbarrierTryWait(uint64_t* bar, unsigned parity);
inline void MbarrierWait(uint64_t* bar, unsigned parity) {
  while (!MbarrierTryWait(bar, parity)) {
  }
}
// To the same place in the shared memory of CTA rank, where bar, too, is meant.
template <class T>
void StoreAsync(T* p, std::common_type_t<T> value, uint64_t* bar, unsigned rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  emulate::StoreAsync(p, &value, sizeof(T), bar, rank);
}
void CopyBulk(void* shared, const void* global, unsigned bytes, uint64_t* bar);

// ---- launch ----

struct LaunchConfig {
  dim3 grid, block;
  size_t shared = 0;         // bytes of dynamic shared memory
  unsigned cluster = 1;      // CTAs along x
  bool cooperative = false;  // all CTAs resident: GridSync, or polling what another CTA writes
};

namespace emulate {
void Run(const void* kernel, const LaunchConfig& config, void (*body)(void*), void* arguments);
}

// Runs the kernel to its end, or throws Error, after which memory holds what was written so far.
// Checked: the limits of a launch; accesses outside of Buffers and of shared memory, of shared
// memory of a CTA that has exited; alignment in every primitive; deadlock, with a list of who waits
// where; lanes that meet in different warp operations, or name lanes that have exited; mbarriers
// without init, with too many arrivals or bytes; stores under way to a CTA that exits; GridSync
// without a cooperative launch. Only a cooperative launch has all CTAs resident: others run few at
// a time, so that a kernel that polls another CTA without asking for residency hangs, and is told.
template <class... P, class... A>
void Launch(void (*kernel)(P...), const LaunchConfig& config, cudaStream_t, A... arguments) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument for each parameter of the kernel");
  struct Call {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> parameters;
  } call{kernel, {arguments...}};
  emulate::Run(
      reinterpret_cast<const void*>(kernel), config,
      [](void* p) {
        auto& call = *static_cast<Call*>(p);
        std::apply(call.kernel, call.parameters);
      },
      &call);
}
template <class... P, class... A>
void Launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
            A... arguments) {
  LaunchConfig config;
  config.grid = grid;
  config.block = block;
  config.shared = shared;
  Launch(kernel, config, stream, arguments...);
}
}  // namespace frnn::cuda
