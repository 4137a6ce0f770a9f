// The backward of a layer (steps.cuh): step by step, as a scan, or in one kernel.
#pragma once
#include <algorithm>

#include "cuda/context.h"
#include "cuda/gates_backward.cuh"
#include "cuda/kernels.cuh"
#include "cuda/matrices.cuh"
#include "cuda/norm.cuh"
#include "cuda/plan.h"
#include "cuda/product.h"
#include "cuda/resident.cuh"
#include "cuda/resident_setup.cuh"
#include "cuda/scan.cuh"
#include "cuda/steps.cuh"

namespace frnn {
namespace cuda {

template <class C, class T>
struct Steps<C, T>::BackwardBuffers {
  BackwardBuffers() = default;
  BackwardBuffers(const LayerGradParams& p, const Plan& plan, Workspace& w)
      : dgx(w.Take<T>(p.rows * C::kX * p.H)),
        dgh(HasOwnDgh(p, plan) ? w.Take<T>(p.rows * C::kH * p.H) : nullptr),
        dnh(NormOfH(p) ? w.Take<T>(p.rows * C::kH * p.H) : nullptr),
        dh(w.Take<A>(p.B * p.Hout)),
        dc(w.Take<A>(p.B * kExtra * p.H)),
        dhp(w.Take<T>(Projected(p) ? p.rows * p.Hout : 0)),
        dh_full(w.Take<A>(Projected(p) ? p.B * p.H : 0)),
        h_masked(w.Take<T>(p.h_mask ? p.rows * p.Hout : 0)),
        dh_masked(w.Take<A>(p.h_mask ? p.B * p.Hout : 0)),
        dparams(w.Take<A>(GradRows(p, plan) * C::kParams * p.H)),
        dgiven(w.Take<T>(HasGivenGrads(p) ? p.rows * C::kGiven * p.H : 0)),
        operands(w.Take<T>(C::kOperands * p.rows * p.H)),
        d_operands(w.Take<A>(C::kOperands * p.B * p.H)),
        dshown(w.Take<A>(NormOfShown(p) ? p.rows * p.H : 0)),
        dstate(w.Take<A>(NormOfShown(p) ? p.B * p.H : 0)),
        partial(w.Take<A>(kSumParts * std::max({C::kX, C::kH, C::kParams}) * p.H)),
        sums(w.Take<T>(InBlocks(p) ? C::kH * p.H : 0)),
        w_hh(w.Take<T>(OwnWeights(p, plan))),
        maps(w.Take<A>(
            plan.variant == Variant::kScan ? GradRows(p, plan) * ScanMaps<C, A>::kSize * p.H : 0)),
        w_hh_t(w.Take<T>(plan.keeps_weights() ? C::kH * p.H * p.H : 0)),
        cuts(w.Take<uint8_t>(plan.keeps_weights() && p.reset ? p.T * p.B : 0)) {}
  T *dgx, *dgh;   // [rows, kX H], [rows, kH H]: gate gradients; dgh null if it is the same
  T* dnh;         // [rows, kH H]: of h W_hh^T before it was normalised, or null
  A *dh, *dc;     // [B, Hout], [B, kExtra H]: what the steps already seen pass back
  T* dhp;         // [rows, Hout]: gradient of the projected h
  A* dh_full;     // [B, H]: and of h before the projection
  T* h_masked;    // [rows, Hout]: h as it went into W_hh, where a mask multiplied it, and
  A* dh_masked;   // [B, Hout]: its gradient, from the step seen last
  A* dparams;     // [GradRows, kParams H]: gradients of parameters, of the steps already seen
  T* dgiven;      // [rows, kGiven H]: gradients of what is given, of this direction
  T* operands;    // [kOperands, rows, H]: operands of W_hh beside h, as they went into it
  A* d_operands;  // [kOperands, B, H]: and their gradients, of a step
  A* dshown;      // [rows, H]: gradients of what the output shows, where that was normalised, and
  A* dstate;      // [B, H]: what reaches the state from there, of a step
  A* partial;     // [kSumParts, gates H]
  T* sums;        // [kH H]: the gradient of b_hh, block by block
  T* w_hh;        // as in the forward
  A* maps;        // of scans, see ScanMaps
  T* w_hh_t;      // [H, kH H]: W_hh^T, for a resident kernel
  uint8_t* cuts;  // [T, B]: as in the forward
};

template <class C, class T>
struct Steps<C, T>::GradDirection : Direction {
  GradDirection(const LayerGradParams& g, const Plan& plan, const Call& call, int d)
      : Direction(g, plan, call, d), g(g) {}
  using Direction::d;
  using Direction::p;
  using Direction::plan;
  using Direction::Product;
  using Direction::Row;
  using Direction::Run;
  using Direction::State;

