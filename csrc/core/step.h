// One step of one unit of one row, for any engine: from its operands in memory, through the cell,
// and back. An engine lends a view of where its operands lie; this file is the one place that knows
// their order, and where a stage has its turn: one that acts on gates before the cell
// (ForwardStep::Compute, first line), or on states after it (last line: zoneout), and what undoes
// them in BackwardStep, in reverse; and one between a state and the output that shows it.
#pragma once
#include <limits>

#include "core/cell.h"

namespace frnn {

// s becomes by s + plus: what a step does to n affine states, or several steps together, or backwards
// in time to their gradients.
template <class V, int n>
struct AffineMap {
  Pack<V, n * n> by;
  Pack<V, n> plus;

  // All that was before does not matter: the states are these.
  FRNN_HD static AffineMap To(const Pack<V, n>& s) {
    AffineMap map{};
    map.plus = s;
    return map;
  }
  FRNN_HD static AffineMap Identity() {
    AffineMap map{};
    FRNN_UNROLL
    for (int i = 0; i < n; i++) map.by[i * n + i] = splat<V>(1);
    return map;
  }
  // `first` and then this.
  FRNN_HD AffineMap After(const AffineMap& first) const {
    AffineMap both;
    FRNN_UNROLL
    for (int i = 0; i < n; i++) {
      FRNN_UNROLL
      for (int j = 0; j < n; j++) {
        V sum = by[i * n] * first.by[j];
        FRNN_UNROLL
        for (int k = 1; k < n; k++) sum = sum + by[i * n + k] * first.by[k * n + j];
        // Factors beyond 1 may overflow together where a state is zero, which is to stay so.
        constexpr auto most = std::numeric_limits<typename Lanes<V>::T>::max();
        both.by[i * n + j] = clamp(sum, -most, most);
      }
    }
    both.plus = (*this)(first.plus);
    return both;
  }
  FRNN_HD Pack<V, n> operator()(const Pack<V, n>& s) const {
    Pack<V, n> to = plus;
    FRNN_UNROLL
    for (int i = 0; i < n; i++) {
      FRNN_UNROLL
      for (int j = 0; j < n; j++) to[i] = to[i] + by[i * n + j] * s[j];
    }
    return to;
  }
};

// The affine ones of all states; and all states, of which these are the affine ones and others zero.
template <class C, class V>
FRNN_HD Pack<V, kAffineStates<C>> AffineOf(const Pack<V, C::kStates>& s) {
  Pack<V, kAffineStates<C>> of;
  int i = 0;
  FRNN_UNROLL
  for (int j = 0; j < C::kStates; j++)
    if (C::kAffine >> j & 1) of[i++] = s[j];
  return of;
}
template <class C, class V>
FRNN_HD Pack<V, C::kStates> FromAffine(const Pack<V, kAffineStates<C>>& of) {
  Pack<V, C::kStates> s{};
  int i = 0;
  FRNN_UNROLL
  for (int j = 0; j < C::kStates; j++)
    if (C::kAffine >> j & 1) s[j] = of[i++];
  return s;
}

// A cell with several products has a step after each: Load<k> has the gates of the first k + 1, and
// StoreOperand<k> is all that comes of it but for the last, which is a step like any other.
//
// An engine without stages calls Compute() alone. A view of the forward has
//   V GateX(q), GateH(q)     pre-activations with their biases; GateX(kX + k): what is given
//   V Param(k)
//   V H(), Extra(e)          the states before the step
//   bool Zones()             whether states keep a part of what they were:
//   V Zone(j)                of h (j = 0) and state j - 1 of c
//   void SetH(V), SetExtra(e, V)
//   void Keep(k, V)          for the backward: value k that the cell saved
//   void KeepExtra(e, V)     and state e of c before the step
//   void SetOperand(k, V)    also for the backward
// and, where what a cell shows is normalised,
//   void SetShown(V)         the state, as it is
//   V Shown()                and as the output shows it
//   V Kept(k)                as Keep had it
template <class C, class V>
struct ForwardStep {
  Pack<V, C::kX + C::kGiven> x;
  Pack<V, C::kH> h;
  Pack<V, C::kStates> s, s_new;
  Pack<V, C::kParams> p;
  Pack<V, C::kSaved> saved;

