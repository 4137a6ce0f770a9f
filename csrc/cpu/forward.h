// The forward of cpu/layer.h.
//
// Per chunk of time steps: gates_x = x W_ih^T for the thread's own units (no barrier), then per step
// gates_h = h W_hh^T, gate math, one barrier (two more around the product of a projection).
// Few rows in all (a decoding step) are not worth packing weights for: they read W as it lies.
#pragma once
#include "cpu/layer.h"

FRNN_BEGIN

// One call. What the threads share are its members, what each has is Own.
template <class C, class V>
class Layer<C, V>::ForwardPass {
 public:
  ForwardPass(const LayerParams& p, int threads);
  void Run(Team& team);

 private:
  static constexpr int kXVecs =
      C::kX * kPanelVecs;  // vectors of a tile of gates_x: [gate][panel vector]
  static constexpr int kHVecs = C::kH * kPanelVecs;
  static constexpr int64_t kChunkRows = 128;   // rows of gates_x computed ahead
  static constexpr int64_t kTiledChunk = 512;  // longer: W_ih and W_hh evict each other
  static constexpr int64_t kTiledInput = 128;  // rows of x that are packed at a time
  static constexpr int64_t kRowBlock = 64;     // rows of gates_h that wait for the gate math
  // Panels of one product on tiles: an even number of tiles wide.
  static constexpr int kTiledGroup = kXVecs % 2 || kHVecs % 2 ? 2 : 1;

  // How a product with W is done. Packing W is one pass over it and makes its rows columns, so that the
  // product needs no sums over lanes (kPacked). So few rows, in all or of a step, do not repay that (some
  // Hout / 8 steps of one row do); long rows of W have fewer such sums, and in vectors of a whole line
  // they stream as fast as panels do (kDots). Where the other side has fewer rows than W, those are made
  // columns instead, and W is read as it lies (kTurned).
  enum class Way { kPacked, kDots, kTurned };
  static Way WayOfX(const LayerParams& p, int threads) {
    if (p.storage != kOwn) return Way::kPacked;
    if (p.rows <= (p.I >= 256 ? 16 : 12)) return Way::kDots;
    return Turns(p, threads, C::kX) ? Way::kTurned : Way::kPacked;
  }
  static Way WayOfH(const LayerParams& p, int threads) {
    if (p.storage != kOwn) return Way::kPacked;
    if (p.rows <= 16) return Way::kDots;
    if (Turns(p, threads, C::kH)) return Way::kTurned;
    if (p.Hout % N != 0) return Way::kPacked;
    const bool dots = p.B == 1 ? p.T <= p.Hout / 8 || (sizeof(V) == 64 && p.Hout >= 512)
                               : p.B == 2 && p.T <= 32 && p.Hout >= 512;
    return dots ? Way::kDots : Way::kPacked;
  }
  // Of one step: the rows that each thread turns are fewer than those of W that it would pack, and fill
  // vectors, more or less.
  static bool Turns(const LayerParams& p, int threads, int gates) {
    return p.T == 1 && !Projected(p) && !Tiled(p) && 2 * p.B * threads <= gates * p.H &&
           RoundUp(p.B, N) - p.B <= N / 2;
  }
  // Rows that are turned together: [k][row].
  static constexpr int kTurnedVecs = 2;
  static constexpr int64_t kTurned = kTurnedVecs * N;

  const LayerParams& p;
  const int threads;
  const bool projected = Projected(p), tiled = Tiled(p);
  const Way x_way = WayOfX(p, threads), h_way = WayOfH(p, threads);
  const Input input{p};
  const int64_t panels = Panels(p), own_panels = (panels + threads - 1) / threads;
  const int64_t own_vecs = (HoutVecs(p) + threads - 1) / threads;
  // gates_x of a thread is [groups of panels][rows][panel of the group][gate][unit].
  const int64_t group = tiled ? kTiledGroup : 1, own_groups = (own_panels + group - 1) / group;
  const int64_t gates_x_stride = group * C::kX * kUnits, gates_h_stride = group * C::kH * kUnits;
  const int64_t chunk_rows = tiled ? kTiledChunk : kChunkRows;
  const int64_t capacity =
      p.rows < chunk_rows ? p.rows : (p.B > chunk_rows ? p.B : chunk_rows);  // rows of gates_x
  // One chunk needs each panel of W_ih once: it is packed just before, and never leaves the cache.
  const bool one_chunk = !tiled && p.rows <= capacity;
  const int64_t x_stride = RowStride(p.I), h_stride = RowStride(p.Hout),
                full_stride = RowStride(p.H), hs_stride = HsStride(p.H, p.Hout);
  // While every step has all rows, hs itself is where h goes; a ragged batch needs the h of
  // finished rows beside it.
  const bool in_place = p.hs != nullptr && !p.ragged;
  const bool direct_y = p.storage == kOwn && !projected;
  // One step reads h0 and writes h_n in place: nobody waits for what another thread writes.
  const bool in_one =
      p.T == 1 && p.h0 != nullptr && p.hs == nullptr && direct_y && !tiled && p.Hout % kUnits == 0;

