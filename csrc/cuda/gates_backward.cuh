// Kernels of the gate math of a step backwards: all of it, what comes before another operand of W_hh,
// and the parts before and after a normalisation of what the output shows.
#pragma once
#include "core/step.h"
#include "cuda/kernels.cuh"
#include "cuda/plan.h"

namespace frnn {
namespace cuda {

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

}  // namespace cuda
}  // namespace frnn
