// The forward of all steps in one kernel (resident.cuh).
#pragma once
#include "core/step.h"
#include "cuda/exchange.cuh"
#include "cuda/kernels.cuh"
#include "cuda/quick.h"
#include "cuda/resident_block.cuh"

namespace frnn {
namespace cuda {

template <class T>
struct ResidentForwardDirection {
  int64_t start, way;           // the time of step 0, +1 or -1
  const T* h0;                  // [B, H] or null
  const T *w_hh, *b_ih, *b_hh;  // [kH H, H], [kX H] or null, [kH H] or null
  const T* params[kMaxParams];  // [H] each
  const Wide<T>* gx;            // [.., kX H], from row gx_row on
  int64_t gx_row;
  T* hs;  // [rows, H]: what a row starts from. Those of step `begin` and those in which sequences
          // start are there, others are kUnwritten
  T* y;   // [rows, dirs H], from the first unit of this direction on
  Wide<T>* c;          // [B, kExtra H]: before step begin, then after step end - 1
  T *h_last, *c_last;  // [B, H], [B, kExtra H]
  Wide<T>* tape;       // [rows, tape H] or null
  // Of kernels with stages:
  ResidentStages<T> stages;
  T* h_kept;  // [rows, H]: with a mask, what a row starts from, where hs has what goes into W_hh
};
template <class T>
struct ResidentForwardArgs {
  ResidentSteps steps;
  ResidentForwardDirection<T> dir[2];
};

// Views of an item, as core/step.h asks for them: what lies in registers, and what goes to memory.
template <class C, class SumH>
struct ResidentInputs : ResidentZones<C> {
  const float* gx;
  const Pack<float, C::kX>& b_ih;
  const SumH& gate_h;
  const Pack<float, C::kParams>& params;
  const float& h;
  const Pack<float, States<C>::kExtra>& c;

  FRNN_HD Quick GateX(int q) const { return gx[q] + b_ih[q]; }
  FRNN_HD Quick GateH(int q) const { return gate_h(q); }
  FRNN_HD Quick Param(int k) const { return params[k]; }
  FRNN_HD Quick H() const { return h; }
  FRNN_HD Quick Extra(int e) const { return c[e]; }
};
template <class C, class T>
struct ResidentResults {
  T h_new;
  float& h;
  Pack<float, States<C>::kExtra>& c;
  int64_t H;
  T *y, *h_last, *c_last;  // h_last is null while the sequence goes on
  float* tape;