  // A thread's memory, its part of the layer, and the direction it is at.
  struct Own : Part {
    T *w_ih, *w_hh;  // packed, or the other side turned
    T *b_ih, *b_hh, *w_hr, *params, *gates_x, *gates_h, *c, *x;
    parts::Operand w_ih_tiles, w_hh_tiles, x_tiles;
    parts::Operand h_tiles[2];  // h before a step
    Balance x_balance, h_balance;
    Scratch spare;  // the weights as vectors, where tiles do not fit

    int64_t count, groups;  // of the panels

    int dir;
    const DirectionWeights* w;
    T* hs;
    bool packed;  // w_ih and w_hh, for vectors
    bool tiles;   // all that every step needs is in the range of tiles
  };
  std::vector<Own> own = std::vector<Own>(threads);
  float* h_largest[2];
  fixed::Size *w_ih_sizes, *w_hh_sizes;
  // Whether weights and h0 are in the range of tiles, and the last step of each parity whose h is
  // not (counted on over both directions).
  std::atomic<bool> fit{tiled};
  std::atomic<int64_t> misfit_h[2] = {{-1}, {-1}};
  T* h_buffer[2] = {nullptr, nullptr};
  T* full_buffer = nullptr;
  Scratch scratch;

  struct Chunk {
    int64_t begin, end;  // time steps
    int64_t row, rows;   // its rows, from `row` on
  };
  struct Step {
    int64_t number, t;
    int64_t n, row;  // its rows, from `row` on
    const T* h;      // h_{t-1}
    T *h_new, *full;
    int64_t ldh, ld_full;
    bool tiles;
  };
  // The operands of the gate math of one panel.
  struct StepRows {
    const T* gates_x;  // [n, kX, units], without bias, rows gates_x_stride apart
    const T* gates_h;  // [n, kH, units], without bias, rows gates_h_stride apart
    int64_t gates_x_stride, gates_h_stride;
    const T* b_ih;    // [kX, units]
    const T* b_hh;    // [kH, units]
    const T* params;  // [kParams, units]
    const T* h;       // h_{t-1} of the panel, rows h_stride apart
    T* h_new;         // rows h_stride apart (h_full, rows full_stride apart, with a projection)
    int64_t h_stride, h_new_stride;
    T* c;     // [n, kExtra, units], replaced
    T* tape;  // [n, kTape, units] or null
    T* y;     // rows y_stride apart, or null
    int64_t y_stride;
    int64_t units;  // valid units from the panel's first one on
    Storage round;  // h is rounded to this
  };
  // The operands of one vector of units of a panel in one row, as core/step.h asks for them.
  struct View {
    const StepRows& s;
    int64_t row, gates_row;  // of the step, and of gates_h
    int vec;                 // of the panel

    FRNN_INLINE V GateX(int q) const {
      return load<V>(s.gates_x + row * s.gates_x_stride + OfGate(q)) + load<V>(s.b_ih + OfGate(q));
    }
    FRNN_INLINE V GateH(int q) const {
      return load<V>(s.gates_h + gates_row * s.gates_h_stride + OfGate(q)) +
             load<V>(s.b_hh + OfGate(q));
    }
    FRNN_INLINE V Param(int k) const { return load<V>(s.params + OfGate(k)); }
    FRNN_INLINE V H() const { return load<V>(s.h + row * s.h_stride + vec * N); }
    FRNN_INLINE V Extra(int e) const { return load<V>(OfExtra(e)); }
    FRNN_INLINE void SetH(const V& h) const {
      const V rounded = RoundToStorage(h, s.round);
      store<V>(s.h_new + row * s.h_new_stride + vec * N, rounded);
      if constexpr (kOutputExtra < 0) SetOutput(rounded);
    }
    FRNN_INLINE void SetExtra(int e, const V& c) const {
      store<V>(OfExtra(e), c);
      if (e == kOutputExtra) SetOutput(c);
    }
    FRNN_INLINE void KeepExtra(int e, const V& c) const { Keep(Tape<C>::OfExtra(e), c); }
    FRNN_INLINE void Keep(int k, const V& v) const {
      store<V>(s.tape + (row * kTape + k) * kUnits + vec * N, v);
    }