  template <int kProduct = C::kOperands, class View>
  FRNN_HD void Load(const View& from) {
    FRNN_UNROLL
    for (int q = 0; q < C::kX + C::kGiven; q++) x[q] = from.GateX(q);
    constexpr int kKnown = Products<C>::First(kProduct + 1);
    FRNN_UNROLL
    for (int q = 0; q < C::kH; q++) h[q] = q < kKnown ? from.GateH(q) : V{};
    s[C::kRecurrent] = States<C>::kReadsH ? from.H() : V{};
    FRNN_UNROLL
    for (int e = 0; e < States<C>::kExtra; e++) s[States<C>::OfExtra(e)] = from.Extra(e);
    FRNN_UNROLL
    for (int k = 0; k < C::kParams; k++) p[k] = from.Param(k);
  }
  FRNN_HD void Compute() { C::forward(x, h, s, p, s_new, saved); }
  template <class View>
  FRNN_HD void Compute(const View& view) {
    Compute();
    if (!view.Zones()) return;
    s[C::kRecurrent] = view.H();
    FRNN_UNROLL
    for (int j = 0; j < C::kStates; j++) Stay(view, j);
  }

  // After Load, whatever the states.
  FRNN_HD AffineMap<V, kAffineStates<C>> Map() const {
    AffineMap<V, kAffineStates<C>> map;
    C::affine(x, p, map.by, map.plus);
    return map;
  }

  template <int kProduct, class View>
  FRNN_HD void StoreOperand(const View& to) const {
    to.SetOperand(kProduct, saved[kProduct]);
  }
  template <class View>
  FRNN_HD void StoreStates(const View& to) const {
    to.SetH(s_new[C::kRecurrent]);
    StoreExtras(to);
  }
  template <class View>
  FRNN_HD void StoreTape(const View& to) const {
    FRNN_UNROLL
    for (int k = C::kOperands; k < C::kSaved; k++) to.Keep(k, saved[k]);
    FRNN_UNROLL
    for (int e = 0; e < States<C>::kExtra; e++)
      if (States<C>::ReadsExtra(e)) to.KeepExtra(e, s[States<C>::OfExtra(e)]);
  }

  // The same in two parts, where what the cell shows is normalised: all up to it, after Load, and
  // the output, of what was kept.
  template <class View>
  FRNN_HD void RunToShown(const View& view) {
    Compute();
    view.SetShown(s_new[C::kShows]);
    if (view.Zones()) {
      FRNN_UNROLL
      for (int j = 1; j < C::kStates; j++) Stay(view, j);
    }
    StoreTape(view);
    StoreExtras(view);
  }
  template <class View>
  FRNN_HD void RunOutput(const View& view) {
    FRNN_UNROLL
    for (int k = 0; k < C::kSaved; k++) saved[k] = view.Kept(k);
    s_new[C::kOutput] = C::show(saved, view.Shown());
    if (view.Zones()) {
      s[C::kRecurrent] = view.H();
      Stay(view, 0);
    }
    view.SetH(s_new[C::kRecurrent]);
  }

 private:
  // What of its old value a unit keeps of h, j = 0, or state j - 1 of c.
  template <class View>
  FRNN_HD void Stay(const View& view, int j) {
    const int state = j == 0 ? C::kRecurrent : States<C>::OfExtra(j - 1);
    const V z = view.Zone(j);
    s_new[state] = (splat<V>(1) - z) * s_new[state] + z * s[state];
  }
  template <class View>
  FRNN_HD void StoreExtras(const View& to) const {
    FRNN_UNROLL
    for (int e = 0; e < States<C>::kExtra; e++) to.SetExtra(e, s_new[States<C>::OfExtra(e)]);
  }
};

// Likewise, the step of product k stores the gradients of its gates; that of h, all others. A view of
// the backward has
//   V Kept(k), KeptExtra(e)         what the forward kept
//   V Param(k)
//   V H(), NewH()                   h before and after the step
//   V GradH(), GradExtra(e)         what reaches the new states from later steps
//   V GradOperand(k)                what reaches operand k from its product
//   void AddGradOutput(V&)          and from the layer's output
//   bool Zones(), V Zone(j)         as in the forward
//   void SetGate(i, V)              gate gradient d[i]
//   void SetGradH(V), SetGradExtra(e, V)
//   void AddGradParam(k, V)
// and, where what a cell shows is normalised,
//   V Shown()                       as in the forward
//   V GradShown()                   what reaches the state from what the output showed of it
template <class C, class V>
struct BackwardStep {
  Pack<V, C::kSaved> saved;
  Pack<V, C::kStates + C::kOperands> ds_new;
  Pack<V, C::kStates> s, ds;
  Pack<V, C::kParams> p, dp;
  Pack<V, C::kD> d;
  V h_new;

