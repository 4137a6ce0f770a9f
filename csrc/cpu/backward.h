// The backward of cpu/layer.h.
//
// Per step, from the last one on: gate gradients d of the own units, one barrier, dh = d W_hh for the
// own units (with a projection, dh_full = dh W_hr and a barrier before that). Then dX, dW and db of the
// whole sequence as large products.
#pragma once
#include <algorithm>

#include "cpu/layer.h"
#include "cpu/weight_grad.h"

FRNN_BEGIN

// Whether magnitudes, as bits, are at most those of `limit`; inf and NaN are not.
template <class I>
FRNN_INLINE bool Below(const I& magnitudes, float limit) {
  bool below = true;
  for (size_t i = 0; i < sizeof(I) / sizeof(int32_t); i++)
    below &= magnitudes[i] <= bit_cast<int32_t>(limit);
  return below;
}

// One call. What the threads share are its members, what each has is Own.
template <class C, class V>
class Layer<C, V>::BackwardPass {
 public:
  BackwardPass(const LayerGradParams& p, int threads);
  void Run(Team& team);

 private:
  using Magnitude = typename Lanes<V>::I;
  static constexpr int kIdentity[1] = {0};
  // So few rows in all read weights as they lie, at a stride that caches do not like twice. Somewhat more
  // rows of one step use each weight once, just after it was packed.
  static constexpr int64_t kUnpackedRows = 12, kOnceRows = 256;

  const LayerGradParams& p;
  const int threads;
  const bool projected = Projected(p), tiled = Tiled(p);
  const bool narrow = p.storage != kOwn, stage_dy = p.dy != nullptr && narrow;
  const bool unpacked = !narrow && p.rows <= kUnpackedRows;
  const bool once = p.T == 1 && p.rows > kUnpackedRows&& p.rows <= kOnceRows && !tiled;
  const int64_t own_panels = (Panels(p) + threads - 1) / threads;
  const int64_t own_vecs = (HoutVecs(p) + threads - 1) / threads;
  const int64_t own_columns = projected ? own_vecs * N : own_panels * kUnits;
  const bool dh_in_place = p.hs == nullptr && p.dh0 != nullptr && p.dirs == 1;
  const int64_t h_stride = dh_in_place ? p.Hout : RowStride(p.Hout), full_stride = RowStride(p.H),
                hs_stride = p.hs == nullptr ? p.Hout : HsStride(p.H, p.Hout);
  const int64_t gate_stride = Padded(p.H), d_stride = C::kD * gate_stride + 16;
  const ColumnTiles<V> x_tiles{(p.I + N - 1) / N};
  // Rows of dX at a time, whole blocks of them to a thread.
  const int64_t x_rows = once ? p.rows : (p.rows < 768 ? 48 : 96) * (tiled ? 2 : 1);
  // As operands of tiles, the gates of dh = d W_hh follow each other along the depth; those of dX are
  // summed one by one, so that an operand stays in the second-level cache.
  const parts::Cut cut = parts::CutOf(p.storage, p.H), d_cut = parts::CutBeside(p.storage, p.H);
  const int64_t gate_depth = parts::DepthBlocks(p.H, cut);
  const int64_t padded_gate = gate_depth * parts::DepthOf(cut);
  const int64_t grad_depth = WeightGrad<V>::Block(p.rows);
  // dW in fixed point is balanced by what was measured of d for dh.
  const parts::Cut grad_cut = cut == parts::Cut::kFixed ? parts::CutOf(p.storage, grad_depth) : cut;
  const parts::Cut d_grad_cut = grad_cut == parts::Cut::kFixed ? grad_cut : d_cut;

  // A thread's memory, its part of the layer, and the direction it is at.
  struct Own : Part {
    T *w_hh, *w_hr, *params, *dc, *dy, *db, *dparams, *dx, *dx_rows, *pack_a;
    parts::Operand w_hh_tiles, dx_tiles, tiles_a;
    parts::Operand d_tiles[2];  // d of a step
    Balance d_balance, dx_balance[C::kX], dw_balance;
    parts::Operand w_ih_right[C::kX];  // W_ih's tiles with this thread's factors
    Scratch spare;                     // W_hh as vectors, where tiles do not fit

