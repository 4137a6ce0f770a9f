// One recurrent layer on a card, for any cell. Everything that does not depend on the step before is
// one product over many steps. What does: per step one product and one kernel with the gate math, or
// where the weights fit into registers one kernel for all steps (resident.cuh).
//
// Forward, per chunk of steps: gx = x W_ih^T; per step: gh = h W_hh^T, gates.
// Backward, per step from the last: gate gradients, dh += dgh W_hh. Then dX, dW and db over all rows.
//
// A direction's rows (t, b) are those of the sequence; `hs` row (t, b) holds the state that this row
// starts from, so that a step's product reads adjacent rows, ragged or not, and so does dW_hh.
#pragma once
#include <algorithm>

#include "cuda/context.h"
#include "cuda/kernels.cuh"
#include "cuda/plan.h"
#include "cuda/product.h"
#include "cuda/resident.cuh"

namespace frnn {
namespace cuda {

// Carves aligned pieces out of the workspace. Without a base it only counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* Take(int64_t n) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += RoundUp(n * int64_t(sizeof(T)), 256);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

template <class C, class T>
class Steps {
 public:
  static constexpr int kExtra = States<C>::kExtra, kTape = Tape<C>::kSize;

  static int64_t ForwardWorkspace(const LayerParams& p, const Plan& plan) {
    Workspace count(nullptr);
    if (plan.variant == Variant::kOne) return 0;
    for (int d = 0; d < p.dirs; d++) ForwardBuffers(p, plan, count);
    TakeOffsets(p, plan, count);
    return count.used();
  }
  static int64_t BackwardWorkspace(const LayerGradParams& p, const Plan& plan) {
    Workspace count(nullptr);
    for (int d = 0; d < p.dirs; d++) BackwardBuffers(p, plan, count);
    TakeOffsets(p, plan, count);
    return count.used();
  }

  static void Forward(const LayerParams& p, const Plan& plan, const Call& call) {
    if (plan.variant == Variant::kOne) return OneStep(p, plan, call);
    Beside beside(call, plan.streams == 2);
    Workspace workspace(call.workspace);
    ForwardBuffers buffers[2] = {{p, plan, workspace}, {}};
    if (p.dirs == 2) buffers[1] = {p, plan, workspace};
    const bool resident = plan.keeps_weights();
    ResidentSteps steps{};
    if (resident) {
      steps = StepsOf(p, plan, call, workspace);
      for (int d = 0; d < p.dirs; d++) Direction(p, plan, call, d).StartStates(buffers[d], steps);
    }
    for (int64_t begin = 0; begin < p.T; begin += plan.chunk_steps) {
      const int64_t end = std::min(begin + plan.chunk_steps, p.T);
      int64_t first[2];
      for (int d = 0; d < p.dirs; d++)
        first[d] = Direction(p, plan, call, d).InputProduct(buffers[d], begin, end);
      if (resident) {
        steps.begin = begin, steps.end = end;
        ForwardResident(p, plan, call, buffers, first, steps);
        continue;
      }
      for (int d = 0; d < p.dirs; d++)
        Direction(p, plan, call, d).ForwardSteps(buffers[d], first[d], begin, end);
    }
    beside.Join();
  }

  static void Backward(const LayerGradParams& p, const Plan& plan, const Call& call) {
    Beside beside(call, plan.streams == 2);
    Workspace workspace(call.workspace);
    BackwardBuffers buffers[2] = {{p, plan, workspace}, {}};
    if (p.dirs == 2) buffers[1] = {p, plan, workspace};
    for (int d = 0; d < p.dirs; d++) GradDirection(p, plan, call, d).StartCarry(buffers[d]);
    if (plan.keeps_weights())
      BackwardResident(p, plan, call, buffers, StepsOf(p, plan, call, workspace));
    else
      for (int64_t end = p.T; end > 0; end -= std::min(end, plan.chunk_steps))
        for (int d = 0; d < p.dirs; d++)
          GradDirection(p, plan, call, d)
              .BackwardChunk(buffers[d], end - std::min(end, plan.chunk_steps), end);
    for (int d = 0; d < p.dirs; d++) GradDirection(p, plan, call, d).Weights(buffers[d]);
    beside.Join();
    if (p.dx == nullptr) return;
    // dX = sum over directions of dgx W_ih
    for (int d = 0; d < p.dirs; d++)
      Multiply(call.Queue(0),
               {kStorage<T>, kStorage<T>, false, false, p.rows, p.I, C::kX * p.H, buffers[d].dgx,
                C::kX * p.H, p.w[d].w_ih, p.I, d > 0, p.dx, p.I},
               call.allow_tf32);
  }

