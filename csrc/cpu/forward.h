// The forward of cpu/layer.h: the loop over time, and what is done once per direction and per chunk.
// What is done in a step is in cpu/forward_step.h.
//
// Per chunk of time steps: gates_x = x W_ih^T for the thread's own units (no barrier), then per
// step gates_h = h W_hh^T, gate math, what happens to the states before the next step, one barrier
// (two more around the product of a projection, one more before each thing that is normalised, and
// one before the product of each further operand of W_hh).
#pragma once
#include <algorithm>

#include "cpu/layer.h"
#include "cpu/product/panel_product.h"

FRNN_BEGIN

// One call. What the threads share are its members, what each has is Thread.
template <class C>
class Layer<C>::ForwardPass {
 public:
  explicit ForwardPass(const LayerParams& p);
  void Run(Team& team);
  static void OneStep(const LayerParams& p);  // see LoopOf

  const cpu::ForwardPlan plan;

 private:
  using ProductX = InputProduct<C::kX, kPanelVecs>;
  template <int kGates>
  using ProductOf = StepProduct<kGates, kPanelVecs>;
  template <int kGates>
  using CommonOf = typename ProductOf<kGates>::Common;
  using ProductH = ProductOf<Products<C>::Gates(0)>;

  const LayerParams& p;
  const bool projected = Projected(p);
  const Input input{p};
  const int64_t panels = Panels(p), own_panels = (panels + plan.threads - 1) / plan.threads;
  const int64_t own_vecs = (HoutVecs(p) + plan.threads - 1) / plan.threads;
  const int64_t x_stride = RowStride(p.I), h_stride = RowStride(p.Hout),
                full_stride = RowStride(p.H), hs_stride = HsStride(p.H, p.Hout);
  // While every step has all rows, hs itself is where h goes; a ragged batch needs the h of
  // finished rows beside it, and resets change h after it was an output.
  const bool in_place = p.hs != nullptr && !p.ragged && p.reset == nullptr;
  const bool direct_y = p.storage == kPlain && !projected;
  const bool states_change = p.reset != nullptr || p.h_mask != nullptr, zones_vary = ZonesVary(p);
  // One step reads h0 and writes h_n in place: nobody waits for what another thread writes, but for
  // rows that are turned.
  const bool in_one = p.T == 1 && p.hs == nullptr && p.h0 != nullptr && direct_y && !plan.tiled &&
                      p.Hout % kUnits == 0 && !states_change && p.norm == Norm::kNone &&
                      C::kOperands == 0;

  // A thread's memory, its slice of the layer, and the direction it is at.
  struct Thread : Slice {
    ProductX x_product;
    ProductH h_product;
    OfOperands<ProductOf> u_products;
    NormX x_norm;
    NormH h_norm;
    NormShown shown_norm;
    T *b_ih, *b_hh, *w_hr, *params, *c, *x;
    T* zones;  // [panel][row][state][unit]
    // If what the output shows is normalised, that [panel][row][unit], what is added to it [panel][unit],
    // and where no tape is kept, that of a step.
    T *shown, *shift, *tape;
    T* given;    // [panel][row][number][unit]
    T* gates_x;  // [group of panels][row][panel of the group][gate][unit]
    // [row][panel of the group][gate][unit] of a block of rows, or as gates_x of a step if they are
    // normalised, or not all gates.
    T* gates_h;
    T* gates_u[Products<C>::kCount];  // the same of the operand with the same number
    T* no_gates_x;                    // zeros, where gates_h has the sum of both

    int64_t count;  // of the panels

