// A step of the backward: the gradients of the gates and states of the own units, and the products that
// take them to the step before.
#pragma once
#include <algorithm>

#include "cpu/backward.h"
#include "cpu/sums.h"

FRNN_BEGIN

template <class C>
auto Layer<C>::BackwardPass::StepAt(Thread& my, int64_t number) const -> Step {
  const int64_t t = my.dir == 0 ? p.T - 1 - number : number;
  Step step;
  step.number = number;
  step.t = t;
  step.n = p.batch_sizes[t];
  step.row = p.offsets[t];
  step.dy = nullptr;
  step.dy_stride = 0;
  if (!p.dy || my.valid <= 0) return step;
  const auto source = [&](int64_t b) {
    const int64_t at =
        p.ragged ? (step.row + b) * p.dy_b_stride : t * p.dy_t_stride + b * p.dy_b_stride;
    return At(p.dy, p.storage, at + my.dir * p.Hout + my.first);
  };
  step.dy = static_cast<const T*>(source(0));
  step.dy_stride = p.dy_b_stride;
  if (stage_dy) {
    for (int64_t b = 0; b < step.n; b++)
      LoadRow(source(b), p.storage, my.dy + b * own_columns, my.valid);
    step.dy = my.dy;
    step.dy_stride = own_columns;
  }
  return step;
}

// dh and dc, the own parts, get what reaches the states of this step from outside.
template <class C>
void Layer<C>::BackwardPass::AddStateGrads(Thread& my, const Step& step) const {
  alignas(kLine) T block[kUnits];
  const auto add = [&](const void* from, int64_t at, int64_t n, T* to) {
    for (int64_t i = 0; i < n; i += kUnits) {
      const int64_t count = n - i < kUnits ? n - i : kUnits;
      LoadRow(At(from, p.storage, at + i), p.storage, block, count);
      for (int64_t u = 0; u < count; u++) to[i + u] += block[u];
    }
  };
  const int64_t first = my.dir * p.rows + step.row;
  for (int64_t b = 0; b < step.n; b++) {
    if (p.dh_n)
      add(p.dh_n, (first + b) * p.Hout + my.first, my.valid, dh + b * h_stride + my.first);
    for (int64_t i = my.panels.begin; i < my.panels.end && p.dc_n; i++)
      for (int e = 0; e < kExtra; e++)
        add(p.dc_n, ((first + b) * kExtra + e) * p.H + i * kUnits,
            std::min<int64_t>(p.H - i * kUnits, kUnits),
            my.dc + (((i - my.panels.begin) * p.B + b) * kExtra + e) * kUnits);
  }
}

// dh_full = (dh + dy) W_hr for the own units; dh_seq keeps the left side for dW_hr.
template <class C>
void Layer<C>::BackwardPass::Unproject(Team& team, Thread& my, const Step& step) const {
  for (int64_t b = 0; b < step.n; b++) {
    T* out = dh_seq + (step.row + b) * h_stride + my.first;
    const T* in = dh + b * h_stride + my.first;
    for (int64_t u = 0; u < my.valid; u++)
      out[u] = in[u] + (step.dy ? step.dy[b * step.dy_stride + u] : T(0));
  }
  team.Sync();
  ForUnits(my, [&](const ColumnWeights<1>& weights, int64_t v, auto nv) {
    weights.Multiply<decltype(nv)::value>(
        v, step.n, [&](int) { return dh_seq + step.row * h_stride; }, h_stride, dh_full + v * N,
        full_stride, false);
  });
}

// The operands of one vector of units in the rows of a step, as core/step.h asks for them. What is
// summed over rows stays here until StoreSums.
template <class C>
struct Layer<C>::BackwardPass::View {
  const BackwardPass& pass;
  const Thread& my;
  const Step& step;
  int64_t unit;  // its first one
  int lanes;     // of them below H
  const T* tape;
  T *d, *dc, *db, *db_low, *dparams, *dparams_low;
  const T *params, *zones;
  int64_t zones_stride;
  int64_t row = 0;
  V bias[C::kD], dparam[C::kParams > 0 ? C::kParams : 1];
  Bits largest;

