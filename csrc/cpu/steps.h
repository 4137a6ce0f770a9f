// One row through the steps of a layer, forwards in time, on the calling thread: what a layer does for
// a single stream in inference, where nothing happens between steps. Sizes are constants
// (std::integral_constant) or known at run time.
//
// The order of sums is the engine's: one chain in x W_ih^T, as many rows have, and in h W_hh^T the chains
// of a single row. Both are the same however a sequence is cut into calls.
#pragma once
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "core/step.h"
#include "cpu/product/panel.h"
#include "cpu/product/tile.h"

FRNN_BEGIN

constexpr int64_t kMostSteps = 32;  // at a time: their gates stay in the first-level cache

// A product with a packed matrix [kGates * H, K].
template <int kGates, int kPanelVecs>
struct RowProduct {
  using Layout = Panel<kGates, kPanelVecs>;

  // out[panel][row][gate][unit] of n <= kMostSteps rows, panels kMostSteps rows apart. In one chain,
  // however few rows there are.
  static void Rows(const T* packed, int64_t panels, int64_t K, const T* x, int64_t stride,
                   int64_t n, T* out) {
    for (int64_t panel = 0; panel < panels; panel++)
      Layout::ForBands([&](auto first, auto vecs) {
        constexpr int NV = decltype(vecs)::value, kRows = cpu::TileRows(kVectors, NV);
        const T* const w = packed + panel * K * Layout::kWidth + first * N * K;
        T* const c = out + panel * kMostSteps * Layout::kWidth + first * N;
        ForRowBlocks<kRows>(n, [&](int rows, int64_t r) {
          WithConstant<kRows>(rows, [&](auto mr) {
            GemmTile<decltype(mr)::value, NV, false, 1>(x + r * stride, stride, w, NV * N, K,
                                                        c + r * Layout::kWidth, Layout::kWidth,
                                                        false, reinterpret_cast<const char*>(w), 0);
          });
        });
      });
  }
  // gates[gate][vector] of a panel, of one row: in one chain likewise, or in those that one row has.
  template <bool kOneChain>
  FRNN_INLINE static void Row(const T* packed, int64_t K, const T* row, int64_t panel, V* gates) {
    Layout::ForBands([&](auto first, auto vecs) FRNN_INLINE_LAMBDA {
      constexpr int NV = decltype(vecs)::value;
      constexpr int kChains = kOneChain ? 1 : cpu::Chains(kVectors, 1, NV);
      constexpr bool kAhead = !kOneChain && cpu::CallsAhead(kVectors, NV);
      const T* const w = packed + panel * K * Layout::kWidth + first * N * K;
      V sums[1][NV];
      TileSums<1, NV, false, kChains, kAhead>(row, 0, w, NV * N, K, sums,
                                              reinterpret_cast<const char*>(w + K * NV * N), kLine);
      FRNN_UNROLL
      for (int v = 0; v < NV; v++) gates[first + v] = sums[0][v];
    });
  }
};

template <class C, class Inputs, class Units>
class Steps {
 public:
  static constexpr int kMostGates = C::kX > Products<C>::Most() ? C::kX : Products<C>::Most();
  static constexpr int kPanelVecs = PanelVecs(kMostGates), kUnits = kPanelVecs * N;
  static constexpr int kExtra = States<C>::kExtra;
  static constexpr int64_t Panels(int64_t units) { return (units + kUnits - 1) / kUnits; }
  static constexpr int64_t Padded(int64_t units) { return Panels(units) * kUnits; }
  // Of few units and inputs a step's own product with x runs beside the chain of what waits for h;
  // others are computed ahead, many rows at a time, which read W_ih once.
  static constexpr bool ComputesAhead(int64_t inputs, int64_t units) {
    return Panels(units) * C::kX * kPanelVecs * inputs > 128;
  }
  // Numbers of what the members point to.
  static constexpr int64_t PackedSize(int64_t inputs, int64_t units) {
    return PackedBefore(inputs, units, Products<C>::kCount);
  }
  static constexpr int64_t OperandsSize(int64_t units) {
    return C::kOperands > 0 ? (C::kOperands + C::kH) * Padded(units) : 0;
  }
  static constexpr int64_t GatesSize(int64_t inputs, int64_t units) {
    return ComputesAhead(inputs, units) ? kMostSteps * C::kX * Padded(units) : 0;
  }