    int dir;
    const DirectionWeights* w;
    const DirectionGrads* dw;
    const T *hs, *new_h;  // h before the first step, and after each
    bool packed;          // w_hh, for vectors
  };
  std::vector<Own> own = std::vector<Own>(threads);
  T *d, *dh, *dh_seq, *dh_full, *w_ih = nullptr, *pack_b, *sum_ih, *sum_hh, *dx_sum;
  // W_ih by gates; the right sides of dW, x and h.
  parts::Operand w_ih_tiles[C::kX], x_right, h_right;
  float *d_largest[2], *d_sizes;
  fixed::Size *w_hh_sizes, *w_ih_sizes[C::kX];
  // Out of the range of tiles: the weights, any d, d of the last step of each parity, a block of dW.
  std::atomic<bool> fit_w_hh{tiled}, fit_w_ih{tiled}, fit_d{tiled};
  std::atomic<int64_t> misfit_d[2] = {{-1}, {-1}}, misfit_block[2] = {{-1}, {-1}};
  Scratch scratch, spare_w_ih;  // spare: W_ih as vectors

  struct Step {
    int64_t number, t;
    int64_t n, row;  // its rows, from `row` on
    // Of the own columns of dh; null: zero.
    const T* dy;
    int64_t dy_stride;
  };
  T* TakeHh(Scratch& s) const { return s.Take<T>(once ? 0 : C::kH * p.H * own_columns); }
  T* TakeIh(Scratch& s) const {
    return s.Take<T>(p.dx && !once ? C::kX * p.H * x_tiles.vecs * N : 0);
  }
  // Columns col .. col + width of a w [K, cols]. Unpacked they are read in place, unless they reach past
  // the last column.
  bool ReadInPlace(int64_t cols, int64_t col, int64_t width) const {
    return unpacked && col + width <= cols;
  }
  // out [n][NV vectors] (+)= the gates of n rows of d times those columns of w, `packed` if they are.
  template <int NV>
  void Product(const int* gates, int count, int64_t row, int64_t n, const void* w, int64_t cols,
               int64_t col, const T* packed, T* out, int64_t stride, bool accumulate) const {
    constexpr int kWidth = NV * N;
    const bool in_place = unpacked && col + kWidth <= cols;
    const T* right = in_place ? static_cast<const T*>(w) + col : packed;
    const int64_t ldw = in_place ? cols : kWidth;
    for (int q = 0; q < count; q++) {
      const T* left = Gate(gates[q], row);
      if (once)
        GemmColumns<V, NV>(n, left, d_stride, At(w, p.storage, q * p.H * cols), p.storage, p.H,
                           cols, col, out, stride, q > 0 || accumulate);
      else
        GemmRows<V, NV>(n, left, d_stride, right + q * p.H * ldw, ldw, p.H, out, stride,
                        q > 0 || accumulate);
    }
  }
  // W_hr's columns of the own units: f(first vector, number of them, where they are packed).
  template <class F>
  void ForUnits(const Own& my, const F& f) const {
    const int64_t begin = my.mine.begin * kPanelVecs, end = my.mine.end * kPanelVecs;
    ForColumnTiles<V>(begin, end,
                      [&](int64_t v, auto nv) { f(v, nv, my.w_hr + (v - begin) * N * p.Hout); });
  }
  const T* Gate(int q, int64_t row) const { return d + row * d_stride + q * gate_stride; }

  void Direction(Team& team, Own& my);
  void PackTiles(Team& team, Own& my);
  void PackVectors(Own& my) const;
  void PackProjection(Own& my) const;
  void Start(Own& my) const;
  Step StepAt(Own& my, int64_t number) const;
  void Unproject(Team& team, Own& my, const Step& step) const;
  struct View;
  Magnitude GateGrads(Own& my, const Step& step) const;
  void ShareGrads(Team& team, Own& my, const Step& step, const Magnitude& largest);
  void RecurrentGrad(Own& my, const Step& step) const;
  void StoreGrads(Own& my) const;
  void InputGrad(Team& team, Own& my);
  bool PackInputTiles(Team& team, Own& my);
  void PackInputVectors(Team& team, Own& my);
  void InputRowsOnTiles(Own& my, int64_t r0, int64_t n, const Team::Range& tiles) const;
  void InputRows(Own& my, int64_t r0, int64_t n, const Team::Range& tiles) const;
  void WeightGrads(Team& team, Own& my);
};