 private:
  using A = Wide<T>;
  static constexpr bool Same() {  // whether W_ih and W_hh see the same gate gradients
    if (C::kX != C::kH) return false;
    for (int q = 0; q < C::kX; q++)
      if (C::kDx[q] != C::kDh[q]) return false;
    return true;
  }
  static bool Projected(const LayerParams& p) { return p.H != p.Hout; }

  struct ForwardBuffers {
    ForwardBuffers() = default;
    ForwardBuffers(const LayerParams& p, const Plan& plan, Workspace& w)
        : gx(w.Take<A>(std::min(plan.chunk_steps * p.B, p.rows) * C::kX * p.H)) {
      if (plan.keeps_weights()) {
        hs = w.Take<T>(p.hs == nullptr ? p.rows * p.Hout : 0);
        c = w.Take<A>(p.B * kExtra * p.H);
        return;
      }
      gh = w.Take<A>(p.B * C::kH * p.H);
      if (p.hs != nullptr) return;
      h_ring = w.Take<T>(2 * p.B * p.Hout);
      c_ring = w.Take<A>(2 * p.B * kExtra * p.H);
      h_full = w.Take<T>(Projected(p) ? p.B * p.H : 0);
    }
    A *gx, *gh;  // [rows of a chunk, kX H], [B, kH H]
    T* hs;       // [rows, Hout]: of a resident kernel, where none are kept for the backward
    A* c;        // [B, kExtra H]: of resident kernels, from one launch to the next
    T* h_ring;   // [2, B, Hout]: states of two steps, where none are kept for the backward
    A* c_ring;   // [2, B, kExtra H]
    T* h_full;   // [B, H]: before the projection
  };

  struct BackwardBuffers {
    BackwardBuffers() = default;
    BackwardBuffers(const LayerParams& p, const Plan& plan, Workspace& w)
        : dgx(w.Take<T>(p.rows * C::kX * p.H)),
          dgh(Same() ? nullptr : w.Take<T>(p.rows * C::kH * p.H)),
          dh(w.Take<A>(p.B * p.Hout)),
          dc(w.Take<A>(p.B * kExtra * p.H)),
          dhp(w.Take<T>(Projected(p) ? p.rows * p.Hout : 0)),
          dh_full(w.Take<A>(Projected(p) ? p.B * p.H : 0)),
          dparams(w.Take<A>(p.B * C::kParams * p.H)),
          partial(w.Take<A>(kSumParts * std::max({C::kX, C::kH, C::kParams}) * p.H)),
          w_hh_t(w.Take<T>(plan.keeps_weights() ? C::kH * p.H * p.H : 0)) {}
    T *dgx, *dgh;  // [rows, kX H], [rows, kH H]: gate gradients; dgh null if it is the same
    A *dh, *dc;    // [B, Hout], [B, kExtra H]: what the steps already seen pass back
    T* dhp;        // [rows, Hout]: gradient of the projected h
    A* dh_full;    // [B, H]: and of h before the projection
    A* dparams;    // [B, kParams H]: gradients of parameters, of the steps already seen
    A* partial;    // [kSumParts, gates H]
    T* w_hh_t;     // [H, kH H]: W_hh^T, for a resident kernel
  };
  static constexpr int64_t kSumParts = 64;

