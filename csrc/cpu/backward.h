// The backward of cpu/layer.h.
//
// Per step, from the last one on: gate gradients d of the own units, one barrier, dh = d W_hh for
// the own units (with a projection, dh_full = dh W_hr and a barrier before that; with further
// operands of W_hh the same for each before, from the last one on). Then dX, dW and db of the whole
// sequence as large products. Where a product of the forward was normalised, its gradients follow
// from d after one more barrier, and take the place of d in these products. Where what the output
// shows was, its gradient and one more barrier come before d.
#pragma once
#include <algorithm>

#include "cpu/layer.h"
#include "cpu/product/column_product.h"
#include "cpu/product/weight_grad.h"
#include "cpu/sums.h"

FRNN_BEGIN

// Whether magnitudes, as bits, are at most those of `limit`; inf and NaN are not.
FRNN_INLINE bool Below(const Bits& magnitudes, float limit) {
  bool below = true;
  for (size_t i = 0; i < sizeof(Bits) / sizeof(int32_t); i++)
    below &= magnitudes[i] <= bit_cast<int32_t>(limit);
  return below;
}

// One call. What the threads share are its members, what each has is Thread.
template <class C>
class Layer<C>::BackwardPass {
 public:
  explicit BackwardPass(const LayerGradParams& p);
  void Run(Team& team);

  const cpu::BackwardPlan plan;

 private:
  template <int kGates>
  using ProductOf = StepGradProduct<kGates>;
  template <int kGates>
  using CommonOf = typename ProductOf<kGates>::Common;
  using ProductH = ProductOf<Products<C>::Gates(0)>;
  using ProductX = InputGradProduct<C::kX>;
  static constexpr int kInOrder[kMaxGates] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  static constexpr int kMostGrads = std::max(kMostGates, C::kD);

  const LayerGradParams& p;
  const bool projected = Projected(p);
  const bool narrow = p.storage != kPlain, stage_dy = p.dy != nullptr && narrow;
  const int64_t own_panels = (Panels(p) + plan.threads - 1) / plan.threads;
  const int64_t own_vecs = (HoutVecs(p) + plan.threads - 1) / plan.threads;
  const int64_t own_columns = projected ? own_vecs * N : own_panels * kUnits;
  const bool dh_in_place = p.hs == nullptr && p.dh0 != nullptr && p.dirs == 1;
  const int64_t h_stride = dh_in_place ? p.Hout : RowStride(p.Hout), full_stride = RowStride(p.H),
                hs_stride = p.hs == nullptr ? p.Hout : HsStride(p.H, p.Hout);
  const int64_t gate_stride = Padded(p.H), d_stride = C::kD * gate_stride + 16;

  // A thread's memory, its slice of the layer, and the direction it is at.
  struct Thread : Slice {
    ProductH dh_product;
    OfOperands<ProductOf> du_products;
    ProductX dx_product;
    NormX x_norm;
    NormH h_norm;
    NormShown shown_norm;
    T *w_hr, *params, *dc, *dy, *db, *db_low, *dparams, *dparams_low;
    T* zones;  // [panel][row][state][unit]
    // Where what the output shows is normalised, the gradient of that [panel][row][unit], what is
    // added to it [panel][unit], and the gradient of that.
    T *dshown, *shift, *dshift;
    Gradients gradients;

