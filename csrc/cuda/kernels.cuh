// Pointwise kernels of the `steps` engine. Matrices are row-major; a thread owns a unit (column) and
// walks rows, so that all accesses along units are coalesced. No atomics anywhere.
#pragma once
#include <utility>

#include "core/cell.h"
#include "cuda/device.h"

namespace frnn {
namespace cuda {

// f(row, unit) for every element of [rows, units], one thread each as far as the grid reaches.
template <class F>
__device__ __forceinline__ void ForEach(int64_t rows, int64_t units, const F& f) {
  const int64_t unit = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (unit >= units) return;
  const int64_t stride = int64_t(gridDim.y) * blockDim.y;
  for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < rows; row += stride)
    f(row, unit);
}

// A matrix in memory: element (row, column) = data[row * stride + column].
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  FRNN_HD T& operator()(int64_t row, int64_t column) const { return data[row * stride + column]; }
  FRNN_HD explicit operator bool() const { return data != nullptr; }
};

// One step of one direction. `rows` sequences are running; the first `next_rows` of them go on.
template <class T>
struct GateForwardArgs {
  int64_t rows, next_rows, H;
  Rows<const Wide<T>> gx;      // [rows, kX H] = x W_ih^T
  Rows<const Wide<T>> gh;      // [rows, kH H] = h W_hh^T
  const T *b_ih, *b_hh;        // [kX H], [kH H] or null
  Rows<const T> h_prev;        // [rows, H], read if the cell uses h elementwise
  Rows<const Wide<T>> c_prev;  // [rows, kExtra H]
  Rows<T> h;                   // [rows, H]: into y, or before the projection
  bool publish;                // not projected: h is also written to
  Rows<T> h_next, h_last;      // [.., H]: for the rows that go on, and for the others
  Rows<Wide<T>> c_next;        // [next_rows, kExtra H]
  Rows<T> c_last;              // [rows, kExtra H], written from next_rows on
  Rows<Wide<T>> saved;         // [rows, (kSaved + kUsesNewH) H] or null
};

template <class C, class T>
__global__ void GateForward(GateForwardArgs<T> a) {
  using A = Wide<T>;
  ForEach(a.rows, a.H, [&](int64_t row, int64_t u) {
    Pack<A, C::kX> x;
    Pack<A, C::kH> h;
    Pack<A, C::kStates> s, s_new;
    Pack<A, C::kSaved> saved;
    FRNN_UNROLL
    for (int q = 0; q < C::kX; q++)
      x[q] = a.gx(row, q * a.H + u) + (a.b_ih ? Widen(a.b_ih[q * a.H + u]) : A(0));
    FRNN_UNROLL
    for (int q = 0; q < C::kH; q++)
      h[q] = a.gh(row, q * a.H + u) + (a.b_hh ? Widen(a.b_hh[q * a.H + u]) : A(0));
    s[0] = C::kUsesH ? Widen(a.h_prev(row, u)) : A(0);
    FRNN_UNROLL
    for (int j = 1; j < C::kStates; j++) s[j] = a.c_prev(row, (j - 1) * a.H + u);

    C::forward(x, h, s, s_new, saved);

    const T h_new = Narrow<T>(s_new[0]);
    a.h(row, u) = h_new;
    const bool goes_on = row < a.next_rows;
    if (a.publish) (goes_on ? a.h_next : a.h_last)(row, u) = h_new;
    FRNN_UNROLL
    for (int j = 1; j < C::kStates; j++) {
      if (goes_on)
        a.c_next(row, (j - 1) * a.H + u) = s_new[j];
      else
        a.c_last(row, (j - 1) * a.H + u) = Narrow<T>(s_new[j]);
    }
    if (a.saved) {
      FRNN_UNROLL
      for (int k = 0; k < C::kSaved; k++) a.saved(row, k * a.H + u) = saved[k];
      if constexpr (C::kUsesNewH) a.saved(row, C::kSaved * a.H + u) = Widen(h_new);
    }
  });
}

template <class T>
struct GateBackwardArgs {
  int64_t rows, H;
  Rows<const Wide<T>> dh;      // [rows, H]: what reaches h_t from later steps
  Rows<const T> dy;            // [rows, H], added to it, or null
  Rows<const Wide<T>> saved;   // as written by GateForward
  Rows<const T> h_prev;        // [rows, H]
  Rows<const Wide<T>> c_prev;  // [rows, kExtra H]
  Rows<Wide<T>> dc;            // [rows, kExtra H]: of c_t on entry, of c_{t-1} on return
  Rows<T> dgx, dgh;            // [rows, kX H], [rows, kH H]; dgh null if it is the same
  Rows<Wide<T>> dh_prev;       // [rows, H]: the elementwise path, written if the cell uses h
};