  // One direction of a layer: where the rows and states of its steps lie, and in which queue it runs.
  struct Direction {
    Direction(const LayerParams& p, const Plan& plan, const Call& call, int d)
        : p(p), plan(plan), call(call), d(d), queue(call.Queue(plan.streams == 2 ? d : 0)) {}

    // Step s of this direction is time t.
    int64_t Time(int64_t s) const { return d == 0 ? s : p.T - 1 - s; }
    int64_t Batch(int64_t s) const { return s < 0 || s >= p.T ? 0 : p.batch_sizes[Time(s)]; }
    int64_t Row(int64_t s) const { return p.offsets[Time(s)]; }

    // Tape of this direction. hs: [rows, Hout], with a projection then [rows, H] (h before it).
    T* Hs() const {
      return static_cast<T*>(p.hs) + d * p.rows * (p.Hout + (Projected(p) ? p.H : 0));
    }
    T* HsFull() const { return Hs() + p.rows * p.Hout; }
    A* Saved() const { return static_cast<A*>(p.saved) + d * p.rows * kTape * p.H; }
    A* TapeOf(int64_t s) const { return Saved() + Row(s) * kTape * p.H; }

    Rows<T> HPrev(const ForwardBuffers& w, int64_t s) const {  // [batch, Hout]: where step s starts
      return {p.hs ? Hs() + Row(s) * p.Hout : w.h_ring + (s & 1) * p.B * p.Hout, p.Hout};
    }
    Rows<A> CPrev(const ForwardBuffers& w, int64_t s) const {  // [batch, kExtra H]
      if (p.hs) return {TapeOf(s) + Tape<C>::kC * p.H, kTape * p.H};
      return {w.c_ring + (s & 1) * p.B * kExtra * p.H, kExtra * p.H};
    }
    Rows<T> Y(int64_t s) const {  // [batch, Hout], of this direction
      return {static_cast<T*>(p.y) + Row(s) * p.dirs * p.Hout + d * p.Hout, p.dirs * p.Hout};
    }
    // Of [dirs, B, width], from a row on; null stays null.
    template <class P>
    P* State(P* base, int64_t width, int64_t row = 0) const {
      return base == nullptr ? nullptr : base + (d * p.B + row) * width;
    }

    // A kernel over [rows, units].
    template <class... Args>
    void Run(void (*kernel)(Args...), int64_t rows, int64_t units,
             const std::common_type_t<Args>&... args) const {
      if (rows == 0 || units == 0) return;
      const int64_t x = plan.threads_x, y = plan.threads_y, most = 65535;  // of a grid in y
      const runtime::Grid grid{unsigned((units + x - 1) / x),
                               unsigned(std::min(most, (rows + y - 1) / y))};
      Start(kernel, ShapeOf(kernel, unsigned(x), unsigned(y)), grid, queue.stream, args...);
    }
    void Product(const cuda::Product& product) const {
      if (product.m > 0 && product.n > 0) Multiply(queue, product, call.allow_tf32);
    }

    // gx = x W_ih^T of steps [begin, end): the row that gx begins with. Backwards in time that is the
    // first row of the last step.
    int64_t InputProduct(const ForwardBuffers& w, int64_t begin, int64_t end) const {
      const int64_t first = std::min(Row(begin), Row(end - 1));
      const int64_t last = std::max(Row(begin) + Batch(begin), Row(end - 1) + Batch(end - 1));
      const int64_t x_stride = XStride();
      Product({kStorage<T>, kStorage<A>, false, true, last - first, C::kX * p.H, p.I,
               static_cast<const T*>(p.x) + first * x_stride, x_stride, p.w[d].w_ih, p.I, false,
               w.gx, C::kX * p.H});
      return first;
    }

    void ForwardSteps(const ForwardBuffers& w, int64_t first, int64_t begin, int64_t end) const {
      for (int64_t s = begin; s < end; s++)
        LaunchForward(w, s, w.gx + (Row(s) - first) * C::kX * p.H);
    }