   private:
    FRNN_INLINE int OfGate(int q) const { return (q * kPanelVecs + vec) * N; }
    FRNN_INLINE T* OfExtra(int e) const { return s.c + (row * kExtra + e) * kUnits + vec * N; }
    FRNN_INLINE void SetOutput(const V& y) const {
      const int64_t left = s.units - vec * N;
      if (s.y && left > 0)
        store_n<V>(s.y + row * s.y_stride + vec * N, y, int(left < N ? left : N));
    }
  };

  void TakeWeights(Scratch& s, Own& to) const {
    const auto size = [&](Way way, int64_t K, int64_t packed) {
      return way == Way::kDots ? 0 : K * (way == Way::kTurned ? RoundUp(p.B, kTurned) : packed);
    };
    to.w_ih = s.Take<T>(size(x_way, p.I, (one_chunk ? 1 : own_panels) * C::kX * kUnits));
    to.w_hh = s.Take<T>(size(h_way, p.Hout, own_panels * C::kH * kUnits));
  }
  T* GatesX(const Own& my, int64_t own_panel) const {
    return my.gates_x + own_panel / group * capacity * gates_x_stride +
           own_panel % group * C::kX * kUnits;
  }
  T* PackedH(const Own& my, int64_t own_panel) const {
    return my.w_hh + own_panel * p.Hout * C::kH * kUnits;
  }

  void Direction(Team& team, Own& my);
  void PackTiles(Team& team, Own& my);
  void PackVectors(Own& my) const;
  void PackPanels(Own& my) const;
  void PackProjection(Own& my) const;
  void Start(Team& team, Own& my);
  Chunk Next(int dir, const Chunk& last) const;
  void InputGates(Own& my, const Chunk& chunk) const;
  Rows Stage(Own& my, const Chunk& chunk) const;
  bool InputGatesOnTiles(Own& my, const Rows& x, int64_t r, int64_t n) const;
  Step StepAt(const Own& my, int64_t number, int64_t t) const;
  StepRows RowsOf(const Own& my, const Chunk& chunk, const Step& step, int64_t at) const;
  void RecurrentGates(Own& my, const Chunk& chunk, const Step& step) const;
  void Project(Team& team, Own& my, const Step& step) const;
  bool ShareH(Team& team, Own& my, const T* h, int64_t ldh, int64_t n, int64_t number);
  void StoreOutputs(Own& my, const Step& step) const;
  void StoreExtraStates(Own& my) const;

  // w [gates * H, K] -> [k][gate][unit] for one panel.
  void PackGates(const void* w, int gates, int64_t K, int64_t panel, T* dst) const {
    for (int q = 0; q < gates; q++)
      for (int j = 0; j < kPanelVecs; j++)
        PackTransposed<V>(At(w, p.storage, q * p.H * K), p.storage, panel * kUnits + j * N, p.H, K,
                          K, dst + (q * kPanelVecs + j) * N, gates * kUnits);
  }
  // The same as right operands of tiles.
  bool PackGateTiles(const void* w, int gates, int64_t K, int64_t panel,
                     const parts::Operand& out) const {
    bool fits = true;
    for (int q = 0; q < gates; q++)
      for (int j = 0; j < kPanelVecs; j++) {
        const int64_t unit = panel * kUnits + j * N, n = p.H - unit < N ? p.H - unit : N;
        fits &= parts::PackRight(At(w, p.storage, (q * p.H + unit) * K), p.storage, K,
                                 parts::Order::kAlong, n, K, out.Row((q * kPanelVecs + j) * N));
      }
    return fits;
  }
  // The rows of a step as right operands of W, kTurned of them at a time.
  void Turn(const T* a, int64_t lda, int64_t K, T* dst) const {
    for (int64_t r = 0; r < p.B; r += N) {
      const int64_t first = r / kTurned * kTurned, vecs = (p.B - first + N - 1) / N;
      PackTransposed<V>(a, kOwn, r, p.B, K, lda, dst + first * K + (r - first),
                        (vecs < kTurnedVecs ? vecs : kTurnedVecs) * N);
    }
  }
  // f(rows, first row) for the rows of gates_h that wait for the gate math together.
  template <class F>
  static void ForGateRows(Way way, int64_t n, const F& f) {
    if (way != Way::kTurned) return ForRowBlocks<kRowBlock>(n, f);
    for (int64_t r = 0; r < n; r += kTurned) f(int(n - r < kTurned ? n - r : kTurned), r);
  }
  // gates [n][gate][unit] of one panel, rows `stride` apart, = a w^T. Packed is w for the panel, or a
  // where it is turned; `before` as in GemmRows.
  template <int kGates>
  void Product(Way way, int64_t n, const T* a, int64_t lda, const void* w, const T* packed,
               int64_t K, int64_t panel, T* gates, int64_t stride, int64_t before) const {
    if (way == Way::kPacked) {
      GemmRows<V, kGates * kPanelVecs>(n, a, lda, packed, kGates * kUnits, K, gates, stride, false,
                                       before);
      return;
    }
    if (way == Way::kTurned) {
      for (int64_t r = 0; r < n; r += kTurned)
        TurnedProduct<kGates>(n - r < kTurned ? n - r : kTurned, packed + r * K, w, K, panel,
                              gates + r * stride, stride);
      return;
    }
    for (int q = 0; q < kGates; q++)
      for (int j = 0; j < kPanelVecs; j++) {
        const int64_t unit = panel * kUnits + j * N;
        DotRows<V>(n, a, lda, static_cast<const T*>(w) + (q * p.H + unit) * K, UnitsFrom(p, unit),
                   K, gates + (q * kPanelVecs + j) * N, stride);
      }
  }
  // n <= kTurned rows: the gates come out as [unit][row], and are turned back.
  template <int kGates>
  void TurnedProduct(int64_t n, const T* turned, const void* w, int64_t K, int64_t panel, T* gates,
                     int64_t stride) const {
    alignas(kLine) T columns[kUnits * kTurned];
    const int64_t unit = panel * kUnits, units = p.H - unit < kUnits ? p.H - unit : kUnits;
    WithConstant<kTurnedVecs>(int((n + N - 1) / N), [&](auto nv) {
      constexpr int NV = decltype(nv)::value;
      for (int q = 0; q < kGates; q++) {
        GemmRows<V, NV>(units, static_cast<const T*>(w) + (q * p.H + unit) * K, K, turned, NV * N,
                        K, columns, NV * N, false);
        for (int j = 0; j < kPanelVecs; j++)
          PackTransposed<V>(columns, kOwn, j * N, units, n, NV * N,
                            gates + (q * kPanelVecs + j) * N, stride);
      }
    });
  }
  static void GateMath(const StepRows& s, int64_t first, int rows);
};