// f(q, i): gate q has the gradient d[i]. Indices are constants of the compiler: device code can not
// read the cell's static arrays.
template <class C, int... q, class F>
FRNN_HD void ForGatesX(std::integer_sequence<int, q...>, const F& f) {
  (f(q, std::integral_constant<int, C::kDx[q]>()), ...);
}
template <class C, int... q, class F>
FRNN_HD void ForGatesH(std::integer_sequence<int, q...>, const F& f) {
  (f(q, std::integral_constant<int, C::kDh[q]>()), ...);
}

template <class C, class T>
__global__ void GateBackward(GateBackwardArgs<T> a) {
  using A = Wide<T>;
  ForEach(a.rows, a.H, [&](int64_t row, int64_t u) {
    Pack<A, C::kSaved> saved;
    Pack<A, C::kStates> s, ds_new, ds;
    Pack<A, C::kD> d;
    FRNN_UNROLL
    for (int k = 0; k < C::kSaved; k++) saved[k] = a.saved(row, k * a.H + u);
    const A h_new = C::kUsesNewH ? a.saved(row, C::kSaved * a.H + u) : A(0);
    s[0] = C::kUsesH ? Widen(a.h_prev(row, u)) : A(0);
    ds_new[0] = a.dh(row, u) + (a.dy ? Widen(a.dy(row, u)) : A(0));
    FRNN_UNROLL
    for (int j = 1; j < C::kStates; j++) {
      s[j] = a.c_prev(row, (j - 1) * a.H + u);
      ds_new[j] = a.dc(row, (j - 1) * a.H + u);
    }

    C::backward(saved, s, h_new, ds_new, d, ds);

    if constexpr (C::kUsesH) a.dh_prev(row, u) = ds[0];
    FRNN_UNROLL
    for (int j = 1; j < C::kStates; j++) a.dc(row, (j - 1) * a.H + u) = ds[j];
    ForGatesX<C>(std::make_integer_sequence<int, C::kX>(),
                 [&](int q, auto i) { a.dgx(row, q * a.H + u) = Narrow<T>(d[i]); });
    if (a.dgh)
      ForGatesH<C>(std::make_integer_sequence<int, C::kH>(),
                   [&](int q, auto i) { a.dgh(row, q * a.H + u) = Narrow<T>(d[i]); });
  });
}

// to = from, between storage and computing types; zero without a source.
template <class To, class From>
__global__ void Convert(int64_t rows, int64_t columns, Rows<To> to, Rows<const From> from) {
  ForEach(rows, columns, [&](int64_t row, int64_t column) {
    to(row, column) = Narrow<To>(from ? Wide<To>(Widen(from(row, column))) : Wide<To>(0));
  });
}

// Projected h, copied from y to where the next step reads it, or to the last states.
template <class T>
__global__ void Publish(int64_t rows, int64_t next_rows, int64_t width, Rows<const T> h,
                        Rows<T> h_next, Rows<T> h_last) {
  ForEach(rows, width,
          [&](int64_t row, int64_t u) { (row < next_rows ? h_next : h_last)(row, u) = h(row, u); });
}

// Gradient of a projected h_t: dh + dy, rounded as an operand of products.
template <class T>
__global__ void SumGradients(int64_t rows, int64_t width, Rows<T> sum, Rows<const Wide<T>> dh,
                             Rows<const T> dy) {
  ForEach(rows, width, [&](int64_t row, int64_t u) {
    sum(row, u) = Narrow<T>(dh(row, u) + (dy ? Widen(dy(row, u)) : Wide<T>(0)));
  });
}

// Sums over rows in a fixed order: each of `parts` blocks of rows by one thread, then the parts.
template <class T>
__global__ void ColumnSumParts(int64_t rows, int64_t columns, int64_t parts, Rows<const T> of,
                               Wide<T>* partial) {  // [parts, columns]
  const int64_t length = (rows + parts - 1) / parts;
  ForEach(parts, columns, [&](int64_t part, int64_t column) {
    const int64_t begin = part * length, end = begin + length < rows ? begin + length : rows;
    Wide<T> sum = 0;
    for (int64_t row = begin; row < end; row++) sum += Widen(of(row, column));
    partial[part * columns + column] = sum;
  });
}
template <class T>
__global__ void ColumnSum(int64_t columns, int64_t parts, const Wide<T>* partial, T* sum) {
  ForEach(1, columns, [&](int64_t, int64_t column) {
    Wide<T> total = 0;
    for (int64_t part = 0; part < parts; part++) total += partial[part * columns + column];
    sum[column] = Narrow<T>(total);
  });
}

}  // namespace cuda
}  // namespace frnn
