// The backward of all steps in one kernel (resident.cuh).
#pragma once
#include "core/step.h"
#include "cuda/exchange.cuh"
#include "cuda/kernels.cuh"
#include "cuda/quick.h"
#include "cuda/resident_block.cuh"

namespace frnn {
namespace cuda {

template <class T>
struct ResidentBackwardDirection {
  int64_t start, way;
  const T* w_hh_t;              // [H, kH H] = W_hh^T
  const T* params[kMaxParams];  // [H] each
  const T* dy;  // (t, b) at t dy_t_stride + b dy_b_stride, ragged row r at r dy_b_stride; or null
  int64_t dy_t_stride, dy_b_stride;
  const T* hs;          // [rows, H]
  const Wide<T>* tape;  // [rows, tape H]
  T *dgx, *dgh;         // [rows, kX H], [rows, kH H]; dgh is kUnwritten. The same for some cells
  Wide<T>*dh, *dc;      // [B, H], [B, kExtra H]: of the last states, then of the first
  Wide<T>* dparams;     // [B, kParams H]
  ResidentStages<const T> stages;  // of kernels with stages
};
template <class T>
struct ResidentBackwardArgs {
  ResidentSteps steps;
  ResidentBackwardDirection<T> dir[2];
};

// Views as in the forward. Gate gradients of W_hh are published before.
template <class C>
struct ResidentGrads : ResidentZones<C> {
  const float* tape;
  const Pack<float, C::kParams>& params;
  const float h;
  const float& dh;
  const Pack<float, States<C>::kExtra>& dc;
  const float dy;

  FRNN_HD Quick Kept(int k) const { return tape[k]; }
  FRNN_HD Quick KeptExtra(int e) const { return tape[Tape<C>::kC + e]; }
  FRNN_HD Quick Param(int k) const { return params[k]; }
  FRNN_HD Quick H() const { return h; }
  FRNN_HD Quick NewH() const { return tape[Tape<C>::kNewH]; }
  FRNN_HD Quick GradH() const { return dh; }
  FRNN_HD Quick GradExtra(int e) const { return dc[e]; }
  FRNN_HD void AddGradOutput(Quick& to) const { to = to + dy; }
};
template <class C, class T, bool kStages>
struct ResidentCarry {
  float& dh;
  Pack<float, States<C>::kExtra>& dc;
  Pack<float, C::kParams>& dparams;
  T* dgx;  // null if it is dgh
  int64_t H;

