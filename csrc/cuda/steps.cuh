// One recurrent layer on a card, for any cell. Everything that does not depend on the step before is
// one product over many steps. What does: per step one product and one kernel with the gate math, or
// where the weights fit into registers one kernel for all steps (resident.cuh), or where the update is
// affine a scan (scan.cuh).
//
// Forward, per chunk of steps: gx = x W_ih^T; per step: gh = h W_hh^T, gates.
// Backward, per step from the last: gate gradients, dh += dgh W_hh. Then dX, dW and db over all rows.
//
// A direction's rows (t, b) are those of the sequence; `hs` row (t, b) holds the state that this row
// starts from, so that a step's product reads adjacent rows, ragged or not, and so does dW_hh.
#pragma once
#include <algorithm>
#include <cstring>

#include "cuda/context.h"
#include "cuda/kernels.cuh"
#include "cuda/plan.h"
#include "cuda/product.h"
#include "cuda/resident.cuh"
#include "cuda/scan.cuh"

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
  static constexpr bool kShows = C::kShows >= 0;

  // Whether states change between two steps, or all of them are wanted.
  static bool ChangesStates(const LayerParams& p) {
    return p.reset || p.zoneout || p.h_mask || p.every_state;
  }

  // Whether what the output shows is normalised.
  static bool NormOfShown(const LayerParams& p) {
    return kShows && p.w[0].gains[kShown] != nullptr;
  }

  // Whether the update of the affine states is affine in this call, too, and the output is of a step.
  static bool CanScan(const LayerParams& p) {
    return C::kAffine != 0 && !p.zoneout && !p.h_mask && !NormOfH(p) && !NormOfShown(p) &&
           !InBlocks(p);
  }

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
      for (int d = 0; d < p.dirs; d++) {
        const Direction on(p, plan, call, d);
        if (scan)
          on.ForwardScan(buffers[d], first[d], on.ScanOf(begin, end, offsets));
        else
          on.ForwardSteps(buffers[d], first[d], begin, end);
      }
    }
    beside.Join();
  }

  static void Backward(const LayerGradParams& p, const Plan& plan, const Call& call) {
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

 private:
  using A = Wide<T>;
  static constexpr bool Same() {  // whether W_ih and W_hh see the same gate gradients
    if (C::kX != C::kH) return false;
    for (int q = 0; q < C::kX; q++)
      if (C::kDx[q] != C::kDh[q]) return false;
    return true;
  }
  static bool Projected(const LayerParams& p) { return p.H != p.Hout; }

  // Whether the gate math of a step is that of kernels with stages.
  static bool HasStages(const LayerParams& p) {
    return ChangesStates(p) || NormOfX(p) || NormOfH(p) || NormOfShown(p) || InBlocks(p);
  }
  // Where x W_ih^T is normalised, and h W_hh^T, if they are; and gates of a row of each place.
  static Place PlaceOfX(const LayerParams& p) { return NormOfSum(p) ? kSum : kInput; }
  static Place PlaceOfH(const LayerParams& p) { return NormOfSum(p) ? kSum : kRecurrent; }
  static constexpr int64_t GatesAt(Place place) {
    return place == kShown ? 1 : place == kInput ? C::kX : C::kH;
  }

  // W_hh is block-diagonal: steps multiply block by block, of weights that have all gates of a block
  // together. Kernels that keep their weights take the whole matrix.
  static bool InBlocks(const LayerParams& p) { return p.blocks > 1; }
  static int64_t Blocks(const LayerParams& p) { return InBlocks(p) ? p.blocks : 1; }
  static int64_t BlockWidth(const LayerParams& p) { return p.H / Blocks(p); }
  static int64_t Columns(const LayerParams& p) { return p.Hout / Blocks(p); }  // of W_hh
  static bool ByBlocks(const LayerParams& p, const Plan& plan) {
    return InBlocks(p) && !plan.keeps_weights();
  }
  static int64_t OwnWeights(const LayerParams& p, const Plan& plan) {
    return !InBlocks(p) ? 0 : C::kH * p.H * (ByBlocks(p, plan) ? BlockWidth(p) : p.H);
  }
  // Of gates beside h.
  static GateOrder OrderOfH(const LayerParams& p, const Plan& plan) {
    return {C::kH, uint32_t(p.H), uint32_t(ByBlocks(p, plan) ? BlockWidth(p) : p.H)};
  }
  static GateOrder PlainOrder(const LayerParams& p) {
    return {uint32_t(std::max(C::kX, C::kH)), uint32_t(p.H), uint32_t(p.H)};
  }
  static bool HasGivenGrads(const LayerGradParams& p) { return C::kGiven > 0 && p.dgiven; }
  // f(k as a constant) for each operand of W_hh beside h, of the product that gives it.
  template <class F, int... k>
  static void ForOperands(const F& f, std::integer_sequence<int, k...>) {
    (f(std::integral_constant<int, k>()), ...);
  }
  template <class F>
  static void ForOperands(const F& f) {
    ForOperands(f, std::make_integer_sequence<int, C::kOperands>());
  }
  // Gates of all products before product k, and their rows in W_hh.
  static int64_t GatesBefore(const LayerParams& p, int k) { return Products<C>::First(k) * p.H; }
  // Whether gate gradients of h, as the cell gives them, lie by themselves.
  static bool HasOwnDgh(const LayerParams& p, const Plan& plan) {
    return !Same() || (ByBlocks(p, plan) && !NormOfH(p));
  }

  struct ForwardBuffers {
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
    T* masked;  // [B, Hout], of resident kernels [rows, Hout]: h as it goes into W_hh, where a mask
                // multiplies it
    uint8_t* cuts;  // [T, B]: of resident kernels, see FindCuts
    T* h_ring;      // [2, B, Hout]: states of two steps, where none are kept for the backward
    A* c_ring;      // [2, B, kExtra H]
    T* h_full;      // [B, H]: before the projection
    A* shown;       // [B, H]: what the output shows, where that is normalised
    A* tape;        // [B, kTape H]: and of its step, where none is kept for the backward
  };

  struct BackwardBuffers {
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
          maps(w.Take<A>(plan.variant == Variant::kScan
                             ? GradRows(p, plan) * ScanMaps<C, A>::kSize * p.H
                             : 0)),
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
  static constexpr int64_t kSumParts = 64;

  static int64_t ScanChunks(const Plan& plan, int64_t steps) {
    return (steps + plan.scan_length - 1) / plan.scan_length;
  }
  // Sequences, each in as many parts as threads sum up gradients of parameters over it.
  static int64_t GradRows(const LayerParams& p, const Plan& plan) {
    return p.B * (plan.variant == Variant::kScan ? ScanChunks(plan, p.T) : 1);
  }

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
    A* Saved() const {
      const int64_t tape = kTape + FactsOf<C>(kTape).NormTape(p.w[0]);
      return static_cast<A*>(p.saved) + d * p.rows * tape * p.H;
    }
    // Behind that, of what was normalised: numbers [rows, gates H], and a scale for each row.
    struct NormTape {
      A *n, *scale;
    };
    NormTape NormTapeOf(Place place, int64_t row) const {
      const int64_t behind = kTape + (place != kInput && NormOfX(p) ? C::kX + 1 : 0) +
                             (place == kShown && NormOfH(p) ? C::kH + 1 : 0);
      const int64_t width = GatesAt(place) * p.H;
      A* n = Saved() + p.rows * behind * p.H;
      return {n + row * width, n + p.rows * width + row};
    }
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

    // Of [dirs, B, width], or with the states of every step of [dirs, rows, width]: this direction's,
    // or those of step s.
    template <class P>
    P* AllStates(P* all, int64_t width) const {
      return all == nullptr ? nullptr : all + d * (p.every_state ? p.rows : p.B) * width;
    }
    template <class P>
    Rows<P> StatesAfter(int64_t s, P* all, int64_t width) const {
      P* const own = AllStates(all, width);
      return {own == nullptr || !p.every_state ? own : own + Row(s) * width, width};
    }
    // What a unit keeps of its states in step s.
    Rows<const T> Zones(int64_t s) const {
      if (p.zoneout == nullptr) return {nullptr, 0};
      const int64_t width = C::kStates * p.H, first = d * p.zoneout_rows;
      const T* zones = static_cast<const T*>(p.zoneout);
      if (p.zoneout_rows == 1) return {zones + first * width, 0};
      return {zones + (first + Row(s)) * width, width};
    }
    // For the rows that go on from step s, or for -1 to the first one: whether as zeros. Null: none.
    const uint8_t* Resets(int64_t s) const {
      if (p.reset == nullptr || s + 1 >= p.T) return nullptr;
      if (d == 0) return p.reset + Row(s + 1);
      return s < 0 ? nullptr : p.reset + Row(s);
    }
    Rows<const T> Mask(int64_t row = 0) const {
      return {State(static_cast<const T*>(p.h_mask), p.Hout, row), p.Hout};
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
    // W_hh as products read it.
    const T* WHh(const T* own) const {
      return InBlocks(p) ? own : static_cast<const T*>(p.w[d].w_hh);
    }
    void TakeWeights(T* own) const {
      if (!InBlocks(p)) return;
      const int64_t width = BlockWidth(p);
      const T* w_hh = static_cast<const T*>(p.w[d].w_hh);
      if (plan.keeps_weights())
        Run(WholeMatrix<T>, C::kH * p.H, p.H, C::kH * p.H, p.H, width, w_hh, own);
      else
        SwapGates(w_hh, own, width * width, false);
    }
    // [gates, blocks, rest] of each product with all gates of a block together, or back.
    void SwapGates(const T* from, T* to, int64_t rest, bool back) const {
      for (int k = 0; k < Products<C>::kCount; k++) {
        const int64_t gates = Products<C>::Gates(k), blocks = p.blocks;
        const int64_t at = Products<C>::First(k) * blocks * rest;
        Run(SwapFirst<T>, gates * blocks, rest, back ? blocks : gates, back ? gates : blocks, rest,
            from + at, to + at);
      }
    }

    // Kernels of what is normalised.
    NormRowsArgs<T> NormOf(Place place, int64_t row) const {
      NormRowsArgs<T> a{};
      a.width = GatesAt(place) * p.H, a.centred = p.norm == Norm::kLayer;
      a.eps = A(NormEps(p));
      a.of_v = a.of_added = PlainOrder(p);
      a.gain = static_cast<const T*>(p.w[d].gains[place]);
      if (p.saved) {
        const NormTape tape = NormTapeOf(place, row);
        a.n = {tape.n, a.width}, a.scale = tape.scale;
      }
      return a;
    }
    template <class Args>
    void RunRows(void (*kernel)(Args), int64_t rows, const Args& args) const {
      if (rows > 0 && p.H > 0)
        Start(kernel, ShapeOf(kernel, kNormThreads), {unsigned(rows)}, queue.stream, args);
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

    // Steps [begin, end) as a scan.
    ScanSteps ScanOf(int64_t begin, int64_t end, const int64_t* offsets) const {
      return {p.H, p.B, p.T, begin, end, plan.scan_length, d == 1, offsets, p.reset};
    }
    // One chunk after the other; `from` are the states before the first, or null.
    void RunStarts(const ScanSteps& n, const A* from, const ScanMaps<C, A>& maps) const {
      Run(ScanStarts<C, A>, n.B, n.H, n.Chunks(), n.B, n.H,
          Rows<const A>{from, kAffineStates<C> * n.H}, maps);
    }
    ScanMaps<C, A> MapsOf(A* maps) const { return {{maps, ScanMaps<C, A>::kSize * p.H}, p.H}; }
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
        a.h_n = AllStates(static_cast<T*>(p.h_n), p.H);
        a.c_n = AllStates(static_cast<T*>(p.c_n), kExtra * p.H);
        a.hs = p.hs ? Hs() : nullptr;
        a.tape = p.saved ? Saved() : nullptr;
        a.maps = MapsOf(w.maps);
        a.after = {w.c, kAffineStates<C> * p.H};
        Run(ScanForwardMaps<C, T>, (n.Chunks() - 1) * p.B, p.H, a);
        RunStarts(n, n.begin > 0 ? w.c : nullptr, a.maps);
        Run(cuda::ScanForward<C, T>, n.Chunks() * p.B, p.H, a);
      }
    }

    // What resident kernels start from, and the words by which they see what is not written yet.
    void StartStates(const ForwardBuffers& w, const ResidentSteps& steps) const {
      T* hs = States(w);
      Unwritten(p.h_mask ? w.masked : hs, p.rows * p.Hout);
      const uint8_t* reset = Resets(-1);
      Run(cuda::StartStates<T>, p.B, p.H, steps, d == 1, State(static_cast<const T*>(p.h0), p.H),
          reset, hs, Mask().data, w.masked);
      Run(Convert<A, T>, p.B, kExtra * p.H, p.B, kExtra * p.H, {w.c, kExtra * p.H},
          {State(static_cast<const T*>(p.c0), kExtra * p.H), kExtra * p.H}, reset);
      FindCuts(w.cuts, steps);
    }
    void FindCuts(uint8_t* cuts, const ResidentSteps& steps) const {
      if (p.reset)
        Run(cuda::FindCuts, p.T, p.B, steps, Time(0), int64_t(d == 0 ? 1 : -1), p.reset, cuts);
    }
    // The stages of a resident kernel; h and c: those of every step, or their gradients.
    template <class P>
    ResidentStages<P> StagesOf(const uint8_t* cuts, P* h, P* c) const {
      ResidentStages<P> a{};
      a.cuts = p.reset ? cuts : nullptr;
      a.zones = Zones(0).data, a.one_row = p.zoneout_rows == 1;
      if (p.zoneout && p.zoneout_rows != 1) a.zones -= Row(0) * C::kStates * p.H;
      a.mask = Mask().data;
      if (p.every_state && h) a.every_h = h + d * p.rows * p.H;
      if (p.every_state && c) a.every_c = c + d * p.rows * kExtra * p.H;
      return a;
    }
    T* States(const ForwardBuffers& w) const { return p.hs ? Hs() : w.hs; }
    void Unwritten(T* data, int64_t n) const {
      if (plan.variant != Variant::kResident) return;  // nobody polls it
      runtime::Fill(queue.stream, data, 0xFF, size_t(n) * sizeof(T));
    }

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
      a.to.h_last = StatesAfter(s, static_cast<T*>(p.h_n), p.Hout);
      a.c_last = StatesAfter(s, static_cast<T*>(p.c_n), kExtra * p.H);
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
      const Rows<T> full{p.hs ? HsFull() + Row(s) * p.H : w.h_full, p.H};
      a.gx = {gx, C::kX * p.H};
      a.operands = {w.operands, p.B * p.H, p.H};
      a.gh = {NormOfSum(p) ? nullptr : w.gh, C::kH * p.H}, a.of_gh = OrderOfH(p, plan);
      a.h_prev = {h_prev.data, h_prev.stride};
      a.c_prev = {c_prev.data, c_prev.stride};
      if (projected) a.output = full;
      a.publish = !projected;
      a.to.reset = Resets(s);
      a.to.mask = MaskFor(w);
      a.zones = Zones(s);
      if (s + 1 < p.T) {
        a.to.h_next = HPrev(w, s + 1);
        if (kExtra > 0) a.c_next = CPrev(w, s + 1);
      }
      if (p.saved) a.tape = {TapeOf(s), kTape * p.H};
      const bool stages = HasStages(p);
      ForOperands([&](auto k) {
        Run(stages ? OperandForward<C, T, true, decltype(k)::value>
                   : OperandForward<C, T, false, decltype(k)::value>,
            batch, p.H, a);
        RecurrentProduct<k + 1>(w, w.operands + k * p.B * p.H, batch);
      });
      RunGates(w, s, a);
      if (!projected) return;
      Product({kStorage<T>, kStorage<T>, false, true, batch, p.Hout, p.H, full.data, p.H,
               p.w[d].w_hr, p.H, false, y.data, y.stride});
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
      Run(HasStages(p) ? GateForward<C, T, true> : GateForward<C, T, false>, gates.rows, p.H,
          gates);
    }
    // gh = h W_hh^T, the gates of product k, or with another operand.
    template <int k>
    void RecurrentProduct(const ForwardBuffers& w, const T* h, int64_t batch) const {
      const int64_t gates = Products<C>::Gates(k) * BlockWidth(p), columns = Columns(p);
      const int64_t before = GatesBefore(p, k);
      Product({kStorage<T>, kStorage<A>, false, true, batch, gates, columns, h, p.Hout,
               WHh(w.w_hh) + before * columns, columns, false, w.gh + before, C::kH * p.H,
               Blocks(p), columns, gates * columns, gates});
    }
    // What the next step multiplies, from a row on.
    HMask<T> MaskFor(const ForwardBuffers& w, int64_t row = 0) const {
      return {Mask(row), {w.masked + (p.h_mask ? row * p.Hout : 0), p.Hout}};
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
        Product({kStorage<T>, kStorage<A>, false, false, batch, p.H, p.Hout, dhp, p.Hout,
                 p.w[d].w_hr, p.H, false, w.dh_full, p.H});
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
        Run(stages ? OperandBackward<C, T, true, k> : OperandBackward<C, T, false, k>, batch, p.H,
            a);
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
    void RunGateGrads(const BackwardBuffers& w, int64_t row,
                      const GateBackwardArgs<T>& gates) const {
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

  // [T + 1]: what kernels for all steps read of a ragged batch, else null. Brought to the card.
  static int64_t* TakeOffsets(const LayerParams& p, const Plan& plan, Workspace& workspace) {
    return plan.variant >= Variant::kScan && p.ragged ? workspace.Take<int64_t>(p.T + 1) : nullptr;
  }
  static const int64_t* BringOffsets(const LayerParams& p, const Plan& plan, const Call& call,
                                     Workspace& workspace) {
    int64_t* offsets = TakeOffsets(p, plan, workspace);
    for (int64_t i = 0; offsets != nullptr && i <= p.T; i += OffsetsPart::kSize) {
      OffsetsPart part;
      const int count = int(std::min<int64_t>(OffsetsPart::kSize, p.T + 1 - i));
      std::copy_n(p.offsets + i, count, part.values);
      Start(StoreOffsets, ShapeOf(StoreOffsets, 128), {unsigned(count + 127) / 128},
            call.streams[0], part, count, offsets + i);
    }
    return offsets;
  }

  // All steps, for resident kernels.
  static ResidentSteps StepsOf(const LayerParams& p, const Plan& plan, const Call& call,
                               const int64_t* offsets) {
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
          on.Run(MaskStates<T>, p.T * p.B, p.H, steps, static_cast<const T*>(on.Hs()),
                 on.Mask().data, buffers[d].h_masked);
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