  template <int kProduct = 0, class View>
  FRNN_HD void Load(const View& from) {
    FRNN_UNROLL
    for (int k = 0; k < C::kSaved; k++) saved[k] = from.Kept(k);
    FRNN_UNROLL
    for (int k = 0; k < C::kParams; k++) p[k] = from.Param(k);
    h_new = C::kReadsNewH ? from.NewH() : V{};
    s[C::kRecurrent] = States<C>::kReadsH ? from.H() : V{};
    ds_new[C::kRecurrent] = from.GradH();
    FRNN_UNROLL
    for (int e = 0; e < States<C>::kExtra; e++) {
      const int j = States<C>::OfExtra(e);
      s[j] = States<C>::ReadsExtra(e) ? from.KeptExtra(e) : V{};
      ds_new[j] = from.GradExtra(e);
    }
    from.AddGradOutput(ds_new[C::kOutput]);
    if constexpr (C::kOperands > 0) {
      FRNN_UNROLL
      for (int k = 0; k < C::kOperands; k++)
        ds_new[C::kStates + k] = k >= kProduct ? from.GradOperand(k) : V{};
    }
  }
  FRNN_HD void Compute() { C::backward(saved, s, h_new, p, ds_new, d, ds, dp); }
  template <class View>
  FRNN_HD void Compute(const View& view) {
    const Pack<V, C::kStates> stays = TakeStaying(view);
    Compute();
    AddStaying(view, stays);
  }
  // Of the gradients of affine states, from those after the step to those before it, where ds_new has
  // all else that reaches the states after it. Its Jacobian is of no state.
  FRNN_HD AffineMap<V, kAffineStates<C>> Map() {
    constexpr int n = kAffineStates<C>;
    AffineMap<V, n> map;
    Compute();
    map.plus = AffineOf<C>(ds);
    FRNN_UNROLL
    for (int j = 0; j < n; j++) {
      Pack<V, n> one{};
      one[j] = splat<V>(1);
      FRNN_UNROLL
      for (int k = 0; k < C::kStates; k++) ds_new[k] = FromAffine<C>(one)[k];
      Compute();
      FRNN_UNROLL
      for (int i = 0; i < n; i++) map.by[i * n + j] = AffineOf<C>(ds)[i];
    }
    return map;
  }
  // The same in two parts, each after Load: the gradient of what the output shows, and all others
  // given that of the state.
  template <class View>
  FRNN_HD V ComputeGradShown(const View& view) {
    TakeStaying(view);
    return C::show_backward(saved, view.Shown(), ds_new[C::kOutput], d);
  }
  template <class View>
  FRNN_HD void ComputeFromShown(const View& view) {
    const Pack<V, C::kStates> stays = TakeStaying(view);
    C::show_backward(saved, view.Shown(), ds_new[C::kOutput], d);
    ds_new[C::kShows] = ds_new[C::kShows] + view.GradShown();
    C::update_backward(saved, s, p, ds_new, d, ds, dp);
    AddStaying(view, stays);
  }

  template <int kProduct = 0, class View>
  FRNN_HD void Store(View&& to) const {
    constexpr uint64_t kOwn = Products<C>::Gradients(kProduct);
    FRNN_UNROLL
    for (int i = 0; i < C::kD; i++)
      if (kOwn >> i & 1) to.SetGate(i, d[i]);
    if (kProduct > 0) return;
    to.SetGradH(ds[C::kRecurrent]);
    FRNN_UNROLL
    for (int e = 0; e < States<C>::kExtra; e++) to.SetGradExtra(e, ds[States<C>::OfExtra(e)]);
    FRNN_UNROLL
    for (int k = 0; k < C::kParams; k++) to.AddGradParam(k, dp[k]);
  }

 private:
  // Of the gradients of new states what passes the cell by, to the old ones.
  template <class View>
  FRNN_HD Pack<V, C::kStates> TakeStaying(const View& view) {
    const bool zones = view.Zones();
    Pack<V, C::kStates> stays{};
    FRNN_UNROLL
    for (int j = 0; j < C::kStates && zones; j++) {
      const int state = j == 0 ? C::kRecurrent : States<C>::OfExtra(j - 1);
      const V z = view.Zone(j);
      stays[state] = z * ds_new[state];
      ds_new[state] = (splat<V>(1) - z) * ds_new[state];
    }
    return stays;
  }
  template <class View>
  FRNN_HD void AddStaying(const View& view, const Pack<V, C::kStates>& stays) {
    const bool zones = view.Zones();
    FRNN_UNROLL
    for (int j = 0; j < C::kStates && zones; j++) ds[j] = ds[j] + stays[j];
  }
};

}  // namespace frnn