  Inputs inputs;
  Units units;
  const T* packed;                // W_ih and W_hh, see Pack
  const T *b_ih, *b_hh, *params;  // [panel][gate or number][unit]
  T* h[2];                        // [Padded] each; the first is before and after a run
  T* c;                           // [kExtra, Padded]
  T* operands;                    // [kOperands, Padded], and gates that wait for a further product
  T* gates_x;                     // [panel][row][gate][unit]

  // W_ih and then W_hh, of each product by itself, as they lie in memory, by panels.
  static void Pack(const T* w_ih, const T* w_hh, int64_t inputs, int64_t units, T* packed) {
    PackMatrix<C::kX>(w_ih, inputs, units, packed);
    PackProducts(w_hh, inputs, units, packed, ProductNumbers());
  }
  // dst[panel][k][unit] = values[unit], of number k of `count`; null: zeros.
  static void PackUnits(const T* values, int k, int count, int64_t units, T* dst) {
    for (int64_t unit = 0; unit < Padded(units); unit++)
      dst[(unit / kUnits * count + k) * kUnits + unit % kUnits] =
          values && unit < units ? values[unit] : T(0);
  }
  // n <= kMostSteps rows of x, and of y.
  FRNN_INLINE void Run(const T* x, int64_t x_stride, int64_t n, T* y, int64_t y_stride) const {
    if (ComputesAhead(inputs, units))
      RowProduct<C::kX, kPanelVecs>::Rows(packed, Panels(units), inputs, x, x_stride, n, gates_x);
    T *before = h[0], *after = h[1];
    for (int64_t row = 0; row < n; row++, std::swap(before, after))
      Step(row, x + row * x_stride, before, after, y + row * y_stride, ProductNumbers());
    if (before != h[0]) std::memcpy(h[0], before, size_t(Padded(units)) * sizeof(T));
  }

 private:
  static constexpr int kOutputExtra = States<C>::kOutputExtra;
  using ProductNumbers = std::make_integer_sequence<int, C::kH == 0 ? 0 : Products<C>::kCount>;

  static constexpr int64_t PackedBefore(int64_t inputs, int64_t units, int product) {
    return Padded(units) * (C::kX * inputs + Products<C>::First(product) * units);
  }
  template <int kGates>
  static void PackMatrix(const T* w, int64_t K, int64_t units, T* packed) {
    using Layout = Panel<kGates, kPanelVecs>;
    for (int64_t panel = 0; panel < Panels(units); panel++)
      Layout::Pack(w, kPlain, units, K, panel, packed + panel * K * Layout::kWidth);
  }
  template <int... k>
  static void PackProducts(const T* w_hh, int64_t inputs, int64_t units, T* packed,
                           std::integer_sequence<int, k...>) {
    (PackMatrix<Products<C>::Gates(k)>(w_hh + Products<C>::First(k) * units * units, units, units,
                                       packed + PackedBefore(inputs, units, k)),
     ...);
  }

  // The operands of one vector of units, as core/step.h asks for them.
  struct View {
    const Steps& my;
    const V *gates_x, *gates_h;  // [gate][vector] of the panel
    int64_t panel;
    int vec;
    const T* h;
    T *h_new, *y;