    int dir;
    const DirectionWeights* w;
    const DirectionGrads* dw;
    const T *hs, *new_h;  // h before the first step, and after each
  };
  Vector<Thread> threads = Vector<Thread>(plan.threads);
  typename ProductH::Common h_common;
  OfOperands<CommonOf> u_common;
  typename ProductX::Common x_common{p.dx ? p.I : 0};
  typename NormX::Common x_norm = NormCommon<NormX>(p, NormOfX(p), own_panels, p.B);
  typename NormH::Common h_norm = NormCommon<NormH>(p, NormOfH(p), own_panels, p.B);
  typename NormShown::Common shown_norm = NormCommon<NormShown>(p, NormOfShown(p), own_panels, p.B);
  // The gradients of products [rows][gate][unit]: of gate q, those in column[q] of d, or by
  // themselves if the product was normalised.
  struct OfProduct {
    T* d;
    int64_t stride;
    const int* column;
  };
  OfProduct x_grads, h_grads;
  // Where nothing reads d once its step is done, it is kept for a step alone.
  const bool d_is_of_step = h_norm.on && (x_norm.on || NormOfSum(p)) && C::kGiven == 0;
  T *d, *dh, *dh_seq, *dh_full, *grad_right, *sum_ih, *sum_hh, *dx_sum;
  T *mask = nullptr, *dh_left = nullptr;  // with a mask of h, that and the gradient behind it
  T* d_operands[Products<C>::kCount];     // of a step, [B, full_stride] each
  parts::TiledOperand x_right, h_right;   // the right sides of dW, x and h
  float* d_sizes;                         // in fixed point, the largest d of each row
  // Out of the range of tiles: any d of a direction, a block of dW.
  std::atomic<bool> misfit_d[2] = {{false}, {false}};
  std::atomic<int64_t> misfit_block[2] = {{-1}, {-1}};
  Scratch scratch;

  struct Step {
    int64_t number, t;
    int64_t n, row;  // its rows, from `row` on
    // Of the own columns of dh; null: zero.
    const T* dy;
    int64_t dy_stride;
  };
  // f(weights, first vector, number of them) for W_hr's columns of the own units.
  template <class F>
  void ForUnits(const Thread& my, const F& f) const {
    const int64_t begin = my.panels.begin * kPanelVecs, end = my.panels.end * kPanelVecs;
    ColumnWeights<1> weights;
    weights.w = my.w->w_hr;
    weights.storage = p.storage;
    weights.K = weights.gate_rows = p.Hout;
    weights.cols = p.H;
    weights.packing = cpu::Packing::kOnce;
    weights.one_chain = plan.one_chain;
    weights.packed = my.w_hr;
    weights.first = begin;
    ForColumnTiles(begin, end, [&](int64_t v, auto nv) { f(weights, v, nv); });
  }
  T* Zones(const Thread& my, int64_t panel) const {
    return my.zones + (panel - my.panels.begin) * ZoneRows(p) * C::kStates * kUnits;
  }
  bool IsReset(const Thread& my, int64_t t, int64_t b) const {
    return p.reset != nullptr && Layer::IsReset(p, my.dir, t, b);
  }
  // The d of a step.
  T* GatesOf(const Step& step) const { return d + (d_is_of_step ? 0 : step.row) * d_stride; }
  const T* Gate(const OfProduct& of, int q, int64_t row) const {
    return of.d + row * of.stride + of.column[q] * gate_stride;
  }

  void RunDirection(Team& team, Thread& my);
  void PackProjection(Thread& my) const;
  void Start(Thread& my) const;
  Step StepAt(Thread& my, int64_t number) const;
  void AddStateGrads(Thread& my, const Step& step) const;
  void Unproject(Team& team, Thread& my, const Step& step) const;
  struct View;
  struct ShownView;
  void ShownGrads(Team& team, Thread& my, const Step& step) const;
  template <class View, int kProduct = 0>
  Bits GateGrads(Thread& my, const Step& step) const;
  template <class F>
  void ForNorms(Thread& my, const Step& step, int64_t panel, const F& f) const;
  void OperandGrads(Team& team, Thread& my, const Step& step) const;
  Bits NormGrads(Team& team, Thread& my, const Step& step, Bits largest) const;
  void AddGivenGrads(const Thread& my) const;
  void StoreGains(const Thread& my) const;
  void ShareGrads(Team& team, Thread& my, const Step& step, const Bits& largest);
  void RecurrentGrad(Thread& my, const Step& step) const;
  void CutResets(Thread& my, const Step& step) const;
  void StoreGrads(Thread& my) const;
  bool FitsTiles(const Thread& my) const {
    return plan.tiled && !misfit_d[my.dir].load(std::memory_order_relaxed);
  }
  void InputGrad(Team& team, Thread& my) const;
  void StoreInputGrad(int dir, int64_t row, int64_t n, T* rows, int64_t stride, int64_t col,
                      int64_t width) const;
  void WeightGrads(Team& team, Thread& my);
  template <class F>
  void RecurrentWeightGrad(Team& team, const WeightGrad& grad, const F& load) const;
};