  void StartCarry(const BackwardBuffers& w) const {
    // Those of the states of every step come in at theirs.
    const auto start = [&](A* carry, const void* from, int64_t width) {
      const T* last = p.every_state ? nullptr : static_cast<const T*>(from);
      Run(Convert<A, T>, p.B, width, p.B, width, {carry, width}, {State(last, width), width},
          nullptr);
    };
    start(w.dh, g.dh_n, p.Hout);
    start(w.dc, g.dc_n, kExtra * p.H);
    start(w.dparams, nullptr, C::kParams * p.H);
    if (p.h_mask) start(w.dh_masked, nullptr, p.Hout);
  }

  // What reaches the states after step s, or for -1 those before the first one.
  Carried<T> CarriedTo(const BackwardBuffers& w, int64_t s) const {
    Carried<T> from{};
    from.dh = {w.dh, p.Hout};
    from.next_rows = s < 0 ? p.B : std::min(this->Batch(s), this->Batch(s + 1));
    from.reset = this->Resets(s);
    from.mask = this->Mask();
    from.masked = {w.dh_masked, p.Hout};
    if (p.every_state && s >= 0)
      from.dh_n = this->StatesAfter(s, static_cast<const T*>(g.dh_n), p.Hout);
    return from;
  }

  void BackwardChunk(const BackwardBuffers& w, int64_t begin, int64_t end) const {
    for (int64_t s = end - 1; s >= begin; s--) LaunchBackward(w, s);
  }

  void BackwardScan(const BackwardBuffers& w, const int64_t* offsets) const {
    if constexpr (C::kAffine != 0) {
      ScanBackwardArgs<C, T> a{};
      a.n = this->ScanOf(0, p.T, offsets);
      a.tape = this->Saved(), a.hs = this->Hs();
      for (int k = 0; k < C::kParams; k++) a.params[k] = static_cast<const T*>(p.w[d].params[k]);
      if (g.dy) a.dy = static_cast<const T*>(g.dy) + d * p.H;
      a.dy_t_stride = g.dy_t_stride, a.dy_b_stride = g.dy_b_stride;
      a.every = p.every_state;
      a.dh_n = this->AllStates(static_cast<const T*>(g.dh_n), p.H);
      a.dc_n = this->AllStates(static_cast<const T*>(g.dc_n), kExtra * p.H);
      a.dgx = w.dgx;
      if (HasGivenGrads(g)) a.dgiven = w.dgiven;
      a.dparams = w.dparams;
      a.dh0 = w.dh, a.dc0 = w.dc;
      a.maps = this->MapsOf(w.maps);
      Run(ScanBackwardMaps<C, T>, (a.n.Chunks() - 1) * p.B, p.H, a);
      this->RunStarts(a.n, nullptr, a.maps);
      Run(ScanBackward<C, T>, a.n.Chunks() * p.B, p.H, a);
    }
  }

