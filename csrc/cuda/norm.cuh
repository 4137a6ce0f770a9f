// Normalisation of gates, or of a state, row by row: v becomes gain * n, where n = (v - mean) * scale and
// scale = 1 / sqrt(var + eps), or without a mean n = v * scale and scale = 1 / sqrt(mean of squares
// + eps). A block of threads has a row.
#pragma once
#include "cuda/kernels.cuh"

namespace frnn {
namespace cuda {

constexpr int kNormThreads = 256;
template <class T>
struct NormRowsArgs {
  int64_t width;  // gates H, of a state H
  bool centred;
  Wide<T> eps;
  Rows<Wide<T>> v;
  GateOrder of_v;
  Rows<const Wide<T>> added;  // to v beforehand, or null
  GateOrder of_added;
  const T* gain;    // [width]
  Rows<Wide<T>> n;  // for the backward, or null: n, and of each row the scale
  Wide<T>* scale;
};
template <class T, class D>  // D: of gradients
struct NormGradsArgs {
  int64_t width;
  bool centred;
  Rows<const D> d;  // of gain * n
  const T* gain;
  Rows<const Wide<T>> n;
  const Wide<T>* scale;
  Rows<D> dv;
  GateOrder of_dv;
};

// The sum over all threads, for each of them.
template <class A>
__device__ __forceinline__ A SumOfBlock(A v) {
  FRNN_SHARED(parts, A[kNormThreads / 32]);
  FRNN_UNROLL
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(~0u, v, lanes);
  __syncthreads();  // the last sum may still be read
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
  __syncthreads();
  A sum = 0;
  FRNN_UNROLL
  for (int i = 0; i < kNormThreads / 32; i++) sum += parts[i];
  return sum;
}
template <class F>
__device__ __forceinline__ void ForOwn(int64_t width, const F& f) {
  for (int64_t i = threadIdx.x; i < width; i += kNormThreads) f(i);
}

template <class T>
__global__ void __launch_bounds__(kNormThreads)
    NormRows(const __grid_constant__ NormRowsArgs<T> a) {
  using A = Wide<T>;
  const int64_t row = blockIdx.x;
  A sum = 0, squares = 0;
  ForOwn(a.width, [&](int64_t i) {
    A& v = a.v(row, a.of_v.At(i));
    if (a.added) v += a.added(row, a.of_added.At(i));
    sum += v;
  });
  const A mean = a.centred ? SumOfBlock(sum) / A(a.width) : A(0);
  // Distances from the mean, so that a large one costs no digits.
  ForOwn(a.width, [&](int64_t i) {
    const A apart = a.v(row, a.of_v.At(i)) - mean;
    squares += apart * apart;
  });
  const A scale = A(1) / A(sqrt(SumOfBlock(squares) / A(a.width) + a.eps));
  ForOwn(a.width, [&](int64_t i) {
    A& v = a.v(row, a.of_v.At(i));
    const A n = (v - mean) * scale;
    if (a.n) a.n(row, i) = n;
    v = Widen(a.gain[i]) * n;
  });
  if (a.n && threadIdx.x == 0) a.scale[row] = scale;
}
template <class T, class D>
__global__ void __launch_bounds__(kNormThreads)
    NormGrads(const __grid_constant__ NormGradsArgs<T, D> a) {
  using A = Wide<T>;
  const int64_t row = blockIdx.x;
  const auto grad = [&](int64_t i) { return Widen(a.d(row, i)) * Widen(a.gain[i]); };
  A sum = 0, products = 0;
  ForOwn(a.width, [&](int64_t i) {
    sum += grad(i);
    products += grad(i) * a.n(row, i);
  });
  const A mean = a.centred ? SumOfBlock(sum) / A(a.width) : A(0);
  const A slope = SumOfBlock(products) / A(a.width), scale = a.scale[row];
  ForOwn(a.width, [&](int64_t i) {
    a.dv(row, a.of_dv.At(i)) = Narrow<D>(scale * (grad(i) - mean - a.n(row, i) * slope));
  });
}

}  // namespace cuda
}  // namespace frnn
