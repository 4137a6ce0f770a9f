// Pointwise kernels of the `steps` engine. Matrices are row-major; a thread owns a unit (column) and
// walks rows, so that all accesses along units are coalesced. No atomics anywhere.
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

// One step of one direction, of `rows` sequences that are running.
template <class T>
struct GateForwardArgs {
  int64_t rows, H;
  Rows<const Wide<T>> gx;       // [rows, kX H] = x W_ih^T
  Rows<const Wide<T>> gh;       // [rows, kH H] = h W_hh^T
  const T *b_ih, *b_hh;         // [kX H], [kH H] or null
  const T* params[kMaxParams];  // [H] each
  Rows<const T> h_prev;         // [rows, H], read if the cell uses h elementwise
  Rows<const Wide<T>> c_prev;   // [rows, kExtra H]; of the tape, if there is one
  Rows<T> output;               // [rows, H]: of y, or before the projection
  bool publish;                 // not projected: h also goes on
  Onward<T> to;
  Rows<Wide<T>> c_next;  // [next_rows, kExtra H]
  Rows<T> c_last;        // [rows, kExtra H], written from to.last_from on
  Rows<Wide<T>> tape;    // [rows, tape H] or null
  Rows<const T> given;   // [rows, kGiven H]
  Operands<T> operands;  // of these rows
  // Of kernels with stages, where gh may be null:
  Rows<const T> zones;  // [rows, kStates H] or null
  GateOrder of_gh;
};

// A unit of a row, as core/step.h asks for its operands.
template <class C, class T, bool kStages = false>
struct GateForwardView {
  using A = Wide<T>;
  const GateForwardArgs<T>& a;
  int64_t row, u;

  FRNN_HD A GateX(int q) const {
    if (q >= C::kX) return Widen(a.given(row, (q - C::kX) * a.H + u));
    return a.gx(row, q * a.H + u) + (a.b_ih ? Widen(a.b_ih[q * a.H + u]) : A(0));
  }
  FRNN_HD A GateH(int q) const {
    const A product = !kStages ? a.gh(row, q * a.H + u)
                      : a.gh   ? a.gh(row, OfGateH<C>(a.of_gh, q, u))
                               : A(0);
    return product + (a.b_hh ? Widen(a.b_hh[q * a.H + u]) : A(0));
  }
  FRNN_HD A Param(int k) const { return Widen(a.params[k][u]); }
  FRNN_HD A H() const { return Widen(a.h_prev(row, u)); }
  FRNN_HD A Extra(int e) const { return a.c_prev(row, e * a.H + u); }
  FRNN_HD void SetH(A h) const {
    const T h_new = Narrow<T>(h);
    if (States<C>::kOutputExtra < 0) a.output(row, u) = h_new;
    if (a.publish) a.to.template Put<kStages>(row, u, h_new);
    if (C::kReadsNewH && a.tape) Keep(Tape<C>::kNewH, Widen(h_new));
  }
  FRNN_HD void SetExtra(int e, A c) const {
    if (e == States<C>::kOutputExtra) a.output(row, u) = Narrow<T>(c);
    if (a.to.GoesOn(row))
      a.c_next(row, e * a.H + u) = a.to.template IsReset<kStages>(row) ? A(0) : c;
    if (a.to.IsLast(row)) a.c_last(row, e * a.H + u) = Narrow<T>(c);
  }
  FRNN_HD void SetOperand(int k, A v) const {
    const T rounded = Narrow<T>(v);
    if (a.tape) Keep(k, Widen(rounded));
    a.operands.Put(k, row, u, rounded, a.to.mask.by);
  }
  FRNN_HD void Keep(int k, A v) const { a.tape(row, k * a.H + u) = v; }
  FRNN_HD void KeepExtra(int, A) const {}  // c_prev lies on the tape
  FRNN_HD bool Zones() const { return bool(a.zones); }
  FRNN_HD A Zone(int j) const { return Widen(a.zones(row, j * a.H + u)); }
};

// kStages: with what happens between two steps beside the cell.
template <class C, class T, bool kStages>
__global__ void GateForward(const __grid_constant__ GateForwardArgs<T> a) {
  ForEach(a.rows, a.H, [&](int64_t row, int64_t u) {
    const GateForwardView<C, T, kStages> view{a, row, u};
    ForwardStep<C, Wide<T>> step;
    step.Load(view);
    if constexpr (kStages)
      step.Compute(view);
    else
      step.Compute();
    step.StoreStates(view);
    if (a.tape) step.StoreTape(view);
  });
}

