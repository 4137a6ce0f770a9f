// A step of the forward: the products with W_hh, the gate math of the own panels, and where what comes
// of it is stored.
#pragma once
#include <algorithm>

#include "cpu/forward.h"

FRNN_BEGIN

template <class C>
auto Layer<C>::ForwardPass::StepAt(const Thread& my, int64_t number, int64_t t) const -> Step {
  Step s;
  s.number = number;
  s.t = t;
  s.n = p.batch_sizes[t];
  s.row = p.offsets[t];
  s.ldh = in_place ? hs_stride : (in_one ? p.Hout : h_stride);
  s.h = in_place ? my.hs + PreviousRow(p, my.dir, t, 0) * hs_stride
        : in_one ? static_cast<const T*>(p.h0) + my.dir * p.B * p.Hout
                 : h_buffer[number & 1];
  s.h_new = in_place ? my.hs + (p.B + s.row) * hs_stride
            : in_one ? static_cast<T*>(p.h_n) + my.dir * p.B * p.Hout
                     : h_buffer[(number + 1) & 1];
  s.left = mask ? masked[number & 1] : s.h;
  s.left_new = mask ? masked[(number + 1) & 1] : s.h_new;
  s.ld_left = mask ? h_stride : s.ldh;
  s.ld_full = my.hs ? hs_stride : full_stride;
  s.full = !projected ? nullptr
           : my.hs    ? my.hs + (p.B + s.row) * hs_stride + h_stride
                      : full_buffer;
  return s;
}

// The operands of the gate math of one panel.
template <class C>
struct Layer<C>::ForwardPass::StepRows {
  const T* gates_x;  // [n, kX, units], without bias, rows gates_x_stride apart
  const T* gates_h;  // [n, kH, units], without bias, rows gates_h_stride apart: those of h
  int64_t gates_x_stride, gates_h_stride;
  const T* gates_u[Products<C>::kCount];  // of operands
  int64_t gates_u_stride[Products<C>::kCount];
  const T* given;   // [n, kGiven, units]
  const T* b_ih;    // [kX, units]
  const T* b_hh;    // [kH, units]
  const T* params;  // [kParams, units]
  const T* h;       // h_{t-1} of the panel, rows h_stride apart
  T* h_new;         // rows h_stride apart (h_full, rows full_stride apart, with a projection)
  int64_t h_stride, h_new_stride;
  T* c;            // [n, kExtra, units], replaced
  T* shown;        // [n, units], and
  const T* shift;  // [units], where what the output shows is normalised
  const T* zones;  // [n, kStates, units], rows zones_stride apart, or null
  int64_t zones_stride;
  T* tape;                           // [n, kTape, units] or null
  T* operands[Products<C>::kCount];  // rows operand_stride apart
  const T* mask;                     // what multiplies them, likewise, or null
  int64_t operand_stride;
  T* y;  // rows y_stride apart, or null
  int64_t y_stride;
  int64_t units;  // valid units from the panel's first one on
  Storage round;  // h is rounded to this
};

template <class C>
auto Layer<C>::ForwardPass::RowsOf(const Thread& my, const Chunk& chunk, const Step& step,
                                   int64_t at) const -> StepRows {
  const int64_t panel = my.panels.begin + at, unit = panel * kUnits;
  StepRows s;
  const bool in_sum = NormOfSum(p);
  s.gates_x = in_sum ? my.no_gates_x : GatesX(my, at) + (step.row - chunk.row) * x_common.Stride();
  s.gates_h = h_norm.on || C::kOperands > 0 ? GatesH(my, at) : my.gates_h + h_common.InGroup(at);
  ForOperands([&](auto k) {
    const auto& common = std::get<k - 1>(u_common);
    s.gates_u[k - 1] = my.gates_u[k - 1] + common.Offset(at, p.B);
    s.gates_u_stride[k - 1] = common.Stride();
    s.operands[k - 1] = operands[k - 1] + unit;
  });
  s.mask = mask ? mask + unit : nullptr;
  s.operand_stride = h_stride;
  s.gates_x_stride = in_sum ? 0 : x_common.Stride();
  s.gates_h_stride = h_common.Stride();
  s.given = Given(my, at);
  s.b_ih = my.b_ih + at * C::kX * kUnits;
  s.b_hh = my.b_hh + at * C::kH * kUnits;
  s.params = my.params + at * C::kParams * kUnits;
  s.h = step.h + unit;
  s.h_stride = step.ldh;
  s.h_new = (projected ? step.full : step.h_new) + unit;
  s.h_new_stride = projected ? step.ld_full : step.ldh;
  s.c = my.c + at * p.B * kExtra * kUnits;
  s.shown = my.shown + at * p.B * kUnits;
  s.shift = my.shift + at * kUnits;
  s.zones = p.zoneout ? Zones(my, at) : nullptr;
  s.zones_stride = ZonesStay(p) ? 0 : C::kStates * kUnits;
  s.tape = p.saved && kTape > 0 ? TapeOf(p, my.dir, step.t, panel)
           : shown_norm.on      ? my.tape + at * p.B * kTape * kUnits
                                : nullptr;
  s.y_stride = p.dirs * p.Hout;
  s.y = direct_y && p.y != p.h_n
            ? static_cast<T*>(p.y) + step.row * s.y_stride + my.dir * p.Hout + unit
            : nullptr;
  s.units = p.H - unit;
  s.round = projected ? kPlain : p.storage;
  return s;
}

