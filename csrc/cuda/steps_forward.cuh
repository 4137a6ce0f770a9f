// The forward of a layer (steps.cuh): step by step, as a scan, in one kernel, or as one step.
#pragma once
#include <algorithm>

#include "cuda/context.h"
#include "cuda/gates_forward.cuh"
#include "cuda/kernels.cuh"
#include "cuda/matrices.cuh"
#include "cuda/norm.cuh"
#include "cuda/one_step.cuh"
#include "cuda/plan.h"
#include "cuda/product.h"
#include "cuda/resident.cuh"
#include "cuda/resident_setup.cuh"
#include "cuda/scan.cuh"
#include "cuda/steps.cuh"

namespace frnn {
namespace cuda {

template <class C, class T>
struct Steps<C, T>::ForwardBuffers {
  ForwardBuffers() = default;
  ForwardBuffers(const LayerParams& p, const Plan& plan, Workspace& w)
      : gx(w.Take<A>(std::min(plan.chunk_steps * p.B, p.rows) * C::kX * p.H)),
        w_hh(w.Take<T>(OwnWeights(p, plan))) {
    if (plan.keeps_weights()) {
      hs = w.Take<T>(p.hs == nullptr ? p.rows * p.Hout : 0);
      masked = w.Take<T>(p.h_mask ? p.rows * p.Hout : 0);
      cuts = w.Take<uint8_t>(p.reset ? p.T * p.B : 0);
      c = w.Take<A>(p.B * kExtra * p.H);
      return;
    }
    if (plan.variant == Variant::kScan) {
      maps = w.Take<A>(ScanChunks(plan, plan.chunk_steps) * p.B * ScanMaps<C, A>::kSize * p.H);
      c = w.Take<A>(p.B * kAffineStates<C> * p.H);
      return;
    }
    gh = w.Take<A>(p.B * C::kH * p.H);
    operands = w.Take<T>(C::kOperands * p.B * p.H);
    masked = w.Take<T>(p.h_mask ? p.B * p.Hout : 0);
    shown = w.Take<A>(NormOfShown(p) ? p.B * p.H : 0);
    if (p.hs != nullptr) return;
    h_ring = w.Take<T>(2 * p.B * p.Hout);
    c_ring = w.Take<A>(2 * p.B * kExtra * p.H);
    h_full = w.Take<T>(Projected(p) ? p.B * p.H : 0);
    tape = w.Take<A>(NormOfShown(p) ? p.B * kTape * p.H : 0);
  }
  A *gx, *gh;   // [rows of a chunk, kX H], [B, kH H]
  T* operands;  // [kOperands, B, H]
  T* w_hh;      // of a block-diagonal one, see ByBlocks
  T* hs;        // [rows, Hout]: of a resident kernel, where none are kept for the backward
  A* c;         // [B, kExtra H]: of resident kernels, from one launch to the next; of scans [B,
                // affine H], of affine states
  A* maps;      // of scans, see ScanMaps
  T* masked;    // [B, Hout], of resident kernels [rows, Hout]: h as it goes into W_hh, where a mask
                // multiplies it
  uint8_t* cuts;  // [T, B]: of resident kernels, see FindCuts
  T* h_ring;      // [2, B, Hout]: states of two steps, where none are kept for the backward
  A* c_ring;      // [2, B, kExtra H]
  T* h_full;      // [B, H]: before the projection
  A* shown;       // [B, H]: what the output shows, where that is normalised
  A* tape;        // [B, kTape H]: and of its step, where none is kept for the backward
};

template <class C, class T>
struct Steps<C, T>::ForwardDirection : Direction {
  using Direction::Batch;
  using Direction::d;
  using Direction::Direction;
  using Direction::Hs;
  using Direction::Mask;
  using Direction::p;
  using Direction::plan;
  using Direction::Product;
  using Direction::Resets;
  using Direction::Row;
  using Direction::Run;
  using Direction::RunRows;
  using Direction::State;

