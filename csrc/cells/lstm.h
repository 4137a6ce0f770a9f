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
  static constexpr int kShows = 1;     // c'

  template <class V>
  FRNN_HD static void forward(const Pack<V, kX>& x, const Pack<V, kH>& h, const Pack<V, kStates>& s,
                              const Pack<V, kParams>&, Pack<V, kStates>& s_new,
                              Pack<V, kSaved>& saved) {
    const V i = sigmoid(V(x[0] + h[0])), f = sigmoid(V(x[1] + h[1])), g = tanh(V(x[2] + h[2])),
            o = sigmoid(V(x[3] + h[3]));
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
    s_new[1] = f * s[1] + i * g;
    s_new[0] = show(saved, s_new[1]);
  }
  template <class V>
  FRNN_HD static void backward(const Pack<V, kSaved>& saved, const Pack<V, kStates>& s, V,
                               const Pack<V, kParams>& p, const Pack<V, kStates>& ds_new,
                               Pack<V, kD>& d, Pack<V, kStates>& ds, Pack<V, kParams>& dp) {
    const V c = saved[1] * s[1] + saved[0] * saved[2];
    Pack<V, kStates> reached = ds_new;
    reached[1] = ds_new[1] + show_backward(saved, c, ds_new[0], d);
    update_backward(saved, s, p, reached, d, ds, dp);
  }

  template <class V>
  FRNN_HD static V show(const Pack<V, kSaved>& saved, const V& shown) {
    return saved[3] * tanh(shown);
  }
  template <class V>
  FRNN_HD static V show_backward(const Pack<V, kSaved>& saved, const V& shown, const V& dh,
                                 Pack<V, kD>& d) {
    const V o = saved[3], t = tanh(shown);
    d[3] = dh * t * sigmoid_grad(o);
    return dh * o * tanh_grad(t);
  }
  template <class V>
  FRNN_HD static void update_backward(const Pack<V, kSaved>& saved, const Pack<V, kStates>& s,
                                      const Pack<V, kParams>&, const Pack<V, kStates>& ds_new,
                                      Pack<V, kD>& d, Pack<V, kStates>& ds, Pack<V, kParams>&) {
    const V i = saved[0], f = saved[1], g = saved[2], dc = ds_new[1];
    d[0] = dc * g * sigmoid_grad(i);
    d[1] = dc * s[1] * sigmoid_grad(f);
    d[2] = dc * i * tanh_grad(g);
    ds[0] = V{};
    ds[1] = dc * f;
  }
};

}  // namespace frnn