template <class C>
Layer<C>::BackwardPass::BackwardPass(const LayerGradParams& p)
    : plan(cpu::PlanBackward(ProblemOf(p), TheMachine())), p(p) {
  const int64_t widest = p.I > p.H ? p.I : p.H;  // of the right operands: x, h, h_full
  const int64_t grad_rows = Gradients::Block(p.rows);
  x_common.storage = p.storage;
  x_common.K = p.H;
  x_common.packing = plan.w_ih;
  x_common.one_chain = plan.one_chain;
  x_common.tiled = plan.tiled;
  x_common.cut = plan.cut;
  x_common.d_cut = plan.d_cut;
  const auto set_up = [&](auto& common, int gates) {
    common.storage = p.storage;
    common.K = common.left.K = p.blocks > 1 ? BlockWidth(p) : p.H;
    common.blocks = p.blocks > 1 ? p.blocks : 1;
    common.packing = plan.w_hh;
    common.one_chain = plan.one_chain;
    common.tiled = common.left.tiled = plan.tiled;
    common.cut = plan.cut;
    common.left.cut = plan.d_cut;
    common.cols = p.Hout;
    common.own_columns = own_columns;
    common.left.gates = gates;
    common.left.batch = p.B;
  };
  set_up(h_common, Products<C>::Gates(0));
  ForOperands([&](auto k) { set_up(std::get<k - 1>(u_common), Products<C>::Gates(k)); });
  x_common.rows = p.dx ? plan.dx_rows : 0;
  scratch.Build([&](Scratch& s) {
    h_common.Take(s, plan.threads);
    ForOperands([&](auto k) {
      std::get<k - 1>(u_common).Take(s, plan.threads);
      d_operands[k - 1] = s.Take<T>(p.B * full_stride);
    });
    x_common.Take(s, plan.threads);
    for (Thread& my : threads) {
      my.dh_product.Take(s, h_common);
      ForOperands(
          [&](auto k) { std::get<k - 1>(my.du_products).Take(s, std::get<k - 1>(u_common)); });
      my.dx_product.Take(s, x_common);
      my.w_hr = s.Take<T>(projected ? p.Hout * own_panels * kUnits : 0);
      my.dc = s.Take<T>(own_panels * p.B * kExtra * kUnits);
      my.dy = s.Take<T>(stage_dy ? p.B * own_columns : 0);
      my.db = s.Take<T>(own_panels * C::kD * kUnits);
      my.db_low = s.Take<T>(own_panels * C::kD * kUnits);
      my.params = s.Take<T>(own_panels * C::kParams * kUnits);
      my.dparams = s.Take<T>(own_panels * C::kParams * kUnits);
      my.dparams_low = s.Take<T>(own_panels * C::kParams * kUnits);
      my.zones = s.Take<T>(own_panels * ZoneRows(p) * C::kStates * kUnits);
      my.gradients.Take(s, p.rows, plan.tiled, plan.d_grad_cut);
      my.x_norm.Take(s, x_norm);
      my.h_norm.Take(s, h_norm);
      my.shown_norm.Take(s, shown_norm);
      const int64_t shown_units = shown_norm.on ? own_panels * kUnits : 0;
      my.dshown = s.Take<T>(p.B * shown_units);
      my.shift = s.Take<T>(shown_units);
      my.dshift = s.Take<T>(shown_units);
    }
    x_norm.Take(s);
    h_norm.Take(s);
    shown_norm.Take(s);
    d_sizes = s.Take<float>(plan.tiled && plan.d_cut == parts::Cut::kFixed ? p.rows : 0);
    x_right = TakeTiles(s, plan.tiled, RoundUp(p.I, N), grad_rows, plan.grad_cut);
    h_right = TakeTiles(s, plan.tiled, RoundUp(p.Hout, N), grad_rows, plan.grad_cut);
    d = s.Take<T>((d_is_of_step ? p.B : p.rows) * d_stride);
    const auto of_product = [&](bool normalised, int gates, const int* column) -> OfProduct {
      const int64_t stride = gates * gate_stride + 16;
      if (normalised) return {s.Take<T>(p.rows * stride), stride, kInOrder};
      return {d, d_stride, column};
    };
    h_grads = of_product(h_norm.on, C::kH, C::kDh);
    x_grads = NormOfSum(p) ? h_grads : of_product(x_norm.on, C::kX, C::kDx);
    dh = dh_in_place ? static_cast<T*>(p.dh0) : s.Take<T>(p.B * h_stride);
    if (p.h_mask != nullptr)
      for (T** buffer : {&mask, &dh_left}) *buffer = s.Take<T>(p.B * h_stride);
    dh_seq = s.Take<T>(projected ? p.rows * h_stride : 0);
    dh_full = s.Take<T>(projected ? p.B * full_stride : 0);
    grad_right = s.Take<T>(WeightGrad::PackedSize(p.rows, widest));
    sum_ih = s.Take<T>(narrow ? C::kX * p.H * p.I : 0);
    sum_hh = s.Take<T>(narrow ? C::kH * p.H * p.Hout : 0);  // and W_hr's
    dx_sum = s.Take<T>(narrow && p.dx && p.dirs == 2 ? p.rows * p.I : 0);
  });
}