template <class C, class V>
Layer<C, V>::ForwardPass::ForwardPass(const LayerParams& p, int threads) : p(p), threads(threads) {
  const auto take_tiles = [&](Scratch& s, int64_t rows, int64_t K) {
    return TakeTiles(s, tiled, rows, K, parts::CutOf(p.storage, K));
  };
  scratch.Build([&](Scratch& s) {
    for (Own& my : own) {
      if (!tiled) TakeWeights(s, my);
      my.b_ih = s.Take<T>(own_panels * C::kX * kUnits);
      my.b_hh = s.Take<T>(own_panels * C::kH * kUnits);
      my.params = s.Take<T>(own_panels * C::kParams * kUnits);
      my.w_hr = s.Take<T>(projected ? own_vecs * N * p.H : 0);
      my.gates_x = s.Take<T>(own_groups * capacity * gates_x_stride);
      my.gates_h = s.Take<T>(kRowBlock * gates_h_stride);
      my.c = s.Take<T>(own_panels * p.B * kExtra * kUnits);
      my.x = s.Take<T>(input.direct ? 0 : capacity * x_stride);
      my.w_ih_tiles = take_tiles(s, own_panels * kXVecs * N, p.I);
      my.w_hh_tiles = take_tiles(s, own_panels * kHVecs * N, p.Hout);
      my.x_tiles = take_tiles(s, kTiledInput, p.I);
      my.x_balance.Take(s, my.x_tiles);
    }
    TakeStepTiles(s, tiled, p.B, p.Hout, parts::CutOf(p.storage, p.Hout), own, &Own::h_tiles,
                  h_largest);
    for (Own& my : own) my.h_balance.Take(s, my.h_tiles[0]);
    w_ih_sizes = s.Take<fixed::Size>(threads * own[0].x_balance.depth);
    w_hh_sizes = s.Take<fixed::Size>(threads * own[0].h_balance.depth);
    if (!in_place && !in_one)
      for (T*& buffer : h_buffer) buffer = s.Take<T>(p.B * h_stride);
    if (projected && p.hs == nullptr) full_buffer = s.Take<T>(p.B * full_stride);
  });
}

template <class C, class V>
void Layer<C, V>::ForwardPass::Run(Team& team) {
  Own& my = own[team.id];
  my.Take(p, team);
  my.count = my.mine.end - my.mine.begin;
  my.groups = (my.count + group - 1) / group;
  const parts::Session session(tiled);
  for (my.dir = 0; my.dir < p.dirs; my.dir++) Direction(team, my);
}

