// Layers over one sequence that comes in blocks, such as sound: what fused_rnn.export_cpp writes out.
// A part has constant sizes and all its memory in itself. It allocates nothing, waits for nobody, and
// gives the same bits however its input is cut into blocks: the sums of the engine for one row in a
// step, and for many in x W_ih^T.
//
// A part has kInputs and kOutputs; Weights, read once and shared by all who run; and
//   void Reset()                                        the states become zeros
//   void Run(const Weights&, const T* x, int64_t n, T* y)   n <= kMostSteps rows of each
#pragma once
#include <algorithm>
#include <cstring>
#include <tuple>

#include "core/step.h"
#include "cpu/product/panel.h"
#include "cpu/product/tile.h"

FRNN_BEGIN

constexpr int64_t kMostSteps = 32;  // their gates stay in the first-level cache

// Numbers one after the other.
struct Reader {
  const T* at;

  const T* Take(int64_t n) {
    const T* const first = at;
    at += n;
    return first;
  }
  template <class Matrix>
  void Read(Matrix& matrix) {
    matrix.Pack(Take(Matrix::kNumbers));
  }
};

// A matrix [kGates * H, K], by panels.
template <int kGates, int kPanelVecs, int64_t H, int64_t K>
struct PackedMatrix {
  using Layout = Panel<kGates, kPanelVecs>;
  static constexpr int64_t kPanels = (H + Layout::kUnits - 1) / Layout::kUnits;
  static constexpr int64_t kNumbers = kGates * H * K;

  void Pack(const T* w) {
    for (int64_t panel = 0; panel < kPanels; panel++)
      Layout::Pack(w, kPlain, H, K, panel, packed + panel * K * Layout::kWidth);
  }
  const T* Band(int64_t panel, int first) const {
    return packed + panel * K * Layout::kWidth + first * N * K;
  }
  // out[panel][row][gate][unit], panels kMostSteps rows apart. Rows are summed in one chain, as many
  // rows are, however few they be.
  void MultiplyRows(const T* x, int64_t n, T* out) const {
    for (int64_t panel = 0; panel < kPanels; panel++)
      Layout::ForBands([&](auto first, auto vecs) {
        constexpr int NV = decltype(vecs)::value, kRows = cpu::TileRows(kVectorBytes, NV);
        const T* const w = Band(panel, first);
        T* const c = out + panel * kMostSteps * Layout::kWidth + first * N;
        ForRowBlocks<kRows>(n, [&](int rows, int64_t r) {
          WithConstant<kRows>(rows, [&](auto mr) {
            GemmTile<decltype(mr)::value, NV, false, 1>(x + r * K, K, w, NV * N, K,
                                                        c + r * Layout::kWidth, Layout::kWidth,
                                                        false, reinterpret_cast<const char*>(w), 0);
          });
        });
      });
  }
  // gates[gate][vector] of a panel, of one row: in one chain likewise, or in those that one row has.
  template <bool kOneChain>
  FRNN_INLINE void MultiplyRow(const T* row, int64_t panel, V* gates) const {
    Layout::ForBands([&](auto first, auto vecs) FRNN_INLINE_LAMBDA {
      constexpr int NV = decltype(vecs)::value;
      constexpr int kChains = kOneChain ? 1 : cpu::Chains(kVectorBytes, 1, NV);
      V sums[1][NV];
      TileSums<1, NV, false, kChains, false>(row, 0, Band(panel, first), NV * N, K, sums);
      FRNN_UNROLL
      for (int v = 0; v < NV; v++) gates[first + v] = sums[0][v];
    });
  }

  alignas(kLine) T packed[kPanels * K * Layout::kWidth];
};

// A layer of one direction.
template <class C, int64_t kIn, int64_t kOut>
class Stream {
  static_assert(CheckCell<C>());
  static_assert(C::kGiven == 0, "a block has nothing but x");
  static constexpr int kMostGates = C::kX > Products<C>::Most() ? C::kX : Products<C>::Most();
  static constexpr int kPanelVecs = PanelVecs(kMostGates), kUnits = kPanelVecs * N;
  static constexpr int64_t kPanels = (kOut + kUnits - 1) / kUnits, kPadded = kPanels * kUnits;
  static constexpr int kExtra = States<C>::kExtra, kOutputExtra = States<C>::kOutputExtra;
  // Of few units and inputs a step's own product with x runs beside the chain of what waits for h;
  // others are computed ahead, many rows at a time, which read W_ih once.
  static constexpr bool kAhead = kPanels * C::kX * kPanelVecs * kIn > 128;