    // What resident kernels start from, and the words by which they see what is not written yet.
    void StartStates(const ForwardBuffers& w, const ResidentSteps& steps) const {
      T* hs = States(w);
      Unwritten(hs, p.rows * p.Hout);
      Run(cuda::StartStates<T>, p.B, p.H, steps, d == 1, State(static_cast<const T*>(p.h0), p.H),
          hs);
      Run(Convert<A, T>, p.B, kExtra * p.H, p.B, kExtra * p.H, {w.c, kExtra * p.H},
          {State(static_cast<const T*>(p.c0), kExtra * p.H), kExtra * p.H});
    }
    T* States(const ForwardBuffers& w) const { return p.hs ? Hs() : w.hs; }
    void Unwritten(T* data, int64_t n) const {
      if (plan.variant != Variant::kResident) return;  // nobody polls it
      runtime::Fill(queue.stream, data, 0xFF, size_t(n) * sizeof(T));
    }

    // What the gate math of a step takes from the layer, and where it goes.
    GateForwardArgs<T> GatesOf(int64_t s) const {
      GateForwardArgs<T> a{};
      a.rows = Batch(s), a.next_rows = std::min(Batch(s), Batch(s + 1)), a.H = p.H;
      a.b_ih = static_cast<const T*>(p.w[d].b_ih);
      a.b_hh = static_cast<const T*>(p.w[d].b_hh);
      for (int k = 0; k < C::kParams; k++) a.params[k] = static_cast<const T*>(p.w[d].params[k]);
      a.output = Y(s);
      a.publish = true;
      a.h_last = {State(static_cast<T*>(p.h_n), p.Hout), p.Hout};
      a.c_last = {State(static_cast<T*>(p.c_n), kExtra * p.H), kExtra * p.H};
      return a;
    }

    void LaunchForward(const ForwardBuffers& w, int64_t s, const A* gx) const {
      const int64_t batch = Batch(s);
      const Rows<T> h_prev = HPrev(w, s), y = Y(s);
      const Rows<A> c_prev = CPrev(w, s);
      // Sequences that start here: all at the first step; backwards in time the shorter ones later.
      const int64_t running = std::min(batch, Batch(s - 1)), starting = batch - running;
      Run(Convert<T, T>, starting, p.Hout, starting, p.Hout, {&h_prev(running, 0), p.Hout},
          {State(static_cast<const T*>(p.h0), p.Hout, running), p.Hout});
      Run(Convert<A, T>, starting, kExtra * p.H, starting, kExtra * p.H,
          {&c_prev(running, 0), c_prev.stride},
          {State(static_cast<const T*>(p.c0), kExtra * p.H, running), kExtra * p.H});

      if (C::kH > 0)
        Product({kStorage<T>, kStorage<A>, false, true, batch, C::kH * p.H, p.Hout, h_prev.data,
                 p.Hout, p.w[d].w_hh, p.Hout, false, w.gh, C::kH * p.H});

      const bool projected = Projected(p);
      GateForwardArgs<T> a = GatesOf(s);
      const Rows<T> full{p.hs ? HsFull() + Row(s) * p.H : w.h_full, p.H};
      a.gx = {gx, C::kX * p.H};
      a.gh = {w.gh, C::kH * p.H};
      a.h_prev = {h_prev.data, h_prev.stride};
      a.c_prev = {c_prev.data, c_prev.stride};
      if (projected) a.output = full;
      a.publish = !projected;
      if (s + 1 < p.T) {
        a.h_next = HPrev(w, s + 1);
        if (kExtra > 0) a.c_next = CPrev(w, s + 1);
      }
      if (p.saved) a.tape = {TapeOf(s), kTape * p.H};
      Run(GateForward<C, T>, batch, p.H, a);
      if (!projected) return;
      Product({kStorage<T>, kStorage<T>, false, true, batch, p.Hout, p.H, full.data, p.H,
               p.w[d].w_hr, p.H, false, y.data, y.stride});
      Run(Publish<T>, batch, p.Hout, batch, a.next_rows, p.Hout, {y.data, y.stride}, a.h_next,
          a.h_last);
    }