template <class C, class V>
void Layer<C, V>::ForwardPass::Direction(Team& team, Own& my) {
  my.w = &p.w[my.dir];
  my.hs = p.hs ? static_cast<T*>(p.hs) + my.dir * (p.B + p.rows) * hs_stride : nullptr;
  my.packed = x_way != Way::kPacked && h_way != Way::kPacked;
  if (tiled) PackTiles(team, my);
  PackPanels(my);
  if (projected) PackProjection(my);
  Start(team, my);
  if (!in_one) team.Sync();
  my.tiles = fit.load(std::memory_order_relaxed);
  if (!my.tiles) PackVectors(my);

  const int64_t start = my.dir == 0 ? 0 : p.T;
  int64_t number = 0;
  for (Chunk chunk{start, start, 0, 0}; number < p.T;) {
    chunk = Next(my.dir, chunk);
    InputGates(my, chunk);
    for (int64_t k = 0; k < chunk.end - chunk.begin; k++, number++) {
      const Step step = StepAt(my, number, my.dir == 0 ? chunk.begin + k : chunk.end - 1 - k);
      if (!step.tiles) PackVectors(my);
      RecurrentGates(my, chunk, step);
      if (projected) Project(team, my, step);
      if (tiled && number + 1 < p.T) ShareH(team, my, step.h_new, step.ldh, step.n, number + 1);
      if (my.valid > 0 && !in_one) StoreOutputs(my, step);
      if (C::kH > 0 && !in_one) team.Sync();
    }
  }
  StoreExtraStates(my);
}

// ---- once per direction ----

// The own panels of both weights, and what balances them. Misfits are noted in `fit`.
template <class C, class V>
void Layer<C, V>::ForwardPass::PackTiles(Team& team, Own& my) {
  if constexpr (kTiles) {
    const int64_t unit = my.mine.begin * kUnits, end = my.mine.end * kUnits;
    const auto measure = [&](const void* w, int gates, const Balance& balance, int64_t K,
                             fixed::Size* sizes) {
      for (int q = 0; q < gates && balance.depth > 0; q++)
        fixed::MeasureColumns(static_cast<const float*>(w) + q * p.H * K, K, K, unit,
                              end < p.H ? end : p.H, sizes + team.id * balance.depth, q > 0);
    };
    measure(my.w->w_ih, C::kX, my.x_balance, p.I, w_ih_sizes);
    measure(my.w->w_hh, C::kH, my.h_balance, p.Hout, w_hh_sizes);
    team.Sync();
    my.x_balance.Find(w_ih_sizes, team.size, 1, p.I, {&my.x_tiles}, {&my.w_ih_tiles});
    my.h_balance.Find(w_hh_sizes, team.size, 1, p.Hout, {&my.h_tiles[0], &my.h_tiles[1]},
                      {&my.w_hh_tiles});
    for (int64_t at = 0; at < my.count; at++)
      if (!(PackGateTiles(my.w->w_ih, C::kX, p.I, my.mine.begin + at,
                          my.w_ih_tiles.Row(at * kXVecs * N)) &
            PackGateTiles(my.w->w_hh, C::kH, p.Hout, my.mine.begin + at,
                          my.w_hh_tiles.Row(at * kHVecs * N))))
        fit.store(false, std::memory_order_relaxed);
  }
}

template <class C, class V>
void Layer<C, V>::ForwardPass::PackVectors(Own& my) const {
  if (my.packed) return;
  if (tiled && my.w_ih == nullptr) my.spare.Build([&](Scratch& s) { TakeWeights(s, my); });
  for (int64_t at = 0; at < my.count; at++) {
    const int64_t panel = my.mine.begin + at;
    if (x_way == Way::kPacked && !one_chunk)
      PackGates(my.w->w_ih, C::kX, p.I, panel, my.w_ih + at * p.I * C::kX * kUnits);
    if (h_way == Way::kPacked) PackGates(my.w->w_hh, C::kH, p.Hout, panel, PackedH(my, at));
  }
  my.packed = true;
}

// Biases [gate][unit], parameters [number][unit] and c_0 [row][state][unit] of the own panels.
template <class C, class V>
void Layer<C, V>::ForwardPass::PackPanels(Own& my) const {
  for (int64_t at = 0; at < my.count; at++) {
    const int64_t unit = (my.mine.begin + at) * kUnits, n = p.H - unit;
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
  }
}

template <class C, class V>
void Layer<C, V>::ForwardPass::PackProjection(Own& my) const {
  ForColumnTiles<V>(my.columns.begin, my.columns.end, [&](int64_t v, auto nv) {
    constexpr int NV = decltype(nv)::value;
    for (int j = 0; j < NV; j++)
      PackTransposed<V>(my.w->w_hr, p.storage, (v + j) * N, p.Hout, p.H, p.H,
                        my.w_hr + (v - my.columns.begin) * N * p.H + j * N, NV * N);
  });
}

