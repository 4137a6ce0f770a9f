// All steps of a cell whose update is affine, s_t = A_t s_{t-1} + b_t, in a few launches (Blelloch
// 1990, "Prefix sums and their applications"; Martin & Cundy 2018, arXiv:1709.04057). Steps are cut
// into chunks, each walked by a thread for a unit of a sequence:
//
//   ScanForwardMaps   the product of its A, and what becomes of zeros in it: all chunks side by side
//   ScanStarts        the states in which chunks start, one chunk after the other
//   ScanForward       its steps, as any engine does them: all chunks side by side
//
// The gradients of the states are affine in those of the step after, so that the backward is the same
// in the other direction of time: ScanBackwardMaps, ScanStarts, ScanBackward. How steps are cut says
// the order of all sums, so that bits do not depend on who comes first.
//
// A sequence begins and ends where it does in a ragged batch. A thread walks over steps in which its
// sequence does not run.
#pragma once
#include "cuda/kernels.cuh"

namespace frnn {
namespace cuda {

// A step of a sequence: its row, and what becomes of the states.
struct ScanRow {
  int64_t time, row;
  bool runs;
  bool starts, ends;       // it is the sequence's first, or last
  bool cut, is_cut_after;  // it starts from zeros, as does the one after it
};

// The steps [begin, end) of a direction, in chunks of `length`.
struct ScanSteps {
  int64_t H, B, T, begin, end, length;
  bool backwards;          // in time: step s is time T - 1 - s
  const int64_t* offsets;  // [T + 1] on the card, of ragged sequences: rows of time t; else null
  const uint8_t* reset;    // of rows, or null

  FRNN_HD int64_t Chunks() const { return (end - begin + length - 1) / length; }
  FRNN_HD int64_t LengthOf(int64_t chunk) const {
    const int64_t left = end - begin - chunk * length;
    return left < length ? left : length;
  }
  FRNN_HD int64_t First(int64_t time) const { return offsets ? offsets[time] : time * B; }
  FRNN_HD int64_t Batch(int64_t time) const { return offsets ? First(time + 1) - First(time) : B; }
  FRNN_HD bool RunsAt(int64_t s, int64_t b) const {
    return s >= 0 && s < T && b < Batch(backwards ? T - 1 - s : s);
  }
  FRNN_HD ScanRow operator()(int64_t s, int64_t b) const {
    ScanRow at{};
    at.time = backwards ? T - 1 - s : s;
    at.row = First(at.time) + b;
    at.runs = RunsAt(s, b);
    at.starts = !RunsAt(s - 1, b), at.ends = !RunsAt(s + 1, b);
    if (reset == nullptr || !at.runs) return at;
    // Of two times the reset of the later one is between them.
    const bool here = reset[at.row];
    at.cut = backwards ? !at.starts && reset[First(at.time + 1) + b] : here;
    at.is_cut_after = !at.ends && (backwards ? here : reset[First(at.time + 1) + b]);
    return at;
  }
};

// What chunks do to the affine states: `by` and `plus` of chunk k and sequence b in row k B + b. When
// starts are known, they take the place of `plus`.
template <class C, class A>
struct ScanMaps {
  static constexpr int n = kAffineStates<C>, kSize = n * n + n;
  Rows<A> data;  // [chunks B, kSize H]
  int64_t H;