    // The binding sees to it that rows of x lie evenly spaced.
    int64_t XStride() const {
      const int64_t stride = !p.ragged && p.B == 1 ? p.x_t_stride : p.x_b_stride;
      return std::max(stride, p.I);
    }

    const LayerParams& p;
    const Plan& plan;
    const Call& call;
    const int d;
    const CudaQueue queue;
  };

  struct GradDirection : Direction {
    GradDirection(const LayerGradParams& g, const Plan& plan, const Call& call, int d)
        : Direction(g, plan, call, d), g(g) {}
    using Direction::d;
    using Direction::p;
    using Direction::Product;
    using Direction::Row;
    using Direction::Run;
    using Direction::State;

    void StartCarry(const BackwardBuffers& w) const {
      Run(Convert<A, T>, p.B, p.Hout, p.B, p.Hout, {w.dh, p.Hout},
          {State(static_cast<const T*>(g.dh_n), p.Hout), p.Hout});
      Run(Convert<A, T>, p.B, kExtra * p.H, p.B, kExtra * p.H, {w.dc, kExtra * p.H},
          {State(static_cast<const T*>(g.dc_n), kExtra * p.H), kExtra * p.H});
      const int64_t width = C::kParams * p.H;
      Run(Convert<A, T>, p.B, width, p.B, width, {w.dparams, width}, {nullptr, 0});
    }

    void BackwardChunk(const BackwardBuffers& w, int64_t begin, int64_t end) const {
      for (int64_t s = end - 1; s >= begin; s--) LaunchBackward(w, s);
    }

    void LaunchBackward(const BackwardBuffers& w, int64_t s) const {
      const int64_t batch = this->Batch(s), row = Row(s);
      const Rows<const T> dy = Dy(s);
      GateBackwardArgs<T> a{};
      a.rows = batch, a.H = p.H;
      if (Projected(p)) {  // through h = W_hr h_full first
        T* dhp = w.dhp + row * p.Hout;
        Run(SumGradients<T>, batch, p.Hout, batch, p.Hout, {dhp, p.Hout}, {w.dh, p.Hout}, dy);
        Product({kStorage<T>, kStorage<A>, false, false, batch, p.H, p.Hout, dhp, p.Hout,
                 p.w[d].w_hr, p.H, false, w.dh_full, p.H});
        a.dh = {w.dh_full, p.H};
      } else {
        a.dh = {w.dh, p.H};
        a.dy = dy;
      }
      a.tape = {this->TapeOf(s), kTape * p.H};
      a.h_prev = {this->Hs() + row * p.Hout, p.Hout};
      for (int k = 0; k < C::kParams; k++) a.params[k] = static_cast<const T*>(p.w[d].params[k]);
      a.dc = {w.dc, kExtra * p.H};
      a.dgx = {w.dgx + row * C::kX * p.H, C::kX * p.H};
      if (!Same()) a.dgh = {w.dgh + row * C::kH * p.H, C::kH * p.H};
      a.dh_prev = {w.dh, p.H};
      a.dparams = {w.dparams, C::kParams * p.H};
      Run(GateBackward<C, T>, batch, p.H, a);

      if (C::kH == 0 || (s == 0 && g.dh0 == nullptr)) return;
      // dh_{t-1} = dgh W_hh, beside the elementwise path if there is one.
      Product({kStorage<T>, kStorage<A>, false, false, batch, p.Hout, C::kH * p.H, Dgh(w, row),
               C::kH * p.H, p.w[d].w_hh, p.Hout, kGradReachesH<C>, w.dh, p.Hout});
    }