template <class C, class V>
Layer<C, V>::BackwardPass::BackwardPass(const LayerGradParams& p, int threads)
    : p(p), threads(threads) {
  const int64_t widest = p.I > p.H ? p.I : p.H;  // of the right operands: x, h, h_full
  const auto take_tiles = [&](Scratch& s, int64_t rows, int64_t K, parts::Cut cut) {
    return TakeTiles(s, tiled, rows, K, cut);
  };
  scratch.Build([&](Scratch& s) {
    for (Own& my : own) {
      if (!tiled) my.w_hh = TakeHh(s);
      my.w_hr = s.Take<T>(projected ? p.Hout * own_panels * kUnits : 0);
      my.dc = s.Take<T>(own_panels * p.B * kExtra * kUnits);
      my.dy = s.Take<T>(stage_dy ? p.B * own_columns : 0);
      my.db = s.Take<T>(own_panels * C::kD * kUnits);
      my.params = s.Take<T>(own_panels * C::kParams * kUnits);
      my.dparams = s.Take<T>(own_panels * C::kParams * kUnits);
      my.dx = s.Take<T>(p.dx ? x_rows * kTileVecs<V> * N : 0);
      my.pack_a = s.Take<T>(WeightGrad<V>::PackASize(p.rows));
      my.w_hh_tiles = take_tiles(s, own_columns, C::kH * padded_gate, cut);
      my.dx_tiles = take_tiles(s, p.dx ? x_rows : 0, p.H, d_cut);
      my.dx_rows = s.Take<T>(tiled && narrow && p.dx ? x_rows * p.I : 0);
      my.tiles_a = take_tiles(s, WeightGrad<V>::kTileGroup * parts::kRows, grad_depth, d_grad_cut);
      my.dw_balance.Take(s, my.tiles_a);
      for (Balance& balance : my.dx_balance) balance.Take(s, my.dx_tiles);
    }
    TakeStepTiles(s, tiled, p.B, C::kH * padded_gate, d_cut, own, &Own::d_tiles, d_largest);
    for (Own& my : own) my.d_balance.Take(s, my.d_tiles[0]);
    w_hh_sizes = s.Take<fixed::Size>(threads * own[0].d_balance.depth);
    for (fixed::Size*& sizes : w_ih_sizes)
      sizes = s.Take<fixed::Size>(threads * own[0].dx_balance[0].depth);
    d_sizes = s.Take<float>(own[0].d_balance.depth > 0 ? p.rows : 0);
    for (parts::Operand& tiles : w_ih_tiles)
      tiles = take_tiles(s, p.dx ? x_tiles.vecs * N : 0, p.H, cut);
    x_right = take_tiles(s, RoundUp(p.I, N), grad_depth, grad_cut);
    h_right = take_tiles(s, RoundUp(p.Hout, N), grad_depth, grad_cut);
    d = s.Take<T>(p.rows * d_stride);
    dh = dh_in_place ? static_cast<T*>(p.dh0) : s.Take<T>(p.B * h_stride);
    dh_seq = s.Take<T>(projected ? p.rows * h_stride : 0);
    dh_full = s.Take<T>(projected ? p.B * full_stride : 0);
    if (!tiled) w_ih = TakeIh(s);
    pack_b = s.Take<T>(WeightGrad<V>::PackBSize(p.rows, widest));
    sum_ih = s.Take<T>(narrow ? C::kX * p.H * p.I : 0);
    sum_hh = s.Take<T>(narrow ? C::kH * p.H * p.Hout : 0);  // and W_hr's
    dx_sum = s.Take<T>(narrow && p.dx && p.dirs == 2 ? p.rows * p.I : 0);
  });
}

template <class C, class V>
void Layer<C, V>::BackwardPass::Run(Team& team) {
  Own& my = own[team.id];
  my.Take(p, team);
  const parts::Session session(tiled);
  for (my.dir = 0; my.dir < p.dirs; my.dir++) Direction(team, my);
}

template <class C, class V>
void Layer<C, V>::BackwardPass::Direction(Team& team, Own& my) {
  my.w = &p.w[my.dir];
  my.dw = &p.dw[my.dir];
  const int64_t rows_of_hs = p.hs ? p.B + p.rows : p.B;
  my.hs = static_cast<const T*>(p.hs ? p.hs : p.h0) + my.dir * rows_of_hs * hs_stride;
  my.new_h = p.hs ? my.hs + p.B * hs_stride
                  : static_cast<const T*>(p.h_n) + my.dir * rows_of_hs * hs_stride;
  my.packed = false;
  if (tiled) PackTiles(team, my);
  if (projected) PackProjection(my);
  Start(my);

  for (int64_t number = 0; number < p.T; number++) {
    const Step step = StepAt(my, number);
    if (projected) Unproject(team, my, step);
    const Magnitude largest = GateGrads(my, step);
    if (tiled) ShareGrads(team, my, step, largest);
    if (C::kH == 0) continue;
    team.Sync();
    RecurrentGrad(my, step);
  }
  team.Sync();

  StoreGrads(my);
  if (p.dx) InputGrad(team, my);
  WeightGrads(team, my);
  team.Sync();
}

// ---- once per direction ----

