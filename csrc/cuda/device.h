// What the kernels and the engine use of CUDA: types, launches, errors. With FUSED_RNN_EMULATE the
// same sources are compiled for the host, on top of tests/cpp/emulate.h.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/params.h"
#include "core/vec.h"

#ifdef FUSED_RNN_EMULATE
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace frnn {
namespace cuda {

inline void Check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("fused_rnn: ") + what + ": " + cudaGetErrorString(status));
}

#ifndef FUSED_RNN_EMULATE
#ifdef __CUDACC__
template <class... P, class... A>
void Launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
            A... args) {
  kernel<<<grid, block, shared, stream>>>(args...);
  Check(cudaGetLastError(), "launching a kernel");
}
// together: all blocks at the same time on the card, so that they may wait for each other.
template <class... P, class... A>
void LaunchResident(void (*kernel)(P...), bool together, unsigned grid, unsigned block,
                    size_t shared, cudaStream_t stream, const A&... args) {
  Check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)),
        "asking for shared memory");
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = together;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared;
  config.stream = stream, config.attrs = &cooperative, config.numAttrs = 1;
  Check(cudaLaunchKernelEx(&config, kernel, args...), "launching a resident kernel");
}
#endif
#else
template <class... P, class... A>
void LaunchResident(void (*kernel)(P...), bool together, unsigned grid, unsigned block,
                    size_t shared, cudaStream_t stream, const A&... args) {
  LaunchConfig config;
  config.grid = grid, config.block = block, config.shared = shared, config.cooperative = together;
  Launch(kernel, config, stream, args...);
}
#endif

// T: type of a tensor in memory. Wide<T>: type it is computed in.
template <class T>
struct WideType {
  using type = float;
};
template <>
struct WideType<double> {
  using type = double;
};
template <class T>
using Wide = typename WideType<T>::type;

template <class T>
struct StorageType;
template <>
struct StorageType<float> {
  static constexpr Storage kValue = Storage::kFloat;
};
template <>
struct StorageType<double> {
  static constexpr Storage kValue = Storage::kDouble;
};
template <>
struct StorageType<__nv_bfloat16> {
  static constexpr Storage kValue = Storage::kBFloat16;
};
template <>
struct StorageType<__half> {
  static constexpr Storage kValue = Storage::kHalf;
};
template <class T>
constexpr Storage kStorage = StorageType<T>::kValue;

FRNN_HD float Widen(float v) { return v; }
FRNN_HD double Widen(double v) { return v; }
FRNN_HD float Widen(__nv_bfloat16 v) { return __bfloat162float(v); }
FRNN_HD float Widen(__half v) { return __half2float(v); }

// Rounds to the nearest number that T holds.
template <class T>
FRNN_HD T Narrow(Wide<T> v) {
  if constexpr (kStorage<T> == Storage::kBFloat16)
    return __float2bfloat16_rn(v);
  else if constexpr (kStorage<T> == Storage::kHalf)
    return __float2half_rn(v);
  else
    return v;
}

}  // namespace cuda
}  // namespace frnn
