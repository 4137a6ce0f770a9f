// The contract of a cell: pure pointwise math on one unit of one batch row, for any V. Everything
// else is the engine's.
//
//   kX, kH    number of input-side and hidden-side pre-activations (gates): x_q = x W_ih^T + b_ih, h_q = h W_hh^T + b_hh
//   kStates   elementwise states; state 0 is h, the one that goes through W_hh
//   kSaved    values the forward keeps for the backward, beside the states
//   kD        distinct gate gradients; the gradient of x_q is d[kDx[q]], that of h_q is d[kDh[q]]
//   kUsesH    whether the math reads h_{t-1} elementwise
//   kUsesNewH whether the backward reads h_t. Either refuses a projection, which changes the width of h.
//
//   forward (x[kX], h[kH], s[kStates])                           -> s_new[kStates], saved[kSaved]
//   backward(saved[kSaved], s[kStates], h_t, ds_new[kStates])    -> d[kD], ds[kStates]
//
// ds holds the elementwise paths to the previous states; the path of h through W_hh is added by the
// engine. h_t is as it was stored, rounded to a 16-bit type if need be.
#pragma once
#include "core/math.h"
#include "core/params.h"

namespace frnn {

template <class V, int K>
struct Pack {
  V v[K > 0 ? K : 1];
  FRNN_HD V& operator[](int i) { return v[i]; }
  FRNN_HD const V& operator[](int i) const { return v[i]; }
};

template <int N, int M>
constexpr bool AllBelow(const int (&index)[N]) {
  for (int i : index)
    if (i < 0 || i >= M) return false;
  return true;
}

template <class C>
constexpr bool CheckCell() {
  static_assert(C::kX >= 1 && C::kH >= 1 && C::kStates >= 1 && C::kSaved >= 0,
                "a cell has gates and states");
  static_assert(sizeof(C::kDx) / sizeof(int) == C::kX && sizeof(C::kDh) / sizeof(int) == C::kH,
                "one gradient per gate");
  static_assert(AllBelow<C::kX, C::kD>(C::kDx) && AllBelow<C::kH, C::kD>(C::kDh),
                "gradient indices lie below kD");
  return true;
}

template <class C>
constexpr CellFacts FactsOf() {
  return {C::kX, C::kH, C::kStates - 1, C::kSaved, C::kUsesH || C::kUsesNewH};
}

}  // namespace frnn
