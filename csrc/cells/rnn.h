// Elman network (Elman 1990, "Finding structure in time"):  h' = f(x_0 + h_0),  f = tanh or relu.
#pragma once
#include "core/cell.h"

namespace frnn {

template <class F>
struct Rnn : CellDefaults {
  static constexpr int kX = 1, kH = 1, kStates = 1, kSaved = 0, kD = 1;
  static constexpr int kDx[kX] = {0}, kDh[kH] = {0};
  static constexpr int kReads = 0;
  static constexpr bool kReadsNewH = true;

  template <class V>
  FRNN_HD static void forward(const Pack<V, kX>& x, const Pack<V, kH>& h, const Pack<V, kStates>&,
                              const Pack<V, kParams>&, Pack<V, kStates>& s_new, Pack<V, kSaved>&) {
    s_new[0] = F::f(V(x[0] + h[0]));
  }
  template <class V>
  FRNN_HD static void backward(const Pack<V, kSaved>&, const Pack<V, kStates>&, V h_new,
                               const Pack<V, kParams>&, const Pack<V, kStates>& ds_new,
                               Pack<V, kD>& d, Pack<V, kStates>& ds, Pack<V, kParams>&) {
    d[0] = F::backward(ds_new[0], h_new);
    ds[0] = V{};
  }
};

struct TanhFn {
  template <class V>
  FRNN_HD static V f(V a) {
    return tanh(a);
  }
  template <class V>
  FRNN_HD static V backward(V dy, V y) {
    return dy * tanh_grad(y);
  }
};
struct ReluFn {
  template <class V>
  FRNN_HD static V f(V a) {
    return relu(a);
  }
  template <class V>
  FRNN_HD static V backward(V dy, V y) {
    return relu_backward(dy, y);
  }
};

using RnnTanh = Rnn<TanhFn>;
using RnnRelu = Rnn<ReluFn>;

}  // namespace frnn