    // Gradients that are sums over all rows, and those of the initial states.
    void Weights(const BackwardBuffers& w) const {
      const DirectionGrads& dw = g.dw[d];
      Run(Convert<T, A>, g.dh0 ? p.B : 0, p.Hout, p.B, p.Hout,
          {State(static_cast<T*>(g.dh0), p.Hout), p.Hout}, {w.dh, p.Hout});
      Run(Convert<T, A>, g.dc0 ? p.B : 0, kExtra * p.H, p.B, kExtra * p.H,
          {State(static_cast<T*>(g.dc0), kExtra * p.H), kExtra * p.H}, {w.dc, kExtra * p.H});
      const int64_t x_stride = this->XStride();
      OuterProduct(dw.w_ih, w.dgx, C::kX * p.H, p.x, p.I, x_stride);
      OuterProduct(dw.w_hh, Dgh(w, 0), C::kH * p.H, this->Hs(), p.Hout, p.Hout);
      if (Projected(p)) OuterProduct(dw.w_hr, w.dhp, p.Hout, this->HsFull(), p.H, p.H);
      SumRows<T>(dw.b_ih, p.rows, {w.dgx, C::kX * p.H}, C::kX * p.H, w.partial);
      SumRows<T>(dw.b_hh, p.rows, {Dgh(w, 0), C::kH * p.H}, C::kH * p.H, w.partial);
      for (int k = 0; k < C::kParams; k++)
        SumRows<A>(dw.params[k], p.B, {w.dparams + k * p.H, C::kParams * p.H}, p.H, w.partial);
    }

   private:
    const T* Dgh(const BackwardBuffers& w, int64_t row) const {
      return (Same() ? w.dgx : w.dgh) + row * C::kH * p.H;
    }
    Rows<const T> Dy(int64_t s) const {
      if (g.dy == nullptr) return {nullptr, 0};
      const int64_t first = p.ragged ? Row(s) * g.dy_b_stride : this->Time(s) * g.dy_t_stride;
      return {static_cast<const T*>(g.dy) + first + d * p.Hout, g.dy_b_stride};
    }
    // dW [n, m] = left^T right over all rows
    void OuterProduct(void* dw, const T* left, int64_t n, const void* right, int64_t m,
                      int64_t stride) const {
      if (dw != nullptr)
        Product({kStorage<T>, kStorage<T>, true, false, n, m, p.rows, left, n, right, stride, false,
                 dw, m});
    }
    template <class Of>
    void SumRows(void* sum, int64_t rows, const Rows<const Of>& of, int64_t columns,
                 A* partial) const {
      if (sum == nullptr) return;
      const int64_t parts = std::min(kSumParts, rows);
      Run(ColumnSumParts<Of>, parts, columns, rows, columns, parts, of, partial);
      Run(ColumnSum<T>, 1, columns, columns, parts, static_cast<const A*>(partial),
          static_cast<T*>(sum));
    }

    const LayerGradParams& g;
  };

  // [T + 1]: what kernels that keep their weights read of a ragged batch, else null.
  static int64_t* TakeOffsets(const LayerParams& p, const Plan& plan, Workspace& workspace) {
    return plan.keeps_weights() && p.ragged ? workspace.Take<int64_t>(p.T + 1) : nullptr;
  }

  // All steps, for resident kernels. The offsets of a ragged batch are brought to the card.
  static ResidentSteps StepsOf(const LayerParams& p, const Plan& plan, const Call& call,
                               Workspace& workspace) {
    int64_t* offsets = TakeOffsets(p, plan, workspace);
    for (int64_t i = 0; offsets != nullptr && i <= p.T; i += OffsetsPart::kSize) {
      OffsetsPart part;
      const int count = int(std::min<int64_t>(OffsetsPart::kSize, p.T + 1 - i));
      std::copy_n(p.offsets + i, count, part.values);
      Start(StoreOffsets, ShapeOf(StoreOffsets, 128), {unsigned(count + 127) / 128},
            call.streams[0], part, count, offsets + i);
    }
    const Patience patience{call.context.device.alarm(), Patience::kPolls};
    return {p.H, p.B, p.T, 0, p.T, offsets, plan.copies, p.dirs, patience};
  }

