// The recurrent unit of DreamerV3 (Hafner et al. 2023, arXiv:2301.04104): a GRU whose gates see but
// the sum of both products, reset after it, and whose update gate is shifted towards keeping h.
// Gate order: r, c, u.
//   r = sigma(s_0)   c = tanh(r s_1)   u = sigma(s_2 - 1)   h' = h + u (c - h)     s = x + h
#pragma once
#include "core/cell.h"

namespace frnn {

struct BlockGRU : CellDefaults {
  static constexpr int kX = 3, kH = 3, kStates = 1, kSaved = 3, kD = 3;
  static constexpr int kDx[kX] = {0, 1, 2}, kDh[kH] = {0, 1, 2};
  static constexpr int kReads = 0b1;

  template <class V>
  FRNN_HD static void forward(const Pack<V, kX>& x, const Pack<V, kH>& h, const Pack<V, kStates>& s,
                              const Pack<V, kParams>&, Pack<V, kStates>& s_new,
                              Pack<V, kSaved>& saved) {
    using T = typename Lanes<V>::T;
    const V r = sigmoid(V(x[0] + h[0])), a = x[1] + h[1], u = sigmoid(V(x[2] + h[2] - T(1)));
    s_new[0] = s[0] + u * (tanh(V(r * a)) - s[0]);
    saved[0] = r, saved[1] = a, saved[2] = u;
  }
  template <class V>
  FRNN_HD static void backward(const Pack<V, kSaved>& saved, const Pack<V, kStates>& s, V,
                               const Pack<V, kParams>&, const Pack<V, kStates>& ds_new,
                               Pack<V, kD>& d, Pack<V, kStates>& ds, Pack<V, kParams>&) {
    using T = typename Lanes<V>::T;
    const V r = saved[0], a = saved[1], u = saved[2], dh = ds_new[0];
    const V c = tanh(V(r * a)), da = dh * u * tanh_grad(c);
    d[0] = da * a * sigmoid_grad(r);
    d[1] = da * r;
    d[2] = dh * (c - s[0]) * sigmoid_grad(u);
    ds[0] = dh * (T(1) - u);
  }
};

}  // namespace frnn