// The operand that product kProduct gives, for the one that follows it.
template <class C, class T, bool kStages, int kProduct>
__global__ void OperandForward(const __grid_constant__ GateForwardArgs<T> a) {
  ForEach(a.rows, a.H, [&](int64_t row, int64_t u) {
    const GateForwardView<C, T, kStages> view{a, row, u};
    ForwardStep<C, Wide<T>> step;
    step.template Load<kProduct>(view);
    step.Compute();
    step.template StoreOperand<kProduct>(view);
  });
}

// The gate math where what the output shows is normalised: up to the state that it shows, whose rows
// are normalised next, and the output, of that and of what was kept.
template <class T>
struct ShownForwardArgs {
  GateForwardArgs<T> gates;  // with a tape, be it of this step alone
  Rows<Wide<T>> shown;       // [rows, H]
  const T* shift;            // [H]
};
template <class C, class T>
struct ShownForwardView : GateForwardView<C, T, true> {
  using A = Wide<T>;
  const ShownForwardArgs<T>& all;

  FRNN_HD A Kept(int k) const { return this->a.tape(this->row, k * this->a.H + this->u); }
  FRNN_HD void SetShown(A v) const { all.shown(this->row, this->u) = v; }
  FRNN_HD A Shown() const { return all.shown(this->row, this->u) + Widen(all.shift[this->u]); }
};
// So many blocks are to live on a multiprocessor: left alone, the compiler takes registers for copies
// of a step, and too few threads are there to hide the latency of memory.
template <class T>
constexpr int kBlocksOfShown = sizeof(Wide<T>) == 8 ? 2 : 3;
template <class C, class T>
__global__ void __launch_bounds__(kGateThreads, kBlocksOfShown<T>)
    ForwardToShown(const __grid_constant__ ShownForwardArgs<T> a) {
  ForEach(a.gates.rows, a.gates.H, [&](int64_t row, int64_t u) {
    const ShownForwardView<C, T> view{{a.gates, row, u}, a};
    ForwardStep<C, Wide<T>> step;
    step.Load(view);
    step.RunToShown(view);
  });
}
template <class C, class T>
__global__ void ForwardOutput(const __grid_constant__ ShownForwardArgs<T> a) {
  ForEach(a.gates.rows, a.gates.H, [&](int64_t row, int64_t u) {
    const ShownForwardView<C, T> view{{a.gates, row, u}, a};
    ForwardStep<C, Wide<T>> step;
    step.RunOutput(view);
  });
}

// A layer of one step, for which nothing is kept: both products and the gate math of a unit by a warp.
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

template <class T>
struct GateBackwardArgs {
  int64_t rows, H;
  Carried<T> from;                     // [rows, H]: what reaches h_t from later steps
  bool projected;                      // from.dh is behind the projection: all that reaches h_t
  Rows<const T> dy;                    // [rows, H]: what reaches the output, or null
  Rows<const Wide<T>> tape;            // as written by GateForward
  Rows<const T> h_prev;                // [rows, H]
  const T* params[kMaxParams];         // [H] each
  Rows<Wide<T>> dc;                    // [rows, kExtra H]: of c_t on entry, of c_{t-1} on return
  Rows<T> dgx, dgh;                    // [rows, kX H], [rows, kH H]; dgh null if it is the same
  Rows<Wide<T>> dh_prev;               // [rows, H]: the elementwise path, written if there is one
  Rows<Wide<T>> dparams;               // [rows, kParams H], added to
  Rows<T> dgiven;                      // [rows, kGiven H] or null
  Operands<const Wide<T>> d_operands;  // their gradients, as they went into W_hh
  Operands<T> operands;                // for dW_hh
  // Of kernels with stages:
  GateOrder of_dgh;
  Rows<const T> zones;  // [rows, kStates H] or null
  Rows<const T> dc_n;   // [rows, kExtra H]: what reaches c from outside, or null
  HMask<T> mask;        // of h_prev and of operands, for dW_hh
};

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

// Whether a gradient reaches h_{t-1} by another way than W_hh.
template <class C>
constexpr bool kGradReachesH = States<C>::kReadsH || C::kH == 0;

template <class C, class T, bool kStages>
struct GateBackwardView {
  using A = Wide<T>;
  const GateBackwardArgs<T>& a;
  int64_t row, u;

