// Gated recurrent unit, reset after the product (the one torch.nn and cuDNN have; Cho et al. 2014,
// arXiv:1406.1078). Gate order of torch.nn: r, z, n.
//   r = sigma(x_0 + h_0)   z = sigma(x_1 + h_1)   n = tanh(x_2 + r h_2)   h' = n + z (h - n)
#pragma once
#include "core/cell.h"

namespace frnn {

struct GRU : CellDefaults {
  static constexpr int kX = 3, kH = 3, kStates = 1, kSaved = 4, kD = 4;
  static constexpr int kDx[kX] = {0, 1, 2},
                       kDh[kH] = {0, 1, 3};  // d[3]: gradient of h_2 = W_hn h + b_hn
  static constexpr int kReads = 0b1;

  template <class V>
  FRNN_HD static void forward(const Pack<V, kX>& x, const Pack<V, kH>& h, const Pack<V, kStates>& s,
                              const Pack<V, kParams>&, Pack<V, kStates>& s_new,
                              Pack<V, kSaved>& saved) {
    const V r = sigmoid(V(x[0] + h[0])), z = sigmoid(V(x[1] + h[1])), n = tanh(V(x[2] + r * h[2]));
    s_new[0] = n + z * (s[0] - n);
    saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = h[2];
  }
  template <class V>
  FRNN_HD static void backward(const Pack<V, kSaved>& saved, const Pack<V, kStates>& s, V,
                               const Pack<V, kParams>&, const Pack<V, kStates>& ds_new,
                               Pack<V, kD>& d, Pack<V, kStates>& ds, Pack<V, kParams>&) {
    using T = typename Lanes<V>::T;
    const V r = saved[0], z = saved[1], n = saved[2], hn = saved[3], dh = ds_new[0];
    const V dn = dh * (T(1) - z) * tanh_grad(n);
    d[0] = dn * hn * sigmoid_grad(r);
    d[1] = dh * (s[0] - n) * sigmoid_grad(z);
    d[2] = dn;
    d[3] = dn * r;
    ds[0] = dh * z;
  }
};

}  // namespace frnn