template <class C>
void Layer<C>::BackwardPass::Run(Team& team) {
  Thread& my = threads[team.id];
  my.Take(p, team);
  const parts::Session session(plan.tiled);
  for (my.dir = 0; my.dir < p.dirs; my.dir++) RunDirection(team, my);
}

template <class C>
void Layer<C>::BackwardPass::RunDirection(Team& team, Thread& my) {
  my.w = &p.w[my.dir];
  my.dw = &p.dw[my.dir];
  const int64_t rows_of_hs = p.hs ? p.B + p.rows : p.B;
  my.hs = static_cast<const T*>(p.hs ? p.hs : p.h0) + my.dir * rows_of_hs * hs_stride;
  my.new_h = p.hs ? my.hs + p.B * hs_stride
                  : static_cast<const T*>(p.h_n) + my.dir * rows_of_hs * hs_stride;
  my.dh_product.Begin(team, my.dir, my.w->w_hh, my.first, my.last);
  ForOperands([&](auto k) {
    const void* w_hh = RowsOfProduct(p, k, my.w->w_hh);
    std::get<k - 1>(my.du_products).Begin(team, my.dir, w_hh, my.first, my.last);
  });
  if (projected) PackProjection(my);
  Start(my);
  my.x_norm.Begin(my.panels, my.w->gains[kInput], p.storage);
  my.h_norm.Begin(my.panels, GainOfH(*my.w), p.storage);
  my.shown_norm.Begin(my.panels, my.w->gains[kShown], p.storage);

  for (int64_t number = 0; number < p.T; number++) {
    const Step step = StepAt(my, number);
    if (p.every_state) AddStateGrads(my, step);
    if (projected) Unproject(team, my, step);
    for (int64_t i = my.panels.begin; i < my.panels.end && ZonesVary(p); i++)
      LoadZones(p, my.dir, step.row, step.n, i, Zones(my, i));
    if (shown_norm.on) ShownGrads(team, my, step);
    if (C::kOperands > 0) OperandGrads(team, my, step);
    Bits largest = shown_norm.on ? GateGrads<ShownView>(my, step) : GateGrads<View>(my, step);
    if (x_norm.on || h_norm.on) largest = NormGrads(team, my, step, largest);
    if (plan.tiled) ShareGrads(team, my, step, largest);
    if (C::kH > 0 || x_norm.on || shown_norm.on) team.Sync();
    if (Products<C>::Gates(0) > 0) RecurrentGrad(my, step);
    CutResets(my, step);
  }
  team.Sync();

  StoreGrads(my);
  StoreGains(my);
  if constexpr (C::kGiven > 0) AddGivenGrads(my);
  if (p.dx) InputGrad(team, my);
  WeightGrads(team, my);
  team.Sync();
}