// h0, its padding, and the padding that nobody writes later: the saved tensors hold no uninitialised
// value.
template <class C, class V>
void Layer<C, V>::ForwardPass::Start(Team& team, Own& my) {
  const bool is_last = team.id + 1 == team.size;
  const int64_t end = is_last ? h_stride : my.last;
  if (my.hs) CopyState(p, p.h0, my.dir, my.first, end, my.hs, hs_stride);
  if (my.hs && is_last) {
    for (int64_t r = 0; r < p.rows; r++)
      for (int64_t u = my.last; u < h_stride; u++) my.hs[(p.B + r) * hs_stride + u] = 0;
    for (int64_t r = 0; r < p.B + p.rows && projected; r++)
      for (int64_t u = r < p.B ? 0 : panels * kUnits; u < full_stride; u++)
        my.hs[r * hs_stride + h_stride + u] = 0;
    T* tape = static_cast<T*>(p.saved) + my.dir * p.rows * kTape * Padded(p.H);
    for (int64_t i = p.rows * kTape * panels * kUnits; i < p.rows * kTape * Padded(p.H); i++)
      tape[i] = 0;
  }
  if (!in_place && !in_one)
    for (T* buffer : h_buffer) CopyState(p, p.h0, my.dir, my.first, end, buffer, h_stride);
  // In both: with the reversed direction of a ragged batch, rows join later.
  for (int64_t i = 0; i < 2 && tiled; i++)
    if (!ShareH(team, my, my.hs ? my.hs : h_buffer[0], my.hs ? hs_stride : h_stride, p.B, i))
      fit.store(false, std::memory_order_relaxed);
}

// ---- per chunk ----

// The next time steps in the direction's order, as many as gates_x has room for.
template <class C, class V>
auto Layer<C, V>::ForwardPass::Next(int dir, const Chunk& last) const -> Chunk {
  int64_t begin = last.end, end = last.begin;
  if (dir == 0) {
    end = begin + 1;
    while (end < p.T && p.offsets[end + 1] - p.offsets[begin] <= capacity) end++;
  } else {
    begin = end - 1;
    while (begin > 0 && p.offsets[end] - p.offsets[begin - 1] <= capacity) begin--;
  }
  return {begin, end, p.offsets[begin], p.offsets[end] - p.offsets[begin]};
}

// gates_x of the own panels.
template <class C, class V>
void Layer<C, V>::ForwardPass::InputGates(Own& my, const Chunk& chunk) const {
  Rows x{Input::Row(p, chunk.begin, 0), p.storage, input.stride};
  if (!input.direct && !(my.tiles && input.one_stride)) x = Stage(my, chunk);
  const int64_t block = my.tiles ? kTiledInput : chunk.rows;
  for (int64_t r = 0; r < chunk.rows; r += block) {
    const int64_t n = chunk.rows - r < block ? chunk.rows - r : block;
    if (my.tiles && InputGatesOnTiles(my, x, r, n)) continue;
    if (x.storage != kOwn) x = Stage(my, chunk);
    PackVectors(my);
    const T* rows = static_cast<const T*>(x.first) + r * x.stride;
    if (x_way == Way::kTurned) Turn(rows, x.stride, p.I, my.w_ih);
    for (int64_t at = 0; at < my.count; at++) {
      T* packed = my.w_ih + (one_chunk ? 0 : at) * p.I * C::kX * kUnits;
      if (one_chunk && x_way == Way::kPacked)
        PackGates(my.w->w_ih, C::kX, p.I, my.mine.begin + at, packed);
      Product<C::kX>(x_way, n, rows, x.stride, my.w->w_ih, packed, p.I, my.mine.begin + at,
                     GatesX(my, at) + r * gates_x_stride, gates_x_stride, 0);
    }
  }
}

// The rows of a chunk in the computing type, one after another.
template <class C, class V>
auto Layer<C, V>::ForwardPass::Stage(Own& my, const Chunk& chunk) const -> Rows {
  RowCursor cursor(p, chunk.row);
  for (int64_t r = 0; r < chunk.rows; r++, cursor.Next())
    LoadRow<T>(Input::Row(p, cursor.t, cursor.b), p.storage, my.x + r * x_stride, p.I);
  return {my.x, kOwn, x_stride};
}

