// Normalisation of a product of a layer, row by row, over all gates and units, or of a state over all
// units, as of one gate: v becomes gain * n, where n = (v - mean) * scale and
// scale = 1 / sqrt(var + eps), or, of kind rms, n = v * scale and
// scale = 1 / sqrt(mean of squares + eps).
//
// A row is spread over the team. Each thread sums up the part of its panels, and after a barrier
// adds up those of all panels, in their order: what comes out depends on no number of threads.
//
// A large mean costs no digits. Of a panel all but its rounded mean is sums of distances from that;
// the mean of a row is that of its first panel, and a small distance from there which is subtracted
// by itself.
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

// Rows of a tape that are called into the cache before they are read or written. A tape goes by once
// in each pass, out of memory if the sequence is long.
constexpr int kRowsAhead = 16;

// One object a thread. Rows are [gate][unit] of a panel, some stride apart.
template <int kGates, int kPanelVecs>
class RowNorm {
 public:
  static constexpr int kUnits = kPanelVecs * N;
  // On the tape, in values per unit: n of all gates, and room for a scale of each row.
  static constexpr int kTape = kGates + 1, kTapeRow = kGates * kUnits;

  // Of a row and panel: its rounded mean, and the sums of distances from that and of their squares.
  enum { kMean, kRest, kSquares, kSums };

  // What the threads of a team share.
  struct Common {
    bool on = false, centred;
    T eps;
    int64_t H, panels, own_panels, rows;  // rows at a time, at most