  Rows<T> HPrev(const ForwardBuffers& w, int64_t s) const {  // [batch, Hout]: where step s starts
    return {p.hs ? Hs() + Row(s) * p.Hout : w.h_ring + (s & 1) * p.B * p.Hout, p.Hout};
  }
  Rows<A> CPrev(const ForwardBuffers& w, int64_t s) const {  // [batch, kExtra H]
    if (p.hs) return {this->TapeOf(s) + Tape<C>::kC * p.H, kTape * p.H};
    return {w.c_ring + (s & 1) * p.B * kExtra * p.H, kExtra * p.H};
  }
  Rows<T> Y(int64_t s) const {  // [batch, Hout], of this direction
    return {static_cast<T*>(p.y) + Row(s) * p.dirs * p.Hout + d * p.Hout, p.dirs * p.Hout};
  }

  NormRowsArgs<T> NormOf(Place place, int64_t row) const {
    NormRowsArgs<T> a{};
    a.width = GatesAt(place) * p.H, a.centred = p.norm == Norm::kLayer;
    a.eps = A(NormEps(p));
    a.of_v = a.of_added = PlainOrder(p);
    a.gain = static_cast<const T*>(p.w[d].gains[place]);
    if (p.saved) {
      const auto tape = this->NormTapeOf(place, row);
      a.n = {tape.n, a.width}, a.scale = tape.scale;
    }
    return a;
  }

  // gx = x W_ih^T of steps [begin, end): the row that gx begins with. Backwards in time that is the
  // first row of the last step.
  int64_t InputProduct(const ForwardBuffers& w, int64_t begin, int64_t end) const {
    const int64_t first = std::min(Row(begin), Row(end - 1));
    const int64_t last = std::max(Row(begin) + Batch(begin), Row(end - 1) + Batch(end - 1));
    const int64_t x_stride = this->XStride();
    Product({kStorage<T>, kStorage<A>, false, true, last - first, C::kX * p.H, p.I,
             static_cast<const T*>(p.x) + first * x_stride, x_stride, p.w[d].w_ih, p.I, false, w.gx,
             C::kX * p.H});
    if (NormOfX(p)) {
      NormRowsArgs<T> a = NormOf(kInput, first);
      a.v = {w.gx, a.width};
      RunRows(NormRows<T>, last - first, a);
    }
    return first;
  }

  void ForwardSteps(const ForwardBuffers& w, int64_t first, int64_t begin, int64_t end) const {
    for (int64_t s = begin; s < end; s++)
      LaunchForward(w, s, w.gx + (Row(s) - first) * C::kX * p.H);
  }

  // gx begins with row `first`.
  void ForwardScan(const ForwardBuffers& w, int64_t first, const ScanSteps& n) const {
    if constexpr (C::kAffine != 0) {
      ScanForwardArgs<C, T> a{};
      a.n = n;
      a.gx = w.gx, a.gx_row = first;
      a.b_ih = static_cast<const T*>(p.w[d].b_ih);
      for (int k = 0; k < C::kParams; k++) a.params[k] = static_cast<const T*>(p.w[d].params[k]);
      a.given = static_cast<const T*>(p.given);
      a.h0 = State(static_cast<const T*>(p.h0), p.H);
      a.c0 = State(static_cast<const T*>(p.c0), kExtra * p.H);
      a.y = {static_cast<T*>(p.y) + d * p.H, p.dirs * p.H};
      a.every = p.every_state;
      a.h_n = this->AllStates(static_cast<T*>(p.h_n), p.H);
      a.c_n = this->AllStates(static_cast<T*>(p.c_n), kExtra * p.H);
      a.hs = p.hs ? Hs() : nullptr;
      a.tape = p.saved ? this->Saved() : nullptr;
      a.maps = this->MapsOf(w.maps);
      a.after = {w.c, kAffineStates<C> * p.H};
      Run(ScanForwardMaps<C, T>, (n.Chunks() - 1) * p.B, p.H, a);
      this->RunStarts(n, n.begin > 0 ? w.c : nullptr, a.maps);
      Run(cuda::ScanForward<C, T>, n.Chunks() * p.B, p.H, a);
    }
  }

