// The backward of cpu/layer.h: the loop over time, and what is done once per direction. What is done in
// a step is in cpu/backward_step.h, what follows the last one in cpu/backward_sums.h.
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

FRNN_BEGIN

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

FRNN_END

#include "cpu/backward_step.h"
#include "cpu/backward_sums.h"
