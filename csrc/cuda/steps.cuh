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
#include <type_traits>
#include <utility>

#include "cuda/context.h"
#include "cuda/kernels.cuh"
#include "cuda/matrices.cuh"
#include "cuda/norm.cuh"
#include "cuda/plan.h"
#include "cuda/product.h"
#include "cuda/resident_block.cuh"
#include "cuda/resident_setup.cuh"
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

// The members that are only declared here are in steps_forward.cuh and steps_backward.cuh.
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

  static void Forward(const LayerParams& p, const Plan& plan, const Call& call);
  static void Backward(const LayerGradParams& p, const Plan& plan, const Call& call);

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

    // A kernel with a block of threads for each row.
    template <class Args>
    void RunRows(void (*kernel)(Args), int64_t rows, const Args& args) const {
      if (rows > 0 && p.H > 0)
        Start(kernel, ShapeOf(kernel, kNormThreads), {unsigned(rows)}, queue.stream, args);
    }

    void Product(const cuda::Product& product) const {
      if (product.m > 0 && product.n > 0) Multiply(queue, product, call.allow_tf32);
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
    void Unwritten(T* data, int64_t n) const {
      if (plan.variant != Variant::kResident) return;  // nobody polls it
      runtime::Fill(queue.stream, data, 0xFF, size_t(n) * sizeof(T));
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

  struct ForwardBuffers;
  struct ForwardDirection;
  struct BackwardBuffers;
  struct GradDirection;

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

  static void OneStep(const LayerParams& p, const Plan& plan, const Call& call);
  // first[d]: the row that gx of direction d begins with.
  static void ForwardResident(const LayerParams& p, const Plan& plan, const Call& call,
                              const ForwardBuffers* buffers, const int64_t* first,
                              const ResidentSteps& steps);
  static void BackwardResident(const LayerGradParams& p, const Plan& plan, const Call& call,
                               const BackwardBuffers* buffers, const ResidentSteps& steps);
};

}  // namespace cuda
}  // namespace frnn