  void LaunchBackward(const BackwardBuffers& w, int64_t s) const {
    const int64_t batch = this->Batch(s), row = Row(s);
    const Rows<const T> dy = Dy(s);
    GateBackwardArgs<T> a{};
    a.rows = batch, a.H = p.H;
    const Carried<T> from = CarriedTo(w, s);
    const Rows<const T> h_prev{this->Hs() + row * p.Hout, p.Hout};
    const HMask<T> mask{this->Mask(), {w.h_masked + (p.h_mask ? row * p.Hout : 0), p.Hout}};
    a.from = from;
    if (Projected(p)) {  // through h = W_hr h_full first
      T* dhp = w.dhp + row * p.Hout;
      Run(SumGradients<T>, batch, p.Hout, batch, p.Hout, {dhp, p.Hout}, from, dy, h_prev, mask);
      Product({kStorage<T>, kStorage<A>, false, false, batch, p.H, p.Hout, dhp, p.Hout, p.w[d].w_hr,
               p.H, false, w.dh_full, p.H});
      a.from.dh = {w.dh_full, p.H};
      a.projected = true;
    } else {
      a.dy = dy;
      a.dh_prev = {w.dh, p.H};
      a.mask = mask;
    }
    a.tape = {this->TapeOf(s), kTape * p.H};
    a.h_prev = h_prev;
    for (int k = 0; k < C::kParams; k++) a.params[k] = static_cast<const T*>(p.w[d].params[k]);
    a.dc = {w.dc, kExtra * p.H};
    a.dgx = {w.dgx + row * C::kX * p.H, C::kX * p.H};
    if (w.dgh) a.dgh = {w.dgh + row * C::kH * p.H, C::kH * p.H};
    a.of_dgh = NormOfH(p) ? PlainOrder(p) : OrderOfH(p, plan);
    a.dparams = {w.dparams, C::kParams * p.H};
    if (HasGivenGrads(g)) a.dgiven = {w.dgiven + row * C::kGiven * p.H, C::kGiven * p.H};
    a.operands = {w.operands + row * p.H, p.rows * p.H, p.H};
    a.d_operands = {w.d_operands, p.B * p.H, p.H};
    a.zones = this->Zones(s);
    if (p.every_state) a.dc_n = this->StatesAfter(s, static_cast<const T*>(g.dc_n), kExtra * p.H);
    const bool stages = HasStages(p);
    ForOperands([&](auto from_first) {
      constexpr int k = C::kOperands - decltype(from_first)::value;
      Run(stages ? OperandBackward<C, T, true, k> : OperandBackward<C, T, false, k>, batch, p.H, a);
      RecurrentGrad<k>(w, row, batch, false, w.d_operands + (k - 1) * p.B * p.H);
    });
    RunGateGrads(w, row, a);

    if (NormOfH(p)) {
      NormGradsArgs<T, T> n = NormGradsOf<T>(PlaceOfH(p), row);
      n.d = {(Same() ? w.dgx : w.dgh) + row * n.width, n.width};
      n.dv = {w.dnh + row * n.width, n.width}, n.of_dv = OrderOfH(p, plan);
      this->RunRows(NormGrads<T, T>, batch, n);
    }
    if (C::kH == 0 || (s == 0 && g.dh0 == nullptr)) return;
    // dh_{t-1} = dgh W_hh, beside the elementwise path if there is one.
    const bool beside = stages ? bool(a.dh_prev) : kGradReachesH<C>;
    RecurrentGrad<0>(w, row, batch, beside && !p.h_mask, p.h_mask ? w.dh_masked : w.dh);
  }
  // The gate math of a step backwards, whose rows begin with `row`.
  void RunGateGrads(const BackwardBuffers& w, int64_t row, const GateBackwardArgs<T>& gates) const {
    if constexpr (kShows) {
      if (NormOfShown(p)) {
        A* const dshown = w.dshown + row * p.H;
        NormGradsArgs<T, A> norm = NormGradsOf<A>(kShown, row);
        norm.d = {dshown, p.H}, norm.dv = {w.dstate, p.H};
        const ShownBackwardArgs<T> a{gates,         norm.n,
                                     norm.gain,     static_cast<const T*>(p.w[d].shift),
                                     {dshown, p.H}, {w.dstate, p.H}};
        Run(BackwardToShown<C, T>, gates.rows, p.H, a);
        this->RunRows(NormGrads<T, A>, gates.rows, norm);
        return Run(BackwardFromShown<C, T>, gates.rows, p.H, a);
      }
    }
    Run(HasStages(p) ? GateBackward<C, T, true> : GateBackward<C, T, false>, gates.rows, p.H,
        gates);
  }
  // The gradient of h, dgh W_hh of the gates of product k, or of another operand.
  template <int k>
  void RecurrentGrad(const BackwardBuffers& w, int64_t row, int64_t batch, bool accumulate,
                     A* to) const {
    const int64_t gates = Products<C>::Gates(k) * BlockWidth(p), columns = Columns(p);
    const int64_t before = GatesBefore(p, k);
    Product({kStorage<T>, kStorage<A>, false, false, batch, columns, gates, Dgh(w, row) + before,
             C::kH * p.H, this->WHh(w.w_hh) + before * columns, columns, accumulate, to, p.Hout,
             Blocks(p), gates, gates * columns, columns});
  }