    FRNN_INLINE V GateX(int q) const {
      return gates_x[q * kPanelVecs + vec] + load<V>(my.b_ih + panel * C::kX * kUnits + OfGate(q));
    }
    FRNN_INLINE V GateH(int q) const {
      return gates_h[q * kPanelVecs + vec] + load<V>(my.b_hh + panel * C::kH * kUnits + OfGate(q));
    }
    FRNN_INLINE V Param(int k) const {
      return load<V>(my.params + panel * C::kParams * kUnits + OfGate(k));
    }
    FRNN_INLINE V H() const { return load<V>(h + Unit()); }
    FRNN_INLINE V Extra(int e) const { return load<V>(my.c + e * Padded(my.units) + Unit()); }
    static constexpr bool Zones() { return false; }
    FRNN_INLINE V Zone(int) const { return V{}; }
    FRNN_INLINE void SetH(const V& value) const {
      store<V>(h_new + Unit(), value);
      if constexpr (kOutputExtra < 0) SetOutput(value);
    }
    FRNN_INLINE void SetExtra(int e, const V& value) const {
      store<V>(my.c + e * Padded(my.units) + Unit(), value);
      if (e == kOutputExtra) SetOutput(value);
    }
    FRNN_INLINE void SetOperand(int k, const V& value) const {
      store<V>(my.operands + k * Padded(my.units) + Unit(), value);
    }

   private:
    FRNN_INLINE int64_t Unit() const { return panel * kUnits + vec * N; }
    FRNN_INLINE int OfGate(int q) const { return (q * kPanelVecs + vec) * N; }
    FRNN_INLINE void SetOutput(const V& value) const {
      const int64_t left = my.units - Unit();
      if (left >= N)
        store<V>(y + Unit(), value);
      else if (left > 0)
        std::memcpy(y + Unit(), &value, size_t(my.units % N) * sizeof(T));
    }
  };

  // Of each product the math that can go on from there, panel by panel.
  template <int... k>
  FRNN_INLINE void Step(int64_t row, const T* x, const T* before, T* after, T* y,
                        std::integer_sequence<int, k...>) const {
    if constexpr (C::kH == 0) {
      for (int64_t panel = 0; panel < Panels(units); panel++) {
        V gates[C::kX * kPanelVecs];
        GatesX(row, x, panel, gates);
        Math<0>(gates, nullptr, panel, before, after, y);
      }
    } else {
      (Product<k>(row, x, before, after, y), ...);
    }
  }
  template <int k>
  FRNN_INLINE void Product(int64_t row, const T* x, const T* before, T* after, T* y) const {
    constexpr int kFirst = Products<C>::First(k) * kPanelVecs;
    constexpr int kEnd = Products<C>::First(k + 1) * kPanelVecs;
    const T* const left = k == 0 ? before : operands + (k - 1) * Padded(units);
    for (int64_t panel = 0; panel < Panels(units); panel++) {
      V gates_x_of[C::kX * kPanelVecs], gates[C::kH * kPanelVecs];
      T* const of_panel = operands + C::kOperands * Padded(units) + panel * C::kH * kUnits;
      for (int v = 0; v < kFirst; v++) gates[v] = load<V>(of_panel + v * N);
      GatesX(row, x, panel, gates_x_of);
      RowProduct<Products<C>::Gates(k), kPanelVecs>::template Row<false>(
          packed + PackedBefore(inputs, units, k), units, left, panel, gates + kFirst);
      if constexpr (k < C::kOperands)
        for (int v = kFirst; v < kEnd; v++) store<V>(of_panel + v * N, gates[v]);
      Math<k>(gates_x_of, gates, panel, before, after, y);
    }
  }
  FRNN_INLINE void GatesX(int64_t row, const T* x, int64_t panel, V* gates) const {
    if (ComputesAhead(inputs, units))
      for (int v = 0; v < C::kX * kPanelVecs; v++)
        gates[v] = load<V>(gates_x + (panel * kMostSteps + row) * C::kX * kUnits + v * N);
    else
      RowProduct<C::kX, kPanelVecs>::template Row<true>(packed, inputs, x, panel, gates);
  }
  template <int k>
  FRNN_INLINE void Math(const V* gates_x_of, const V* gates, int64_t panel, const T* before,
                        T* after, T* y) const {
    FRNN_UNROLL
    for (int vec = 0; vec < kPanelVecs; vec++) {
      const View view{*this, gates_x_of, gates, panel, vec, before, after, y};
      ForwardStep<C, V> step;
      step.template Load<k>(view);
      if constexpr (k < C::kOperands) {
        step.Compute();
        step.template StoreOperand<k>(view);
      } else {
        step.Compute(view);
        step.StoreStates(view);
      }
    }
  }
};

FRNN_END
