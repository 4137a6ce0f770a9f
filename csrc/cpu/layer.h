// The CPU engine: one recurrent layer over a whole sequence, for any cell. What both passes share
// is here, the passes are in cpu/forward.h and cpu/backward.h, and what single sequences have
// instead of the first in cpu/single.h.
//
// Units are cut into panels of a few vectors; a thread owns a range of panels for the whole
// sequence, so its slice of the weights stays in its own cache. Weights are packed per panel as
// [k][gate][unit]: a tile of a product holds all gates of its units, and the gate math runs on it
// while it is in the first-level cache.
//
// How matrices are multiplied is behind cpu/product: on vectors, or on tiles where the processor
// has a unit for them. All choices by shape and machine are in cpu/plan.h.
#pragma once
#include <tuple>

#include "core/scratch.h"
#include "core/step.h"
#include "cpu/convert.h"
#include "cpu/norm.h"
#include "cpu/plan.h"
#include "cpu/product/panel_product.h"
#include "cpu/product/tiles.h"
#include "cpu/steps.h"
#include "cpu/threads.h"

FRNN_BEGIN

// The tape of a row, in values per unit: what the cell saved, then the states of c that it reads. h
// is at hand.
template <class C>
struct Tape {
  static constexpr int kExtra = States<C>::kExtra;
  static constexpr int OfExtra(int e) {
    int at = C::kSaved;
    for (int i = 0; i < e; i++) at += States<C>::ReadsExtra(i);
    return at;
  }
  static constexpr int kSize = OfExtra(kExtra);
};

template <class C>
class Layer {
 public:
  static void Forward(const LayerParams& p) {
    switch (LoopOf(p)) {
      case Loop::kOneStep:
        return ForwardPass::OneStep(p);
      case Loop::kStream:
        return ForwardStream(p);
      case Loop::kAny:
        Run<ForwardPass>(p);
    }
  }
  static void Backward(const LayerGradParams& p) { Run<BackwardPass>(p); }
  static void Scale(void* data, const void* by, int64_t n, Storage storage) {
    constexpr int64_t kBlock = 256;
    T a[kBlock], b[kBlock];
    for (int64_t i = 0; i < n; i += kBlock) {
      const int64_t count = n - i < kBlock ? n - i : kBlock;
      LoadRow(At(data, storage, i), storage, a, count);
      LoadRow(At(by, storage, i), storage, b, count);
      for (int64_t j = 0; j < count; j++) a[j] *= b[j];
      StoreRow(At(data, storage, i), storage, a, count);
    }
  }
  static int64_t PackedSize(int64_t I, int64_t H, int64_t K, int64_t element) {
    return PackedBefore(I, H, K, {nullptr, element}, C::kOperands + 1);
  }
  static void Pack(const LayerParams& p, const DirectionWeights& w) {
    PanelProduct<C::kX, kPanelVecs>::Pack(w.w_ih, p.storage, p.H, p.I, Panels(p), PackedInput(w));
    ForProducts([&](auto k) {
      constexpr int kGates = Products<C>::Gates(decltype(k)::value);
      if constexpr (kGates > 0)
        PanelProduct<kGates, kPanelVecs>::Pack(RowsOfProduct(p, k, w.w_hh), p.storage, p.H,
                                               BlockWidth(p), Panels(p), PackedProduct(p, w, k));
    });
  }
  static constexpr CpuKernels Kernels() {
    return {FactsOf<C>(kTape), &Forward, &Backward, &Scale, &PackedSize, &Pack};
  }

 private:
  class ForwardPass;
  class BackwardPass;

  static constexpr int kMostGates = C::kX > Products<C>::Most() ? C::kX : Products<C>::Most();
  static constexpr int kPanelVecs = PanelVecs(kMostGates);
  static constexpr int kUnits = kPanelVecs * N;  // units of a panel
  static constexpr int kExtra = States<C>::kExtra, kOutputExtra = States<C>::kOutputExtra;
  static constexpr int kTape = Tape<C>::kSize;
  static constexpr bool kShows = C::kShows >= 0;
  using NormX = RowNorm<C::kX, kPanelVecs>;
  using NormH = RowNorm<C::kH, kPanelVecs>;
  using NormShown = RowNorm<1, kPanelVecs>;
  static_assert(CheckCell<C>());
  static_assert(kAlign % kUnits == 0, "buffers are padded to whole panels");

  // What there is for each product with another operand than h: of Product<its gates>.
  template <template <int> class Product, int... k>
  static std::tuple<Product<Products<C>::Gates(k + 1)>...> MakeOfOperands(
      std::integer_sequence<int, k...>);
  template <template <int> class Product>
  using OfOperands =
      decltype(MakeOfOperands<Product>(std::make_integer_sequence<int, C::kOperands>()));
  // f(k as a constant) for the numbers of these products, 1, 2 ..
  template <class F, int... k>
  FRNN_INLINE static void ForOperands(const F& f, std::integer_sequence<int, k...>) {
    (f(std::integral_constant<int, k + 1>()), ...);
  }
  template <class F>
  FRNN_INLINE static void ForOperands(const F& f) {
    ForOperands(f, std::make_integer_sequence<int, C::kOperands>());
  }