  FRNN_HD A Kept(int k) const { return a.tape(row, k * a.H + u); }
  FRNN_HD A KeptExtra(int e) const { return Kept(Tape<C>::kC + e); }
  FRNN_HD A Param(int k) const { return Widen(a.params[k][u]); }
  FRNN_HD A H() const { return Widen(a.h_prev(row, u)); }
  FRNN_HD A NewH() const { return Kept(Tape<C>::kNewH); }
  FRNN_HD A GradH() const {
    return kStages && a.projected ? a.from.dh(row, u) : a.from.template H<kStages>(row, u);
  }
  FRNN_HD A GradExtra(int e) const {
    const A carried = a.from.template IsReset<kStages>(row) ? A(0) : a.dc(row, e * a.H + u);
    return kStages && a.dc_n ? carried + Widen(a.dc_n(row, e * a.H + u)) : carried;
  }
  FRNN_HD void AddGradOutput(A& to) const { to += a.dy ? Widen(a.dy(row, u)) : A(0); }
  FRNN_HD A GradOperand(int k) const {
    const A d = a.d_operands(k, row, u);
    return a.mask ? d * Widen(a.mask.by(row, u)) : d;
  }
  FRNN_HD void SetGate(int i, A d) const {
    ForGatesX<C>(i, [&](int q) {
      if (q < C::kX)
        a.dgx(row, q * a.H + u) = Narrow<T>(d);
      else if (a.dgiven)
        a.dgiven(row, (q - C::kX) * a.H + u) = Narrow<T>(d);
    });
    if (a.dgh)
      ForGatesH<C>(i, [&](int q) {
        a.dgh(row, kStages ? OfGateH<C>(a.of_dgh, q, u) : q * a.H + u) = Narrow<T>(d);
      });
  }
  FRNN_HD void SetGradH(A dh) const {
    if (kStages ? bool(a.dh_prev) : kGradReachesH<C>) a.dh_prev(row, u) = dh;
  }
  FRNN_HD void SetGradExtra(int e, A dc) const { a.dc(row, e * a.H + u) = dc; }
  FRNN_HD void AddGradParam(int k, A d) const { a.dparams(row, k * a.H + u) += d; }
  FRNN_HD bool Zones() const { return bool(a.zones); }
  FRNN_HD A Zone(int j) const { return Widen(a.zones(row, j * a.H + u)); }
};

template <class C, class T, bool kStages>
__global__ void GateBackward(const __grid_constant__ GateBackwardArgs<T> a) {
  ForEach(a.rows, a.H, [&](int64_t row, int64_t u) {
    const GateBackwardView<C, T, kStages> view{a, row, u};
    BackwardStep<C, Wide<T>> step;
    step.Load(view);
    if constexpr (kStages) {
      step.Compute(view);
      if (a.mask) a.mask.Keep(row, u, a.h_prev(row, u));
    } else {
      step.Compute();
    }
    step.Store(view);
    FRNN_UNROLL
    for (int k = 0; k < C::kOperands; k++)
      a.operands.Put(k, row, u, Narrow<T>(step.saved[k]), a.mask.by);
  });
}

// Before that, from the last one on: the gate gradients of product kProduct with another operand than h.
template <class C, class T, bool kStages, int kProduct>
__global__ void OperandBackward(const __grid_constant__ GateBackwardArgs<T> a) {
  ForEach(a.rows, a.H, [&](int64_t row, int64_t u) {
    const GateBackwardView<C, T, kStages> view{a, row, u};
    BackwardStep<C, Wide<T>> step;
    step.template Load<kProduct>(view);
    if constexpr (kStages)
      step.Compute(view);
    else
      step.Compute();
    step.template Store<kProduct>(view);
  });
}

// The gate math backwards where what the output shows was normalised: the gradient of what it shows,
// which goes back through the normalisation next, and all others, given what reaches the state.
template <class T>
struct ShownBackwardArgs {
  GateBackwardArgs<T> gates;
  Rows<const Wide<T>> n;       // [rows, H]: the state, normalised
  const T *gain, *shift;       // [H] each
  Rows<Wide<T>> dshown;        // [rows, H]: of gain * n + shift
  Rows<const Wide<T>> dstate;  // [rows, H]: of the state
};
template <class C, class T>
struct ShownBackwardView : GateBackwardView<C, T, true> {
  using A = Wide<T>;
  const ShownBackwardArgs<T>& all;

  FRNN_HD A Shown() const {
    return Widen(all.gain[this->u]) * all.n(this->row, this->u) + Widen(all.shift[this->u]);
  }
  FRNN_HD A GradShown() const { return all.dstate(this->row, this->u); }
};
template <class C, class T>
__global__ void BackwardToShown(const __grid_constant__ ShownBackwardArgs<T> a) {
  ForEach(a.gates.rows, a.gates.H, [&](int64_t row, int64_t u) {
    const ShownBackwardView<C, T> view{{a.gates, row, u}, a};
    BackwardStep<C, Wide<T>> step;
    step.Load(view);
    a.dshown(row, u) = step.ComputeGradShown(view);
  });
}
template <class C, class T>
__global__ void __launch_bounds__(kGateThreads, kBlocksOfShown<T>)
    BackwardFromShown(const __grid_constant__ ShownBackwardArgs<T> a) {
  ForEach(a.gates.rows, a.gates.H, [&](int64_t row, int64_t u) {
    const ShownBackwardView<C, T> view{{a.gates, row, u}, a};
    BackwardStep<C, Wide<T>> step;
    step.Load(view);
    step.ComputeFromShown(view);
    if (a.gates.mask) a.gates.mask.Keep(row, u, a.gates.h_prev(row, u));
    step.Store(view);
  });
}

