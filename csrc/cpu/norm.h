// Normalisation of a product of a layer, row by row, over all gates and units, or of a state over all
// units, as of one gate: v becomes gain * n, where n = (v - mean) * scale and
// scale = 1 / sqrt(var + eps), or, of kind rms, n = v * scale and
// scale = 1 / sqrt(mean of squares + eps).
//
// A row is spread over the team. Each thread sums up the part of its panels, and after a barrier
// adds up those of all panels, in their order: what comes out depends on no number of threads.
// Squares are those of distances from the mean of a panel, so that a large mean costs no digits.
#pragma once
#include <algorithm>
#include <cmath>

#include "core/params.h"
#include "core/scratch.h"
#include "cpu/convert.h"
#include "cpu/product/gemm.h"
#include "cpu/product/tiles.h"
#include "cpu/threads.h"

FRNN_BEGIN

// One object a thread. Rows are [gate][unit] of a panel, some stride apart.
template <int kGates, int kPanelVecs>
class RowNorm {
 public:
  static constexpr int kUnits = kPanelVecs * N;
  // On the tape, of each row and panel: n of all gates, then the scale, once for each unit, 0 past H.
  static constexpr int kTape = kGates + 1, kTapeRow = kTape * kUnits;

  // What the threads of a team share.
  struct Common {
    bool on = false, centred;
    T eps;
    int64_t H, panels, own_panels, rows;  // rows at a time, at most

    T* sums;                                               // [panel][2][row]
    int64_t Rows() const { return RoundUp(rows, N) + N; }  // stores of whole vectors reach past
    void Take(Scratch& s) { sums = s.Take<T>(on ? panels * 2 * Rows() : 0); }
    T* Sum(int64_t panel, int which) const { return sums + (panel * 2 + which) * Rows(); }
    int64_t Units(int64_t panel) const {
      const int64_t left = H - panel * kUnits;
      return left < kUnits ? left : kUnits;
    }
  };

  void Take(Scratch& s, Common& shared) {
    common_ = &shared;
    gain_ = s.Take<T>(shared.on ? shared.own_panels * kWidth : 0);
    dgain_ = s.Take<T>(shared.on ? shared.own_panels * kWidth : 0);
    for (T*& of_rows : found_) of_rows = s.Take<T>(shared.on ? shared.Rows() : 0);
  }
  // Begins a direction, with gains [gate][unit].
  void Begin(Team::Range panels, const void* gain, Storage storage) {
    panels_ = panels;
    if (!common_->on) return;
    for (int64_t at = 0; at < panels.end - panels.begin; at++)
      for (int q = 0; q < kGates; q++) {
        const int64_t unit = (panels.begin + at) * kUnits;
        LoadPadded<kUnits>(At(gain, storage, q * common_->H + unit), storage, common_->H - unit,
                           gain_ + at * kWidth + q * kUnits);
        std::fill_n(dgain_ + at * kWidth + q * kUnits, kUnits, T(0));
      }
  }

  // ---- forward: Measure all own panels, a barrier, Find, Apply ----

  // The rows from `first` on of the own panel `at`. Blocks of rows are measured in their order.
  void Measure(int64_t at, int64_t first, int64_t rows, const T* v, int64_t stride) const {
    const Common& c = *common_;
    const int64_t panel = panels_.begin + at, units = c.Units(panel);
    V valid[kPanelVecs];
    Valid(at, valid);
    T *const sum = c.Sum(panel, 0) + first, *const squares = c.Sum(panel, 1) + first;
    for (int64_t r = 0; r < rows; r += N) {
      V mean{};
      if (c.centred) {
        const V sums = OfRows(r, rows, [&](int64_t row, int q, int j) FRNN_INLINE_LAMBDA {
          return load<V>(v + row * stride + (q * kPanelVecs + j) * N);
        });
        store<V>(sum + r, sums);
        mean = sums / T(kGates * units);
      }
      store<V>(squares + r, OfRows(r, rows, [&](int64_t row, int q, int j) FRNN_INLINE_LAMBDA {
                 const V value = load<V>(v + row * stride + (q * kPanelVecs + j) * N);
                 const V apart = (value - splat<V>(mean[row - r])) * valid[j];
                 return V(apart * apart);
               }));
    }
  }
  void Find(int64_t n) const {
    const Common& c = *common_;
    for (int64_t r = 0; r < n; r += N) {
      const V mean = c.centred ? V(SumOfPanels(0, r) / Count()) : V{};
      V squares{};
      for (int64_t panel = 0; panel < c.panels; panel++) {
        squares += load<V>(c.Sum(panel, 1) + r);
        if (!c.centred) continue;
        const T count = T(kGates * c.Units(panel));
        const V apart = load<V>(c.Sum(panel, 0) + r) / count - mean;
        squares += apart * apart * count;
      }
      const V var = squares / Count() + c.eps;
      store<V>(found_[0] + r, mean);
      for (int lane = 0; lane < N && r + lane < n; lane++)
        found_[1][r + lane] = T(1) / std::sqrt(var[lane]);
    }
  }
  // In place. `tape` may be null.
  void Apply(int64_t at, int64_t n, T* v, int64_t stride, T* tape) const {
    const T* gain = gain_ + at * kWidth;
    V valid[kPanelVecs];
    Valid(at, valid);
    for (int64_t row = 0; row < n; row++, v += stride) {
      const V mean = splat<V>(found_[0][row]), scale = splat<V>(found_[1][row]);
      FRNN_UNROLL
      for (int i = 0; i < kVecs; i++) {
        const V normal = (load<V>(v + i * N) - mean) * scale;
        if (tape) store<V>(tape + i * N, normal);
        store<V>(v + i * N, normal * load<V>(gain + i * N));
      }
      if (!tape) continue;
      FRNN_UNROLL
      for (int j = 0; j < kPanelVecs; j++) store<V>(tape + kWidth + j * N, scale * valid[j]);
      tape += kTapeRow;
    }
  }

