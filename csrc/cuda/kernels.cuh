// What pointwise kernels have in common: matrices, where the gates of a row lie, and where states and
// their gradients go. Matrices are row-major; a thread owns a unit (column) and walks rows, so that all
// accesses along units are coalesced. No atomics anywhere.
#pragma once
#include <utility>

#include "core/step.h"
#include "cuda/device.h"
#include "cuda/plan.h"

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

// The tape of a row on a card, in values per unit: what the cell saved, c_{t-1}, and h_t if the
// backward reads that.
template <class C>
struct Tape {
  static constexpr int kC = C::kSaved, kNewH = kC + States<C>::kExtra;
  static constexpr int kSize = kNewH + (C::kReadsNewH ? 1 : 0);
};

// Where the gates of a row that one product has lie: one after the other, each of all units; or so in
// each block of `width` units by itself, one block after the other.
struct GateOrder {
  uint32_t gates, H, width;
  FRNN_HD int64_t operator()(int64_t q, int64_t u) const {
    if (width == H) return q * H + u;
    const uint32_t block = uint32_t(u) / width;
    return (int64_t(block) * gates + q) * width + (u - int64_t(block) * width);
  }
  // Of what is number i in the first of these orders.
  FRNN_HD int64_t At(int64_t i) const {
    if (width == H) return i;
    const uint32_t q = uint32_t(i) / H;
    return (*this)(q, i - int64_t(q) * H);
  }
};

// Where gate q of unit u lies in a row, where the gates of each product with W_hh are ordered by
// themselves. Device code can not read the cell's static arrays, so that numbers of gates are constants
// of the compiler, as q is where this is inlined.
template <class C, int... k>
FRNN_HD int64_t OfGateH(const GateOrder& order, int q, int64_t u,
                        std::integer_sequence<int, k...>) {
  int64_t at = 0;
  const auto of_product = [&](int first, int end, int gates) {
    const GateOrder own{uint32_t(gates), order.H, order.width};
    if (q >= first && q < end) at = int64_t(first) * order.H + own(q - first, u);
  };
  (of_product(std::integral_constant<int, Products<C>::First(k)>(),
              std::integral_constant<int, Products<C>::First(k + 1)>(),
              std::integral_constant<int, Products<C>::Gates(k)>()),
   ...);
  return at;
}
template <class C>
FRNN_HD int64_t OfGateH(const GateOrder& order, int q, int64_t u) {
  return OfGateH<C>(order, q, u, std::make_integer_sequence<int, Products<C>::kCount>());
}

// f(q) for the gates whose gradient is d[i], and for x[kX] and on, what is given. Device code can not
// read the cell's static arrays, so that they are constants of the compiler, as i is where this is
// inlined.
template <class C, int... q, class F>
FRNN_HD void ForGatesX(int i, std::integer_sequence<int, q...>, const F& f) {
  ((std::integral_constant<int, C::kDx[q]>() == i ? f(q) : void()), ...);
}
template <class C, int... q, class F>
FRNN_HD void ForGatesH(int i, std::integer_sequence<int, q...>, const F& f) {
  ((std::integral_constant<int, C::kDh[q]>() == i ? f(q) : void()), ...);
}
template <class C, class F>
FRNN_HD void ForGatesX(int i, const F& f) {
  ForGatesX<C>(i, std::make_integer_sequence<int, C::kX + C::kGiven>(), f);
}
template <class C, class F>
FRNN_HD void ForGatesH(int i, const F& f) {
  ForGatesH<C>(i, std::make_integer_sequence<int, C::kH>(), f);
}

// h, or another operand of W_hh, as a mask leaves it.
template <class T>
FRNN_HD T Masked(T h, T by) {
  return Narrow<T>(Widen(h) * Widen(by));
}

// What multiplies h where it goes into W_hh, [B, Hout], or null; and what goes there then.
template <class T>
struct HMask {
  Rows<const T> by;
  Rows<T> masked;
  FRNN_HD explicit operator bool() const { return bool(by); }
  FRNN_HD void Keep(int64_t row, int64_t u, T h) const {
    masked(row, u) = Masked<T>(h, by(row, u));
  }
};

// Operands of W_hh beside h, of some rows: number k of unit u in a row is at data[k * size + row * H + u].
template <class T>
struct Operands {
  T* data;
  int64_t size, H;
  FRNN_HD T& operator()(int k, int64_t row, int64_t u) const {
    return data[k * size + row * H + u];
  }
  // As it goes there, where a mask multiplies it, or none.
  FRNN_HD void Put(int k, int64_t row, int64_t u, T v, const Rows<const T>& mask) const {
    (*this)(k, row, u) = mask ? Masked<T>(v, mask(row, u)) : v;
  }
};

// Where the states after a step go: the first `next_rows` rows to the next step, those from
// `last_from` on to the last states, or to those of every step.
template <class T>
struct Onward {
  int64_t next_rows, last_from;
  Rows<T> h_next, h_last;
  // Of kernels with stages:
  const uint8_t* reset;  // [next_rows] or null: which rows go on as zeros
  HMask<T> mask;

  FRNN_HD bool GoesOn(int64_t row) const { return row < next_rows; }
  FRNN_HD bool IsLast(int64_t row) const { return row >= last_from; }
  template <bool kStages>
  FRNN_HD bool IsReset(int64_t row) const {
    return kStages && reset != nullptr && reset[row];
  }
  template <bool kStages>
  FRNN_HD void Put(int64_t row, int64_t u, T h) const {
    if (IsLast(row)) h_last(row, u) = h;
    if (!GoesOn(row)) return;
    if (IsReset<kStages>(row)) h = Narrow<T>(0);
    h_next(row, u) = h;
    if (kStages && mask) mask.Keep(row, u, h);
  }
};

// What steps already seen pass back to the states after a step.
template <class T>
struct Carried {
  using A = Wide<T>;
  Rows<A> dh;  // [.., Hout]
  // Of kernels with stages:
  int64_t next_rows;     // of these, which have gone on,
  const uint8_t* reset;  // those that did so as zeros, or null
  Rows<const T> mask;    // of h, or null, and
  Rows<const A> masked;  // the gradient of what went into W_hh, beside dh
  Rows<const T> dh_n;    // what reaches h from outside, or null

  template <bool kStages>
  FRNN_HD bool IsReset(int64_t row) const {
    return kStages && reset != nullptr && row < next_rows && reset[row];
  }
  template <bool kStages>
  FRNN_HD A H(int64_t row, int64_t u) const {
    if (!kStages) return dh(row, u);
    A sum = IsReset<kStages>(row) ? A(0)
            : mask                ? dh(row, u) + masked(row, u) * Widen(mask(row, u))
                                  : dh(row, u);
    if (dh_n) sum += Widen(dh_n(row, u));
    return sum;
  }
};

// Whether a gradient reaches h_{t-1} by another way than W_hh.
template <class C>
constexpr bool kGradReachesH = States<C>::kReadsH || C::kH == 0;

// So many blocks of the kernels around a normalisation of what the output shows are to live on a
// multiprocessor: left alone, the compiler takes registers for copies of a step, and too few threads
// are there to hide the latency of memory.
template <class T>
constexpr int kBlocksOfShown = sizeof(Wide<T>) == 8 ? 2 : 3;

}  // namespace cuda
}  // namespace frnn
