// Layers over one sequence that comes in blocks, such as sound: what fused_rnn.export_cpp writes out.
// A part has constant sizes and all its memory in itself. It allocates nothing and waits for nobody.
//
// A part has kInputs and kOutputs; Weights, read once and shared by all who run; and
//   void Reset()                                            the states become zeros
//   void Run(const Weights&, const T* x, int64_t n, T* y)   n <= kMostSteps rows of each
#pragma once
#include "cpu/steps.h"

FRNN_BEGIN

// Numbers one after the other.
struct Reader {
  const T* at;
  const T* Take(int64_t n) {
    const T* const first = at;
    at += n;
    return first;
  }
};

// A layer of one direction.
template <class C, int64_t kIn, int64_t kOut>
class Stream {
  static_assert(CheckCell<C>());
  static_assert(C::kGiven == 0, "a block has nothing but x");
  template <int64_t n>
  using Constant = std::integral_constant<int64_t, n>;
  using Layer = Steps<C, Constant<kIn>, Constant<kOut>>;
  static constexpr int64_t kPadded = Layer::Padded(kOut);

 public:
  static constexpr int64_t kInputs = kIn, kOutputs = kOut;

  // Read in the order w_ih, w_hh, b_ih, b_hh, parameters, of those that the cell has.
  struct Weights {
    explicit Weights(Reader& from) {
      const T* const w_ih = from.Take(C::kX * kOut * kIn);
      Layer::Pack(w_ih, from.Take(C::kH * kOut * kOut), kIn, kOut, packed);
      const auto read = [&](int count, T* to) {
        for (int k = 0; k < count; k++) Layer::PackUnits(from.Take(kOut), k, count, kOut, to);
      };
      read(C::kX, b_ih);
      read(C::kH, b_hh);
      read(C::kParams, params);
    }

    alignas(kLine) T packed[Layer::PackedSize(kIn, kOut)];
    alignas(kLine) T b_ih[C::kX * kPadded];
    alignas(kLine) T b_hh[C::kH * kPadded + N];
    alignas(kLine) T params[C::kParams * kPadded + N];
  };

  void Reset() {
    std::fill_n(h_[0], kPadded, T(0));
    std::fill_n(c_, C::kStates * kPadded, T(0));
  }
  FRNN_NOINLINE void Run(const Weights& w, const T* x, int64_t n, T* y) {
    const Layer layer{{}, {},        w.packed, w.b_ih, w.b_hh, w.params, {h_[0], h_[1]},
                      c_, operands_, gates_x_};
    layer.Run(x, kIn, n, y, kOut);
  }

 private:
  alignas(kLine) T h_[2][kPadded];
  alignas(kLine) T c_[C::kStates * kPadded];
  alignas(kLine) T operands_[Layer::OperandsSize(kOut) + N];
  alignas(kLine) T gates_x_[Layer::GatesSize(kIn, kOut) + N];
};

// y = W x + b
template <int64_t kIn, int64_t kOut>
class Dense {
  static constexpr int64_t kPanels = (kOut + N - 1) / N;

 public:
  static constexpr int64_t kInputs = kIn, kOutputs = kOut;

  struct Weights {
    explicit Weights(Reader& from) {
      const T* const matrix = from.Take(kOut * kIn);
      for (int64_t panel = 0; panel < kPanels; panel++)
        Panel<1, 1>::Pack(matrix, kPlain, kOut, kIn, panel, w + panel * kIn * N);
      b = from.Take(kOut);
    }
    alignas(kLine) T w[kPanels * kIn * N];
    const T* b;
  };

  void Reset() {}
  FRNN_NOINLINE void Run(const Weights& w, const T* x, int64_t n, T* y) {
    RowProduct<1, 1>::Rows(w.w, kPanels, kIn, x, kIn, n, products_);
    for (int64_t row = 0; row < n; row++)
      for (int64_t i = 0; i < kOut; i++)
        y[row * kOut + i] = products_[(i / N * kMostSteps + row) * N + i % N] + w.b[i];
  }

 private:
  alignas(kLine) T products_[kPanels * kMostSteps * N];
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
