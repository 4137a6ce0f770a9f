// Long short-term memory with forget gate (Hochreiter & Schmidhuber 1997; Gers, Schmidhuber &
// Cummins 2000). Gate order of torch.nn: i, f, g, o.
//   i = sigma(x_0 + h_0)   f = sigma(x_1 + h_1)   g = tanh(x_2 + h_2)   o = sigma(x_3 + h_3)
//   c' = f c + i g         h' = o tanh(c')
// States: s[0] = h, s[1] = c.
#pragma once
#include "core/cell.h"

namespace frnn {

struct LSTM : CellDefaults {
  static constexpr int kX = 4, kH = 4, kStates = 2, kSaved = 4, kD = 4;
  static constexpr int kDx[kX] = {0, 1, 2, 3}, kDh[kH] = {0, 1, 2, 3};
  static constexpr int kReads = 0b10;  // c

  template <class V>
  FRNN_HD static void forward(const Pack<V, kX>& x, const Pack<V, kH>& h, const Pack<V, kStates>& s,
                              const Pack<V, kParams>&, Pack<V, kStates>& s_new,
                              Pack<V, kSaved>& saved) {
    const V i = sigmoid(V(x[0] + h[0])), f = sigmoid(V(x[1] + h[1])), g = tanh(V(x[2] + h[2])),
            o = sigmoid(V(x[3] + h[3]));
    const V c = f * s[1] + i * g;
    s_new[0] = o * tanh(c);
    s_new[1] = c;
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
  }
  template <class V>
  FRNN_HD static void backward(const Pack<V, kSaved>& saved, const Pack<V, kStates>& s, V,
                               const Pack<V, kParams>&, const Pack<V, kStates>& ds_new,
                               Pack<V, kD>& d, Pack<V, kStates>& ds, Pack<V, kParams>&) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V tc = tanh(V(f * s[1] + i * g));
    const V dc = ds_new[1] + ds_new[0] * o * tanh_grad(tc);
    d[0] = dc * g * sigmoid_grad(i);
    d[1] = dc * s[1] * sigmoid_grad(f);
    d[2] = dc * i * tanh_grad(g);
    d[3] = ds_new[0] * tc * sigmoid_grad(o);
    ds[0] = V{};
    ds[1] = dc * f;
  }
};

}  // namespace frnn