// sum += of, [rows, columns].
template <class T>
__global__ void AddTo(int64_t rows, int64_t columns, T* sum, const T* of) {
  ForEach(rows, columns, [&](int64_t row, int64_t column) {
    const int64_t i = row * columns + column;
    sum[i] = Narrow<T>(Widen(sum[i]) + Widen(of[i]));
  });
}

// to = from, between storage and computing types; zero without a source, and in rows that are reset.
template <class To, class From>
__global__ void Convert(int64_t rows, int64_t columns, Rows<To> to, Rows<const From> from,
                        const uint8_t* reset) {
  ForEach(rows, columns, [&](int64_t row, int64_t column) {
    const bool there = from && !(reset != nullptr && reset[row]);
    to(row, column) = Narrow<To>(there ? Wide<To>(Widen(from(row, column))) : Wide<To>(0));
  });
}

// data[i] *= by[i], rows of `width` at a time.
template <class T>
__global__ void ScaleBy(int64_t n, int64_t width, T* data, const T* by) {
  ForEach((n + width - 1) / width, width, [&](int64_t row, int64_t column) {
    const int64_t i = row * width + column;
    if (i < n) data[i] = Narrow<T>(Widen(data[i]) * Widen(by[i]));
  });
}

// h that no gate math gives, but a projection, or h_0 (null: zeros), to where the next step reads it and
// to the last states.
template <class T>
__global__ void Publish(int64_t rows, int64_t width, Rows<const T> h,
                        const __grid_constant__ Onward<T> to) {
  ForEach(rows, width, [&](int64_t row, int64_t u) {
    to.template Put<true>(row, u, h ? h(row, u) : Narrow<T>(0));
  });
}

// Gradient of an h that no gate math gives: of a projection, rounded as an operand of products, or of
// h_0. What has been passed back through a mask is used up.
template <class T>
__global__ void SumGradients(int64_t rows, int64_t width, Rows<T> sum,
                             const __grid_constant__ Carried<T> from, Rows<const T> dy,
                             Rows<const T> h_prev, const __grid_constant__ HMask<T> mask) {
  ForEach(rows, width, [&](int64_t row, int64_t u) {
    sum(row, u) = Narrow<T>(from.template H<true>(row, u) + (dy ? Widen(dy(row, u)) : Wide<T>(0)));
    if (!mask) return;
    from.dh(row, u) = 0;
    mask.Keep(row, u, h_prev(row, u));
  });
}

// W_hh [gates, blocks, units of a block, width] with all gates of a block together; or anything else
// whose first two dimensions change places.
template <class T>
__global__ void SwapFirst(int64_t first, int64_t second, int64_t rest, const T* from, T* to) {
  ForEach(first * second, rest, [&](int64_t row, int64_t i) {
    to[(row % second * first + row / second) * rest + i] = from[row * rest + i];
  });
}
// The whole matrix [rows, H] of a block-diagonal one, which has blocks of `width` columns.
template <class T>
__global__ void WholeMatrix(int64_t rows, int64_t H, int64_t width, const T* from, T* to) {
  ForEach(rows, H, [&](int64_t row, int64_t k) {
    const int64_t column = k - row % H / width * width;
    to[row * H + k] = column >= 0 && column < width ? from[row * width + column] : Narrow<T>(0);
  });
}

// Normalisation of gates, or of a state, row by row: v becomes gain * n, where n = (v - mean) * scale and
// scale = 1 / sqrt(var + eps), or without a mean n = v * scale and scale = 1 / sqrt(mean of squares
// + eps). A block of threads has a row.
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

// Sums over rows in a fixed order: each of `parts` blocks of rows by one thread, then the parts. Of
// products, where there is something to multiply by.
template <class T>
__global__ void ColumnSumParts(int64_t rows, int64_t columns, int64_t parts, Rows<const T> of,
                               Rows<const Wide<T>> times, Wide<T>* partial) {  // [parts, columns]
  const int64_t length = (rows + parts - 1) / parts;
  ForEach(parts, columns, [&](int64_t part, int64_t column) {
    const int64_t begin = part * length, end = begin + length < rows ? begin + length : rows;
    Wide<T> sum = 0;
    for (int64_t row = begin; row < end; row++)
      sum += times ? Widen(of(row, column)) * times(row, column) : Widen(of(row, column));
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