// False if one of the n rows from r on is out of the range of tiles.
template <class C, class V>
bool Layer<C, V>::ForwardPass::InputGatesOnTiles(Own& my, const Rows& x, int64_t r,
                                                 int64_t n) const {
  if constexpr (kTiles) {
    if (!parts::PackRows(At(x.first, x.storage, r * x.stride), x.storage, x.stride, n, 0,
                         my.x_tiles.PaddedDepth(), p.I, my.x_tiles))
      return false;
    for (int64_t g = 0; g < my.groups; g++) {
      // There and back, see parts::Multiply.
      const int64_t at = group * (r / kTiledInput % 2 ? my.groups - 1 - g : g);
      parts::Multiply(my.x_tiles, n, my.w_ih_tiles.Row(at * kXVecs * N),
                      (my.count - at < group ? my.count - at : group) * kXVecs * N,
                      GatesX(my, at) + r * gates_x_stride, gates_x_stride, false);
    }
  }
  return kTiles;
}

// ---- per step ----

template <class C, class V>
auto Layer<C, V>::ForwardPass::StepAt(const Own& my, int64_t number, int64_t t) const -> Step {
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
  s.ld_full = my.hs ? hs_stride : full_stride;
  s.full = !projected ? nullptr
           : my.hs    ? my.hs + (p.B + s.row) * hs_stride + h_stride
                      : full_buffer;
  s.tiles =
      my.tiles && misfit_h[number & 1].load(std::memory_order_relaxed) != my.dir * p.T + number;
  return s;
}

template <class C, class V>
auto Layer<C, V>::ForwardPass::RowsOf(const Own& my, const Chunk& chunk, const Step& step,
                                      int64_t at) const -> StepRows {
  const int64_t panel = my.mine.begin + at, unit = panel * kUnits;
  StepRows s;
  s.gates_x = GatesX(my, at) + (step.row - chunk.row) * gates_x_stride;
  s.gates_h = my.gates_h + at % group * C::kH * kUnits;
  s.gates_x_stride = gates_x_stride;
  s.gates_h_stride = gates_h_stride;
  s.b_ih = my.b_ih + at * C::kX * kUnits;
  s.b_hh = my.b_hh + at * C::kH * kUnits;
  s.params = my.params + at * C::kParams * kUnits;
  s.h = step.h + unit;
  s.h_stride = step.ldh;
  s.h_new = (projected ? step.full : step.h_new) + unit;
  s.h_new_stride = projected ? step.ld_full : step.ldh;
  s.c = my.c + at * p.B * kExtra * kUnits;
  s.tape = p.saved && kTape > 0 ? TapeOf(p, my.dir, step.t, panel) : nullptr;
  s.y_stride = p.dirs * p.Hout;
  s.y = direct_y && p.y != p.h_n
            ? static_cast<T*>(p.y) + step.row * s.y_stride + my.dir * p.Hout + unit
            : nullptr;
  s.units = p.H - unit;
  s.round = projected ? kOwn : p.storage;
  return s;
}

// gates_h and the gate math of the own panels, block by block, so that what the gate math stores
// drains while the next product runs.
template <class C, class V>
void Layer<C, V>::ForwardPass::RecurrentGates(Own& my, const Chunk& chunk, const Step& step) const {
  if constexpr (kTiles && C::kH > 0)
    if (step.tiles) {
      for (int64_t g = 0; g < my.groups; g++) {
        const int64_t at = group * (step.number % 2 ? my.groups - 1 - g : g);
        const int64_t panels_now = my.count - at < group ? my.count - at : group;
        for (int64_t r = 0; r < step.n; r += kRowBlock) {
          const int64_t rows = step.n - r < kRowBlock ? step.n - r : kRowBlock;
          parts::Multiply(my.h_tiles[step.number & 1].Row(r), rows,
                          my.w_hh_tiles.Row(at * kHVecs * N), panels_now * kHVecs * N, my.gates_h,
                          gates_h_stride, false);
          for (int64_t j = 0; j < panels_now; j++)
            GateMath(RowsOf(my, chunk, step, at + j), r, int(rows));
        }
      }
      return;
    }
  if (h_way == Way::kTurned) Turn(step.h, step.ldh, p.Hout, my.w_hh);
  for (int64_t at = 0; at < my.count; at++) {
    const StepRows s = RowsOf(my, chunk, step, at);
    T* gates_h = my.gates_h + at % group * C::kH * kUnits;
    ForGateRows(h_way, step.n, [&](int rows, int64_t r) {
      const T* packed = h_way == Way::kTurned ? my.w_hh + r * p.Hout : PackedH(my, at);
      if constexpr (C::kH > 0)
        Product<C::kH>(h_way, rows, step.h + r * step.ldh, step.ldh, my.w->w_hh, packed, p.Hout,
                       my.mine.begin + at, gates_h, gates_h_stride, r);
      GateMath(s, r, rows);
    });
  }
}

