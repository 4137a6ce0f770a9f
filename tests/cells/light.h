// Without a recurrent matrix, after SRU (Lei et al. 2018, arXiv:1709.02755), and with a parameter:
//   f = sigma(x_1 + p c)   c' = x_0 + f (c - x_0)   r = sigma(x_2)   h' = r tanh(c')
// States: s[0] = h, s[1] = c.
#pragma once
#include "core/cell.h"

namespace frnn {

struct Light : CellDefaults {
  static constexpr int kX = 3, kH = 0, kStates = 2, kSaved = 3, kD = 3, kParams = 1;
  static constexpr int kDx[kX] = {0, 1, 2};
  static constexpr int kReads = 0b10;
  static constexpr const char* kParamNames[kParams] = {"p"};

  template <class V>
  FRNN_HD static void forward(const Pack<V, kX>& x, const Pack<V, kH>&, const Pack<V, kStates>& s,
                              const Pack<V, kParams>& p, Pack<V, kStates>& s_new,
                              Pack<V, kSaved>& saved) {
    const V f = sigmoid(V(x[1] + p[0] * s[1])), r = sigmoid(x[2]);
    s_new[1] = x[0] + f * (s[1] - x[0]);
    s_new[0] = r * tanh(s_new[1]);
    saved[0] = x[0], saved[1] = f, saved[2] = r;
  }
  template <class V>
  FRNN_HD static void backward(const Pack<V, kSaved>& saved, const Pack<V, kStates>& s, V,
                               const Pack<V, kParams>& p, const Pack<V, kStates>& ds_new,
                               Pack<V, kD>& d, Pack<V, kStates>& ds, Pack<V, kParams>& dp) {
    using T = typename Lanes<V>::T;
    const V x = saved[0], f = saved[1], r = saved[2], tc = tanh(V(x + f * (s[1] - x)));
    const V dc = ds_new[1] + ds_new[0] * r * tanh_grad(tc);
    d[0] = dc * (T(1) - f);
    d[1] = dc * (s[1] - x) * sigmoid_grad(f);
    d[2] = ds_new[0] * tc * sigmoid_grad(r);
    ds[0] = V{};
    ds[1] = dc * f + d[1] * p[0];
    dp[0] = d[1] * s[1];
  }
};

}  // namespace frnn