  template <int... k>
  static std::tuple<PackedMatrix<Products<C>::Gates(k), kPanelVecs, kOut, kOut>...> MatricesOf(
      std::integer_sequence<int, k...>);
  using ProductNumbers = std::make_integer_sequence<int, C::kH == 0 ? 0 : Products<C>::kCount>;

 public:
  static constexpr int64_t kInputs = kIn, kOutputs = kOut;

  // Read in the order w_ih, w_hh, b_ih, b_hh, parameters, of those that the cell has.
  struct Weights {
    explicit Weights(Reader& from) {
      from.Read(w_ih);
      std::apply([&](auto&... of_product) { (from.Read(of_product), ...); }, w_hh);
      ReadUnits(from, C::kX, b_ih);
      ReadUnits(from, C::kH, b_hh);
      ReadUnits(from, C::kParams, params);
    }

    PackedMatrix<C::kX, kPanelVecs, kOut, kIn> w_ih;
    decltype(MatricesOf(ProductNumbers())) w_hh;
    alignas(kLine) T b_ih[kPadded * C::kX];  // [panel][gate][unit]
    alignas(kLine) T b_hh[kPadded * C::kH + N];
    alignas(kLine) T params[kPadded * C::kParams + N];

   private:
    static void ReadUnits(Reader& from, int count, T* to) {
      for (int k = 0; k < count; k++) {
        const T* const values = from.Take(kOut);
        for (int64_t unit = 0; unit < kPadded; unit++)
          to[(unit / kUnits * count + k) * kUnits + unit % kUnits] =
              unit < kOut ? values[unit] : T(0);
      }
    }
  };

  void Reset() {
    std::fill_n(h_[0], kPadded, T(0));
    std::fill_n(c_, kExtra * kPadded, T(0));
  }
  FRNN_NOINLINE void Run(const Weights& w, const T* x, int64_t n, T* y) {
    if constexpr (kAhead) w.w_ih.MultiplyRows(x, n, gates_x_);
    T *h = h_[0], *h_new = h_[1];
    for (int64_t row = 0; row < n; row++, std::swap(h, h_new))
      Step(w, row, x + row * kIn, h, h_new, y + row * kOut, ProductNumbers());
    if (h != h_[0]) std::memcpy(h_[0], h, sizeof(h_[0]));
  }

 private:
  // The operands of one vector of units, as core/step.h asks for them.
  struct View {
    Stream& my;
    const Weights& w;
    const V *gates_x, *gates_h;  // [gate][vector] of the panel
    int64_t panel;
    int vec;
    const T* h;
    T *h_new, *y;

    FRNN_INLINE V GateX(int q) const {
      return gates_x[q * kPanelVecs + vec] + load<V>(w.b_ih + panel * C::kX * kUnits + OfGate(q));
    }
    FRNN_INLINE V GateH(int q) const {
      return gates_h[q * kPanelVecs + vec] + load<V>(w.b_hh + panel * C::kH * kUnits + OfGate(q));
    }
    FRNN_INLINE V Param(int k) const {
      return load<V>(w.params + panel * C::kParams * kUnits + OfGate(k));
    }
    FRNN_INLINE V H() const { return load<V>(h + Unit()); }
    FRNN_INLINE V Extra(int e) const { return load<V>(my.c_ + e * kPadded + Unit()); }
    static constexpr bool Zones() { return false; }
    FRNN_INLINE V Zone(int) const { return V{}; }
    FRNN_INLINE void SetH(const V& value) const {
      store<V>(h_new + Unit(), value);
      if constexpr (kOutputExtra < 0) SetOutput(value);
    }
    FRNN_INLINE void SetExtra(int e, const V& value) const {
      store<V>(my.c_ + e * kPadded + Unit(), value);
      if (e == kOutputExtra) SetOutput(value);
    }
    FRNN_INLINE void SetOperand(int k, const V& value) const {
      store<V>(my.operands_ + k * kPadded + Unit(), value);
    }

   private:
    FRNN_INLINE int64_t Unit() const { return panel * kUnits + vec * N; }
    FRNN_INLINE int OfGate(int q) const { return (q * kPanelVecs + vec) * N; }
    FRNN_INLINE void SetOutput(const V& value) const {
      constexpr size_t kRest = kOut % N * sizeof(T);
      if (Unit() + N <= kOut)
        store<V>(y + Unit(), value);
      else if (Unit() < kOut)
        std::memcpy(y + Unit(), &value, kRest);
    }
  };