  FRNN_HD A& At(int64_t row, int k, int64_t u) const { return data(row, k * H + u); }
  FRNN_HD void Put(int64_t row, int64_t u, const AffineMap<A, n>& map) const {
    FRNN_UNROLL
    for (int k = 0; k < n * n; k++) At(row, k, u) = map.by[k];
    PutStart(row, u, map.plus);
  }
  FRNN_HD AffineMap<A, n> Get(int64_t row, int64_t u) const {
    AffineMap<A, n> map;
    FRNN_UNROLL
    for (int k = 0; k < n * n; k++) map.by[k] = At(row, k, u);
    map.plus = Start(row, u);
    return map;
  }
  FRNN_HD void PutStart(int64_t row, int64_t u, const Pack<A, n>& s) const {
    FRNN_UNROLL
    for (int i = 0; i < n; i++) At(row, n * n + i, u) = s[i];
  }
  FRNN_HD Pack<A, n> Start(int64_t row, int64_t u) const {
    Pack<A, n> s;
    FRNN_UNROLL
    for (int i = 0; i < n; i++) s[i] = At(row, n * n + i, u);
    return s;
  }
};

// `from`: the states before the first chunk, [B, n H], or null: they do not matter, since sequences
// start in it or after it.
template <class C, class A>
__global__ void ScanStarts(int64_t chunks, int64_t B, int64_t H, Rows<const A> from,
                           ScanMaps<C, A> maps) {
  ForEach(B, H, [&](int64_t b, int64_t u) {
    constexpr int n = kAffineStates<C>;
    Pack<A, n> s{};
    FRNN_UNROLL
    for (int i = 0; i < n && from; i++) s[i] = from(b, i * H + u);
    // The last chunk has no map. What the next chunk does is loaded before it is needed.
    AffineMap<A, n> ahead{};
    if (chunks > 1) ahead = maps.Get(b, u);
    for (int64_t k = 0; k < chunks; k++) {
      const AffineMap<A, n> map = ahead;
      if (k + 2 < chunks) ahead = maps.Get((k + 1) * B + b, u);
      maps.PutStart(k * B + b, u, s);
      s = map(s);
    }
  });
}

template <class C, class T>
struct ScanForwardArgs {
  using A = Wide<T>;
  ScanSteps n;
  const A* gx;  // [.., kX H] = x W_ih^T, from row gx_row on
  int64_t gx_row;
  const T* b_ih;                // [kX H] or null
  const T* params[kMaxParams];  // [H] each
  const T* given;               // [rows, kGiven H]
  const T *h0, *c0;             // [B, H], [B, kExtra H] or null
  Rows<T> y;                    // [rows, H]
  T *h_n, *c_n;                 // [B, H], [B, kExtra H]; of every row, if `every`
  bool every;
  T* hs;    // [rows, H] or null: h before each step
  A* tape;  // [rows, tape H] or null
  ScanMaps<C, A> maps;
  Rows<A> after;  // [B, n H]: affine states after the last step
};

template <class C, class T>
struct ScanForwardView {
  using A = Wide<T>;
  const ScanForwardArgs<C, T>& a;
  const ScanRow& at;
  int64_t b, u;
  const Pack<A, C::kParams>& p;

  // Of the row, before its turn.
  FRNN_HD A GateX(int q) const {
    const int64_t H = a.n.H, place = q * H + u;
    if (q >= C::kX) return Widen(a.given[at.row * C::kGiven * H + place - C::kX * H]);
    return a.gx[(at.row - a.gx_row) * C::kX * H + place] + (a.b_ih ? Widen(a.b_ih[place]) : A(0));
  }
  FRNN_HD A GateH(int) const { return A(0); }
  FRNN_HD A Param(int k) const { return p[k]; }
  // The states come with the thread, unless they begin here.
  FRNN_HD A H() const { return A(0); }
  FRNN_HD A Extra(int) const { return A(0); }