  // f(k as a constant) for all products of W_hh, 0 being that with h.
  template <class F>
  FRNN_INLINE static void ForProducts(const F& f) {
    f(std::integral_constant<int, 0>());
    ForOperands(f);
  }

  // A pass on a team, or on one thread where a team is not complete.
  template <class Pass, class Params>
  static void Run(const Params& p) {
    Pass pass(p);
    if (RunTeam(pass.plan, [&](Team& team) { pass.Run(team); })) return;
    Params alone = p;
    alone.threads = 1;
    Run<Pass>(alone);
  }

  // A single sequence in inference, forwards, with nothing between its steps, which one thread runs on
  // vectors, has loops of its own, without what others need: one step of weights as they lie, and
  // steps of packed ones.
  enum class Loop { kAny, kOneStep, kStream };
  static Loop LoopOf(const LayerParams& p) {
    if (p.B != 1 || p.dirs != 1 || p.ragged || p.storage != kPlain || C::kH == 0 || C::kGiven > 0)
      return Loop::kAny;
    if (p.hs || p.saved || p.every_state || p.reset || p.zoneout || p.h_mask || p.blocks > 1 ||
        Projected(p) || p.norm != Norm::kNone)
      return Loop::kAny;
    const cpu::ForwardPlan plan = cpu::PlanForward(ProblemOf(p), TheMachine());
    if (plan.threads > 1 || plan.tiled || plan.one_chain) return Loop::kAny;
    if (p.T == 1) {
      const bool lies = plan.w_ih == cpu::Packing::kNone && plan.w_hh == cpu::Packing::kNone;
      return lies && p.h0 && C::kOperands == 0 ? Loop::kOneStep : Loop::kAny;
    }
    const bool packed = plan.w_hh == cpu::Packing::kOnce || IsPackedPlainly(p.w[0]);
    return packed ? Loop::kStream : Loop::kAny;
  }
  static void ForwardStream(const LayerParams& p);

  static int64_t Panels(int64_t H) { return (H + kUnits - 1) / kUnits; }
  static int64_t Panels(const LayerParams& p) { return Panels(p.H); }
  static cpu::Problem ProblemOf(const LayerParams& p) {
    cpu::Problem problem;
    problem.storage = p.storage;
    problem.threads = TeamSize(p.threads);
    problem.T = p.T;
    problem.B = p.B;
    problem.I = p.I;
    problem.H = p.H;
    problem.Hout = BlockWidth(p);
    problem.in_blocks = p.blocks > 1;
    problem.rows = p.rows;
    problem.gates_x = C::kX;
    problem.gates_h = C::kH;
    problem.scalar_bytes = sizeof(T);
    problem.vector_bytes = sizeof(V);
    problem.panel_vecs = kPanelVecs;
    problem.panels = Panels(p);
    problem.h_changes = p.reset != nullptr || p.h_mask != nullptr;
    problem.norm = NormOfX(p) || NormOfH(p);
    problem.operands = C::kOperands > 0;
    problem.packed = p.w[0].packed != nullptr;
    problem.bytes = PackedInput(p.w[0]).IsBytes();
    problem.invariant = p.invariant;
    return problem;
  }
  static cpu::Machine TheMachine() {
    cpu::Machine machine;
    machine.unit = kTiles ? parts::TheUnit() : parts::MatrixUnit::kNone;
    machine.cores = Cores();
    machine.l2_bytes = L2Bytes();
    machine.crowded = Crowd::Here();
    return machine;
  }
  // Of a block of W_hh: the units that it has, and as many columns of h.
  static int64_t BlockWidth(const LayerParams& p) {
    return p.blocks > 1 ? p.Hout / p.blocks : p.Hout;
  }
  static bool Projected(const LayerParams& p) { return p.w[0].w_hr != nullptr; }
  // How many units a vector of them has from `unit` on: N, fewer at the end, or none past it.
  static int UnitsFrom(const LayerParams& p, int64_t unit) {
    const int64_t left = p.H - unit;
    return int(left < 0 ? 0 : (left < N ? left : N));
  }
  static int64_t HoutVecs(const LayerParams& p) { return (p.Hout + N - 1) / N; }
  // What a thread owns of a layer, in both passes.
  struct Slice {
    Team::Range panels, columns;  // of units; vectors of the projection's output
    int64_t first, last;          // columns of h: those of its units, or of the projection
    int64_t valid;                // of these below Hout