// ---- once per direction ----

template <class C>
void Layer<C>::BackwardPass::PackProjection(Thread& my) const {
  ForUnits(my, [&](const ColumnWeights<1>& weights, int64_t v, auto nv) {
    weights.Pack<decltype(nv)::value>(v);
  });
}

// The parameters [number][unit] and shifts of the own panels; their gradients and db = 0; dc and dh
// from what comes after the last step.
template <class C>
void Layer<C>::BackwardPass::Start(Thread& my) const {
  const int64_t count = my.panels.end - my.panels.begin;
  for (int64_t i = 0; i < count * C::kD * kUnits; i++) my.db[i] = my.db_low[i] = 0;
  for (int64_t i = 0; i < count * C::kParams * kUnits; i++) my.dparams[i] = my.dparams_low[i] = 0;
  for (int64_t at = 0; at < count; at++)
    for (int k = 0; k < C::kParams; k++) {
      const int64_t unit = (my.panels.begin + at) * kUnits;
      LoadPadded<kUnits>(At(my.w->params[k], p.storage, unit), p.storage, p.H - unit,
                         my.params + (at * C::kParams + k) * kUnits);
    }
  for (int64_t at = 0; at < count && shown_norm.on; at++) {
    const int64_t unit = (my.panels.begin + at) * kUnits;
    LoadPadded<kUnits>(At(my.w->shift, p.storage, unit), p.storage, p.H - unit,
                       my.shift + at * kUnits);
    std::fill_n(my.dshift + at * kUnits, kUnits, T(0));
  }
  for (int64_t i = my.panels.begin; i < my.panels.end; i++)
    for (int64_t r = 0; r < p.B * kExtra; r++) {
      const int64_t unit = i * kUnits;
      const int64_t at = (my.dir * p.B * kExtra + r) * p.H + unit;
      const bool given = p.dc_n != nullptr && !p.every_state;
      LoadPadded<kUnits>(given ? At(p.dc_n, p.storage, at) : nullptr, p.storage,
                         given ? p.H - unit : 0,
                         my.dc + ((i - my.panels.begin) * p.B * kExtra + r) * kUnits);
    }
  CopyState(p, p.every_state ? nullptr : p.dh_n, my.dir, my.first, my.last, dh, h_stride);
  if (mask) CopyState(p, p.h_mask, my.dir, my.first, my.last, mask, h_stride);
  for (int k = 0; k < C::kOperands; k++)
    CopyState(p, nullptr, my.dir, my.first, my.last, d_operands[k], full_stride);
  for (int64_t i = my.panels.begin; i < my.panels.end && ZonesStay(p); i++)
    LoadZones(p, my.dir, 0, 1, i, Zones(my, i));
}

// ---- per step ----

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

// ---- of the whole sequence ----