// W_hh as the right operand of dh = d W_hh: per gate [H][own columns].
template <class C, class V>
void Layer<C, V>::BackwardPass::PackVectors(Own& my) const {
  if (my.packed || once) return;
  if (tiled && my.w_hh == nullptr) my.spare.Build([&](Scratch& s) { my.w_hh = TakeHh(s); });
  ForColumnTiles<V>(my.first / N, my.last / N, [&](int64_t v, auto nv) {
    constexpr int kWidth = decltype(nv)::value * N;
    if (v * N < p.Hout && !ReadInPlace(p.Hout, v * N, kWidth))
      PackColumns<kWidth>(my.w->w_hh, p.storage, C::kH * p.H, p.Hout, v * N,
                          my.w_hh + (v * N - my.first) * C::kH * p.H);
  });
  my.packed = true;
}

// The same as tiles, with what balances them. Misfits are noted in fit_w_hh.
template <class C, class V>
void Layer<C, V>::BackwardPass::PackTiles(Team& team, Own& my) {
  if constexpr (kTiles) {
    const auto gate = [&](int q) { return At(my.w->w_hh, p.storage, q * p.H * p.Hout + my.first); };
    const bool measured = cut == parts::Cut::kFixed;
    for (int q = 0; q < C::kH && measured; q++)
      fixed::MeasureRows(static_cast<const float*>(gate(q)), p.Hout, p.H, 0, my.valid,
                         w_hh_sizes + team.id * my.d_balance.depth + q * padded_gate);
    if (measured) team.Sync();
    my.d_balance.Find(w_hh_sizes, team.size, C::kH, p.H, {&my.d_tiles[0], &my.d_tiles[1]},
                      {&my.w_hh_tiles});
    if (my.valid <= 0) return;
    for (int q = 0; q < C::kH && measured; q++)
      fixed::Measure(static_cast<const float*>(gate(q)), p.Hout, parts::Order::kAcross, my.valid, 0,
                     p.H, my.w_hh_tiles.Depth(q * gate_depth).factors, my.w_hh_tiles.largest,
                     q > 0);
    for (int q = 0; q < C::kH; q++)
      if (!parts::PackRight(gate(q), p.storage, p.Hout, parts::Order::kAcross, my.valid, p.H,
                            my.w_hh_tiles.Depth(q * gate_depth), measured))
        fit_w_hh.store(false, std::memory_order_relaxed);
  }
}

template <class C, class V>
void Layer<C, V>::BackwardPass::PackProjection(Own& my) const {
  ForUnits(my, [&](int64_t v, auto nv, T* packed) {
    if (v * N < p.H)
      PackColumns<decltype(nv)::value * N>(my.w->w_hr, p.storage, p.Hout, p.H, v * N, packed);
  });
}

// The parameters [number][unit] of the own panels; their gradients and db = 0; dc and dh from what
// comes after the last step.
template <class C, class V>
void Layer<C, V>::BackwardPass::Start(Own& my) const {
  const int64_t count = my.mine.end - my.mine.begin;
  for (int64_t i = 0; i < count * C::kD * kUnits; i++) my.db[i] = 0;
  for (int64_t i = 0; i < count * C::kParams * kUnits; i++) my.dparams[i] = 0;
  for (int64_t at = 0; at < count; at++)
    for (int k = 0; k < C::kParams; k++) {
      const int64_t unit = (my.mine.begin + at) * kUnits;
      LoadPadded<kUnits>(At(my.w->params[k], p.storage, unit), p.storage, p.H - unit,
                         my.params + (at * C::kParams + k) * kUnits);
    }
  for (int64_t i = my.mine.begin; i < my.mine.end; i++)
    for (int64_t r = 0; r < p.B * kExtra; r++) {
      const int64_t unit = i * kUnits;
      const int64_t at = (my.dir * p.B * kExtra + r) * p.H + unit;
      LoadPadded<kUnits>(p.dc_n ? At(p.dc_n, p.storage, at) : nullptr, p.storage,
                         p.dc_n ? p.H - unit : 0,
                         my.dc + ((i - my.mine.begin) * p.B * kExtra + r) * kUnits);
    }
  CopyState(p, p.dh_n, my.dir, my.first, my.last, dh, h_stride);
}

// ---- per step ----

template <class C, class V>
auto Layer<C, V>::BackwardPass::StepAt(Own& my, int64_t number) const -> Step {
  const int64_t t = my.dir == 0 ? p.T - 1 - number : number;
  Step step{number, t, p.batch_sizes[t], p.offsets[t], nullptr, 0};
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
      LoadRow<T>(source(b), p.storage, my.dy + b * own_columns, my.valid);
    step.dy = my.dy;
    step.dy_stride = own_columns;
  }
  return step;
}