  template <class D>
  NormGradsArgs<T, D> NormGradsOf(Place place, int64_t row) const {
    NormGradsArgs<T, D> a{};
    a.width = GatesAt(place) * p.H, a.centred = p.norm == Norm::kLayer;
    a.gain = static_cast<const T*>(p.w[d].gains[place]);
    const auto tape = this->NormTapeOf(place, row);
    a.n = {tape.n, a.width}, a.scale = tape.scale;
    a.of_dv = PlainOrder(p);
    return a;
  }

  // Gradients that are sums over all rows, and those of the initial states.
  void Weights(const BackwardBuffers& w) const {
    const DirectionGrads& dw = g.dw[d];
    Run(SumGradients<T>, g.dh0 ? p.B : 0, p.Hout, p.B, p.Hout,
        {State(static_cast<T*>(g.dh0), p.Hout), p.Hout}, CarriedTo(w, -1), {}, {}, {});
    Run(Convert<T, A>, g.dc0 ? p.B : 0, kExtra * p.H, p.B, kExtra * p.H,
        {State(static_cast<T*>(g.dc0), kExtra * p.H), kExtra * p.H}, {w.dc, kExtra * p.H},
        this->Resets(-1));
    RecurrentWeights(w);
    if (Projected(p)) OuterProduct(dw.w_hr, w.dhp, p.Hout, this->HsFull(), p.H, p.H);
    const int64_t width = C::kX * p.H;
    SumRows<T>(dw.b_ih, p.rows, {w.dgx, width}, width, w.partial);
    if (NormOfX(p) || NormOfSum(p)) {
      NormGradsArgs<T, T> a = NormGradsOf<T>(PlaceOfX(p), 0);
      SumRows<T>(dw.gains[PlaceOfX(p)], p.rows, {w.dgx, width}, width, w.partial, a.n);
      a.d = {w.dgx, width}, a.dv = {w.dgx, width};
      this->RunRows(NormGrads<T, T>, p.rows, a);
    }
    OuterProduct(dw.w_ih, w.dgx, width, p.x, p.I, this->XStride());
    if (NormOfShown(p)) {
      const Rows<const A> d{w.dshown, p.H};
      SumRows<A>(dw.gains[kShown], p.rows, d, p.H, w.partial, NormGradsOf<A>(kShown, 0).n);
      SumRows<A>(dw.shift, p.rows, d, p.H, w.partial);
    }
    for (int k = 0; k < C::kParams; k++)
      SumRows<A>(dw.params[k], GradRows(p, plan), {w.dparams + k * p.H, C::kParams * p.H}, p.H,
                 w.partial);
  }