// dh0, dc0 and the gradients of biases and parameters, the own parts.
template <class C>
void Layer<C>::BackwardPass::StoreGrads(Thread& my) const {
  for (int64_t b = 0; b < p.B && p.dh0 && my.valid > 0 && !dh_in_place; b++)
    StoreRow(At(p.dh0, p.storage, (my.dir * p.B + b) * p.Hout + my.first), p.storage,
             dh + b * h_stride + my.first, my.valid);
  for (int64_t i = my.panels.begin; i < my.panels.end; i++) {
    const int64_t unit = i * kUnits, n = p.H - unit < kUnits ? p.H - unit : kUnits;
    const int64_t at = i - my.panels.begin;
    T sums[std::max(C::kD, C::kParams) * kUnits];
    Rounded(my.db + at * C::kD * kUnits, my.db_low + at * C::kD * kUnits, C::kD * kUnits, sums);
    for (int q = 0; q < C::kX && my.dw->b_ih; q++)
      StoreRow(At(my.dw->b_ih, p.storage, q * p.H + unit), p.storage, sums + C::kDx[q] * kUnits, n);
    for (int q = 0; q < C::kH && my.dw->b_hh; q++)
      StoreRow(At(my.dw->b_hh, p.storage, q * p.H + unit), p.storage, sums + C::kDh[q] * kUnits, n);
    Rounded(my.dparams + at * C::kParams * kUnits, my.dparams_low + at * C::kParams * kUnits,
            C::kParams * kUnits, sums);
    for (int k = 0; k < C::kParams; k++)
      if (my.dw->params[k])
        StoreRow(At(my.dw->params[k], p.storage, unit), p.storage, sums + k * kUnits, n);
    for (int64_t r = 0; r < p.B * kExtra && p.dc0; r++)
      StoreRow(At(p.dc0, p.storage, (my.dir * p.B * kExtra + r) * p.H + unit), p.storage,
               my.dc + ((i - my.panels.begin) * p.B * kExtra + r) * kUnits, n);
  }
}

// To those of what is given, the own units, are added those of this direction.
template <class C>
void Layer<C>::BackwardPass::AddGivenGrads(const Thread& my) const {
  alignas(kLine) T block[kUnits];
  for (int64_t r = 0; r < p.rows && p.dgiven; r++)
    for (int64_t i = my.panels.begin; i < my.panels.end; i++)
      for (int k = 0; k < C::kGiven; k++) {
        const int64_t unit = i * kUnits, n = std::min<int64_t>(p.H - unit, kUnits);
        void* sum = At(p.dgiven, p.storage, (r * C::kGiven + k) * p.H + unit);
        const T* own = d + r * d_stride + C::kDx[C::kX + k] * gate_stride + unit;
        LoadRow(sum, p.storage, block, n);
        for (int64_t u = 0; u < n; u++) block[u] += own[u];
        StoreRow(sum, p.storage, block, n);
      }
}

// The gradients of the own gains and shifts.
template <class C>
void Layer<C>::BackwardPass::StoreGains(const Thread& my) const {
  // [panel][gate][unit]
  const auto store_units = [&](const T* from, int gates, void* to) {
    for (int64_t i = my.panels.begin; i < my.panels.end && to; i++)
      for (int q = 0; q < gates; q++, from += kUnits)
        StoreRow(At(to, p.storage, q * p.H + i * kUnits), p.storage, from,
                 std::min<int64_t>(p.H - i * kUnits, kUnits));
  };
  store_units(my.x_norm.GainGrads(0), C::kX, my.dw->gains[kInput]);
  store_units(my.h_norm.GainGrads(0), C::kH, GainOfH(*my.dw));
  store_units(my.shown_norm.GainGrads(0), 1, my.dw->gains[kShown]);
  store_units(my.dshift, 1, my.dw->shift);
}

