// The math of an LSTM, with c in the place of h: c is state 0 and the output, h is state 1 and goes
// through W_hh. Beside them state 2, a count of steps that no other reads.
#pragma once
#include "core/cell.h"

namespace frnn {

struct Swapped : CellDefaults {
  static constexpr int kX = 4, kH = 4, kStates = 3, kSaved = 4, kD = 4;
  static constexpr int kDx[kX] = {0, 1, 2, 3}, kDh[kH] = {0, 1, 2, 3};
  static constexpr int kReads = 0b001, kRecurrent = 1, kOutput = 0;

  template <class V>
  FRNN_HD static void forward(const Pack<V, kX>& x, const Pack<V, kH>& h, const Pack<V, kStates>& s,
                              const Pack<V, kParams>&, Pack<V, kStates>& s_new,
                              Pack<V, kSaved>& saved) {
    using T = typename Lanes<V>::T;
    const V i = sigmoid(V(x[0] + h[0])), f = sigmoid(V(x[1] + h[1])), g = tanh(V(x[2] + h[2])),
            o = sigmoid(V(x[3] + h[3]));
    s_new[0] = f * s[0] + i * g;
    s_new[1] = o * tanh(s_new[0]);
    s_new[2] = s[2] + T(1);
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
  }
  template <class V>
  FRNN_HD static void backward(const Pack<V, kSaved>& saved, const Pack<V, kStates>& s, V,
                               const Pack<V, kParams>&, const Pack<V, kStates>& ds_new,
                               Pack<V, kD>& d, Pack<V, kStates>& ds, Pack<V, kParams>&) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V tc = tanh(V(f * s[0] + i * g));
    const V dc = ds_new[0] + ds_new[1] * o * tanh_grad(tc);
    d[0] = dc * g * sigmoid_grad(i);
    d[1] = dc * s[0] * sigmoid_grad(f);
    d[2] = dc * i * tanh_grad(g);
    d[3] = ds_new[1] * tc * sigmoid_grad(o);
    ds[0] = dc * f;
    ds[1] = V{};
    ds[2] = ds_new[2];
  }
};

}  // namespace frnn
