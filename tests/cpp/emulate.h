// CUDA device code on the CPU: the same .cuh, compiled by g++, every CUDA thread a fiber.
//
// Link emulate*.cpp with it. It has what csrc/cuda uses of CUDA, and the names of
// csrc/cuda/primitives.h; whoever adds to that adds here.
//
//   primitive, in frnn::cuda   PTX twin
//   -------------------------  --------------------------------------------------
//   FRNN_SHARED(name, type);   .shared variable (static; one per CTA)
//   DynamicShared<T>()         extern .shared, 16-byte aligned
//   InRegister(v)              v, of every lane the same
//   LoadRelaxed(p)             ld.relaxed.gpu.global.v4.u32, atomic per word
//   StoreRelaxed(p, v)         st.relaxed.gpu.global.u32
//   MmaBf16(d, a, b0, b1)      mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
//   MmaF16(d, a, b0, b1)       mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
//   MmaTf32(d, a, b0, b1)      mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32
//   ToTf32(x)                  cvt.rna.tf32.f32
//   ClusterSync()              barrier.cluster.arrive.release and .wait.acquire
//   InitBarrier(b)             mbarrier.init of 1, fence.mbarrier_init.release.cluster
//   ExpectBytes(b, bytes)      mbarrier.arrive.expect_tx
//   WaitForBytes(b, parity)    mbarrier.try_wait.parity until it is true
//   StoreAsync(p, v, b, rank)  st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32
//
// Two things a kernel must do for the emulation's sake: declare shared variables by FRNN_SHARED
// (a function's static would be one for all CTAs), and poll through LoadRelaxed or WaitForBytes
// (they let the other threads run; a bare volatile read does not).
//
// What is checked: see Launch below. What is not: accesses to global memory (the address sanitizer
// sees those), memory order (one host thread runs all fibers, so memory is sequentially
// consistent), caches that are not coherent, .aligned on diverged warps, registers, bank conflicts,
// rounding of the fast intrinsics, the order of sums inside mma, speed.
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

#pragma GCC visibility push(default)  // for libraries of single cells

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

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// ---- the machine ----

namespace frnn::cuda::emulate {

// What a launch throws, and with it everything that the emulation finds: the message names the
// kernel, the block, the thread and, for a fault, the address.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Settings {
  // Warps, lanes and CTAs come in random order, warps are frozen for up to max_stall rounds,
  // 16-byte loads tear; one seed gives one schedule. 0: none of this, every warp runs in its turn.
  // FUSED_RNN_EMULATE_SEED sets the first value.
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
template <class T>
inline void CheckAligned(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) Fail("access is not aligned");
}

void SyncThreads();

// Waits for the lanes of mask, then the last to come calls finish(slots by lane, mask).
using FinishMeeting = void (*)(void* const* slots, unsigned mask);
void Meet(const char* where, unsigned mask, void* slot, FinishMeeting finish);
void SyncWarp(unsigned mask);
uint64_t Shuffle(const char* where, unsigned mask, uint64_t value, int from);
int Lane();

char* DynamicShared();
char* StaticShared(const void* site, size_t bytes, size_t align);
// Site is the type of a lambda, so each declaration has an offset of its own.
template <class T, class Site>
T& StaticShared(Site) {
  static const char site = 0;
  return *reinterpret_cast<T*>(StaticShared(&site, sizeof(T), alignof(T)));
}

}  // namespace frnn::cuda::emulate

#define threadIdx (::frnn::cuda::emulate::thread_index)
#define blockIdx (::frnn::cuda::emulate::block_index)
#define blockDim (::frnn::cuda::emulate::block_dim)
#define gridDim (::frnn::cuda::emulate::grid_dim)

// ---- the runtime, as far as an engine needs it ----

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0 };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

// ---- intrinsics under CUDA's names ----

inline void __syncthreads() { ::frnn::cuda::emulate::SyncThreads(); }
inline void __syncwarp(unsigned mask = ~0u) { ::frnn::cuda::emulate::SyncWarp(mask); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  const int from = ::frnn::cuda::emulate::Lane() ^ bits;
  word = ::frnn::cuda::emulate::Shuffle("__shfl_xor_sync", mask, word, from);
  std::memcpy(&value, &word, sizeof(T));
  return value;
}
[[noreturn]] inline void __trap() { ::frnn::cuda::emulate::Fail("__trap"); }

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
inline float __uint_as_float(unsigned x) { return ::frnn::cuda::emulate::BitCast<float>(x); }
inline float __int_as_float(int x) { return ::frnn::cuda::emulate::BitCast<float>(x); }

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
inline __half __float2half_rn(float x) { return x; }
inline float __half2float(__half x) { return x; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }

#define __expf(x) expf(x)  // a macro, because the C library declares the name itself
inline float __fdividef(float x, float y) { return x / y; }

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

inline uint32_t InRegister(uint32_t v) { return v; }

inline uint4 LoadRelaxed(const uint4* p) {
  emulate::CheckAligned(p);
  if (--emulate::poll_budget <= 0) emulate::Pause("LoadRelaxed");
  unsigned words[4];
  for (int i = 0; i < 4; i++) {
    if (i > 0 && emulate::Chance(16)) emulate::Pause("LoadRelaxed");  // vectors are not atomic
    words[i] = __atomic_load_n(reinterpret_cast<const unsigned*>(p) + i, __ATOMIC_RELAXED);
  }
  return {words[0], words[1], words[2], words[3]};
}
inline void StoreRelaxed(uint32_t* p, uint32_t value) {
  emulate::CheckAligned(p);
  ++emulate::progress;
  __atomic_store_n(p, value, __ATOMIC_RELAXED);
}

// Fragments as in the PTX manual; r = lane / 4, q = lane % 4. d: (r, 2q), (r, 2q+1), (r+8, 2q),
// (r+8, 2q+1). a, two k in a word: (r, 2q..), (r+8, 2q..), (r, 2q+8..), (r+8, 2q+8..);
// b: (2q.., r), (2q+8.., r). tf32: a: (r, q), (r+8, q), (r, q+4), (r+8, q+4); b: (q, r), (q+4, r).
void MmaBf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void MmaF16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void MmaTf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
inline uint32_t ToTf32(float x) { return (__float_as_uint(x) + 0x1000u) & ~0x1FFFu; }

void ClusterSync();
void InitBarrier(uint64_t* barrier);
void ExpectBytes(uint64_t* barrier, unsigned bytes);
void WaitForBytes(uint64_t* barrier, unsigned parity);
void StoreAsync(uint4* p, const uint4& v, uint64_t* barrier, unsigned rank);  // arrives some time

// ---- launch ----

struct LaunchConfig {
  dim3 grid, block;
  size_t shared = 0;         // bytes of dynamic shared memory
  unsigned cluster = 1;      // CTAs along x
  bool cooperative = false;  // all CTAs resident, so that one may poll what another writes
};

namespace emulate {
void Run(const void* kernel, const LaunchConfig& config, void (*body)(void*), void* arguments);
}

// Runs the kernel to its end, or throws Error, after which memory holds what was written so far.
// Checked: the limits of a launch; accesses outside of shared memory; alignment in every primitive;
// deadlock, with a list of who waits where; lanes that meet in different warp operations, or name
// lanes that have exited; mbarriers without InitBarrier, with too many arrivals or bytes; stores to a
// CTA that exits. Only a cooperative launch has all CTAs resident: others run few clusters at a time,
// so that a kernel that polls another CTA without asking for residency hangs, and is told.
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

#pragma GCC visibility pop