// dX = d W_ih, to which the second direction adds. Rows are split over the team; where there are
// few, columns are.
template <class C>
void Layer<C>::BackwardPass::InputGrad(Team& team, Thread& my) const {
  const bool by_columns = p.rows <= plan.dx_rows;
  my.dx_product.Begin(team, my.dir, my.w->w_ih, FitsTiles(my), by_columns);
  const int64_t count = x_common.tiles_of_columns.count;
  const auto rows = by_columns ? Team::Range{0, p.rows} : team.Split(p.rows, plan.dx_rows);
  const auto tiles = by_columns ? team.Split(count) : Team::Range{0, count};
  for (int64_t r = rows.begin; r < rows.end; r += plan.dx_rows) {
    const int64_t n = std::min(rows.end - r, plan.dx_rows);
    my.dx_product.Multiply(
        n, tiles, [&](int q) { return Gate(x_grads, q, r); }, x_grads.stride,
        narrow ? nullptr : static_cast<T*>(p.dx) + r * p.I, my.dir == 1,
        [&](T* dx, int64_t stride, int64_t col, int64_t width) {
          StoreInputGrad(my.dir, r, n, dx, stride, col, width);
        });
  }
}

// Columns [col, col + width) of n rows of dX from `row` on, which are overwritten by the sum with
// those of the first direction.
template <class C>
void Layer<C>::BackwardPass::StoreInputGrad(int dir, int64_t row, int64_t n, T* rows,
                                            int64_t stride, int64_t col, int64_t width) const {
  const T* sum = narrow ? dx_sum : static_cast<T*>(p.dx);
  for (int64_t r = 0; r < n; r++) {
    T* out = rows + r * stride;
    const int64_t at = (row + r) * p.I + col;
    for (int64_t i = 0; i < width && dir == 1; i++) out[i] += sum[at + i];
    if (narrow && dir + 1 < p.dirs)
      memcpy(dx_sum + at, out, width * sizeof(T));
    else
      StoreRow(At(p.dx, p.storage, at), p.storage, out, width);
  }
}

// dW_hh of a product, where load(first row, rows, first column, ..) brings its operand. Of a
// block-diagonal W_hh one gate and block after the other: a block of d with its columns of h.
template <class C>
template <class F>
void Layer<C>::BackwardPass::RecurrentWeightGrad(Team& team, const WeightGrad& grad,
                                                 const F& load) const {
  if (p.blocks <= 1) return grad.Run(team, load);
  const int64_t width = BlockWidth(p);
  for (int q = 0; q < grad.gates && grad.dw; q++)
    for (int64_t block = 0; block < p.blocks; block++) {
      const int64_t first = block * width;
      WeightGrad block_grad = grad;
      block_grad.gates = 1;
      block_grad.column = grad.column + q;
      block_grad.left.d = grad.left.d + first;
      block_grad.left.H = block_grad.cols = width;
      block_grad.dw = At(grad.dw, p.storage, (q * p.H + first) * width);
      block_grad.Run(team, [&](int64_t r0, int64_t n, int64_t col, auto nv, T* dst) {
        load(r0, n, first + col, nv, dst);
      });
    }
}