  FRNN_INLINE View(const BackwardPass& pass, const Thread& my, const Step& step, int64_t panel,
                   int vec, const Bits& largest)
      : pass(pass),
        my(my),
        step(step),
        unit(panel * kUnits + vec * N),
        lanes(UnitsFrom(pass.p, unit)),
        tape(TapeOf(pass.p, my.dir, step.t, panel) + vec * N),
        d(pass.GatesOf(step) + unit),
        largest(largest) {
    const int64_t at = panel - my.panels.begin;
    dc = my.dc + at * pass.p.B * kExtra * kUnits + vec * N;
    const int64_t of_biases = at * C::kD * kUnits + vec * N,
                  of_params = at * C::kParams * kUnits + vec * N;
    db = my.db + of_biases;
    db_low = my.db_low + of_biases;
    params = my.params + of_params;
    dparams = my.dparams + of_params;
    dparams_low = my.dparams_low + of_params;
    zones = pass.p.zoneout ? pass.Zones(my, panel) + vec * N : nullptr;
    zones_stride = ZonesStay(pass.p) ? 0 : C::kStates * kUnits;
    FRNN_UNROLL
    for (int q = 0; q < C::kD; q++) bias[q] = V{};
    FRNN_UNROLL
    for (int k = 0; k < C::kParams; k++) dparam[k] = V{};
  }
  FRNN_INLINE V Kept(int k) const { return load<V>(tape + (row * kTape + k) * kUnits); }
  FRNN_INLINE V KeptExtra(int e) const { return Kept(Tape<C>::OfExtra(e)); }
  // Calls into the cache what is kept of a later row.
  FRNN_INLINE void CallAhead() const {
    FRNN_UNROLL
    for (int k = 0; k < kTape; k++)
      __builtin_prefetch(tape + ((row + kRowsAhead) * kTape + k) * kUnits);
  }
  FRNN_INLINE V Param(int k) const { return load<V>(params + k * kUnits); }
  FRNN_INLINE V H() const {
    if (pass.IsReset(my, step.t, row)) return V{};
    return load<V>(my.hs + PreviousRow(pass.p, my.dir, step.t, row) * pass.hs_stride + unit);
  }
  FRNN_INLINE V NewH() const {
    return load<V>(my.new_h + (step.row + row) * pass.hs_stride + unit);
  }
  FRNN_INLINE bool Zones() const { return zones != nullptr; }
  FRNN_INLINE V Zone(int j) const { return load<V>(zones + row * zones_stride + j * kUnits); }
  FRNN_INLINE V GradH() const {
    return load<V>(pass.projected ? pass.dh_full + row * pass.full_stride + unit : OfGradH());
  }
  FRNN_INLINE V GradOperand(int k) const {
    return load<V>(pass.d_operands[k] + row * pass.full_stride + unit);
  }
  FRNN_INLINE V GradExtra(int e) const { return load<V>(dc + (row * kExtra + e) * kUnits); }
  // With a projection it is in GradH already.
  FRNN_INLINE void AddGradOutput(V& to) const {
    if (step.dy && !pass.projected)
      to += load_n(step.dy + row * step.dy_stride + unit - my.first, lanes);
  }
  FRNN_INLINE void SetGate(int i, const V& g) {
    store<V>(d + row * pass.d_stride + i * pass.gate_stride, g);
    bias[i] += g;
    if constexpr (kTiles) {
      const auto magnitude = bit_cast<Bits>(g) & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  FRNN_INLINE void SetGradH(const V& g) const {
    if (!pass.projected) store<V>(OfGradH(), g);
  }
  FRNN_INLINE void SetGradExtra(int e, const V& g) const {
    store<V>(dc + (row * kExtra + e) * kUnits, g);
  }
  FRNN_INLINE void AddGradParam(int k, const V& g) { dparam[k] += g; }
  FRNN_INLINE void StoreSums() const {
    FRNN_UNROLL
    for (int q = 0; q < C::kD; q++) AddExactly(db + q * kUnits, db_low + q * kUnits, bias[q]);
    FRNN_UNROLL
    for (int k = 0; k < C::kParams; k++)
      AddExactly(dparams + k * kUnits, dparams_low + k * kUnits, dparam[k]);
  }

 private:
  FRNN_INLINE T* OfGradH() const { return pass.dh + row * pass.h_stride + unit; }
};

// The same where what the output shows was normalised.
template <class C>
struct Layer<C>::BackwardPass::ShownView : View {
  const T *normal, *gain, *shift;
  T* dshown;

  FRNN_INLINE ShownView(const BackwardPass& pass, const Thread& my, const Step& step, int64_t panel,
                        int vec, const Bits& largest)
      : View(pass, my, step, panel, vec, largest),
        normal(NormTapeOfShown(pass.p, my.dir).Normal(step.t, panel) + vec * N) {
    const int64_t at = panel - my.panels.begin;
    gain = my.shown_norm.Gains(at) + vec * N;
    shift = my.shift + at * kUnits + vec * N;
    dshown = my.dshown + at * pass.p.B * kUnits + vec * N;
  }
  FRNN_INLINE V Shown() const {
    return load<V>(normal + this->row * NormShown::kTapeRow) * load<V>(gain) + load<V>(shift);
  }
  FRNN_INLINE V GradShown() const { return load<V>(dshown + this->row * kUnits); }
};

// The gradient that reaches the state from what the output shows of it, the own units.
template <class C>
void Layer<C>::BackwardPass::ShownGrads(Team& team, Thread& my, const Step& step) const {
  if constexpr (kShows) {
    const NormTape tape = NormTapeOfShown(p, my.dir);
    const auto tape_of = [&](int64_t at) { return tape.Normal(step.t, my.panels.begin + at); };
    const auto grads_of = [&](int64_t at) { return my.dshown + at * p.B * kUnits; };
    const int64_t count = my.panels.end - my.panels.begin;
    for (int64_t at = 0; at < count; at++) {
      FRNN_UNROLL
      for (int vec = 0; vec < kPanelVecs; vec++) {
        ShownView view(*this, my, step, my.panels.begin + at, vec, Bits{});
        V sum{};
        for (; view.row < step.n; view.row++) {
          BackwardStep<C, V> unit;
          view.CallAhead();
          unit.Load(view);
          const V grad = unit.ComputeGradShown(view);
          store<V>(view.dshown + view.row * kUnits, grad);
          sum += grad;
        }
        T* dshift = my.dshift + at * kUnits + vec * N;
        store<V>(dshift, load<V>(dshift) + sum);
      }
      my.shown_norm.MeasureGrads(
          at, step.n, [&](int) FRNN_INLINE_LAMBDA { return grads_of(at); }, kUnits, tape_of(at));
    }
    team.Sync();
    my.shown_norm.FindGrads(step.n);
    for (int64_t at = 0; at < count; at++)
      my.shown_norm.ApplyGrads(
          at, step.n, [&](int) FRNN_INLINE_LAMBDA { return grads_of(at); }, kUnits, tape_of(at),
          tape.Scales(step.t), grads_of(at), kUnits, kUnits);
  }
}

// d of the own units, from dh, dc and what the forward saved; dc and the elementwise path of dh are
// replaced by those of the step before. The largest |d|, as bits. Of product k > 0 its gates alone.
template <class C>
template <class View, int kProduct>
Bits Layer<C>::BackwardPass::GateGrads(Thread& my, const Step& step) const {
  Bits largest{};
  const bool measures = kProduct == 0 && (x_norm.on || h_norm.on);
  for (int64_t panel = my.panels.begin; panel < my.panels.end; panel++) {
    FRNN_UNROLL
    for (int vec = 0; vec < kPanelVecs; vec++) {
      View view(*this, my, step, panel, vec, largest);
      for (; view.row < step.n; view.row++) {
        BackwardStep<C, V> unit;
        unit.template Load<kProduct>(view);
        if constexpr (kShows && std::is_same_v<View, ShownView>)
          unit.ComputeFromShown(view);
        else
          unit.Compute(view);
        unit.template Store<kProduct>(view);
      }
      view.StoreSums();
      largest = view.largest;
    }
    if (!measures) continue;
    ForNorms(my, step, panel,
             [&](auto& norm, const OfProduct&, const auto& gate, const NormTape& tape) {
               norm.MeasureGrads(panel - my.panels.begin, step.n, gate, d_stride,
                                 tape.Normal(step.t, panel));
             });
  }
  return largest;
}

// Of all operands but h, from the last one on: the gates of its product, then its own columns.
template <class C>
void Layer<C>::BackwardPass::OperandGrads(Team& team, Thread& my, const Step& step) const {
  ForOperands([&](auto from_first) {
    constexpr int k = Products<C>::kCount - decltype(from_first)::value;
    GateGrads<View, k>(my, step);
    team.Sync();
    T* out = d_operands[k - 1];
    std::get<k - 1>(my.du_products)
        .Multiply(
            my.dir * p.T + step.number, step.n,
            [&](int q) { return GatesOf(step) + C::kDh[Products<C>::First(k) + q] * gate_stride; },
            d_stride, out, full_stride, false);
    for (int64_t b = 0; b < step.n && mask; b++)
      for (int64_t u = my.first; u < my.first + my.valid; u++)
        out[b * full_stride + u] *= mask[b * h_stride + u];
  });
}

// f(norm, gradients, `gate` as in cpu/norm.h, tape) for each product that was normalised.
template <class C>
template <class F>
FRNN_INLINE void Layer<C>::BackwardPass::ForNorms(Thread& my, const Step& step, int64_t panel,
                                                  const F& f) const {
  const T* first = GatesOf(step) + panel * kUnits;
  const auto gate_x = [&](int q) FRNN_INLINE_LAMBDA { return first + C::kDx[q] * gate_stride; };
  const auto gate_h = [&](int q) FRNN_INLINE_LAMBDA { return first + C::kDh[q] * gate_stride; };
  if (x_norm.on) f(my.x_norm, x_grads, gate_x, NormTapeOfX(p, my.dir));
  if (h_norm.on) f(my.h_norm, h_grads, gate_h, NormTapeOfH(p, my.dir));
}

// The gradients of what was normalised, the own units, from those of what came of it, which
// GateGrads has measured. The largest of all.
template <class C>
Bits Layer<C>::BackwardPass::NormGrads(Team& team, Thread& my, const Step& step,
                                       Bits largest) const {
  team.Sync();
  if (x_norm.on) my.x_norm.FindGrads(step.n);
  if (h_norm.on) my.h_norm.FindGrads(step.n);
  for (int64_t panel = my.panels.begin; panel < my.panels.end; panel++)
    ForNorms(my, step, panel,
             [&](auto& norm, const OfProduct& grads, const auto& gate, const NormTape& tape) {
               T* out = grads.d + step.row * grads.stride + panel * kUnits;
               const Bits found = norm.ApplyGrads(panel - my.panels.begin, step.n, gate, d_stride,
                                                  tape.Normal(step.t, panel), tape.Scales(step.t),
                                                  out, grads.stride, gate_stride);
               largest = found > largest ? found : largest;
             });
  return largest;
}

// Whether magnitudes, as bits, are at most those of `limit`; inf and NaN are not.
FRNN_INLINE bool Below(const Bits& magnitudes, float limit) {
  bool below = true;
  for (size_t i = 0; i < sizeof(Bits) / sizeof(int32_t); i++)
    below &= magnitudes[i] <= bit_cast<int32_t>(limit);
  return below;
}

// d of the own units, for the products of the whole team on tiles.
template <class C>
void Layer<C>::BackwardPass::ShareGrads(Team& team, Thread& my, const Step& step,
                                        const Bits& largest) {
  if constexpr (kTiles) {
    const int64_t number = my.dir * p.T + step.number;
    my.dh_product.Share(
        team, number, step.n, my.panels.begin * kUnits, my.panels.end * kUnits,
        [&](int q) { return Gate(h_grads, q, step.row); }, h_grads.stride);
    const float* of_rows = my.dh_product.Largest(number);
    if (of_rows && team.id == 0) memcpy(d_sizes + step.row, of_rows, step.n * sizeof(float));
    if (!Below(largest, parts::kLargest)) {
      my.dh_product.Refuse(number);
      misfit_d[my.dir].store(true, std::memory_order_relaxed);
    }
  }
}

// dh += d W_hh for the own columns (with a projection dh has no elementwise path, and is replaced).
template <class C>
void Layer<C>::BackwardPass::RecurrentGrad(Thread& my, const Step& step) const {
  if (step.number + 1 == p.T && !p.dh0) return;
  my.dh_product.Multiply(
      my.dir * p.T + step.number, step.n, [&](int q) { return Gate(h_grads, q, step.row); },
      h_grads.stride, mask ? dh_left : dh, h_stride, !projected && !mask);
  for (int64_t b = 0; b < step.n && mask; b++)
    for (int64_t u = my.first; u < my.first + my.valid; u++) {
      const int64_t at = b * h_stride + u;
      dh[at] = (projected ? T(0) : dh[at]) + dh_left[at] * mask[at];
    }
}

// No gradient passes to before a reset.
template <class C>
void Layer<C>::BackwardPass::CutResets(Thread& my, const Step& step) const {
  ForResets(p, my.dir, step.t, [&](int64_t b) {
    std::fill(dh + b * h_stride + my.first, dh + b * h_stride + my.last, T(0));
    for (int64_t i = 0; i < my.panels.end - my.panels.begin; i++)
      std::fill_n(my.dc + (i * p.B + b) * kExtra * kUnits, kExtra * kUnits, T(0));
  });
}

FRNN_END