    T* sums;                                               // [panel][kSums][row]
    int64_t Rows() const { return RoundUp(rows, N) + N; }  // stores of whole vectors reach past
    void Take(Scratch& s) { sums = s.Take<T>(on ? panels * kSums * Rows() : 0); }
    T* Sum(int64_t panel, int which) const { return sums + (panel * kSums + which) * Rows(); }
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
    const int64_t panel = panels_.begin + at;
    const T count = T(kGates * c.Units(panel));
    V valid[kPanelVecs];
    Valid(at, valid);
    for (int64_t r = 0; r < rows; r += N) {
      const int n = int(rows - r < N ? rows - r : N);
      const T* const block = v + r * stride;
      alignas(kLine) T means[N] = {};
      V rests[N] = {}, squares[N] = {};
      if (c.centred) {
        V sums[N] = {};
        for (int i = 0; i < n; i++) {
          FRNN_UNROLL
          for (int k = 0; k < kVecs; k++) sums[i] += load<V>(block + i * stride + k * N);
        }
        SumLanes(sums);
        store<V>(means, sums[0] / count);
      }
      for (int i = 0; i < n; i++) {
        const V mean = splat<V>(means[i]);
        V rest{}, square{};
        FRNN_UNROLL
        for (int k = 0; k < kVecs; k++) {
          const V apart = (load<V>(block + i * stride + k * N) - mean) * valid[k % kPanelVecs];
          rest += apart;
          square += apart * apart;
        }
        rests[i] = rest;
        squares[i] = square;
      }
      if (c.centred) {
        SumLanes(rests);
        store<V>(c.Sum(panel, kMean) + first + r, load<V>(means));
        store<V>(c.Sum(panel, kRest) + first + r, rests[0]);
      }
      SumLanes(squares);
      store<V>(c.Sum(panel, kSquares) + first + r, squares[0]);
    }
  }
  // The scales go to `scales`, too, which may be null.
  void Find(int64_t n, T* scales) const {
    const Common& c = *common_;
    for (int64_t r = 0; r < n; r += N) {
      V near{}, mean{}, squares{};
      // How far the mean of a panel is from `near`.
      const auto apart = [&](int64_t panel, T count) FRNN_INLINE_LAMBDA {
        return V(load<V>(c.Sum(panel, kMean) + r) - near +
                 load<V>(c.Sum(panel, kRest) + r) / count);
      };
      if (c.centred) {
        near = load<V>(c.Sum(0, kMean) + r);
        for (int64_t panel = 0; panel < c.panels; panel++) {
          const T count = T(kGates * c.Units(panel));
          mean += apart(panel, count) * count;
        }
        mean /= Count();
      }
      for (int64_t panel = 0; panel < c.panels; panel++) {
        squares += load<V>(c.Sum(panel, kSquares) + r);
        if (!c.centred) continue;
        const T count = T(kGates * c.Units(panel));
        const V rest = load<V>(c.Sum(panel, kRest) + r), from_mean = apart(panel, count) - mean;
        squares += from_mean * from_mean * count - rest * rest / count;
      }
      const V var = squares / Count() + c.eps;
      V scale{};
      for (int lane = 0; lane < N && r + lane < n; lane++)
        scale[lane] = T(1) / std::sqrt(var[lane]);
      store<V>(found_[0] + r, near);
      store<V>(found_[1] + r, mean * scale);
      store<V>(found_[2] + r, scale);
    }
    if (scales && panels_.begin == 0) std::copy_n(found_[2], n, scales);
  }
  // In place, the rows from `first` on of those that were found. n goes to `tape`, which may be null.
  void Apply(int64_t at, int64_t first, int64_t n, T* v, int64_t stride, T* tape) const {
    const T* gain = gain_ + at * kWidth;
    for (int64_t row = first; row < first + n; row++, v += stride) {
      const V near = splat<V>(found_[0][row]), mean = splat<V>(found_[1][row]),
              scale = splat<V>(found_[2][row]);
      FRNN_UNROLL
      for (int i = 0; i < kVecs; i++) {
        const V normal = (load<V>(v + i * N) - near) * scale - mean;
        if (tape) {
          __builtin_prefetch(tape + kRowsAhead * kTapeRow + i * N, 1);
          store<V>(tape + i * N, normal);
        }
        store<V>(v + i * N, normal * load<V>(gain + i * N));
      }
      if (tape) tape += kTapeRow;
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
        V sum{}, product{};
        FRNN_UNROLL
        for (int k = 0; k < kVecs; k++) {
          const T* const at_row = tape + (r + i) * kTapeRow + k * N;
          __builtin_prefetch(at_row + kRowsAhead * kTapeRow);
          const V d = load<V>(gate(k / kPanelVecs) + (r + i) * stride + k % kPanelVecs * N);
          const V normal = load<V>(at_row);
          const V g = d * load<V>(gain + k * N);
          sum += g;
          product += g * normal;
          gains[k] += d * normal;
        }
        sums[i] = sum;
        products[i] = product;
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
  Bits ApplyGrads(int64_t at, int64_t n, const GateOf& gate, int64_t stride, const T* tape,
                  const T* scales, T* out, int64_t out_stride, int64_t gate_stride) const {
    const T* gain = gain_ + at * kWidth;
    V valid[kPanelVecs];
    Valid(at, valid);
    Bits largest{};
    for (int64_t row = 0; row < n; row++, tape += kTapeRow) {
      const V mean = splat<V>(found_[0][row]), slope = splat<V>(found_[1][row]);
      FRNN_UNROLL
      for (int k = 0; k < kVecs; k++) {
        const int q = k / kPanelVecs, unit = k % kPanelVecs * N;
        V g = load<V>(gate(q) + row * stride + unit) * load<V>(gain + k * N);
        FRNN_ROUNDED(g);  // of a single unit it is the mean
        const V scale = scales[row] * valid[k % kPanelVecs];
        const V dv = scale * (g - mean - load<V>(tape + k * N) * slope);
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
  Common* common_ = nullptr;
  Team::Range panels_;
  T *gain_, *dgain_;
  // Of rows: a number near the mean, the mean's distance from it times the scale, and the scale. Of
  // gradients, what comes off, and off per n.
  T* found_[3];
};

FRNN_END