    int dir;
    const DirectionWeights* w;
    T* hs;
  };
  Vector<Thread> threads = Vector<Thread>(plan.threads);
  typename ProductX::Common x_common;
  typename ProductH::Common h_common;
  OfOperands<CommonOf> u_common;
  T* operands[Products<C>::kCount];  // of a step, [B, h_stride] each
  typename NormX::Common x_norm = NormCommon<NormX>(p, NormOfX(p), own_panels, plan.gates_rows);
  typename NormH::Common h_norm = NormCommon<NormH>(p, NormOfH(p), own_panels, p.B);
  typename NormShown::Common shown_norm = NormCommon<NormShown>(p, NormOfShown(p), own_panels, p.B);
  T* h_buffer[2] = {nullptr, nullptr};
  T* full_buffer = nullptr;
  // With a mask of h, [B, h_stride], what goes into the product: of steps in turn.
  T *mask = nullptr, *masked[2] = {nullptr, nullptr};
  Scratch scratch;

  struct Chunk {
    int64_t begin, end;  // time steps
    int64_t row, rows;   // its rows, from `row` on
  };
  struct Step {
    int64_t number, t;
    int64_t n, row;  // its rows, from `row` on
    const T* h;      // h_{t-1}
    const T* left;   // the same as it goes into the product
    T *h_new, *full;
    T* left_new;  // the left side of the next step's product
    int64_t ldh, ld_left, ld_full;
  };
  struct StepRows;
  struct View;

  T* GatesX(const Thread& my, int64_t own_panel) const {
    return my.gates_x + x_common.Offset(own_panel, plan.gates_rows);
  }
  // Of all rows of a step.
  T* GatesH(const Thread& my, int64_t own_panel) const {
    return my.gates_h + h_common.Offset(own_panel, p.B);
  }
  T* Zones(const Thread& my, int64_t own_panel) const {
    return my.zones + own_panel * ZoneRows(p) * C::kStates * kUnits;
  }
  T* Given(const Thread& my, int64_t own_panel) const {
    return my.given + own_panel * p.B * C::kGiven * kUnits;
  }
  // Steps counted on over both directions.
  int64_t NumberOf(const Thread& my, int64_t number) const { return my.dir * p.T + number; }

  void RunDirection(Team& team, Thread& my);
  void PackPanels(Thread& my) const;
  void PackProjection(Thread& my) const;
  void Start(Team& team, Thread& my) const;
  void ChangeStates(Thread& my, int64_t t, T* h, int64_t ldh, T* left, int64_t n) const;
  Chunk Next(int dir, const Chunk& last) const;
  void InputGates(Team& team, Thread& my, const Chunk& chunk) const;
  MatrixRows Stage(Thread& my, const Chunk& chunk) const;
  Step StepAt(const Thread& my, int64_t number, int64_t t) const;
  StepRows RowsOf(const Thread& my, const Chunk& chunk, const Step& step, int64_t at) const;
  void RecurrentGates(Team& team, Thread& my, const Chunk& chunk, const Step& step) const;
  void NormalisedGates(Team& team, Thread& my, const Chunk& chunk, const Step& step) const;
  template <int kProduct>
  void Gates(const Thread& my, const StepRows& s, int64_t at, int64_t first, int rows) const;
  // Not inline: its bits are those of one place, wherever it is called.
  template <int kProduct>
  FRNN_NOINLINE static void GateMath(const StepRows& s, int64_t first, int rows);
  template <class F>
  static void ForRows(const StepRows& s, int64_t first, int rows, const F& run);
  void ShowOutputs(Team& team, Thread& my, const Chunk& chunk, const Step& step) const;
  void Project(Team& team, Thread& my, const Step& step) const;
  void StoreOutputs(Thread& my, const Step& step) const;
  void StoreExtraStates(Thread& my, int64_t rows, int64_t row) const;
};