// gates_h and the gate math of the own panels, block by block; of each product the math that can go
// on from there.
template <class C>
void Layer<C>::ForwardPass::RecurrentGates(Team& team, Thread& my, const Chunk& chunk,
                                           const Step& step) const {
  const int64_t number = NumberOf(my, step.number);
  my.h_product.Multiply(
      number, step.n, step.left, step.ld_left,
      [&](int64_t group, int64_t first) FRNN_INLINE_LAMBDA {
        return C::kOperands == 0 ? my.gates_h
                                 : my.gates_h + (group * p.B + first) * h_common.Stride();
      },
      [&](int64_t at, int64_t first, int rows)
          FRNN_INLINE_LAMBDA { Gates<0>(my, RowsOf(my, chunk, step, at), at, first, rows); });
  ForOperands([&](auto k) {
    team.Sync();
    const int64_t stride = std::get<k - 1>(u_common).Stride();
    std::get<k - 1>(my.u_products)
        .Multiply(
            number, step.n, operands[k - 1], h_stride,
            [&](int64_t group, int64_t first) {
              return my.gates_u[k - 1] + (group * p.B + first) * stride;
            },
            [&](int64_t at, int64_t first, int rows) {
              GateMath<decltype(k)::value>(RowsOf(my, chunk, step, at), first, rows);
            });
  });
}

// The same where gates_h is normalised, which takes whole rows of it.
template <class C>
void Layer<C>::ForwardPass::NormalisedGates(Team& team, Thread& my, const Chunk& chunk,
                                            const Step& step) const {
  const int64_t stride = h_common.Stride();
  my.h_product.Multiply(
      NumberOf(my, step.number), step.n, step.left, step.ld_left,
      [&](int64_t group, int64_t first) { return my.gates_h + (group * p.B + first) * stride; },
      [&](int64_t at, int64_t first, int rows) {
        T* gates = GatesH(my, at) + first * stride;
        const T* gates_x = GatesX(my, at) + (step.row - chunk.row + first) * x_common.Stride();
        for (int64_t r = 0; r < rows && NormOfSum(p); r++)
          for (int64_t i = 0; i < C::kH * kUnits; i += N)
            store<V>(gates + r * stride + i, load<V>(gates + r * stride + i) +
                                                 load<V>(gates_x + r * x_common.Stride() + i));
        my.h_norm.Measure(at, first, rows, gates, stride);
      });
  team.Sync();
  const NormTape tape = NormTapeOfH(p, my.dir);
  my.h_norm.Find(step.n, tape.Scales(step.t));
  for (int64_t at = 0; at < my.count; at++) {
    my.h_norm.Apply(at, 0, step.n, GatesH(my, at), stride,
                    tape.Normal(step.t, my.panels.begin + at));
    Gates<C::kOperands>(my, RowsOf(my, chunk, step, at), at, 0, int(step.n));
  }
}

// h = W_hr h_full, the own columns.
template <class C>
void Layer<C>::ForwardPass::Project(Team& team, Thread& my, const Step& step) const {
  team.Sync();
  ForColumnTiles(my.columns.begin, my.columns.end, [&](int64_t v, auto nv) {
    constexpr int NV = decltype(nv)::value;
    T* out = step.h_new + v * N;
    GemmRows<NV>(step.n, step.full, step.ld_full, my.w_hr + (v - my.columns.begin) * N * p.H,
                 NV * N, p.H, out, step.ldh, false, plan.one_chain);
    for (int64_t r = 0; r < step.n && p.storage != kPlain; r++)
      for (int j = 0; j < NV; j++) {
        T* h = out + r * step.ldh + j * N;
        store<V>(h, RoundToStorage(load<V>(h), p.storage));
      }
  });
}