// dW_ih = d^T x, dW_hh = d^T h_{t-1}, dW_hr = (dh + dy)^T h_full.
template <class C>
void Layer<C>::BackwardPass::WeightGrads(Team& team, Thread& my) {
  Gradients& gradients = my.gradients;
  gradients.d = x_grads.d;
  gradients.stride = x_grads.stride;
  gradients.gate_stride = gate_stride;
  gradients.rows = p.rows;
  gradients.H = p.H;
  gradients.sizes = d_sizes;
  WeightGrad x_grad;
  x_grad.left = gradients;
  x_grad.gates = C::kX;
  x_grad.column = x_grads.column;
  x_grad.cols = p.I;
  x_grad.packed = grad_right;
  x_grad.tiles = x_right;
  x_grad.misfit = &misfit_block[0];
  x_grad.first_row = my.dir * p.rows;
  x_grad.sum = sum_ih;
  x_grad.dw = my.dw->w_ih;
  x_grad.storage = p.storage;
  const auto load_x = [&](int64_t r0, int64_t n, int64_t col, auto nv, T* dst) {
    constexpr int kWidth = decltype(nv)::value * N;
    RowCursor cursor(p, r0);
    for (int64_t r = 0; r < n; r++, cursor.Next())
      LoadPadded<kWidth>(At(Input::Row(p, cursor.t, cursor.b), p.storage, col), p.storage,
                         p.I - col, dst + r * kWidth);
  };
  WeightGrad h_grad = x_grad;
  h_grad.left.d = h_grads.d;
  h_grad.left.stride = h_grads.stride;
  h_grad.gates = Products<C>::Gates(0);
  h_grad.column = h_grads.column;
  h_grad.cols = p.Hout;
  h_grad.tiles = h_right;
  h_grad.misfit = &misfit_block[1];
  h_grad.sum = sum_hh;
  h_grad.dw = my.dw->w_hh;
  const auto load_h = [&](int64_t r0, int64_t n, int64_t col, auto nv, T* dst) {
    constexpr int kWidth = decltype(nv)::value * N;
    RowCursor cursor(p, r0);
    for (int64_t r = 0; r < n; r++, cursor.Next()) {
      T* row = dst + r * kWidth;
      if (IsReset(my, cursor.t, cursor.b)) {
        std::fill_n(row, kWidth, T(0));
        continue;
      }
      LoadPadded<kWidth>(my.hs + PreviousRow(p, my.dir, cursor.t, cursor.b) * hs_stride + col,
                         kPlain, p.Hout - col, row);
      for (int64_t u = 0; u < kWidth && mask; u += N)
        store<V>(row + u, Masked(row + u, mask + cursor.b * h_stride + col + u, p.storage));
    }
  };
  if (FitsTiles(my) && x_grads.d == h_grads.d) {
    WeightGrad::RunTiles(team, kMostGrads, x_grad, load_x, h_grad, load_h);
  } else if (FitsTiles(my)) {
    WeightGrad no_grad = x_grad;
    no_grad.dw = nullptr;
    WeightGrad::RunTiles(team, kMostGrads, x_grad, load_x, no_grad, load_x);
    WeightGrad::RunTiles(team, kMostGrads, h_grad, load_h, no_grad, load_h);
  } else {
    x_grad.Run(team, load_x);
    if (Products<C>::Gates(0) > 0) RecurrentWeightGrad(team, h_grad, load_h);
    ForOperands([&](auto k) {
      WeightGrad grad = h_grad;
      grad.gates = Products<C>::Gates(k);
      grad.column = h_grads.column + Products<C>::First(k);
      grad.dw = RowsOfProduct(p, k, my.dw->w_hh);
      RecurrentWeightGrad(team, grad, [&](int64_t r0, int64_t n, int64_t col, auto nv, T* dst) {
        constexpr int kWidth = decltype(nv)::value * N;
        RowCursor cursor(p, r0);
        for (int64_t r = 0; r < n; r++, cursor.Next())
          for (int64_t u = col; u < col + kWidth; u += N, dst += N) {
            if (u >= p.H) {
              store<V>(dst, V{});
              continue;
            }
            const T* tape = TapeOf(p, my.dir, cursor.t, u / kUnits) +
                            (cursor.b * kTape + k - 1) * kUnits + u % kUnits;
            store<V>(dst, mask ? Masked(tape, mask + cursor.b * h_stride + u, p.storage)
                               : load<V>(tape));
          }
      });
    });
  }
  if (projected) {
    WeightGrad projection_grad = h_grad;
    projection_grad.gates = 1;
    projection_grad.left.H = p.Hout;
    projection_grad.column = kInOrder;
    projection_grad.left.d = dh_seq;
    projection_grad.left.stride = h_stride;
    projection_grad.cols = p.H;
    projection_grad.dw = my.dw->w_hr;
    projection_grad.Run(team, [&](int64_t r0, int64_t n, int64_t col, auto nv, T* dst) {
      constexpr int kWidth = decltype(nv)::value * N;
      for (int64_t r = 0; r < n; r++)
        LoadPadded<kWidth>(my.hs + (p.B + r0 + r) * hs_stride + h_stride + col, kPlain, p.H - col,
                           dst + r * kWidth);
    });
  }
}

FRNN_END