template <class C>
Layer<C>::ForwardPass::ForwardPass(const LayerParams& p)
    : plan(cpu::PlanForward(ProblemOf(p), TheMachine())), p(p) {
  x_common.storage = p.storage;
  x_common.H = p.H;
  x_common.own_panels = own_panels;
  x_common.paired = plan.paired;
  x_common.K = p.I;
  x_common.packing = plan.w_ih;
  const bool in_bytes = PackedInput(p.w[0]).IsBytes();
  x_common.byte_rows = in_bytes ? plan.gates_rows : 0;
  x_common.one_chain = plan.one_chain;
  x_common.tiled = plan.tiled;
  x_common.cut = plan.x_cut;
  const auto set_up = [&](auto& common) {
    common.storage = p.storage;
    common.H = p.H;
    common.own_panels = own_panels;
    common.paired = plan.paired;
    common.K = common.left.K = BlockWidth(p);
    common.block_units = p.blocks > 1 ? BlockWidth(p) : 0;
    common.packing = plan.w_hh;
    common.byte_rows = in_bytes ? p.B : 0;
    common.one_chain = plan.one_chain;
    common.tiled = common.left.tiled = plan.tiled && C::kH > 0;
    common.cut = common.left.cut = plan.h_cut;
    common.left.gates = 1;
    common.left.batch = p.B;
  };
  set_up(h_common);
  ForOperands([&](auto k) {
    auto& common = std::get<k - 1>(u_common);
    set_up(common);
    if (common.Turns()) common.packing = cpu::Packing::kOnce;
  });
  scratch.Build([&](Scratch& s) {
    h_common.left.Take(s, plan.threads);
    for (Thread& my : threads) {
      my.x_product.Take(s, x_common);
      my.h_product.Take(s, h_common);
      my.b_ih = s.Take<T>(own_panels * C::kX * kUnits);
      my.b_hh = s.Take<T>(own_panels * C::kH * kUnits);
      my.params = s.Take<T>(own_panels * C::kParams * kUnits);
      my.w_hr = s.Take<T>(projected ? own_vecs * N * p.H : 0);
      my.gates_x = s.Take<T>(x_common.Groups(own_panels) * plan.gates_rows * x_common.Stride());
      const bool whole = h_norm.on || C::kOperands > 0;
      my.gates_h = s.Take<T>((whole ? h_common.Groups(own_panels) * p.B : cpu::kRowBlock) *
                             h_common.Stride());
      ForOperands([&](auto k) {
        const auto& common = std::get<k - 1>(u_common);
        std::get<k - 1>(my.u_products).Take(s, std::get<k - 1>(u_common));
        my.gates_u[k - 1] = s.Take<T>(common.Groups(own_panels) * p.B * common.Stride());
      });
      my.no_gates_x = s.Take<T>(NormOfSum(p) ? x_common.Stride() : 0);
      my.x_norm.Take(s, x_norm);
      my.h_norm.Take(s, h_norm);
      my.shown_norm.Take(s, shown_norm);
      const int64_t shown_units = shown_norm.on ? own_panels * kUnits : 0;
      my.shown = s.Take<T>(p.B * shown_units);
      my.shift = s.Take<T>(shown_units);
      my.tape = s.Take<T>(p.saved ? 0 : p.B * kTape * shown_units);
      my.c = s.Take<T>(own_panels * p.B * kExtra * kUnits);
      my.x = s.Take<T>(input.direct ? 0 : plan.gates_rows * x_stride);
      my.zones = s.Take<T>(own_panels * ZoneRows(p) * C::kStates * kUnits);
      my.given = s.Take<T>(own_panels * p.B * C::kGiven * kUnits);
    }
    x_common.Take(s, plan.threads, p.B);
    h_common.Take(s, plan.threads, p.B);
    ForOperands([&](auto k) {
      std::get<k - 1>(u_common).Take(s, plan.threads, p.B);
      operands[k - 1] = s.Take<T>(p.B * h_stride);
    });
    x_norm.Take(s);
    h_norm.Take(s);
    shown_norm.Take(s);
    if (!in_place && !in_one)
      for (T*& buffer : h_buffer) buffer = s.Take<T>(p.B * h_stride);
    if (projected && p.hs == nullptr) full_buffer = s.Take<T>(p.B * full_stride);
    if (p.h_mask != nullptr)
      for (T** buffer : {&mask, &masked[0], &masked[1]}) *buffer = s.Take<T>(p.B * h_stride);
  });
}

template <class C>
void Layer<C>::ForwardPass::Run(Team& team) {
  Thread& my = threads[team.id];
  my.Take(p, team);
  my.count = my.panels.end - my.panels.begin;
  const parts::Session session(plan.tiled);
  for (my.dir = 0; my.dir < p.dirs; my.dir++) RunDirection(team, my);
}