  static void OneStep(const LayerParams& p, const Plan& plan, const Call& call) {
    OneStepArgs<T> args{};
    constexpr int64_t kAtOnce = 16 / sizeof(T);
    args.I = p.I, args.x_stride = Direction(p, plan, call, 0).XStride();
    bool whole = p.I % kAtOnce == 0 && p.H % kAtOnce == 0 && args.x_stride % kAtOnce == 0;
    for (int d = 0; d < p.dirs; d++) {
      const Direction on(p, plan, call, d);
      OneStepDirection<T>& a = args.dir[d];
      a.x = static_cast<const T*>(p.x);
      a.w_ih = static_cast<const T*>(p.w[d].w_ih), a.w_hh = static_cast<const T*>(p.w[d].w_hh);
      a.c_prev = on.State(static_cast<const T*>(p.c0), kExtra * p.H);
      a.gates = on.GatesOf(0);
      a.gates.h_prev = {on.State(static_cast<const T*>(p.h0), p.H), p.H};
      const void* const operands[] = {a.x, a.w_ih, a.w_hh, a.gates.h_prev.data};
      for (const void* operand : operands)
        whole &= reinterpret_cast<uintptr_t>(operand) % 16 == 0;
    }
    const int64_t groups = (p.B + kOneStepRows - 1) / kOneStepRows;
    const runtime::Grid grid{unsigned((p.H * 32 + kOneStepThreads - 1) / kOneStepThreads),
                             unsigned(groups * p.dirs)};
    const auto run = [&](auto kernel) {
      if (p.B > 0 && p.H > 0)
        Start(kernel, ShapeOf(kernel, kOneStepThreads), grid, call.streams[0], args, groups);
    };
    whole ? run(cuda::OneStep<C, T, kAtOnce>) : run(cuda::OneStep<C, T, 1>);
  }

  // first[d]: the row that gx of direction d begins with.
  static void ForwardResident(const LayerParams& p, const Plan& plan, const Call& call,
                              const ForwardBuffers* buffers, const int64_t* first,
                              const ResidentSteps& steps) {
    if constexpr (kHasResident<C, T>) {
      ResidentForwardArgs<T> args{};
      args.steps = steps;
      for (int d = 0; d < p.dirs; d++) {
        const Direction on(p, plan, call, d);
        const DirectionWeights& w = p.w[d];
        ResidentForwardDirection<T>& a = args.dir[d];
        a.start = on.Time(0), a.way = d == 0 ? 1 : -1;
        a.h0 = on.State(static_cast<const T*>(p.h0), p.Hout);
        a.w_hh = static_cast<const T*>(w.w_hh);
        a.b_ih = static_cast<const T*>(w.b_ih);
        a.b_hh = static_cast<const T*>(w.b_hh);
        for (int k = 0; k < C::kParams; k++) a.params[k] = static_cast<const T*>(w.params[k]);
        a.gx = buffers[d].gx, a.gx_row = first[d];
        a.hs = on.States(buffers[d]);
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

  static void BackwardResident(const LayerGradParams& p, const Plan& plan, const Call& call,
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
              C::kH * p.H, p.H, static_cast<const T*>(p.w[d].w_hh), buffers[d].w_hh_t);
        ResidentBackwardDirection<T>& a = args.dir[d];
        a.start = on.Time(0), a.way = d == 0 ? 1 : -1;
        a.w_hh_t = buffers[d].w_hh_t;
        for (int k = 0; k < C::kParams; k++) a.params[k] = static_cast<const T*>(p.w[d].params[k]);
        a.dy = p.dy ? static_cast<const T*>(p.dy) + d * p.Hout : nullptr;
        a.dy_t_stride = p.dy_t_stride, a.dy_b_stride = p.dy_b_stride;
        a.hs = on.Hs(), a.tape = on.Saved();
        a.dgx = buffers[d].dgx, a.dgh = dgh;
        a.dh = buffers[d].dh, a.dc = buffers[d].dc;
        a.dparams = buffers[d].dparams;
      }
      WithResidentInstance<C, T>(plan, [&](auto instance) {
        instance.Backward(plan.copies * p.dirs, args, call.streams[0]);
      });
    }
  }
};

}  // namespace cuda
}  // namespace frnn