// dh_full = (dh + dy) W_hr for the own units; dh_seq keeps the left side for dW_hr.
template <class C, class V>
void Layer<C, V>::BackwardPass::Unproject(Team& team, Own& my, const Step& step) const {
  for (int64_t b = 0; b < step.n; b++) {
    T* out = dh_seq + (step.row + b) * h_stride + my.first;
    const T* in = dh + b * h_stride + my.first;
    for (int64_t u = 0; u < my.valid; u++)
      out[u] = in[u] + (step.dy ? step.dy[b * step.dy_stride + u] : T(0));
  }
  team.Sync();
  ForUnits(my, [&](int64_t v, auto nv, const T* packed) {
    constexpr int NV = decltype(nv)::value;
    GemmRows<V, NV>(step.n, dh_seq + step.row * h_stride, h_stride, packed, NV * N, p.Hout,
                    dh_full + v * N, full_stride, false);
  });
}

// The operands of one vector of units in the rows of a step, as core/step.h asks for them. What is
// summed over rows stays here until StoreSums.
template <class C, class V>
struct Layer<C, V>::BackwardPass::View {
  const BackwardPass& pass;
  const Own& my;
  const Step& step;
  int64_t unit;  // its first one
  int lanes;     // of them below H
  const T* tape;
  T *d, *dc, *db, *dparams;
  const T* params;
  int64_t row = 0;
  V bias[C::kD], dparam[C::kParams > 0 ? C::kParams : 1];
  Magnitude largest;

