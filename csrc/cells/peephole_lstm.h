// LSTM whose gates see the cell state (Gers & Schmidhuber 2000, "Recurrent nets that time and count").
// Gate order: i, f, g, o.
//   i = sigma(x_0 + h_0 + p_i c)   f = sigma(x_1 + h_1 + p_f c)   g = tanh(x_2 + h_2)
//   c' = f c + i g                 o = sigma(x_3 + h_3 + p_o c')  h' = o tanh(c')
// States: s[0] = h, s[1] = c.
#pragma once
#include "core/cell.h"

namespace frnn {

struct PeepholeLSTM : CellDefaults {
  static constexpr int kX = 4, kH = 4, kStates = 2, kSaved = 4, kD = 4, kParams = 3;
  static constexpr int kDx[kX] = {0, 1, 2, 3}, kDh[kH] = {0, 1, 2, 3};
  static constexpr int kReads = 0b10;  // c
  static constexpr int kShows = 1;     // c'
  static constexpr const char* kParamNames[kParams] = {"p_i", "p_f", "p_o"};

  template <class V>
  FRNN_HD static void forward(const Pack<V, kX>& x, const Pack<V, kH>& h, const Pack<V, kStates>& s,
                              const Pack<V, kParams>& p, Pack<V, kStates>& s_new,
                              Pack<V, kSaved>& saved) {
    const V i = sigmoid(V(x[0] + h[0] + p[0] * s[1])), f = sigmoid(V(x[1] + h[1] + p[1] * s[1])),
            g = tanh(V(x[2] + h[2]));
    const V c = f * s[1] + i * g, o = sigmoid(V(x[3] + h[3] + p[2] * c));
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
    s_new[0] = show(saved, c);
    s_new[1] = c;
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
                                      const Pack<V, kParams>& p, const Pack<V, kStates>& ds_new,
                                      Pack<V, kD>& d, Pack<V, kStates>& ds, Pack<V, kParams>& dp) {
    const V i = saved[0], f = saved[1], g = saved[2];
    const V c = f * s[1] + i * g, dc = ds_new[1] + d[3] * p[2];
    d[0] = dc * g * sigmoid_grad(i);
    d[1] = dc * s[1] * sigmoid_grad(f);
    d[2] = dc * i * tanh_grad(g);
    ds[0] = V{};
    ds[1] = dc * f + d[0] * p[0] + d[1] * p[1];
    dp[0] = d[0] * s[1], dp[1] = d[1] * s[1], dp[2] = d[3] * c;
  }
};

}  // namespace frnn