  // ---- backward: MeasureGrads of all own panels, a barrier, FindGrads, ApplyGrads ----

  // Of gradients of gain * n, where `gate(q)` is that of gate q in the panel's first unit.
  template <class GateOf>
  void MeasureGrads(int64_t at, int64_t n, const GateOf& gate, int64_t stride,
                    const T* tape) const {
    const Common& c = *common_;
    const int64_t panel = panels_.begin + at;
    const T* gain = gain_ + at * kWidth;
    T* dgain = dgain_ + at * kWidth;
    V gains[kVecs > 0 ? kVecs : 1] = {};
    for (int64_t r = 0; r < n; r += N) {
      V sums[N] = {}, products[N] = {};
      for (int i = 0; i < N && r + i < n; i++) {
        FRNN_UNROLL
        for (int k = 0; k < kVecs; k++) {
          const V d = load<V>(gate(k / kPanelVecs) + (r + i) * stride + k % kPanelVecs * N);
          const V normal = load<V>(tape + (r + i) * kTapeRow + k * N);
          const V g = d * load<V>(gain + k * N);
          sums[i] += g;
          products[i] += g * normal;
          gains[k] += d * normal;
        }
      }
      SumLanes(sums);
      SumLanes(products);
      store<V>(c.Sum(panel, 0) + r, sums[0]);
      store<V>(c.Sum(panel, 1) + r, products[0]);
    }
    for (int k = 0; k < kVecs; k++) store<V>(dgain + k * N, load<V>(dgain + k * N) + gains[k]);
  }
  void FindGrads(int64_t n) const {
    for (int64_t r = 0; r < n; r += N) {
      store<V>(found_[0] + r, common_->centred ? V(SumOfPanels(0, r) / Count()) : V{});
      store<V>(found_[1] + r, SumOfPanels(1, r) / Count());
    }
  }
  // The gradients of v, [gate][unit] with gates `gate_stride` apart. The largest of them, as bits.
  template <class GateOf>
  Bits ApplyGrads(int64_t at, int64_t n, const GateOf& gate, int64_t stride, const T* tape, T* out,
                  int64_t out_stride, int64_t gate_stride) const {
    const T* gain = gain_ + at * kWidth;
    Bits largest{};
    for (int64_t row = 0; row < n; row++, tape += kTapeRow) {
      const V mean = splat<V>(found_[0][row]), slope = splat<V>(found_[1][row]);
      FRNN_UNROLL
      for (int k = 0; k < kVecs; k++) {
        const int q = k / kPanelVecs, unit = k % kPanelVecs * N;
        const V g = load<V>(gate(q) + row * stride + unit) * load<V>(gain + k * N);
        const V dv = load<V>(tape + kWidth + unit) * (g - mean - load<V>(tape + k * N) * slope);
        store<V>(out + row * out_stride + q * gate_stride + unit, dv);
        if constexpr (kTiles) {
          const auto magnitude = bit_cast<Bits>(dv) & 0x7fffffff;
          largest = magnitude > largest ? magnitude : largest;
        }
      }
    }
    return largest;
  }
  // [gate][unit] of an own panel.
  const T* Gains(int64_t at) const { return gain_ + at * kWidth; }
  const T* GainGrads(int64_t at) const { return dgain_ + at * kWidth; }

 private:
  static constexpr int kVecs = kGates * kPanelVecs, kWidth = kGates * kUnits;

  T Count() const { return T(kGates * common_->H); }
  // 1 for each unit of an own panel, 0 past H.
  void Valid(int64_t at, V (&valid)[kPanelVecs]) const {
    const int64_t units = common_->Units(panels_.begin + at);
    for (int j = 0; j < kPanelVecs; j++)
      for (int lane = 0; lane < N; lane++) valid[j][lane] = j * N + lane < units;
  }
  V SumOfPanels(int which, int64_t r) const {
    V sum{};
    for (int64_t panel = 0; panel < common_->panels; panel++)
      sum += load<V>(common_->Sum(panel, which) + r);
    return sum;
  }
  // The sums over gates and units of value(row, gate, vector of units), of N rows from r on.
  template <class F>
  FRNN_INLINE static V OfRows(int64_t r, int64_t rows, const F& value) {
    V sums[N] = {};
    for (int i = 0; i < N && r + i < rows; i++) {
      FRNN_UNROLL
      for (int k = 0; k < kVecs; k++) sums[i] += value(r + i, k / kPanelVecs, k % kPanelVecs);
    }
    SumLanes(sums);
    return sums[0];
  }

  Common* common_ = nullptr;
  Team::Range panels_;
  T *gain_, *dgain_;
  T* found_[2];  // of rows: mean and scale; of gradients, what comes off, and off per n
};

FRNN_END