  FRNN_HD A* Tape(int k) const {
    return a.tape + at.row * cuda::Tape<C>::kSize * a.n.H + k * a.n.H + u;
  }
  // Where a state of the last step, or of every step, goes.
  FRNN_HD int64_t Last() const { return a.every ? at.row : b; }
  FRNN_HD bool IsLast() const { return a.every || at.ends; }
  FRNN_HD void SetH(A h) const {
    const T h_new = Narrow<T>(h);
    if (States<C>::kOutputExtra < 0) a.y(at.row, u) = h_new;
    if (IsLast()) a.h_n[Last() * a.n.H + u] = h_new;
    if (C::kReadsNewH && a.tape) Keep(cuda::Tape<C>::kNewH, Widen(h_new));
  }
  FRNN_HD void SetExtra(int e, A c) const {
    if (e == States<C>::kOutputExtra) a.y(at.row, u) = Narrow<T>(c);
    if (IsLast()) a.c_n[(Last() * States<C>::kExtra + e) * a.n.H + u] = Narrow<T>(c);
  }
  FRNN_HD void Keep(int k, A v) const { *Tape(k) = v; }
  FRNN_HD void KeepExtra(int e, A c) const { *Tape(cuda::Tape<C>::kC + e) = c; }
};

// Of the sequence's first step; zeros if it is reset before it.
template <class C, class T>
FRNN_HD Pack<Wide<T>, C::kStates> FirstStates(const ScanForwardArgs<C, T>& a, bool cut, int64_t b,
                                              int64_t u) {
  constexpr int kExtra = States<C>::kExtra;
  Pack<Wide<T>, C::kStates> s{};
  if (cut) return s;
  if (a.h0) s[C::kRecurrent] = Widen(a.h0[b * a.n.H + u]);
  FRNN_UNROLL
  for (int e = 0; e < kExtra && a.c0; e++)
    s[States<C>::OfExtra(e)] = Widen(a.c0[(b * kExtra + e) * a.n.H + u]);
  return s;
}

template <class C, class T>
FRNN_HD Pack<Wide<T>, C::kParams> ParamsOf(const T* const (&params)[kMaxParams], int64_t u) {
  Pack<Wide<T>, C::kParams> p;
  FRNN_UNROLL
  for (int k = 0; k < C::kParams; k++) p[k] = Widen(params[k][u]);
  return p;
}

// f(a step that has its operands, its row) for each step of a chunk in which the sequence runs; the
// operands of the step behind it are loaded before that. `load`(row, step) loads them, `row_of`(i) is
// the row of step i of the chunk.
template <class Step, class RowOf, class Load, class F>
FRNN_HD void WalkChunk(int64_t length, const RowOf& row_of, const Load& load, const F& f) {
  ScanRow next = row_of(0);
  Step ahead{};
  if (next.runs) load(next, ahead);
  for (int64_t i = 0; i < length; i++) {
    const ScanRow at = next;
    Step step = ahead;
    if (i + 1 < length) {
      next = row_of(i + 1);
      if (next.runs) load(next, ahead);
    }
    if (at.runs) f(at, step);
  }
}
// Forward, of chunk i / B and sequence i % B.
template <class C, class T, class F>
FRNN_HD void WalkForward(const ScanForwardArgs<C, T>& a, int64_t i, int64_t u, const F& f) {
  const int64_t chunk = i / a.n.B, b = i % a.n.B, first = a.n.begin + chunk * a.n.length;
  const Pack<Wide<T>, C::kParams> p = ParamsOf<C>(a.params, u);
  WalkChunk<ForwardStep<C, Wide<T>>>(
      a.n.LengthOf(chunk), [&](int64_t k) { return a.n(first + k, b); },
      [&](const ScanRow& at, auto& step) { step.Load(ScanForwardView<C, T>{a, at, b, u, p}); },
      [&](const ScanRow& at, auto& step) { f(ScanForwardView<C, T>{a, at, b, u, p}, step); });
}

template <class C, class T>
__global__ void ScanForwardMaps(const __grid_constant__ ScanForwardArgs<C, T> a) {
  using Map = AffineMap<Wide<T>, kAffineStates<C>>;
  ForEach((a.n.Chunks() - 1) * a.n.B, a.n.H, [&](int64_t i, int64_t u) {
    Map map = Map::Identity();
    WalkForward(a, i, u, [&](const auto& view, const auto& step) {
      if (view.at.starts || view.at.cut)
        map = Map::To(AffineOf<C>(FirstStates(a, view.at.cut, view.b, u)));
      map = step.Map().After(map);
    });
    a.maps.Put(i, u, map);
  });
}

template <class C, class T>
__global__ void ScanForward(const __grid_constant__ ScanForwardArgs<C, T> a) {
  ForEach(a.n.Chunks() * a.n.B, a.n.H, [&](int64_t i, int64_t u) {
    auto s = FromAffine<C>(a.maps.Start(i, u));
    s[C::kRecurrent] = Widen(Narrow<T>(s[C::kRecurrent]));
    WalkForward(a, i, u, [&](const auto& view, auto& step) {
      if (view.at.starts || view.at.cut) s = FirstStates(a, view.at.cut, view.b, u);
      if (States<C>::kReadsH && a.hs) a.hs[view.at.row * a.n.H + u] = Narrow<T>(s[C::kRecurrent]);
      step.s = s;
      step.Compute();
      step.StoreStates(view);
      if (a.tape) step.StoreTape(view);
      s = step.s_new;
      s[C::kRecurrent] = Widen(Narrow<T>(s[C::kRecurrent]));
    });
    if (i / a.n.B + 1 < a.n.Chunks()) return;
    const auto after = AffineOf<C>(s);
    FRNN_UNROLL
    for (int k = 0; k < kAffineStates<C>; k++) a.after(i % a.n.B, k * a.n.H + u) = after[k];
  });
}

template <class C, class T>
struct ScanBackwardArgs {
  using A = Wide<T>;
  ScanSteps n;
  const A* tape;  // as written by ScanForward
  const T* hs;
  const T* params[kMaxParams];
  const T* dy;  // what reaches the output, or null
  int64_t dy_t_stride, dy_b_stride;
  const T *dh_n, *dc_n;  // what reaches the last states, or those of every row, or null
  bool every;
  T* dgx;        // [rows, kX H]
  T* dgiven;     // [rows, kGiven H] or null
  A* dparams;    // [chunks B, kParams H]
  A *dh0, *dc0;  // [B, H], [B, kExtra H]
  ScanMaps<C, A> maps;
};

template <class C, class T>
struct ScanBackwardView {
  using A = Wide<T>;
  const ScanBackwardArgs<C, T>& a;
  const ScanRow& at;
  int64_t b, u;
  const Pack<A, C::kParams>& p;