template <class C>
void Layer<C>::ForwardPass::RunDirection(Team& team, Thread& my) {
  my.w = &p.w[my.dir];
  my.hs = p.hs ? static_cast<T*>(p.hs) + my.dir * (p.B + p.rows) * hs_stride : nullptr;
  my.x_product.Begin(team, my.panels, my.dir, my.w->w_ih, PackedInput(*my.w));
  my.h_product.Begin(team, my.panels, my.dir, my.w->w_hh, PackedProduct(p, *my.w, 0));
  ForOperands([&](auto k) {
    const void* w_hh = RowsOfProduct(p, k, my.w->w_hh);
    std::get<k - 1>(my.u_products).Begin(team, my.panels, my.dir, w_hh, PackedProduct(p, *my.w, k));
  });
  PackPanels(my);
  my.x_norm.Begin(my.panels, my.w->gains[kInput], p.storage);
  my.h_norm.Begin(my.panels, GainOfH(*my.w), p.storage);
  my.shown_norm.Begin(my.panels, my.w->gains[kShown], p.storage);
  if (projected) PackProjection(my);
  Start(team, my);
  my.x_product.Turn(team, p.B, static_cast<const T*>(p.x), p.x_b_stride);
  my.h_product.Turn(team, p.B, p.h0 ? static_cast<const T*>(p.h0) + my.dir * p.B * p.Hout : nullptr,
                    p.Hout);
  if (!in_one || x_common.Turns() || h_common.Turns()) team.Sync();

  const int64_t start = my.dir == 0 ? 0 : p.T;
  int64_t number = 0;
  for (Chunk chunk{start, start, 0, 0}; number < p.T;) {
    chunk = Next(my.dir, chunk);
    InputGates(team, my, chunk);
    for (int64_t k = 0; k < chunk.end - chunk.begin; k++, number++) {
      const int64_t ahead = my.dir == 0 ? 1 : -1;
      const Step step = StepAt(my, number, my.dir == 0 ? chunk.begin + k : chunk.end - 1 - k);
      for (int64_t at = 0; at < my.count && zones_vary; at++)
        LoadZones(p, my.dir, step.row, step.n, my.panels.begin + at, Zones(my, at));
      for (int64_t at = 0; at < my.count && C::kGiven > 0; at++)
        LoadGiven(p, step.row, step.n, my.panels.begin + at, Given(my, at));
      if (h_norm.on)
        NormalisedGates(team, my, chunk, step);
      else
        RecurrentGates(team, my, chunk, step);
      if (shown_norm.on) ShowOutputs(team, my, chunk, step);
      if (projected) Project(team, my, step);
      if (my.valid > 0 && !in_one) StoreOutputs(my, step);
      if (p.every_state) StoreExtraStates(my, step.n, step.row);
      if (number + 1 < p.T) {
        if (states_change)
          ChangeStates(my, step.t + ahead, step.h_new, step.ldh, step.left_new, step.n);
        my.h_product.Share(team, NumberOf(my, number + 1), step.n, my.first, my.last, step.left_new,
                           step.ld_left);
      }
      if ((C::kH > 0 || shown_norm.on) && !in_one) team.Sync();
    }
  }
  if (!p.every_state) StoreExtraStates(my, p.B, 0);
}

// ---- once per direction ----