  FRNN_HD void SetH(Quick) const {
    h = Widen(h_new);
    *y = h_new;
    if (h_last) *h_last = h_new;
  }
  FRNN_HD void SetExtra(int e, Quick v) const {
    c[e] = v.v;
    if (h_last) c_last[e * H] = Narrow<T>(v.v);
  }
  FRNN_HD void Keep(int k, Quick v) const { tape[k * H] = v.v; }
  FRNN_HD void KeepExtra(int e, Quick v) const { Keep(Tape<C>::kC + e, v); }
};

template <class C, class T, int kBlocks, int kGroups, int kTiles, class E, bool kStages>
__global__ void __launch_bounds__(kWarps * 32, 1)
    ResidentForward(const __grid_constant__ ResidentForwardArgs<T> args) {
  if constexpr (E::kCluster && !kHasClusters) return;
  using Products = ResidentProducts<C, T, kBlocks, kGroups, kTiles, E>;
  using Product = typename Products::Forward;
  using Sums = typename Products::Sums;
  using Block = ResidentBlock<kGroups, kTiles>;
  constexpr int kItems = Block::kItems, kColumns = Block::kColumns, kExtra = States<C>::kExtra;
  Notes& notes = *DynamicShared<Notes>();
  float* sums = DynamicShared<float>() + Notes::kBytes / sizeof(float);  // [2][kParts][Sums::kSize]
  void* rest = sums + 2 * Product::kParts * Sums::kSize;
  const ResidentSteps n = args.steps;
  const Block at(n);
  const ResidentForwardDirection<T>& a = args.dir[at.dir];
  T* const hs = a.hs;
  const int64_t H = at.H;

  Product product;
  product.Load([&](int m, int row, int k) -> const T* {
    const int64_t unit = at.first_unit + m / C::kH * kUnits + row;
    return unit < H && k < H ? a.w_hh + (m % C::kH * H + unit) * H + k : nullptr;
  });

  const auto time = [&](int64_t s) { return a.start + s * a.way; };
  TimeRows rows = RowsOf(n, time(n.begin));
  RowsAhead ahead{notes};
  ahead.Load(n, time(n.begin + 1));
  ahead.Put(n.begin + 1);
  const auto start = [&](int64_t b, int64_t u) -> float {  // h before step begin
    const T* kept = kStages && a.stages.mask ? a.h_kept : a.hs;
    if (b < rows.running) return Widen(kept[(rows.first + b) * H + u]);
    return a.h0 ? Widen(a.h0[b * H + u]) : 0;
  };

  float gx[kItems][C::kX] = {}, h[kItems];
  Pack<float, kExtra> c[kItems];
  Pack<float, C::kX> b_ih[kColumns];
  Pack<float, C::kH> b_hh[kColumns];
  Pack<float, C::kParams> params[kColumns];
  // What does not depend on other blocks is loaded ahead of the wait for them, and not looked at before
  // that is over: a warp that waits for one load waits for all.
  [[maybe_unused]] T zones[kItems][C::kStates] = {};
  [[maybe_unused]] uint8_t cuts[kItems] = {};
  const auto fetch = [&]([[maybe_unused]] int64_t s) {
    FRNN_UNROLL
    for (int i = 0; i < kItems; i++) {
      if (!at.Runs(i, rows)) continue;
      const float* from = a.gx + at.Wide(at.Place(rows, i) - a.gx_row * H, i, C::kX);
      FRNN_UNROLL
      for (int q = 0; q < C::kX; q++) gx[i][q] = from[q * H];
      if constexpr (kStages) {
        if (a.stages.cuts) cuts[i] = a.stages.cuts[s * at.B + at.Batch(i)];
        if (a.stages.zones) FetchZones<C>(at, rows, i, a.stages, zones[i]);
      }
    }
  };
  FRNN_UNROLL
  for (int i = 0; i < kColumns; i++) {
    const int64_t unit = at.Unit(i);
    const bool exists = unit < H;
    FRNN_UNROLL
    for (int q = 0; q < C::kX; q++) b_ih[i][q] = exists && a.b_ih ? Widen(a.b_ih[q * H + unit]) : 0;
    FRNN_UNROLL
    for (int q = 0; q < C::kH; q++) b_hh[i][q] = exists && a.b_hh ? Widen(a.b_hh[q * H + unit]) : 0;
    FRNN_UNROLL
    for (int k = 0; k < C::kParams; k++) params[i][k] = exists ? Widen(a.params[k][unit]) : 0;
  }
  FRNN_UNROLL
  for (int i = 0; i < kItems; i++) {
    FRNN_UNROLL
    for (int j = 0; j < kExtra; j++)
      c[i][j] = at.Exists(i) ? a.c[(at.Batch(i) * kExtra + j) * H + at.Unit(i)] : 0;
    h[i] = (kStages || States<C>::kReadsH) && at.Exists(i) ? start(at.Batch(i), at.Unit(i)) : 0;
  }
  // In shared memory: h of the rows of this block, [kTiles * kTileRows][stride], as LocalPlace says.
  using Box = Mailbox<E::kCluster>;
  const int width = at.blocks * kGroups * kUnits, stride = int(LocalStride<T>(width));
  constexpr int kRowsSize = kTiles * kTileRows * int(sizeof(T));
  const Box box(rest, kRowsSize * stride, kRowsSize * width);
  const auto h_of = [&](int mail) { return reinterpret_cast<T*>(box.Half(mail)); };
  if constexpr (E::kShared) {
    for (int k = threadIdx.x; k < kTiles * kTileRows * int(H); k += kWarps * 32) {
      const int row = k / int(H), u = k % int(H);
      const T v = Narrow<T>(at.first_row + row < n.B ? start(at.first_row + row, u) : 0);
      const int place = row * stride + LocalPlace<T>(row, u);
      h_of(0)[place] = h_of(1)[place] = v;
    }
  }
  if (threadIdx.x == 0) notes.gave_up = 0;
  box.Open();

  for (int64_t s = n.begin; s < n.end; s++) {
    const int mail = int(E::kShared ? s - n.begin : s);
    const bool last = s + 1 == n.end;
    fetch(s);
    if constexpr (E::kShared) {
      if (mail > 0) box.Wait(mail);
      if (!last) box.Expect(mail + 1);
    }
    // Two sets of sums in turn: a warp that is ahead writes the one that no other still reads.
    const Sums now{sums + (mail & 1) * Product::kParts * Sums::kSize};
    product.template Multiply<!E::kShared>(
        E::kShared ? h_of(mail) : hs + (rows.first + at.first_row) * H, E::kShared ? stride : H,
        rows.running - at.first_row, int(H), n.patience, &notes.gave_up,
        [&](int m, int tile, const float (&d)[4]) { now.Put(Product::Part(), m, tile, d); });
    __syncthreads();

    const TimeRows next = ahead.Get(s + 1);
    ahead.Load(n, time(s + 2));
    // Math without branches first, so that items overlap; then what others wait for; then the rest.
    ForwardStep<C, Quick> unit[kItems];
    T h_new[kItems];
    FRNN_UNROLL
    for (int i = 0; i < kItems; i++) {
      if (!Block::Has(i)) continue;
      const int column = Block::Column(i);
      const auto gate_h = [&](int q) {
        return now.template Sum<Product::kParts>(Product::kParts, Block::Group(i) * C::kH + q,
                                                 Block::Tile(i), Block::J(i)) +
               b_hh[column][q];
      };
      float kept[C::kStates];
      FRNN_UNROLL
      for (int j = 0; j < C::kStates && kStages; j++) kept[j] = Widen(zones[i][j]);
      const ResidentInputs<C, decltype(gate_h)> view{{kStages && a.stages.zones, kept},
                                                     gx[i],
                                                     b_ih[column],
                                                     gate_h,
                                                     params[column],
                                                     h[i],
                                                     c[i]};
      unit[i].Load(view);
      if constexpr (kStages)
        unit[i].Compute(view);
      else
        unit[i].Compute();
      h_new[i] = Narrow<T>(unit[i].s_new[C::kRecurrent].v);
    }
    FRNN_UNROLL
    for (int i = 0; i < kItems; i++) {
      if (!Block::Has(i)) continue;
      const bool runs = at.Runs(i, rows);
      const int row = Block::Row(i) * stride;
      if constexpr (E::kCluster) {
        // All rows are sent, so that as many bytes come each time: of those that are yet to start h_0.
        T v = h_new[i];
        if (n.offsets != nullptr && !runs)
          v = h_of(mail)[row + LocalPlace<T>(Block::Row(i), at.Unit(i))];
        const uint4 units = JoinUnits(v);
        constexpr int kUnitsOf16 = Operand<T>::kLane;
        const int number = threadIdx.x % 32 / 4 % kUnitsOf16;  // of the lanes that have these
        const int place = row + LocalPlace<T>(Block::Row(i), at.Unit(i) - number);
        for (int to = last ? at.blocks : number; to < at.blocks; to += kUnitsOf16)
          box.Send(mail + 1, h_of(mail + 1) + place, units, to);
      } else if (E::kShared && runs) {
        h_of(mail + 1)[row + LocalPlace<T>(Block::Row(i), at.Unit(i))] = h_new[i];
      }
      const bool goes_on = runs && at.Batch(i) < next.running;
      if constexpr (kStages) {
        T v = cuts[i] ? Narrow<T>(0) : h_new[i];
        if (a.stages.mask) {
          if (goes_on) a.h_kept[at.Place(next, i)] = v;
          if (goes_on) v = Masked<T>(v, a.stages.mask[at.Batch(i) * H + at.Unit(i)]);
        }
        PublishUnit(hs + at.Place(next, i), v, goes_on);
      } else {
        PublishUnit(hs + at.Place(next, i), h_new[i], goes_on);
      }
    }
    FRNN_UNROLL
    for (int i = 0; i < kItems; i++) {
      if (!at.Runs(i, rows)) continue;
      bool ends = at.Batch(i) >= next.running;
      T* h_last = a.h_last + at.Batch(i) * H + at.Unit(i);
      T* c_last = a.c_last + at.Batch(i) * kExtra * H + at.Unit(i);
      if (kStages && a.stages.every_h) {
        ends = true;
        h_last = a.stages.every_h + at.Place(rows, i);
        c_last = a.stages.every_c + at.Wide(at.Place(rows, i), i, kExtra);
      }
      const ResidentResults<C, T> to{h_new[i],
                                     h[i],
                                     c[i],
                                     H,
                                     a.y + at.Wide(at.Place(rows, i), i, n.dirs),
                                     ends ? h_last : nullptr,
                                     c_last,
                                     a.tape + at.Wide(at.Place(rows, i), i, Tape<C>::kSize)};
      if (a.tape) {
        unit[i].StoreTape(to);
        if (C::kReadsNewH) to.Keep(Tape<C>::kNewH, Widen(h_new[i]));
      }
      unit[i].StoreStates(to);
      if (kStages && cuts[i]) {
        h[i] = 0;
        FRNN_UNROLL
        for (int j = 0; j < kExtra; j++) c[i][j] = 0;
      }
    }
    rows = next;
    ahead.Put(s + 2);
  }

  FRNN_UNROLL
  for (int i = 0; i < kItems; i++) {
    FRNN_UNROLL
    for (int j = 0; j < kExtra; j++)
      if (at.Exists(i)) a.c[(at.Batch(i) * kExtra + j) * H + at.Unit(i)] = c[i][j];
  }
}

}  // namespace cuda
}  // namespace frnn