// The own columns of h where y, hs and h_n have them.
template <class C>
void Layer<C>::ForwardPass::StoreOutputs(Thread& my, const Step& step) const {
  // Rows from here on end with this step.
  const int64_t going_on = my.dir == 1        ? (step.t == 0 ? 0 : step.n)
                           : step.t + 1 < p.T ? p.batch_sizes[step.t + 1]
                                              : 0;
  for (int64_t r = 0; r < step.n; r++) {
    const T* h = step.h_new + r * step.ldh + my.first;
    if (!direct_y && kOutputExtra < 0)
      StoreRow(At(p.y, p.storage, ((step.row + r) * p.dirs + my.dir) * p.Hout + my.first),
               p.storage, h, my.valid);
    for (int64_t at = 0; at < my.count && !direct_y && kOutputExtra >= 0; at++) {
      const int64_t unit = (my.panels.begin + at) * kUnits;
      StoreRow(At(p.y, p.storage, ((step.row + r) * p.dirs + my.dir) * p.H + unit), p.storage,
               my.c + ((at * p.B + r) * kExtra + kOutputExtra) * kUnits,
               p.H - unit < kUnits ? p.H - unit : kUnits);
    }
    if (my.hs && !in_place)
      memcpy(my.hs + (p.B + step.row + r) * hs_stride + my.first, h,
             (my.last - my.first) * sizeof(T));
    if (p.every_state)
      StoreRow(At(p.h_n, p.storage, (my.dir * p.rows + step.row + r) * p.Hout + my.first),
               p.storage, h, my.valid);
    else if (r >= going_on)
      StoreRow(At(p.h_n, p.storage, (my.dir * p.B + r) * p.Hout + my.first), p.storage, h,
               my.valid);
  }
}

// c and other states beside h of so many rows, to those of c_n from `row` on.
template <class C>
void Layer<C>::ForwardPass::StoreExtraStates(Thread& my, int64_t rows, int64_t row) const {
  const int64_t first = my.dir * (p.every_state ? p.rows : p.B) + row;
  for (int64_t at = 0; at < my.count; at++)
    for (int64_t r = 0; r < rows * kExtra; r++) {
      const int64_t unit = (my.panels.begin + at) * kUnits;
      StoreRow(At(p.c_n, p.storage, (first * kExtra + r) * p.H + unit), p.storage,
               my.c + (at * p.B * kExtra + r) * kUnits, p.H - unit < kUnits ? p.H - unit : kUnits);
    }
}

// The operands of one vector of units of a panel in one row, as core/step.h asks for them.
template <class C>
struct Layer<C>::ForwardPass::View {
  const StepRows& s;
  int64_t row, gates_row;  // of the step, and of gates_h
  int vec;                 // of the panel

  FRNN_INLINE V GateX(int q) const {
    if constexpr (C::kGiven > 0)
      if (q >= C::kX) return load<V>(s.given + row * C::kGiven * kUnits + OfGate(q - C::kX));
    return load<V>(s.gates_x + row * s.gates_x_stride + OfGate(q)) + load<V>(s.b_ih + OfGate(q));
  }
  FRNN_INLINE V GateH(int q) const {
    const T* gate = s.gates_h + gates_row * s.gates_h_stride + OfGate(q);
    ForOperands([&](auto k) FRNN_INLINE_LAMBDA {
      constexpr int kFirst = Products<C>::First(decltype(k)::value);
      if (q >= kFirst)
        gate = s.gates_u[k - 1] + gates_row * s.gates_u_stride[k - 1] + OfGate(q - kFirst);
    });
    return load<V>(gate) + load<V>(s.b_hh + OfGate(q));
  }
  FRNN_INLINE V Param(int k) const { return load<V>(s.params + OfGate(k)); }
  FRNN_INLINE V H() const { return load<V>(s.h + row * s.h_stride + vec * N); }
  FRNN_INLINE V Extra(int e) const { return load<V>(OfExtra(e)); }
  FRNN_INLINE bool Zones() const { return s.zones != nullptr; }
  FRNN_INLINE V Zone(int j) const { return load<V>(s.zones + row * s.zones_stride + OfGate(j)); }
  FRNN_INLINE void SetH(const V& h) const {
    const V rounded = RoundToStorage(h, s.round);
    store<V>(s.h_new + row * s.h_new_stride + vec * N, rounded);
    if constexpr (kOutputExtra < 0) SetOutput(rounded);
  }
  FRNN_INLINE void SetExtra(int e, const V& c) const {
    store<V>(OfExtra(e), c);
    if (e == kOutputExtra) SetOutput(c);
  }
  FRNN_INLINE void SetOperand(int k, const V& u) const {
    const int64_t at = row * s.operand_stride + vec * N;
    const V rounded = RoundToStorage(u, s.round);
    store<V>(s.operands[k] + at, rounded);
    if (s.tape) Keep(k, rounded);
    if (s.mask) store<V>(s.operands[k] + at, Masked(s.operands[k] + at, s.mask + at, s.round));
  }
  FRNN_INLINE void KeepExtra(int e, const V& c) const { Keep(Tape<C>::OfExtra(e), c); }
  FRNN_INLINE void Keep(int k, const V& v) const { store<V>(OfTape(k), v); }
  FRNN_INLINE V Kept(int k) const { return load<V>(OfTape(k)); }
  FRNN_INLINE void SetShown(const V& v) const { store<V>(OfShown(), v); }
  FRNN_INLINE V Shown() const { return load<V>(OfShown()) + load<V>(s.shift + vec * N); }