// Biases [gate][unit], parameters [number][unit], what is added to what is shown, and c_0
// [row][state][unit] of the own panels, and zones that are the same in all steps.
template <class C>
void Layer<C>::ForwardPass::PackPanels(Thread& my) const {
  for (int64_t at = 0; at < my.count; at++) {
    const int64_t unit = (my.panels.begin + at) * kUnits, n = p.H - unit;
    const auto pack = [&](const void* b, int gates, T* dst) {
      for (int q = 0; q < gates; q++)
        LoadPadded<kUnits>(b ? At(b, p.storage, q * p.H + unit) : nullptr, p.storage, b ? n : 0,
                           dst + (at * gates + q) * kUnits);
    };
    pack(my.w->b_ih, C::kX, my.b_ih);
    pack(my.w->b_hh, C::kH, my.b_hh);
    for (int k = 0; k < C::kParams; k++)
      LoadPadded<kUnits>(At(my.w->params[k], p.storage, unit), p.storage, n,
                         my.params + (at * C::kParams + k) * kUnits);
    for (int64_t r = 0; r < p.B * kExtra; r++)
      LoadPadded<kUnits>(
          p.c0 ? At(p.c0, p.storage, (my.dir * p.B * kExtra + r) * p.H + unit) : nullptr, p.storage,
          p.c0 ? n : 0, my.c + (at * p.B * kExtra + r) * kUnits);
    if (shown_norm.on)
      LoadPadded<kUnits>(At(my.w->shift, p.storage, unit), p.storage, n, my.shift + at * kUnits);
    if (ZonesStay(p)) LoadZones(p, my.dir, 0, 1, my.panels.begin + at, Zones(my, at));
  }
}

template <class C>
void Layer<C>::ForwardPass::PackProjection(Thread& my) const {
  ForColumnTiles(my.columns.begin, my.columns.end, [&](int64_t v, auto nv) {
    constexpr int NV = decltype(nv)::value;
    for (int j = 0; j < NV; j++)
      PackTransposed(my.w->w_hr, p.storage, (v + j) * N, p.Hout, p.H, p.H,
                     my.w_hr + (v - my.columns.begin) * N * p.H + j * N, NV * N);
  });
}

// h0, its padding, and the padding that nobody writes later: the saved tensors hold no
// uninitialised value.
template <class C>
void Layer<C>::ForwardPass::Start(Team& team, Thread& my) const {
  const bool is_last = team.id + 1 == team.size;
  const int64_t end = is_last ? h_stride : my.last;
  if (my.hs) CopyState(p, p.h0, my.dir, my.first, end, my.hs, hs_stride);
  if (my.hs && is_last) {
    for (int64_t r = 0; r < p.rows; r++)
      for (int64_t u = my.last; u < h_stride; u++) my.hs[(p.B + r) * hs_stride + u] = 0;
    for (int64_t r = 0; r < p.B + p.rows && projected; r++)
      for (int64_t u = r < p.B ? 0 : panels * kUnits; u < full_stride; u++)
        my.hs[r * hs_stride + h_stride + u] = 0;
    const auto end_tape = [&](T* tape, int64_t values) {
      std::fill(tape + p.rows * values * panels * kUnits, tape + p.rows * values * Padded(p.H),
                T(0));
    };
    end_tape(TapeOf(p, my.dir), kTape);
  }
  const auto end_norm_tape = [&](bool on, const NormTape& tape) {
    if (!on || p.saved == nullptr) return;
    const int64_t room = p.rows * Padded(p.H);
    const auto rest = team.Split(room - p.rows);
    T* const behind = tape.Scales(0) + p.rows;
    std::fill(behind + rest.begin, behind + rest.end, T(0));
    if (is_last)
      std::fill(tape.Normal(0, 0) + p.rows * panels * kUnits * tape.gates, tape.Scales(0), T(0));
  };
  end_norm_tape(x_norm.on, NormTapeOfX(p, my.dir));
  end_norm_tape(h_norm.on, NormTapeOfH(p, my.dir));
  end_norm_tape(shown_norm.on, NormTapeOfShown(p, my.dir));
  std::fill_n(my.no_gates_x, NormOfSum(p) ? x_common.Stride() : 0, T(0));
  if (!in_place && !in_one)
    for (T* buffer : h_buffer) CopyState(p, p.h0, my.dir, my.first, end, buffer, h_stride);
  if (mask) CopyState(p, p.h_mask, my.dir, my.first, end, mask, h_stride);
  T* const h = in_place ? my.hs : h_buffer[0];
  const int64_t ldh = in_place ? hs_stride : h_stride, t = my.dir == 0 ? 0 : p.T - 1;
  // Rows of a ragged batch begin with what they are here in any later step.
  for (T* left : masked)
    if (mask) ChangeStates(my, t, h, ldh, left, p.B);
  if (!mask && !in_one) ChangeStates(my, t, h, ldh, h, p.B);
  my.h_product.ShareFirst(team, NumberOf(my, 0), p.B, my.first, my.last, mask ? masked[0] : h,
                          mask ? h_stride : ldh);
}