  FRNN_INLINE View(const BackwardPass& pass, const Own& my, const Step& step, int64_t panel,
                   int vec, const Magnitude& largest)
      : pass(pass),
        my(my),
        step(step),
        unit(panel * kUnits + vec * N),
        lanes(UnitsFrom(pass.p, unit)),
        tape(TapeOf(pass.p, my.dir, step.t, panel) + vec * N),
        d(pass.d + step.row * pass.d_stride + unit),
        largest(largest) {
    const int64_t at = panel - my.mine.begin;
    dc = my.dc + at * pass.p.B * kExtra * kUnits + vec * N;
    db = my.db + at * C::kD * kUnits + vec * N;
    params = my.params + at * C::kParams * kUnits + vec * N;
    dparams = my.dparams + at * C::kParams * kUnits + vec * N;
    FRNN_UNROLL
    for (int q = 0; q < C::kD; q++) bias[q] = V{};
    FRNN_UNROLL
    for (int k = 0; k < C::kParams; k++) dparam[k] = V{};
  }
  FRNN_INLINE V Kept(int k) const { return load<V>(tape + (row * kTape + k) * kUnits); }
  FRNN_INLINE V KeptExtra(int e) const { return Kept(Tape<C>::OfExtra(e)); }
  FRNN_INLINE V Param(int k) const { return load<V>(params + k * kUnits); }
  FRNN_INLINE V H() const {
    return load<V>(my.hs + PreviousRow(pass.p, my.dir, step.t, row) * pass.hs_stride + unit);
  }
  FRNN_INLINE V NewH() const {
    return load<V>(my.new_h + (step.row + row) * pass.hs_stride + unit);
  }
  FRNN_INLINE V GradH() const {
    return load<V>(pass.projected ? pass.dh_full + row * pass.full_stride + unit : OfGradH());
  }
  FRNN_INLINE V GradExtra(int e) const { return load<V>(dc + (row * kExtra + e) * kUnits); }
  // With a projection it is in GradH already.
  FRNN_INLINE void AddGradOutput(V& to) const {
    if (step.dy && !pass.projected)
      to += load_n<V>(step.dy + row * step.dy_stride + unit - my.first, lanes);
  }
  FRNN_INLINE void SetGate(int i, const V& g) {
    store<V>(d + row * pass.d_stride + i * pass.gate_stride, g);
    bias[i] += g;
    if constexpr (kTiles) {
      const auto magnitude = bit_cast<Magnitude>(g) & 0x7fffffff;
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
    for (int q = 0; q < C::kD; q++) store<V>(db + q * kUnits, load<V>(db + q * kUnits) + bias[q]);
    FRNN_UNROLL
    for (int k = 0; k < C::kParams; k++)
      store<V>(dparams + k * kUnits, load<V>(dparams + k * kUnits) + dparam[k]);
  }

 private:
  FRNN_INLINE T* OfGradH() const { return pass.dh + row * pass.h_stride + unit; }
};

// d of the own units, from dh, dc and what the forward saved; dc and the elementwise path of dh are
// replaced by those of the step before. The largest |d|, as bits.
template <class C, class V>
auto Layer<C, V>::BackwardPass::GateGrads(Own& my, const Step& step) const -> Magnitude {
  Magnitude largest{};
  for (int64_t panel = my.mine.begin; panel < my.mine.end; panel++) {
    FRNN_UNROLL
    for (int vec = 0; vec < kPanelVecs; vec++) {
      View view(*this, my, step, panel, vec, largest);
      for (; view.row < step.n; view.row++) {
        BackwardStep<C, V> unit;
        unit.Load(view);
        unit.Compute();
        unit.Store(view);
      }
      view.StoreSums();
      largest = view.largest;
    }
  }
  return largest;
}

// d of the own units as tiles, for the whole team.
template <class C, class V>
void Layer<C, V>::BackwardPass::ShareGrads(Team& team, Own& my, const Step& step,
                                           const Magnitude& largest) {
  if constexpr (kTiles) {
    const int64_t parity = step.number & 1;
    const parts::Operand& to = my.d_tiles[parity];
    const int64_t begin = my.mine.begin * kUnits, end = my.mine.end * kUnits;
    const bool measured = ShareLargest(team, to, d_largest[parity], step.n, [&](float* largest) {
      for (int q = 0; q < C::kH; q++)
        fixed::Measure(Gate(C::kDh[q], step.row), d_stride, parts::Order::kAlong, step.n, begin,
                       end < p.H ? end : p.H, to.Depth(q * gate_depth).factors, largest, q > 0);
    });
    if (measured && team.id == 0) memcpy(d_sizes + step.row, to.largest, step.n * sizeof(float));
    for (int q = 0; q < C::kH; q++)
      parts::PackRows(Gate(C::kDh[q], step.row), kOwn, d_stride, step.n, begin,
                      team.id + 1 == team.size ? padded_gate : end, p.H, to.Depth(q * gate_depth),
                      measured);
    if (!Below(largest, parts::kLargest)) {
      misfit_d[parity].store(my.dir * p.T + step.number, std::memory_order_relaxed);
      fit_d.store(false, std::memory_order_relaxed);
    }
  }
}

// dh += d W_hh for the own columns (with a projection dh has no elementwise path, and is replaced).
template <class C, class V>
void Layer<C, V>::BackwardPass::RecurrentGrad(Own& my, const Step& step) const {
  const bool go_on = step.number + 1 < p.T || p.dh0;
  const bool tiles =
      tiled && fit_w_hh.load(std::memory_order_relaxed) &&
      misfit_d[step.number & 1].load(std::memory_order_relaxed) != my.dir * p.T + step.number;
  if (!tiles) PackVectors(my);
  if (!go_on || my.valid <= 0) return;
  if constexpr (kTiles)
    if (tiles) {
      parts::Multiply(my.d_tiles[step.number & 1], step.n, my.w_hh_tiles, my.valid, dh + my.first,
                      h_stride, !projected, step.number % 2);
      return;
    }
  ForColumnTiles<V>(my.first / N, my.last / N, [&](int64_t v, auto nv) {
    constexpr int NV = decltype(nv)::value;
    if (v * N >= p.Hout) return;
    Product<NV>(C::kDh, C::kH, step.row, step.n, my.w->w_hh, p.Hout, v * N,
                my.w_hh + (v * N - my.first) * C::kH * p.H, dh + v * N, h_stride, !projected);
  });
}

// ---- of the whole sequence ----

// dh0, dc0 and the gradients of biases and parameters, the own parts.
template <class C, class V>
void Layer<C, V>::BackwardPass::StoreGrads(Own& my) const {
  for (int64_t b = 0; b < p.B && p.dh0 && my.valid > 0 && !dh_in_place; b++)
    StoreRow<T>(At(p.dh0, p.storage, (my.dir * p.B + b) * p.Hout + my.first), p.storage,
                dh + b * h_stride + my.first, my.valid);
  for (int64_t i = my.mine.begin; i < my.mine.end; i++) {
    const int64_t unit = i * kUnits, n = p.H - unit < kUnits ? p.H - unit : kUnits;
    const T* db = my.db + (i - my.mine.begin) * C::kD * kUnits;
    for (int q = 0; q < C::kX && my.dw->b_ih; q++)
      StoreRow<T>(At(my.dw->b_ih, p.storage, q * p.H + unit), p.storage, db + C::kDx[q] * kUnits,
                  n);
    for (int q = 0; q < C::kH && my.dw->b_hh; q++)
      StoreRow<T>(At(my.dw->b_hh, p.storage, q * p.H + unit), p.storage, db + C::kDh[q] * kUnits,
                  n);
    for (int k = 0; k < C::kParams; k++)
      if (my.dw->params[k])
        StoreRow<T>(At(my.dw->params[k], p.storage, unit), p.storage,
                    my.dparams + ((i - my.mine.begin) * C::kParams + k) * kUnits, n);
    for (int64_t r = 0; r < p.B * kExtra && p.dc0; r++)
      StoreRow<T>(At(p.dc0, p.storage, (my.dir * p.B * kExtra + r) * p.H + unit), p.storage,
                  my.dc + ((i - my.mine.begin) * p.B * kExtra + r) * kUnits, n);
  }
}

// dX = d W_ih, to which the second direction adds. Rows are split over the team, which shares the packed
// weights; where there are few, columns are.
template <class C, class V>
void Layer<C, V>::BackwardPass::InputGrad(Team& team, Own& my) {
  const bool by_columns = p.rows <= x_rows;
  const bool on_tiles = PackInputTiles(team, my);
  if (!on_tiles && !once) {
    PackInputVectors(team, my);
    if (!by_columns) team.Sync();
  }
  const auto rows = by_columns ? Team::Range{0, p.rows} : team.Split(p.rows, x_rows);
  const auto tiles = by_columns ? team.Split(x_tiles.count) : Team::Range{0, x_tiles.count};
  for (int64_t r0 = rows.begin; r0 < rows.end; r0 += x_rows) {
    const int64_t n = rows.end - r0 < x_rows ? rows.end - r0 : x_rows;
    if (on_tiles)
      InputRowsOnTiles(my, r0, n, tiles);
    else
      InputRows(my, r0, n, tiles);
  }
}

// W_ih as the team's right operands of dX. False if W_ih or any d is out of the range of tiles.
template <class C, class V>
bool Layer<C, V>::BackwardPass::PackInputTiles(Team& team, Own& my) {
  if constexpr (kTiles)
    if (tiled && fit_d.load(std::memory_order_relaxed)) {
      const auto my_tiles = team.Split(x_tiles.count);
      const int64_t first = x_tiles.First(my_tiles.begin) * N,
                    end = x_tiles.First(my_tiles.end) * N;
      std::copy(w_ih_tiles, w_ih_tiles + C::kX, my.w_ih_right);
      for (int q = 0; q < C::kX && cut == parts::Cut::kFixed; q++)
        fixed::MeasureRows(static_cast<const float*>(my.w->w_ih) + q * p.H * p.I, p.I, p.H, first,
                           end < p.I ? end : p.I, w_ih_sizes[q] + team.id * my.dx_balance[q].depth);
      if (cut == parts::Cut::kFixed) team.Sync();
      for (int q = 0; q < C::kX; q++)
        my.dx_balance[q].Find(w_ih_sizes[q], team.size, 1, p.H, {}, {&my.w_ih_right[q]});
      x_tiles.For(my_tiles.begin, my_tiles.end, [&](int64_t v, auto nv) {
        const int64_t col = v * N, left = p.I - col, width = decltype(nv)::value * N;
        for (int q = 0; q < C::kX; q++)
          if (!parts::PackRight(At(my.w->w_ih, p.storage, q * p.H * p.I + col), p.storage, p.I,
                                parts::Order::kAcross, left < width ? left : width, p.H,
                                my.w_ih_right[q].Row(col)))
            fit_w_ih.store(false, std::memory_order_relaxed);
      });
      team.Sync();
      return fit_w_ih.load(std::memory_order_relaxed);
    }
  return false;
}

template <class C, class V>
void Layer<C, V>::BackwardPass::PackInputVectors(Team& team, Own& my) {
  if (tiled) {
    if (team.id == 0 && w_ih == nullptr) spare_w_ih.Build([&](Scratch& s) { w_ih = TakeIh(s); });
    team.Sync();
  }
  const auto my_tiles = team.Split(x_tiles.count);
  x_tiles.For(my_tiles.begin, my_tiles.end, [&](int64_t v, auto nv) {
    constexpr int kWidth = decltype(nv)::value * N;
    if (!ReadInPlace(p.I, v * N, kWidth))
      PackColumns<kWidth>(my.w->w_ih, p.storage, C::kX * p.H, p.I, v * N,
                          w_ih + v * N * C::kX * p.H);
  });
}

// n rows of dX from r0 on, some tiles of columns.
template <class C, class V>
void Layer<C, V>::BackwardPass::InputRowsOnTiles(Own& my, int64_t r0, int64_t n,
                                                 const Team::Range& tiles) const {
  const int64_t col = x_tiles.First(tiles.begin) * N, end = x_tiles.First(tiles.end) * N;
  const int64_t width = (p.I < end ? p.I : end) - col;
  if (width <= 0) return;
  T* out = narrow ? my.dx_rows : static_cast<T*>(p.dx) + r0 * p.I;
  if constexpr (kTiles)
    for (int q = 0; q < C::kX; q++) {
      my.dx_tiles.factors = my.dx_balance[q].factors;
      parts::PackRows(Gate(C::kDx[q], r0), kOwn, d_stride, n, 0, padded_gate, p.H, my.dx_tiles);
      parts::Multiply(my.dx_tiles, n, my.w_ih_right[q].Row(col), width, out + col, p.I,
                      q > 0 || (my.dir == 1 && !narrow));
    }
  for (int64_t r = 0; r < n && narrow; r++) {
    T *row = out + r * p.I + col, *total = dx_sum + (r0 + r) * p.I + col;
    for (int64_t i = 0; i < width && my.dir == 1; i++) row[i] += total[i];
    if (my.dir + 1 < p.dirs)
      memcpy(total, row, width * sizeof(T));
    else
      StoreRow<T>(At(p.dx, p.storage, (r0 + r) * p.I + col), p.storage, row, width);
  }
}

template <class C, class V>
void Layer<C, V>::BackwardPass::InputRows(Own& my, int64_t r0, int64_t n,
                                          const Team::Range& tiles) const {
  x_tiles.For(tiles.begin, tiles.end, [&](int64_t v, auto nv) {
    constexpr int NV = decltype(nv)::value, kWidth = NV * N;
    const int64_t col = v * N, width = p.I - col < kWidth ? p.I - col : kWidth;
    const bool in_place = !narrow && my.dir == 0 && width == kWidth;
    Product<NV>(C::kDx, C::kX, r0, n, my.w->w_ih, p.I, col, w_ih + col * C::kX * p.H,
                in_place ? static_cast<T*>(p.dx) + r0 * p.I + col : my.dx, in_place ? p.I : kWidth,
                false);
    if (in_place) return;
    for (int64_t r = 0; r < n; r++) {
      T* out = my.dx + r * kWidth;
      const int64_t at = (r0 + r) * p.I + col;
      const T* total = narrow ? dx_sum : static_cast<T*>(p.dx);
      if (my.dir == 1)
        for (int64_t i = 0; i < width; i++) out[i] += total[at + i];
      if (narrow && my.dir + 1 < p.dirs)
        memcpy(dx_sum + at, out, width * sizeof(T));
      else
        StoreRow<T>(At(p.dx, p.storage, at), p.storage, out, width);
    }
  });
}

// dW_ih = d^T x, dW_hh = d^T h_{t-1}, dW_hr = (dh + dy)^T h_full.
template <class C, class V>
void Layer<C, V>::BackwardPass::WeightGrads(Team& team, Own& my) {
  WeightGrad<V> x_grad;
  x_grad.gates = C::kX;
  x_grad.H = p.H;
  x_grad.column = C::kDx;
  x_grad.gate_stride = gate_stride;
  x_grad.d = d;
  x_grad.d_stride = d_stride;
  x_grad.rows = p.rows;
  x_grad.cols = p.I;
  x_grad.pack_a = my.pack_a;
  x_grad.pack_b = pack_b;
  x_grad.tiles_a = my.tiles_a;
  x_grad.tiles_b = x_right;
  x_grad.sizes = d_sizes;
  x_grad.factors = my.dw_balance.factors;
  x_grad.inverse = my.dw_balance.inverse;
  x_grad.misfit = &misfit_block[0];
  x_grad.number = my.dir * p.rows;
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
  WeightGrad<V> h_grad = x_grad;
  h_grad.gates = C::kH;
  h_grad.column = C::kDh;
  h_grad.cols = p.Hout;
  h_grad.tiles_b = h_right;
  h_grad.misfit = &misfit_block[1];
  h_grad.sum = sum_hh;
  h_grad.dw = my.dw->w_hh;
  const auto load_h = [&](int64_t r0, int64_t n, int64_t col, auto nv, T* dst) {
    constexpr int kWidth = decltype(nv)::value * N;
    RowCursor cursor(p, r0);
    for (int64_t r = 0; r < n; r++, cursor.Next())
      LoadPadded<kWidth>(my.hs + PreviousRow(p, my.dir, cursor.t, cursor.b) * hs_stride + col, kOwn,
                         p.Hout - col, dst + r * kWidth);
  };
  if (tiled && fit_d.load(std::memory_order_relaxed)) {
    WeightGrad<V>::RunTiles(team, C::kD, x_grad, load_x, h_grad, load_h);
  } else {
    x_grad.Run(team, load_x);
    if (C::kH > 0) h_grad.Run(team, load_h);
  }
  if (projected) {
    WeightGrad<V> projection_grad = h_grad;
    projection_grad.gates = 1;
    projection_grad.H = p.Hout;
    projection_grad.column = kIdentity;
    projection_grad.d = dh_seq;
    projection_grad.d_stride = h_stride;
    projection_grad.cols = p.H;
    projection_grad.dw = my.dw->w_hr;
    projection_grad.Run(team, [&](int64_t r0, int64_t n, int64_t col, auto nv, T* dst) {
      constexpr int kWidth = decltype(nv)::value * N;
      for (int64_t r = 0; r < n; r++)
        LoadPadded<kWidth>(my.hs + (p.B + r0 + r) * hs_stride + h_stride + col, kOwn, p.H - col,
                           dst + r * kWidth);
    });
  }
}

FRNN_END