 private:
  // Of h W_hh^T.
  const T* Dgh(const BackwardBuffers& w, int64_t row) const {
    return (w.dnh ? w.dnh : w.dgh ? w.dgh : w.dgx) + row * C::kH * p.H;
  }
  // Those of W_hh, its bias and its gains.
  void RecurrentWeights(const BackwardBuffers& w) const {
    const DirectionGrads& dw = g.dw[d];
    const int64_t all = C::kH * p.H;
    WeightsOf<0>(w, p.h_mask ? w.h_masked : this->Hs());
    ForOperands([&](auto k) { WeightsOf<k + 1>(w, w.operands + k * p.rows * p.H); });
    // As the cell gives them; of another order if they are operands of products, too.
    const Rows<const T> d_h{Same() ? w.dgx : w.dgh, all};
    const bool turned = d_h.data == Dgh(w, 0) && ByBlocks(p, plan);
    SumRows<T>(turned && dw.b_hh ? w.sums : dw.b_hh, p.rows, d_h, all, w.partial);
    if (turned && dw.b_hh) this->SwapGates(w.sums, static_cast<T*>(dw.b_hh), BlockWidth(p), true);
    if (dw.gains[kRecurrent])
      SumRows<T>(dw.gains[kRecurrent], p.rows, d_h, all, w.partial,
                 NormGradsOf<T>(kRecurrent, 0).n);
  }
  // The rows of W_hh that product k is with: all gates of it with h, or another operand.
  template <int k>
  void WeightsOf(const BackwardBuffers& w, const T* operand) const {
    if (g.dw[d].w_hh == nullptr) return;
    const int64_t width = BlockWidth(p), before = GatesBefore(p, k);
    const T* dgh = Dgh(w, 0) + before;
    T* dw = static_cast<T*>(g.dw[d].w_hh) + before * Columns(p);
    if (!InBlocks(p))
      return OuterProduct(dw, dgh, Products<C>::Gates(k) * p.H, operand, p.Hout, p.Hout,
                          C::kH * p.H);
    GateOrder order = OrderOfH(p, plan);
    order.gates = Products<C>::Gates(k);
    for (int q = 0; q < Products<C>::Gates(k); q++)
      Product({kStorage<T>, kStorage<T>, true, false, width, width, p.rows, dgh + order(q, 0),
               C::kH * p.H, operand, p.Hout, false, dw + q * p.H * width, width, p.blocks,
               order(0, width) - order(0, 0), width, width * width});
  }
  Rows<const T> Dy(int64_t s) const {
    if (g.dy == nullptr) return {nullptr, 0};
    const int64_t first = p.ragged ? Row(s) * g.dy_b_stride : this->Time(s) * g.dy_t_stride;
    return {static_cast<const T*>(g.dy) + first + d * p.Hout, g.dy_b_stride};
  }
  // dW [n, m] = left^T right over all rows, which are n columns of one `left_stride` long (0: n).
  void OuterProduct(void* dw, const T* left, int64_t n, const void* right, int64_t m,
                    int64_t stride, int64_t left_stride = 0) const {
    if (dw != nullptr)
      Product({kStorage<T>, kStorage<T>, true, false, n, m, p.rows, left,
               left_stride > 0 ? left_stride : n, right, stride, false, dw, m});
  }
  template <class Of>
  void SumRows(void* sum, int64_t rows, const Rows<const Of>& of, int64_t columns, A* partial,
               const Rows<const A>& times = {}) const {
    if (sum == nullptr) return;
    const int64_t parts = std::min(kSumParts, rows);
    Run(ColumnSumParts<Of>, parts, columns, rows, columns, parts, of, times, partial);
    Run(ColumnSum<T>, 1, columns, columns, parts, static_cast<const A*>(partial),
        static_cast<T*>(sum));
  }