 private:
  FRNN_INLINE int OfGate(int q) const { return (q * kPanelVecs + vec) * N; }
  FRNN_INLINE T* OfExtra(int e) const { return s.c + (row * kExtra + e) * kUnits + vec * N; }
  FRNN_INLINE T* OfTape(int k) const { return s.tape + (row * kTape + k) * kUnits + vec * N; }
  FRNN_INLINE T* OfShown() const { return s.shown + row * kUnits + vec * N; }
  FRNN_INLINE void SetOutput(const V& y) const {
    const int64_t left = s.units - vec * N;
    if (s.y && left > 0) store_n(s.y + row * s.y_stride + vec * N, y, int(left < N ? left : N));
  }
};

// The pointwise part of a step after a product, for one panel and the rows from `first` on: up to
// what the output shows, if that is normalised.
template <class C>
template <int kProduct>
void Layer<C>::ForwardPass::Gates(const Thread& my, const StepRows& s, int64_t at, int64_t first,
                                  int rows) const {
  if constexpr (kShows) {
    if (shown_norm.on) {
      ForRows(s, first, rows, [](ForwardStep<C, V>& step, const View& view) FRNN_INLINE_LAMBDA {
        step.Load(view);
        step.RunToShown(view);
      });
      return my.shown_norm.Measure(at, first, rows, s.shown + first * kUnits, kUnits);
    }
  }
  GateMath<kProduct>(s, first, rows);
}
template <class C>
template <int kProduct>
void Layer<C>::ForwardPass::GateMath(const StepRows& s, int64_t first, int rows) {
  ForRows(s, first, rows, [&](ForwardStep<C, V>& step, const View& view) FRNN_INLINE_LAMBDA {
    step.template Load<kProduct>(view);
    if constexpr (kProduct < C::kOperands) {
      step.Compute();
      step.template StoreOperand<kProduct>(view);
    } else {
      step.Compute(view);
      step.StoreStates(view);
      if (s.tape) step.StoreTape(view);
    }
  });
}
// run(step, view) for each row and vector of units.
template <class C>
template <class F>
FRNN_INLINE void Layer<C>::ForwardPass::ForRows(const StepRows& s, int64_t first, int rows,
                                                const F& run) {
  for (int64_t row = first; row < first + rows; row++) {
    FRNN_UNROLL
    for (int vec = 0; vec < kPanelVecs; vec++) {
      ForwardStep<C, V> step;
      run(step, View{s, row, C::kOperands == 0 ? row - first : row, vec});
    }
  }
}

// The output of the own panels, of what it shows in normalised form.
template <class C>
void Layer<C>::ForwardPass::ShowOutputs(Team& team, Thread& my, const Chunk& chunk,
                                        const Step& step) const {
  if constexpr (kShows) {
    team.Sync();
    const NormTape tape = NormTapeOfShown(p, my.dir);
    my.shown_norm.Find(step.n, tape.Scales(step.t));
    for (int64_t at = 0; at < my.count; at++) {
      const StepRows s = RowsOf(my, chunk, step, at);
      my.shown_norm.Apply(at, 0, step.n, s.shown, kUnits,
                          tape.Normal(step.t, my.panels.begin + at));
      ForRows(s, 0, int(step.n), [](ForwardStep<C, V>& unit, const View& view) FRNN_INLINE_LAMBDA {
        unit.RunOutput(view);
      });
    }
  }
}

FRNN_END
