// A layer of one step, for which nothing is kept: both products and the gate math of a unit by a warp.
#pragma once
#include "core/step.h"
#include "cuda/gates_forward.cuh"
#include "cuda/plan.h"

namespace frnn {
namespace cuda {

template <class T>
struct OneStepDirection {
  GateForwardArgs<T> gates;  // without gx, gh and c_prev; h_prev may be null
  const T *x, *w_ih, *w_hh;  // [rows, I], [kX H, I], [kH H, H]
  const T* c_prev;           // [rows, kExtra H] or null
};
template <class T>
struct OneStepArgs {
  int64_t I, x_stride;
  OneStepDirection<T> dir[2];
};
constexpr int kOneStepThreads = 128;

template <class C, class T>
struct OneStepView : GateForwardView<C, T> {
  using A = Wide<T>;
  const Pack<A, C::kX>& x;
  const Pack<A, C::kH>& h;
  const T* c_prev;

  FRNN_HD A Bias(const T* b, int q) const { return b ? Widen(b[q * this->a.H + this->u]) : A(0); }
  FRNN_HD A GateX(int q) const {
    if (q >= C::kX) return Widen(this->a.given(this->row, (q - C::kX) * this->a.H + this->u));
    return x[q] + Bias(this->a.b_ih, q);
  }
  FRNN_HD A GateH(int q) const { return h[q] + Bias(this->a.b_hh, q); }
  FRNN_HD A H() const { return this->a.h_prev ? Widen(this->a.h_prev(this->row, this->u)) : A(0); }
  FRNN_HD A Extra(int e) const {
    const int64_t width = States<C>::kExtra * this->a.H;
    return c_prev ? Widen(c_prev[this->row * width + e * this->a.H + this->u]) : A(0);
  }
};

// sums[q][row] += row q of w by a row of `from`, over the k of this lane, kAtOnce adjacent ones at a
// time. Rows of w are `gate` apart.
template <int kAtOnce, int kGates, class T>
__device__ __forceinline__ void AddProducts(Pack<Wide<T>, kOneStepRows> (&sums)[kGates], const T* w,
                                            int64_t gate, Rows<const T> from, int64_t rows,
                                            int64_t depth) {
  struct alignas(kAtOnce * sizeof(T)) Piece {
    T values[kAtOnce];
  };
  for (int64_t k = threadIdx.x % 32 * kAtOnce; k < depth; k += 32 * kAtOnce) {
    Piece of_w[kGates];
    FRNN_UNROLL
    for (int q = 0; q < kGates; q++) of_w[q] = *reinterpret_cast<const Piece*>(w + q * gate + k);
    FRNN_UNROLL
    for (int row = 0; row < kOneStepRows; row++) {
      if (row >= rows) break;
      const Piece of_row = *reinterpret_cast<const Piece*>(&from(row, k));
      FRNN_UNROLL
      for (int q = 0; q < kGates; q++) {
        FRNN_UNROLL
        for (int i = 0; i < kAtOnce; i++)
          sums[q][row] += Widen(of_w[q].values[i]) * Widen(of_row.values[i]);
      }
    }
  }
}
// The sums over all lanes; of these, lane `row` gets its own.
template <int kGates, class A, int kSize>
__device__ __forceinline__ Pack<A, kSize> OfAllLanes(const Pack<A, kOneStepRows> (&sums)[kGates]) {
  Pack<A, kSize> own;
  FRNN_UNROLL
  for (int q = 0; q < kSize; q++) {
    FRNN_UNROLL
    for (int row = 0; row < kOneStepRows; row++) {
      A sum = sums[q][row];
      FRNN_UNROLL
      for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
      if (row == 0 || int(threadIdx.x % 32) == row) own[q] = sum;
    }
  }
  return own;
}

template <class C, class T, int kAtOnce>
__global__ void __launch_bounds__(kOneStepThreads)
    OneStep(const __grid_constant__ OneStepArgs<T> args, int64_t groups) {
  using A = Wide<T>;
  constexpr int kMinH = C::kH > 0 ? C::kH : 1;  // there is no array of none
  const OneStepDirection<T>& a = args.dir[blockIdx.y / groups];
  const GateForwardArgs<T>& gates = a.gates;
  const int64_t unit = (int64_t(blockIdx.x) * kOneStepThreads + threadIdx.x) / 32;
  const int64_t first = blockIdx.y % groups * kOneStepRows, rows = gates.rows - first;
  if (unit >= gates.H) return;
  Pack<A, kOneStepRows> of_x[C::kX] = {}, of_h[kMinH] = {};
  AddProducts<kAtOnce>(of_x, a.w_ih + unit * args.I, gates.H * args.I,
                       {a.x + first * args.x_stride, args.x_stride}, rows, args.I);
  if (C::kH > 0 && gates.h_prev)
    AddProducts<kAtOnce>(of_h, a.w_hh + unit * gates.H, gates.H * gates.H,
                         {&gates.h_prev(first, 0), gates.h_prev.stride}, rows, gates.H);
  const auto x = OfAllLanes<C::kX, A, C::kX>(of_x);
  const auto h = OfAllLanes<kMinH, A, C::kH>(of_h);
  const int64_t row = threadIdx.x % 32;
  if (row >= kOneStepRows || row >= rows) return;
  const OneStepView<C, T> view{{gates, first + row, unit}, x, h, a.c_prev};
  ForwardStep<C, A> step;
  step.Load(view);
  step.Compute();
  step.StoreStates(view);
}

}  // namespace cuda
}  // namespace frnn