  const LayerGradParams& g;
};

template <class C, class T>
void Steps<C, T>::Backward(const LayerGradParams& p, const Plan& plan, const Call& call) {
  Workspace workspace(call.workspace);
  const int64_t* offsets = BringOffsets(p, plan, call, workspace);
  Beside beside(call, plan.streams == 2);
  BackwardBuffers buffers[2] = {{p, plan, workspace}, {}};
  if (p.dirs == 2) buffers[1] = {p, plan, workspace};
  for (int d = 0; d < p.dirs; d++) {
    const GradDirection on(p, plan, call, d);
    on.TakeWeights(buffers[d].w_hh);
    on.StartCarry(buffers[d]);
  }
  if (plan.keeps_weights())
    BackwardResident(p, plan, call, buffers, StepsOf(p, plan, call, offsets));
  else if (plan.variant == Variant::kScan)
    for (int d = 0; d < p.dirs; d++)
      GradDirection(p, plan, call, d).BackwardScan(buffers[d], offsets);
  else
    for (int64_t end = p.T; end > 0; end -= std::min(end, plan.chunk_steps))
      for (int d = 0; d < p.dirs; d++)
        GradDirection(p, plan, call, d)
            .BackwardChunk(buffers[d], end - std::min(end, plan.chunk_steps), end);
  for (int d = 0; d < p.dirs; d++) GradDirection(p, plan, call, d).Weights(buffers[d]);
  beside.Join();
  if constexpr (C::kGiven > 0)
    for (int d = 0; d < p.dirs && p.dgiven; d++)
      Direction(p, plan, call, 0)
          .Run(AddTo<T>, p.rows, C::kGiven * p.H, p.rows, C::kGiven * p.H,
               static_cast<T*>(p.dgiven), buffers[d].dgiven);
  if (p.dx == nullptr) return;
  // dX = sum over directions of dgx W_ih
  for (int d = 0; d < p.dirs; d++)
    Multiply(call.Queue(0),
             {kStorage<T>, kStorage<T>, false, false, p.rows, p.I, C::kX * p.H, buffers[d].dgx,
              C::kX * p.H, p.w[d].w_ih, p.I, d > 0, p.dx, p.I},
             call.allow_tf32);
}

template <class C, class T>
void Steps<C, T>::BackwardResident(const LayerGradParams& p, const Plan& plan, const Call& call,
                                   const BackwardBuffers* buffers, const ResidentSteps& steps) {
  if constexpr (kHasResident<C, T>) {
    ResidentBackwardArgs<T> args{};
    args.steps = steps;
    for (int d = 0; d < p.dirs; d++) {
      const Direction on(p, plan, call, d);
      T* dgh = Same() ? buffers[d].dgx : buffers[d].dgh;
      on.Unwritten(dgh, p.rows * C::kH * p.H);
      Start(Transpose<T>, ShapeOf(Transpose<T>, 32, 8),
            {unsigned(p.H + 31) / 32, unsigned(C::kH * p.H + 31) / 32}, call.streams[0],
            C::kH * p.H, p.H, on.WHh(buffers[d].w_hh), buffers[d].w_hh_t);
      ResidentBackwardDirection<T>& a = args.dir[d];
      a.start = on.Time(0), a.way = d == 0 ? 1 : -1;
      a.w_hh_t = buffers[d].w_hh_t;
      for (int k = 0; k < C::kParams; k++) a.params[k] = static_cast<const T*>(p.w[d].params[k]);
      a.dy = p.dy ? static_cast<const T*>(p.dy) + d * p.Hout : nullptr;
      a.dy_t_stride = p.dy_t_stride, a.dy_b_stride = p.dy_b_stride;
      a.hs = on.Hs(), a.tape = on.Saved();
      a.dgx = buffers[d].dgx, a.dgh = dgh;
      a.dh = buffers[d].dh, a.dc = buffers[d].dc;
      on.FindCuts(buffers[d].cuts, steps);
      a.stages = on.StagesOf(buffers[d].cuts, static_cast<const T*>(p.dh_n),
                             static_cast<const T*>(p.dc_n));
      if (p.h_mask)
        on.Run(MaskStates<T>, p.T * p.B, p.H, steps, static_cast<const T*>(on.Hs()), on.Mask().data,
               buffers[d].h_masked);
      a.dparams = buffers[d].dparams;
    }
    WithResidentInstance<C, T>(plan, [&](auto instance) {
      instance.Backward(plan.copies * p.dirs, args, call.streams[0]);
    });
  }
}

}  // namespace cuda
}  // namespace frnn