  // What resident kernels start from, and the words by which they see what is not written yet.
  void StartStates(const ForwardBuffers& w, const ResidentSteps& steps) const {
    T* hs = States(w);
    this->Unwritten(p.h_mask ? w.masked : hs, p.rows * p.Hout);
    const uint8_t* reset = Resets(-1);
    Run(cuda::StartStates<T>, p.B, p.H, steps, d == 1, State(static_cast<const T*>(p.h0), p.H),
        reset, hs, Mask().data, w.masked);
    Run(Convert<A, T>, p.B, kExtra * p.H, p.B, kExtra * p.H, {w.c, kExtra * p.H},
        {State(static_cast<const T*>(p.c0), kExtra * p.H), kExtra * p.H}, reset);
    this->FindCuts(w.cuts, steps);
  }

  T* States(const ForwardBuffers& w) const { return p.hs ? Hs() : w.hs; }

  // What the gate math of a step takes from the layer, and where it goes.
  GateForwardArgs<T> GatesOf(int64_t s) const {
    GateForwardArgs<T> a{};
    a.rows = Batch(s), a.H = p.H;
    a.b_ih = static_cast<const T*>(p.w[d].b_ih);
    a.b_hh = static_cast<const T*>(p.w[d].b_hh);
    for (int k = 0; k < C::kParams; k++) a.params[k] = static_cast<const T*>(p.w[d].params[k]);
    if (p.given)
      a.given = {static_cast<const T*>(p.given) + Row(s) * C::kGiven * p.H, C::kGiven * p.H};
    a.output = Y(s);
    a.publish = true;
    a.to.next_rows = std::min(Batch(s), Batch(s + 1));
    a.to.last_from = p.every_state ? 0 : a.to.next_rows;
    a.to.h_last = this->StatesAfter(s, static_cast<T*>(p.h_n), p.Hout);
    a.c_last = this->StatesAfter(s, static_cast<T*>(p.c_n), kExtra * p.H);
    return a;
  }