// h = W_hr h_full, the own columns.
template <class C, class V>
void Layer<C, V>::ForwardPass::Project(Team& team, Own& my, const Step& step) const {
  team.Sync();
  ForColumnTiles<V>(my.columns.begin, my.columns.end, [&](int64_t v, auto nv) {
    constexpr int NV = decltype(nv)::value;
    T* out = step.h_new + v * N;
    GemmRows<V, NV>(step.n, step.full, step.ld_full, my.w_hr + (v - my.columns.begin) * N * p.H,
                    NV * N, p.H, out, step.ldh, false);
    for (int64_t r = 0; r < step.n && p.storage != kOwn; r++)
      for (int j = 0; j < NV; j++) {
        T* h = out + r * step.ldh + j * N;
        store<V>(h, RoundToStorage(load<V>(h), p.storage));
      }
  });
}

// The own columns of n rows of h, as the tiles of a step. False if they are out of range.
template <class C, class V>
bool Layer<C, V>::ForwardPass::ShareH(Team& team, Own& my, const T* h, int64_t ldh, int64_t n,
                                      int64_t number) {
  if constexpr (kTiles && C::kH > 0) {
    const int64_t parity = number & 1;
    const parts::Operand& to = my.h_tiles[parity];
    const bool measured = ShareLargest(team, to, h_largest[parity], n, [&](float* largest) {
      fixed::Measure(h, ldh, parts::Order::kAlong, n, my.first, my.first + my.valid, to.factors,
                     largest, false);
    });
    const int64_t end = team.id + 1 == team.size ? to.PaddedDepth() : my.last;
    if (!parts::PackRows(h, kOwn, ldh, n, my.first, end, p.Hout, to, measured)) {
      misfit_h[parity].store(my.dir * p.T + number, std::memory_order_relaxed);
      return false;
    }
  }
  return true;
}

// The own columns of h where y, hs and h_n have them.
template <class C, class V>
void Layer<C, V>::ForwardPass::StoreOutputs(Own& my, const Step& step) const {
  // Rows from here on end with this step.
  const int64_t going_on = my.dir == 1        ? (step.t == 0 ? 0 : step.n)
                           : step.t + 1 < p.T ? p.batch_sizes[step.t + 1]
                                              : 0;
  for (int64_t r = 0; r < step.n; r++) {
    const T* h = step.h_new + r * step.ldh + my.first;
    if (!direct_y && kOutputExtra < 0)
      StoreRow<T>(At(p.y, p.storage, ((step.row + r) * p.dirs + my.dir) * p.Hout + my.first),
                  p.storage, h, my.valid);
    for (int64_t at = 0; at < my.count && !direct_y && kOutputExtra >= 0; at++) {
      const int64_t unit = (my.mine.begin + at) * kUnits;
      StoreRow<T>(At(p.y, p.storage, ((step.row + r) * p.dirs + my.dir) * p.H + unit), p.storage,
                  my.c + ((at * p.B + r) * kExtra + kOutputExtra) * kUnits,
                  p.H - unit < kUnits ? p.H - unit : kUnits);
    }
    if (my.hs && !in_place)
      memcpy(my.hs + (p.B + step.row + r) * hs_stride + my.first, h,
             (my.last - my.first) * sizeof(T));
    if (r >= going_on)
      StoreRow<T>(At(p.h_n, p.storage, (my.dir * p.B + r) * p.Hout + my.first), p.storage, h,
                  my.valid);
  }
}

// c_n and other states beside h.
template <class C, class V>
void Layer<C, V>::ForwardPass::StoreExtraStates(Own& my) const {
  for (int64_t at = 0; at < my.count; at++)
    for (int64_t r = 0; r < p.B * kExtra; r++) {
      const int64_t unit = (my.mine.begin + at) * kUnits;
      StoreRow<T>(At(p.c_n, p.storage, (my.dir * p.B * kExtra + r) * p.H + unit), p.storage,
                  my.c + (at * p.B * kExtra + r) * kUnits,
                  p.H - unit < kUnits ? p.H - unit : kUnits);
    }
}

// The pointwise part of a step, for one panel and the rows from `first` on.
template <class C, class V>
void Layer<C, V>::ForwardPass::GateMath(const StepRows& s, int64_t first, int rows) {
  for (int64_t row = first; row < first + rows; row++) {
    FRNN_UNROLL
    for (int vec = 0; vec < kPanelVecs; vec++) {
      const View view{s, row, row - first, vec};
      ForwardStep<C, V> step;
      step.Load(view);
      step.Compute();
      step.StoreStates(view);
      if (s.tape) step.StoreTape(view);
    }
  }
}

FRNN_END