  FRNN_HD A Kept(int k) const {
    return a.tape[at.row * cuda::Tape<C>::kSize * a.n.H + k * a.n.H + u];
  }
  FRNN_HD A KeptExtra(int e) const { return Kept(cuda::Tape<C>::kC + e); }
  FRNN_HD A Param(int k) const { return p[k]; }
  FRNN_HD A H() const { return Widen(a.hs[at.row * a.n.H + u]); }
  FRNN_HD A NewH() const { return Kept(cuda::Tape<C>::kNewH); }
  // What reaches new states from outside: that of the step after comes with the thread.
  FRNN_HD A OfLast(const T* all, int e, int extras) const {
    if (all == nullptr || !(a.every || at.ends)) return A(0);
    return Widen(all[((a.every ? at.row : b) * extras + e) * a.n.H + u]);
  }
  FRNN_HD A GradH() const { return OfLast(a.dh_n, 0, 1); }
  FRNN_HD A GradExtra(int e) const { return OfLast(a.dc_n, e, States<C>::kExtra); }
  FRNN_HD void AddGradOutput(A& to) const {
    if (a.dy == nullptr) return;
    const int64_t place =
        a.n.offsets ? at.row * a.dy_b_stride : at.time * a.dy_t_stride + b * a.dy_b_stride;
    to += Widen(a.dy[place + u]);
  }
};
// To that, where a step's gradients go.
template <class C, class T>
struct ScanGradView : ScanBackwardView<C, T> {
  using A = Wide<T>;
  Pack<A, C::kStates>& ds;
  Pack<A, C::kParams>& dp;

  FRNN_HD void SetGate(int i, A d) const {
    const auto& a = this->a;
    const int64_t row = this->at.row, u = this->u;
    ForGatesX<C>(i, [&](int q) {
      if (q < C::kX)
        a.dgx[(row * C::kX + q) * a.n.H + u] = Narrow<T>(d);
      else if (a.dgiven)
        a.dgiven[(row * C::kGiven + q - C::kX) * a.n.H + u] = Narrow<T>(d);
    });
  }
  FRNN_HD void SetGradH(A d) const { ds[C::kRecurrent] = d; }
  FRNN_HD void SetGradExtra(int e, A d) const { ds[States<C>::OfExtra(e)] = d; }
  FRNN_HD void AddGradParam(int k, A d) const { dp[k] += d; }
};

// Chunks are counted from the last step on.
template <class C, class T, class F>
FRNN_HD void WalkBackward(const ScanBackwardArgs<C, T>& a, int64_t i, int64_t u, const F& f) {
  const int64_t chunk = i / a.n.B, b = i % a.n.B, last = a.n.end - 1 - chunk * a.n.length;
  const Pack<Wide<T>, C::kParams> p = ParamsOf<C>(a.params, u);
  WalkChunk<BackwardStep<C, Wide<T>>>(
      a.n.LengthOf(chunk), [&](int64_t k) { return a.n(last - k, b); },
      [&](const ScanRow& at, auto& step) { step.Load(ScanBackwardView<C, T>{a, at, b, u, p}); },
      [&](const ScanRow& at, auto& step) { f(ScanBackwardView<C, T>{a, at, b, u, p}, step); });
}

template <class C, class T>
__global__ void ScanBackwardMaps(const __grid_constant__ ScanBackwardArgs<C, T> a) {
  using Map = AffineMap<Wide<T>, kAffineStates<C>>;
  ForEach((a.n.Chunks() - 1) * a.n.B, a.n.H, [&](int64_t i, int64_t u) {
    Map map = Map::Identity();
    WalkBackward(a, i, u, [&](const auto& view, auto& step) {
      if (view.at.ends || view.at.is_cut_after) map = Map::To({});
      map = step.Map().After(map);
    });
    a.maps.Put(i, u, map);
  });
}

template <class C, class T>
__global__ void ScanBackward(const __grid_constant__ ScanBackwardArgs<C, T> a) {
  using A = Wide<T>;
  constexpr int kExtra = States<C>::kExtra;
  ForEach(a.n.Chunks() * a.n.B, a.n.H, [&](int64_t i, int64_t u) {
    Pack<A, C::kStates> ds = FromAffine<C>(a.maps.Start(i, u));
    Pack<A, C::kParams> dp{};
    WalkBackward(a, i, u, [&](const ScanBackwardView<C, T>& view, auto& step) {
      if (view.at.ends || view.at.is_cut_after) ds = {};
      FRNN_UNROLL
      for (int j = 0; j < C::kStates; j++) step.ds_new[j] = step.ds_new[j] + ds[j];
      step.Compute();
      step.Store(ScanGradView<C, T>{view, ds, dp});
      if (!view.at.starts) return;
      a.dh0[view.b * a.n.H + u] = ds[C::kRecurrent];
      FRNN_UNROLL
      for (int e = 0; e < kExtra; e++)
        a.dc0[(view.b * kExtra + e) * a.n.H + u] = ds[States<C>::OfExtra(e)];
    });
    FRNN_UNROLL
    for (int k = 0; k < C::kParams; k++) a.dparams[(i * C::kParams + k) * a.n.H + u] = dp[k];
  });
}

}  // namespace cuda
}  // namespace frnn