// What happens to the own columns of n rows of h and c before step t: they become zeros where they
// are reset, and masked ones go to `left`.
template <class C>
void Layer<C>::ForwardPass::ChangeStates(Thread& my, int64_t t, T* h, int64_t ldh, T* left,
                                         int64_t n) const {
  ForResets(p, my.dir, t, [&](int64_t b) {
    std::fill(h + b * ldh + my.first, h + b * ldh + my.last, T(0));
    for (int64_t at = 0; at < my.count; at++)
      std::fill_n(my.c + (at * p.B + b) * kExtra * kUnits, kExtra * kUnits, T(0));
  });
  for (int64_t b = 0; b < n && mask; b++)
    for (int64_t u = my.first; u < my.last; u += N)
      store<V>(left + b * h_stride + u,
               Masked(h + b * ldh + u, mask + b * h_stride + u, p.storage));
}

// ---- per chunk ----

// The next time steps in the direction's order, as many as gates_x has room for.
template <class C>
auto Layer<C>::ForwardPass::Next(int dir, const Chunk& last) const -> Chunk {
  int64_t begin = last.end, end = last.begin;
  if (dir == 0) {
    end = begin + 1;
    while (end < p.T && p.offsets[end + 1] - p.offsets[begin] <= plan.gates_rows) end++;
  } else {
    begin = end - 1;
    while (begin > 0 && p.offsets[end] - p.offsets[begin - 1] <= plan.gates_rows) begin--;
  }
  return {begin, end, p.offsets[begin], p.offsets[end] - p.offsets[begin]};
}

// gates_x of the own panels.
template <class C>
void Layer<C>::ForwardPass::InputGates(Team& team, Thread& my, const Chunk& chunk) const {
  const auto stage = [&] { return Stage(my, chunk); };
  const bool as_it_lies = input.one_stride && (p.storage == kPlain || my.x_product.FitsTiles());
  const MatrixRows x =
      as_it_lies ? MatrixRows{Input::Row(p, chunk.begin, 0), p.storage, input.stride} : stage();
  my.x_product.Multiply(x, chunk.rows, [&](int64_t at) { return GatesX(my, at); }, stage);
  if (!x_norm.on) return;
  const int64_t stride = x_common.Stride();
  for (int64_t at = 0; at < my.count; at++)
    my.x_norm.Measure(at, 0, chunk.rows, GatesX(my, at), stride);
  team.Sync();
  const NormTape tape = NormTapeOfX(p, my.dir);
  my.x_norm.Find(chunk.rows, tape.Scales(chunk.begin));
  for (int64_t at = 0; at < my.count; at++)
    for (int64_t t = chunk.begin; t < chunk.end; t++) {
      const int64_t first = p.offsets[t] - chunk.row;
      my.x_norm.Apply(at, first, p.batch_sizes[t], GatesX(my, at) + first * stride, stride,
                      tape.Normal(t, my.panels.begin + at));
    }
  if (C::kH == 0) team.Sync();  // before anyone measures the next chunk
}

// The rows of a chunk in the computing type, one after another.
template <class C>
auto Layer<C>::ForwardPass::Stage(Thread& my, const Chunk& chunk) const -> MatrixRows {
  RowCursor cursor(p, chunk.row);
  for (int64_t r = 0; r < chunk.rows; r++, cursor.Next())
    LoadRow(Input::Row(p, cursor.t, cursor.b), p.storage, my.x + r * x_stride, p.I);
  return {my.x, kPlain, x_stride};
}

FRNN_END

#include "cpu/forward_step.h"