  void LaunchForward(const ForwardBuffers& w, int64_t s, A* gx) const {
    const int64_t batch = Batch(s);
    const Rows<T> h_prev = HPrev(w, s), y = Y(s);
    const Rows<A> c_prev = CPrev(w, s);
    // Sequences that start here: all at the first step; backwards in time the shorter ones later.
    const int64_t running = std::min(batch, Batch(s - 1)), starting = batch - running;
    const uint8_t* reset = s == 0 ? Resets(-1) : nullptr;
    Run(Publish<T>, starting, p.Hout, starting, p.Hout,
        {State(static_cast<const T*>(p.h0), p.Hout, running), p.Hout},
        {starting, starting, {&h_prev(running, 0), p.Hout}, {}, reset, MaskFor(w, running)});
    Run(Convert<A, T>, starting, kExtra * p.H, starting, kExtra * p.H,
        {&c_prev(running, 0), c_prev.stride},
        {State(static_cast<const T*>(p.c0), kExtra * p.H, running), kExtra * p.H}, reset);

    RecurrentProduct<0>(w, p.h_mask ? w.masked : h_prev.data, batch);
    if (NormOfH(p)) {
      NormRowsArgs<T> a = NormOf(PlaceOfH(p), Row(s));
      a.v = {w.gh, a.width}, a.of_v = OrderOfH(p, plan);
      if (NormOfSum(p)) {
        a.added = {w.gh, a.width}, a.of_added = a.of_v;
        a.v = {gx, a.width}, a.of_v = PlainOrder(p);
      }
      RunRows(NormRows<T>, batch, a);
    }

    const bool projected = Projected(p);
    GateForwardArgs<T> a = GatesOf(s);
    const Rows<T> full{p.hs ? this->HsFull() + Row(s) * p.H : w.h_full, p.H};
    a.gx = {gx, C::kX * p.H};
    a.operands = {w.operands, p.B * p.H, p.H};
    a.gh = {NormOfSum(p) ? nullptr : w.gh, C::kH * p.H}, a.of_gh = OrderOfH(p, plan);
    a.h_prev = {h_prev.data, h_prev.stride};
    a.c_prev = {c_prev.data, c_prev.stride};
    if (projected) a.output = full;
    a.publish = !projected;
    a.to.reset = Resets(s);
    a.to.mask = MaskFor(w);
    a.zones = this->Zones(s);
    if (s + 1 < p.T) {
      a.to.h_next = HPrev(w, s + 1);
      if (kExtra > 0) a.c_next = CPrev(w, s + 1);
    }
    if (p.saved) a.tape = {this->TapeOf(s), kTape * p.H};
    const bool stages = HasStages(p);
    ForOperands([&](auto k) {
      Run(stages ? OperandForward<C, T, true, decltype(k)::value>
                 : OperandForward<C, T, false, decltype(k)::value>,
          batch, p.H, a);
      RecurrentProduct<k + 1>(w, w.operands + k * p.B * p.H, batch);
    });
    RunGates(w, s, a);
    if (!projected) return;
    Product({kStorage<T>, kStorage<T>, false, true, batch, p.Hout, p.H, full.data, p.H, p.w[d].w_hr,
             p.H, false, y.data, y.stride});
    Run(Publish<T>, batch, p.Hout, batch, p.Hout, {y.data, y.stride}, a.to);
  }
  // The gate math of a step, after all products but a projection.
  void RunGates(const ForwardBuffers& w, int64_t s, const GateForwardArgs<T>& gates) const {
    if constexpr (kShows) {
      if (NormOfShown(p)) {
        ShownForwardArgs<T> a{gates, {w.shown, p.H}, static_cast<const T*>(p.w[d].shift)};
        if (!p.saved) a.gates.tape = {w.tape, kTape * p.H};
        NormRowsArgs<T> norm = NormOf(kShown, Row(s));
        norm.v = a.shown;
        Run(ForwardToShown<C, T>, gates.rows, p.H, a);
        RunRows(NormRows<T>, gates.rows, norm);
        return Run(ForwardOutput<C, T>, gates.rows, p.H, a);
      }
    }
    Run(HasStages(p) ? GateForward<C, T, true> : GateForward<C, T, false>, gates.rows, p.H, gates);
  }
  // gh = h W_hh^T, the gates of product k, or with another operand.
  template <int k>
  void RecurrentProduct(const ForwardBuffers& w, const T* h, int64_t batch) const {
    const int64_t gates = Products<C>::Gates(k) * BlockWidth(p), columns = Columns(p);
    const int64_t before = GatesBefore(p, k);
    Product({kStorage<T>, kStorage<A>, false, true, batch, gates, columns, h, p.Hout,
             this->WHh(w.w_hh) + before * columns, columns, false, w.gh + before, C::kH * p.H,
             Blocks(p), columns, gates * columns, gates});
  }
  // What the next step multiplies, from a row on.
  HMask<T> MaskFor(const ForwardBuffers& w, int64_t row = 0) const {
    return {Mask(row), {w.masked + (p.h_mask ? row * p.Hout : 0), p.Hout}};
  }
};

template <class C, class T>
void Steps<C, T>::Forward(const LayerParams& p, const Plan& plan, const Call& call) {
  if (plan.variant == Variant::kOne) return OneStep(p, plan, call);
  Workspace workspace(call.workspace);
  const int64_t* offsets = BringOffsets(p, plan, call, workspace);
  Beside beside(call, plan.streams == 2);
  ForwardBuffers buffers[2] = {{p, plan, workspace}, {}};
  if (p.dirs == 2) buffers[1] = {p, plan, workspace};
  for (int d = 0; d < p.dirs; d++) Direction(p, plan, call, d).TakeWeights(buffers[d].w_hh);
  const bool resident = plan.keeps_weights(), scan = plan.variant == Variant::kScan;
  ResidentSteps steps{};
  if (resident) {
    steps = StepsOf(p, plan, call, offsets);
    for (int d = 0; d < p.dirs; d++)
      ForwardDirection(p, plan, call, d).StartStates(buffers[d], steps);
  }
  for (int64_t begin = 0; begin < p.T; begin += plan.chunk_steps) {
    const int64_t end = std::min(begin + plan.chunk_steps, p.T);
    int64_t first[2];
    for (int d = 0; d < p.dirs; d++)
      first[d] = ForwardDirection(p, plan, call, d).InputProduct(buffers[d], begin, end);
    if (resident) {
      steps.begin = begin, steps.end = end;
      ForwardResident(p, plan, call, buffers, first, steps);
      continue;
    }
    for (int d = 0; d < p.dirs; d++) {
      const ForwardDirection on(p, plan, call, d);
      if (scan)
        on.ForwardScan(buffers[d], first[d], on.ScanOf(begin, end, offsets));
      else
        on.ForwardSteps(buffers[d], first[d], begin, end);
    }
  }
  beside.Join();
}

template <class C, class T>
void Steps<C, T>::OneStep(const LayerParams& p, const Plan& plan, const Call& call) {
  OneStepArgs<T> args{};
  constexpr int64_t kAtOnce = 16 / sizeof(T);
  args.I = p.I, args.x_stride = Direction(p, plan, call, 0).XStride();
  bool whole = p.I % kAtOnce == 0 && p.H % kAtOnce == 0 && args.x_stride % kAtOnce == 0;
  for (int d = 0; d < p.dirs; d++) {
    const ForwardDirection on(p, plan, call, d);
    OneStepDirection<T>& a = args.dir[d];
    a.x = static_cast<const T*>(p.x);
    a.w_ih = static_cast<const T*>(p.w[d].w_ih), a.w_hh = static_cast<const T*>(p.w[d].w_hh);
    a.c_prev = on.State(static_cast<const T*>(p.c0), kExtra * p.H);
    a.gates = on.GatesOf(0);
    a.gates.h_prev = {on.State(static_cast<const T*>(p.h0), p.H), p.H};
    const void* const operands[] = {a.x, a.w_ih, a.w_hh, a.gates.h_prev.data};
    for (const void* operand : operands) whole &= reinterpret_cast<uintptr_t>(operand) % 16 == 0;
  }
  const int64_t groups = (p.B + kOneStepRows - 1) / kOneStepRows;
  const runtime::Grid grid{unsigned((p.H * 32 + kOneStepThreads - 1) / kOneStepThreads),
                           unsigned(groups * p.dirs)};
  const auto run = [&](auto kernel) {
    if (p.B > 0 && p.H > 0)
      Start(kernel, ShapeOf(kernel, kOneStepThreads), grid, call.streams[0], args, groups);
  };
  if constexpr (C::kX + C::kH <= kOneStepGates && C::kOperands == 0)
    whole ? run(cuda::OneStep<C, T, kAtOnce>) : run(cuda::OneStep<C, T, 1>);
}

template <class C, class T>
void Steps<C, T>::ForwardResident(const LayerParams& p, const Plan& plan, const Call& call,
                                  const ForwardBuffers* buffers, const int64_t* first,
                                  const ResidentSteps& steps) {
  if constexpr (kHasResident<C, T>) {
    ResidentForwardArgs<T> args{};
    args.steps = steps;
    for (int d = 0; d < p.dirs; d++) {
      const ForwardDirection on(p, plan, call, d);
      const DirectionWeights& w = p.w[d];
      ResidentForwardDirection<T>& a = args.dir[d];
      a.start = on.Time(0), a.way = d == 0 ? 1 : -1;
      a.h0 = on.State(static_cast<const T*>(p.h0), p.Hout);
      a.w_hh = on.WHh(buffers[d].w_hh);
      a.b_ih = static_cast<const T*>(w.b_ih);
      a.b_hh = static_cast<const T*>(w.b_hh);
      for (int k = 0; k < C::kParams; k++) a.params[k] = static_cast<const T*>(w.params[k]);
      a.gx = buffers[d].gx, a.gx_row = first[d];
      a.h_kept = on.States(buffers[d]);
      a.hs = p.h_mask ? buffers[d].masked : a.h_kept;
      a.stages = on.StagesOf(buffers[d].cuts, static_cast<T*>(p.h_n), static_cast<T*>(p.c_n));
      a.y = static_cast<T*>(p.y) + d * p.Hout;
      a.c = buffers[d].c;
      a.h_last = on.State(static_cast<T*>(p.h_n), p.Hout);
      a.c_last = on.State(static_cast<T*>(p.c_n), kExtra * p.H);
      a.tape = p.saved ? on.Saved() : nullptr;
    }
    WithResidentInstance<C, T>(plan, [&](auto instance) {
      instance.Forward(plan.copies * p.dirs, args, call.streams[0]);
    });
  }
}

}  // namespace cuda
}  // namespace frnn