    void Take(const LayerParams& p, const Team& team) {
      panels = team.Split(Panels(p));
      columns = team.Split(HoutVecs(p));
      first = Projected(p) ? columns.begin * N : panels.begin * kUnits;
      last = Projected(p) ? columns.end * N : panels.end * kUnits;
      valid = (last < p.Hout ? last : p.Hout) - first;
    }
  };
  // The rows of x, as the engine may read them: `stride` apart and in the computing type (direct),
  // or to be staged first. Tiles are packed from any type.
  struct Input {
    explicit Input(const LayerParams& p) {
      one_stride = p.ragged || p.B == 1 || p.T == 1 || p.x_t_stride == p.B * p.x_b_stride;
      stride = !p.ragged && p.B == 1 ? p.x_t_stride : p.x_b_stride;
      direct = one_stride && p.storage == kPlain;
    }
    static const void* Row(const LayerParams& p, int64_t t, int64_t b) {
      return At(p.x, p.storage,
                p.ragged ? (p.offsets[t] + b) * p.x_b_stride : t * p.x_t_stride + b * p.x_b_stride);
    }
    int64_t stride;
    bool one_stride, direct;
  };

  // Walks the rows r = offsets[t] + b in order.
  struct RowCursor {
    RowCursor(const LayerParams& p, int64_t row) : p(p), t(0) {
      if (!p.ragged) {
        t = row / p.B;
        b = row % p.B;
      } else {
        while (p.offsets[t + 1] <= row) t++;
        b = row - p.offsets[t];
      }
    }
    void Next() {
      if (++b == p.batch_sizes[t]) {
        b = 0;
        t++;
      }
    }
    const LayerParams& p;
    int64_t t, b;
  };

  // Where h_{t-1} (h_{t+1} of a reversed direction) of row (t, b) lies in hs: row b holds h0, row B
  // + r holds h of row r.
  static int64_t PreviousRow(const LayerParams& p, int dir, int64_t t, int64_t b) {
    if (dir == 0) return t == 0 ? b : p.B + p.offsets[t - 1] + b;
    return t + 1 < p.T && b < p.batch_sizes[t + 1] ? p.B + p.offsets[t + 1] + b : b;
  }
  // Whether the states before step t of row b become zeros.
  static bool IsReset(const LayerParams& p, int dir, int64_t t, int64_t b) {
    if (dir == 0) return p.reset[p.offsets[t] + b];
    return t + 1 < p.T && b < p.batch_sizes[t + 1] && p.reset[p.offsets[t + 1] + b];
  }
  // f(b) for each row of a step whose states before it become zeros.
  template <class F>
  static void ForResets(const LayerParams& p, int dir, int64_t t, const F& f) {
    for (int64_t b = 0; p.reset != nullptr && b < p.batch_sizes[t]; b++)
      if (IsReset(p, dir, t, b)) f(b);
  }
  static T* TapeOf(const LayerParams& p, int dir, int64_t t, int64_t panel) {
    return TapeOf(p, dir) + InTape(p, t, panel) * kTape;
  }
  // Where a step and panel begin on a tape of one value, [step][panel][row][unit].
  static int64_t InTape(const LayerParams& p, int64_t t, int64_t panel) {
    return (p.offsets[t] * Panels(p) + panel * p.batch_sizes[t]) * kUnits;
  }
  // Of a direction: that of the cell, then those of what is normalised.
  static T* TapeOf(const LayerParams& p, int dir) {
    const int64_t tape = kTape + FactsOf<C>(kTape).NormTape(p.w[0]);
    return static_cast<T*>(p.saved) + dir * p.rows * tape * Padded(p.H);
  }
  // What is kept of a normalised row: n of all gates of a panel, and behind those of all rows their
  // scales.
  struct NormTape {
    const LayerParams& p;
    T* first;
    int gates;

    NormTape(const LayerParams& p, int dir, int64_t before, int gates)
        : p(p),
          first(p.saved ? TapeOf(p, dir) + p.rows * before * Padded(p.H) : nullptr),
          gates(gates) {}
    T* Normal(int64_t t, int64_t panel) const {
      return first ? first + InTape(p, t, panel) * gates : nullptr;
    }
    T* Scales(int64_t t) const {
      return first ? first + p.rows * gates * Padded(p.H) + p.offsets[t] : nullptr;
    }
  };
  static NormTape NormTapeOfX(const LayerParams& p, int dir) { return {p, dir, kTape, C::kX}; }
  static NormTape NormTapeOfH(const LayerParams& p, int dir) {
    return {p, dir, kTape + (NormOfX(p) ? NormX::kTape : 0), C::kH};
  }
  static NormTape NormTapeOfShown(const LayerParams& p, int dir) {
    const int64_t before =
        kTape + (NormOfX(p) ? NormX::kTape : 0) + (NormOfH(p) ? NormH::kTape : 0);
    return {p, dir, before, 1};
  }

