// What the kernels and the engine use of CUDA: types, launches. With FUSED_RNN_EMULATE the
// same sources are compiled for the host, on top of tests/cpp/emulate.h.
#pragma once
#include <cstdint>
#include <tuple>

#include "core/params.h"
#include "core/vec.h"
#include "cuda/runtime.h"

#ifdef FUSED_RNN_EMULATE
#include "emulate.h"
#include "fake_runtime.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/primitives.h"
#endif

namespace frnn {
namespace cuda {

// The shape of a kernel's launches.
template <class... P>
runtime::Shape ShapeOf(void (*kernel)(P...), unsigned block_x, unsigned block_y = 1) {
  return {reinterpret_cast<const void*>(kernel), block_x, block_y};
}

// Launches a kernel; the arguments become what it takes.
template <class... P, class... A>
void Start(void (*kernel)(P...), const runtime::Shape& shape, const runtime::Grid& grid,
           runtime::Stream stream, const A&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument for each parameter of the kernel");
#ifdef FUSED_RNN_EMULATE
  fake::Start(shape, grid, stream, [=] {
    LaunchConfig config;
    config.grid = dim3(grid.x, grid.y), config.block = dim3(shape.block_x, shape.block_y);
    config.shared = shape.shared, config.cooperative = shape.together;
    config.cluster = shape.cluster;
    Launch(kernel, config, nullptr, args...);
  });
#else
  std::tuple<std::decay_t<P>...> parameters{args...};
  std::apply(
      [&](auto&... parameter) {
        void* addresses[] = {&parameter...};
        runtime::Start(shape, grid, stream, addresses);
      },
      parameters);
#endif
}

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
