// Kernels of the gate math of a step: all of it, what comes before another operand of W_hh, and the
// parts before and after a normalisation of what the output shows.
#pragma once
#include "core/step.h"
#include "cuda/kernels.cuh"
#include "cuda/plan.h"

namespace frnn {
namespace cuda {

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

}  // namespace cuda
}  // namespace frnn