  // Of each product the math that can go on from there, panel by panel.
  template <int... k>
  FRNN_INLINE void Step(const Weights& w, int64_t row, const T* x, const T* h, T* h_new, T* y,
                        std::integer_sequence<int, k...>) {
    constexpr bool kKeeps = C::kOperands > 0;  // the gates of earlier products
    constexpr int kVecsX = C::kX * kPanelVecs;
    V gates_x[kVecsX], gates[kKeeps ? kPanels : 1][C::kH > 0 ? C::kH * kPanelVecs : 1];
    const auto run = [&](auto product, const auto& multiply) FRNN_INLINE_LAMBDA {
      for (int64_t panel = 0; panel < kPanels; panel++) {
        V* const of_panel = gates[kKeeps ? panel : 0];
        if constexpr (kAhead)
          for (int v = 0; v < kVecsX; v++)
            gates_x[v] = load<V>(gates_x_ + (panel * kMostSteps + row) * C::kX * kUnits + v * N);
        else
          w.w_ih.template MultiplyRow<true>(x, panel, gates_x);
        multiply(panel, of_panel);
        FRNN_UNROLL
        for (int vec = 0; vec < kPanelVecs; vec++)
          Math<decltype(product)::value>(
              View{*this, w, gates_x, of_panel, panel, vec, h, h_new, y});
      }
    };
    if constexpr (C::kH == 0) run(std::integral_constant<int, 0>(), [](int64_t, V*) {});
    (run(std::integral_constant<int, k>(),
         [&](int64_t panel, V* of_panel) FRNN_INLINE_LAMBDA {
           const T* const left = k == 0 ? h : operands_ + (k - 1) * kPadded;
           std::get<k>(w.w_hh).template MultiplyRow<false>(
               left, panel, of_panel + Products<C>::First(k) * kPanelVecs);
         }),
     ...);
  }
  template <int kProduct>
  FRNN_INLINE static void Math(const View& view) {
    ForwardStep<C, V> step;
    step.template Load<kProduct>(view);
    if constexpr (kProduct < C::kOperands) {
      step.Compute();
      step.template StoreOperand<kProduct>(view);
    } else {
      step.Compute(view);
      step.StoreStates(view);
    }
  }

  alignas(kLine) T h_[2][kPadded];  // before a step and after it, in turns
  alignas(kLine) T c_[kExtra * kPadded + N];
  alignas(kLine) T operands_[C::kOperands * kPadded + N];
  alignas(kLine)
      T gates_x_[kAhead ? kPanels * kMostSteps * C::kX * kUnits : N];  // [panel][row][gate][unit]
};

// y = W x + b
template <int64_t kIn, int64_t kOut>
class Dense {
  using Matrix = PackedMatrix<1, 1, kOut, kIn>;

 public:
  static constexpr int64_t kInputs = kIn, kOutputs = kOut;

  struct Weights {
    explicit Weights(Reader& from) {
      from.Read(w);
      const T* const bias = from.Take(kOut);
      for (int64_t i = 0; i < Matrix::kPanels * N; i++) b[i] = i < kOut ? bias[i] : T(0);
    }
    Matrix w;
    alignas(kLine) T b[Matrix::kPanels * N];
  };

  void Reset() {}
  FRNN_NOINLINE void Run(const Weights& w, const T* x, int64_t n, T* y) {
    w.w.MultiplyRows(x, n, products_);
    for (int64_t row = 0; row < n; row++)
      for (int64_t i = 0; i < kOut; i++)
        y[row * kOut + i] = products_[(i / N * kMostSteps + row) * N + i % N] + w.b[i];
  }

 private:
  alignas(kLine) T products_[Matrix::kPanels * kMostSteps * N];
};

// One part after the other, over any number of rows.
template <class First, class... Rest>
class Chain {
  using Next = Chain<Rest...>;

 public:
  static constexpr int64_t kInputs = First::kInputs, kOutputs = Next::kOutputs;
  static_assert(First::kOutputs == Next::kInputs);

  struct Weights {
    explicit Weights(Reader& from) : first(from), rest(from) {}
    typename First::Weights first;
    typename Next::Weights rest;
  };

  void Reset() {
    first_.Reset();
    rest_.Reset();
  }
  void Run(const Weights& w, const T* x, int64_t n, T* y) {
    first_.Run(w.first, x, n, between_);
    rest_.Run(w.rest, between_, n, y);
  }

 private:
  First first_;
  Next rest_;
  alignas(kLine) T between_[kMostSteps * First::kOutputs];
};
template <class Last>
class Chain<Last> : public Last {};

FRNN_END