  FRNN_HD void SetGate(int i, Quick d) const {
    if (dgx) ForGatesX<C>(i, [&](int q) { dgx[q * H] = Narrow<T>(d.v); });
  }
  FRNN_HD void SetGradH(Quick d) const { dh = kStages || kGradReachesH<C> ? d.v : 0; }
  FRNN_HD void SetGradExtra(int e, Quick d) const { dc[e] = d.v; }
  FRNN_HD void AddGradParam(int k, Quick d) const { dparams[k] += d.v; }
};

template <class C, class T, int kBlocks, int kGroups, int kTiles, class E, bool kStages>
__global__ void __launch_bounds__(kWarps * 32, 1)
    ResidentBackward(const __grid_constant__ ResidentBackwardArgs<T> args) {
  if constexpr (E::kCluster && !kHasClusters) return;
  using Products = ResidentProducts<C, T, kBlocks, kGroups, kTiles, E>;
  using Product = typename Products::Backward;
  using Sums = typename Products::SumsBack;
  using Block = ResidentBlock<kGroups, kTiles>;
  constexpr int kItems = Block::kItems, kColumns = Block::kColumns, kExtra = States<C>::kExtra,
                kTape = Tape<C>::kSize;
  const ResidentSteps n = args.steps;
  const Block at(n);
  const ResidentBackwardDirection<T>& a = args.dir[at.dir];
  T* const dgh = a.dgh;
  const int64_t H = at.H;

  // In shared memory: parts of dh, from other blocks or from the warps of this one; then where it is
  // not published the dgh of this block, [2][kTiles * kTileRows][kStride], as LocalPlace says.
  using Box = Mailbox<E::kCluster>;
  constexpr int kOwn = kGroups * kUnits, kDepth = C::kH * kOwn;
  constexpr int kStride = int(LocalStride<T>(kDepth)), kOwnHalf = kTiles * kTileRows * kStride;
  const int parts = E::kCluster ? at.blocks : Products::kPartsBack;
  const int half = parts * Sums::kSize * int(sizeof(float));
  Notes& notes = *DynamicShared<Notes>();
  char* const rest = DynamicShared<char>() + Notes::kBytes;
  const Box box(rest, half, half);
  T* const own_dgh = reinterpret_cast<T*>(rest + Box::Bytes(half));

  Product product;
  product.Load([&](int m, int row, int k) -> const T* {
    const int64_t unit = (E::kCluster ? 0 : at.first_unit) + m * kUnits + row;
    // k: of all gate gradients, or of those of this block.
    const int64_t own = at.first_unit + k % kOwn;
    if (unit >= H || (E::kShared ? k >= kDepth || own >= H : k >= C::kH * H)) return nullptr;
    return a.w_hh_t + unit * C::kH * H + (E::kShared ? k / kOwn * H + own : k);
  });

  const auto time = [&](int64_t s) { return a.start + s * a.way; };
  TimeRows rows = RowsOf(n, time(n.end - 1));
  RowsAhead ahead{notes};
  ahead.Load(n, time(n.end - 2));
  ahead.Put(n.end - 2);

  float dh[kItems];
  [[maybe_unused]] float mask[kItems];
  Pack<float, kExtra> dc[kItems];
  Pack<float, C::kParams> params[kColumns], dparams[kItems];
  T dy[kItems] = {}, h_prev[kItems] = {};
  float tape[kItems][kTape] = {};
  [[maybe_unused]] T zones[kItems][C::kStates] = {}, every[kItems][C::kStates] = {};
  [[maybe_unused]] uint8_t cuts[kItems] = {};
  const auto fetch = [&](int64_t s) {  // as in the forward
    const int64_t dy_at = n.offsets ? rows.first * a.dy_b_stride : time(s) * a.dy_t_stride;
    FRNN_UNROLL
    for (int i = 0; i < kItems; i++) {
      if (!at.Runs(i, rows)) continue;
      if (a.dy) dy[i] = a.dy[dy_at + at.Batch(i) * a.dy_b_stride + at.Unit(i)];
      if constexpr (States<C>::kReadsH) h_prev[i] = a.hs[at.Place(rows, i)];
      const float* from = a.tape + at.Wide(at.Place(rows, i), i, kTape);
      FRNN_UNROLL
      for (int k = 0; k < kTape; k++) tape[i][k] = from[k * H];
      if constexpr (kStages) {
        if (a.stages.cuts) cuts[i] = a.stages.cuts[s * at.B + at.Batch(i)];
        if (a.stages.zones) FetchZones<C>(at, rows, i, a.stages, zones[i]);
        if (a.stages.every_h) every[i][0] = a.stages.every_h[at.Place(rows, i)];
        FRNN_UNROLL
        for (int j = 0; j < kExtra && a.stages.every_c; j++)
          every[i][1 + j] = a.stages.every_c[at.Wide(at.Place(rows, i), i, kExtra) + j * H];
      }
    }
  };
  FRNN_UNROLL
  for (int i = 0; i < kColumns; i++) {
    FRNN_UNROLL
    for (int k = 0; k < C::kParams; k++)
      params[i][k] = at.Unit(i) < H ? Widen(a.params[k][at.Unit(i)]) : 0;
  }
  FRNN_UNROLL
  for (int i = 0; i < kItems; i++) {
    dh[i] = at.Exists(i) ? a.dh[at.Batch(i) * H + at.Unit(i)] : 0;
    FRNN_UNROLL
    for (int j = 0; j < kExtra; j++)
      dc[i][j] = at.Exists(i) ? a.dc[(at.Batch(i) * kExtra + j) * H + at.Unit(i)] : 0;
    FRNN_UNROLL
    for (int k = 0; k < C::kParams; k++) dparams[i][k] = 0;
    if (kStages && a.stages.mask)
      mask[i] = at.Exists(i) ? Widen(a.stages.mask[at.Batch(i) * H + at.Unit(i)]) : 0;
  }
  if constexpr (E::kShared) {  // zero for units that are not there
    for (int k = threadIdx.x; k < 2 * kOwnHalf; k += kWarps * 32) own_dgh[k] = Narrow<T>(0);
  }
  if (threadIdx.x == 0) notes.gave_up = 0;
  box.Open();
  fetch(n.end - 1);
  ahead.Load(n, time(n.end - 3));

  for (int64_t s = n.end - 1; s >= n.begin; s--) {
    const int mail = int(E::kShared ? n.end - s : s);
    T* const own = own_dgh + (mail & 1) * kOwnHalf;
    BackwardStep<C, Quick> unit[kItems];
    FRNN_UNROLL
    for (int i = 0; i < kItems; i++) {
      if (!Block::Has(i)) continue;
      if (kStages && at.Runs(i, rows)) {
        dh[i] = (cuts[i] ? 0 : dh[i]) + Widen(every[i][0]);
        FRNN_UNROLL
        for (int j = 0; j < kExtra; j++)
          dc[i][j] = (cuts[i] ? 0 : dc[i][j]) + Widen(every[i][1 + j]);
      }
      float kept[C::kStates];
      FRNN_UNROLL
      for (int j = 0; j < C::kStates && kStages; j++) kept[j] = Widen(zones[i][j]);
      const ResidentGrads<C> view{{kStages && a.stages.zones, kept},
                                  tape[i],
                                  params[Block::Column(i)],
                                  Widen(h_prev[i]),
                                  dh[i],
                                  dc[i],
                                  Widen(dy[i])};
      unit[i].Load(view);
      if constexpr (kStages)
        unit[i].Compute(view);
      else
        unit[i].Compute();
    }
    FRNN_UNROLL
    for (int i = 0; i < kItems; i++) {
      if (!Block::Has(i)) continue;
      const bool runs = at.Runs(i, rows);
      T* to = dgh + at.Wide(at.Place(rows, i), i, C::kH);
      FRNN_UNROLL
      for (int g = 0; g < C::kD; g++)
        ForGatesH<C>(g, [&](int q) {
          const T v = Narrow<T>(unit[i].d[g].v);
          if (E::kShared && runs) {
            const int k = q * kOwn + at.Unit(i) - at.first_unit;
            own[Block::Row(i) * kStride + LocalPlace<T>(Block::Row(i), k)] = v;
          }
          PublishUnit(to + q * H, v, runs);
        });
    }
    FRNN_UNROLL
    for (int i = 0; i < kItems; i++) {
      if (!at.Runs(i, rows)) continue;
      T* dgx = a.dgx == dgh ? nullptr : a.dgx + at.Wide(at.Place(rows, i), i, C::kX);
      const ResidentCarry<C, T, kStages> to{dh[i], dc[i], dparams[i], dgx, H};
      unit[i].Store(to);
    }
    const TimeRows seen = rows;
    rows = ahead.Get(s - 1);
    ahead.Put(s - 2);
    if (s > n.begin) fetch(s - 1);
    const Sums now{reinterpret_cast<float*>(box.Half(mail))};
    box.Expect(mail);
    if constexpr (E::kShared) __syncthreads();
    product.template Multiply<!E::kShared>(
        E::kShared ? own : dgh + (seen.first + at.first_row) * C::kH * H,
        E::kShared ? kStride : C::kH * H, seen.running - at.first_row,
        E::kShared ? kDepth : int(C::kH * H), n.patience, &notes.gave_up,
        [&](int m, int tile, const float (&d)[4]) {
          if constexpr (E::kCluster) {
            const int to = m / kGroups;
            if (to >= at.blocks) return;
            box.Send(mail, now.At(at.rank, m % kGroups, tile), Sums::Turned(d), to);
          } else {
            now.Put(Product::Part(), m, tile, d);
          }
        });
    box.Wait(mail);
    rows = ahead.Get(s - 1);  // again: a product needs the registers
    ahead.Load(n, time(s - 3));
    FRNN_UNROLL
    for (int i = 0; i < kItems; i++)  // nothing for sequences that do not run
      if (Block::Has(i)) {
        float sum = now.template Sum<Products::kPartsBack>(parts, Block::Group(i), Block::Tile(i),
                                                           Block::J(i));
        if (kStages && a.stages.mask) sum *= mask[i];
        dh[i] += sum;
      }
  }

  FRNN_UNROLL
  for (int i = 0; i < kItems; i++) {
    if (!at.Exists(i)) continue;
    a.dh[at.Batch(i) * H + at.Unit(i)] = dh[i];
    FRNN_UNROLL
    for (int j = 0; j < kExtra; j++) a.dc[(at.Batch(i) * kExtra + j) * H + at.Unit(i)] = dc[i][j];
    FRNN_UNROLL
    for (int k = 0; k < C::kParams; k++)
      a.dparams[(at.Batch(i) * C::kParams + k) * H + at.Unit(i)] = dparams[i][k];
  }
}

}  // namespace cuda
}  // namespace frnn