  // Whether what the output shows is normalised.
  static bool NormOfShown(const LayerParams& p) {
    return kShows && p.w[0].gains[kShown] != nullptr;
  }
  template <class Normed>
  static typename Normed::Common NormCommon(const LayerParams& p, bool on, int64_t own_panels,
                                            int64_t rows) {
    typename Normed::Common common{};
    common.on = on;
    common.centred = p.norm == Norm::kLayer;
    common.eps = T(NormEps(p));
    common.H = p.H;
    common.panels = Panels(p);
    common.own_panels = own_panels;
    common.rows = rows;
    return common;
  }

  // What of its old value each unit of a panel keeps, for n rows or, where one is for all, that one:
  // [row][state][unit].
  static void LoadZones(const LayerParams& p, int dir, int64_t row, int64_t n, int64_t panel,
                        T* zones) {
    const int64_t unit = panel * kUnits;
    const int64_t first = dir * p.zoneout_rows + (p.zoneout_rows == 1 ? 0 : row);
    for (int64_t i = 0; i < n * C::kStates; i++)
      LoadPadded<kUnits>(At(p.zoneout, p.storage, (first * C::kStates + i) * p.H + unit), p.storage,
                         p.H - unit, zones + i * kUnits);
  }
  static bool ZonesVary(const LayerParams& p) { return p.zoneout && p.zoneout_rows > 1; }
  static bool ZonesStay(const LayerParams& p) { return p.zoneout && p.zoneout_rows == 1; }
  static int64_t ZoneRows(const LayerParams& p) {
    return p.zoneout == nullptr ? 0 : (ZonesStay(p) ? 1 : p.B);
  }
  // What is given, for n rows from `row` on and the units of a panel: [row][number][unit].
  static void LoadGiven(const LayerParams& p, int64_t row, int64_t n, int64_t panel, T* given) {
    const int64_t unit = panel * kUnits;
    for (int64_t i = 0; i < n * C::kGiven; i++)
      LoadPadded<kUnits>(At(p.given, p.storage, (row * C::kGiven + i) * p.H + unit), p.storage,
                         p.H - unit, given + i * kUnits);
  }
  // The rows of a matrix W_hh that product k is with.
  template <class P>
  static P RowsOfProduct(const LayerParams& p, int k, P w_hh) {
    return w_hh == nullptr ? w_hh
                           : At(w_hh, p.storage, Products<C>::First(k) * p.H * BlockWidth(p));
  }
  // Bytes that are packed before the rows of product k: those of W_ih, and of the products before it.
  static int64_t PackedBefore(int64_t I, int64_t H, int64_t K, const PackedPanels& packed, int k) {
    int64_t of_panel = PanelProduct<C::kX, kPanelVecs>::PackedSize(I, packed);
    ForProducts([&](auto product) {
      constexpr int kGates = Products<C>::Gates(decltype(product)::value);
      if (product < k) of_panel += PanelProduct<kGates, kPanelVecs>::PackedSize(K, packed);
    });
    return Panels(H) * of_panel;
  }
  static PackedPanels PackedInput(const DirectionWeights& w) {
    return {w.packed, w.packed ? w.packed_bytes : 0};
  }
  // Before the call, in panels of the computing type, which are those of Steps.
  static bool IsPackedPlainly(const DirectionWeights& w) {
    return w.packed && w.packed_bytes == int64_t(sizeof(T));
  }
  static PackedPanels PackedProduct(const LayerParams& p, const DirectionWeights& w, int k) {
    const PackedPanels packed = PackedInput(w);
    return packed.From(PackedBefore(p.I, p.H, BlockWidth(p), packed, k));
  }
  // h, or another operand, as it goes into W_hh.
  FRNN_INLINE static V Masked(const T* h, const T* mask, Storage storage) {
    return RoundToStorage(V(load<V>(h) * load<V>(mask)), storage);
  }

  static void CopyState(const LayerParams& p, const void* src, int dir, int64_t first, int64_t last,
                        T* dst, int64_t stride);
};

// dst[b][first .. last) = src[dir][b][first .. last) for all b, zero where src is null or past
// Hout.
template <class C>
void Layer<C>::CopyState(const LayerParams& p, const void* src, int dir, int64_t first,
                         int64_t last, T* dst, int64_t stride) {
  const int64_t n = src == nullptr || first >= p.Hout ? 0 : (last < p.Hout ? last : p.Hout) - first;
  for (int64_t b = 0; b < p.B; b++) {
    if (n > 0)
      LoadRow(At(src, p.storage, (dir * p.B + b) * p.Hout + first), p.storage,
              dst + b * stride + first, n);
    for (int64_t u = first + n; u < last; u++) dst[b * stride + u] = 0;
  }
}

FRNN_END

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/single.h"
