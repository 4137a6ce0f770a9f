// The contract of a cell: pure pointwise math on one unit of one batch row, for any V. Everything
// else is the engine's. A cell is a struct that derives from CellDefaults and declares
//
//   kX, kH       number of gates with an input part, x_q = x W_ih^T + b_ih, and of those with a
//                recurrent part, h_q = h W_hh^T + b_hh. A gate may have one of the two; kH = 0 is a
//                cell without recurrence through a matrix
//   kStates      states, of one value per unit each
//   kSaved       values that the forward keeps for the backward, beside the states
//   kD           distinct gate gradients; that of x_q is d[kDx[q]], that of h_q is d[kDh[q]]
//   kReads       bit j: the math reads state j of the step before elementwise: h in the forward or the
//                backward, another in the backward, for which it is then kept
// and may declare
//   kRecurrent   the state that goes through W_hh and is called h, of the width of a projection (0)
//   kOutput      the state that is the layer's output (0)
//   kReadsNewH   whether the backward reads h_t (no)
//   kParams      parameters of one value per unit, such as peepholes (none), and their names, in
//                kParamNames. Their gradients are summed over steps and batch
//   kShows       the state whose new value the output, which is then h, shows (-1: none): what it
//                shows can be normalised on the way, see below
//   kGiven       values of a unit that the caller gives for each step (none): gates with an input
//                part that is no product, x[kX] and on, whose gradients kDx has behind the others
//   kOperands    further operands of W_hh (none). Operand k multiplies the rows of the gates of
//                product k + 1; product 0 is that of h, of which it may be a function, and of the
//                gates of all products before its own
//   kHOf         with operands, how many of the kH gates each product has, in order
//   kAffine      as bits, all states that the math reads of the step before, if these become
//                s_t = by_t s_{t-1} + plus_t with `by` and `plus` of gates and parameters alone, and
//                kH = 0 (0: they do not). An engine may then do many steps at once, see below
//
//   forward (x[kX + kGiven], h[kH], s[kStates], p[kParams])         -> s_new[kStates], saved[kSaved]
//   backward(saved[kSaved], s[kStates], h_t, p[kParams], ds_new[kStates + kOperands])
//                                                    -> d[kD], ds[kStates], dp[kParams]
//
// A cell that shows a state has its output and the rest of its backward as functions, too. `shown` is
// what takes the place of the new state in the output, `dy` the gradient of the output:
//
//   show(saved, shown)                                             -> output
//   show_backward(saved, shown, dy)                                -> that of shown; d of its own gates
//   update_backward(saved, s, p, ds_new, d of these gates)         -> d of the others, ds, dp
//
// where ds_new of the state has the gradient that reaches it from what was shown. `forward` computes
// show(saved, s_new[kShows]); what it saves does not depend on that.
//
// A cell with n affine states has, in their order and `by` row by row,
//
//   affine(x[kX + kGiven], p[kParams])                             -> by[n * n], plus[n]
//
// saved[k] is operand k, and ds_new[kStates + k] its gradient, for k < kOperands. An engine calls
// forward once for each product, with zeros for the gates that it does not have yet, and takes from
// it what depends on none of them. It calls backward once for each product, from the last one on,
// with zeros for the gradients of operands that it does not have yet.
//
// ds holds the elementwise paths to the previous states; the path of h through W_hh is added by the
// engine. h_t is as it was stored, rounded to a 16-bit type if need be. States that are not in
// kReads are unspecified where they come in: all in the backward, h in the forward.
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

struct CellDefaults {
  static constexpr int kRecurrent = 0, kOutput = 0, kParams = 0, kShows = -1, kGiven = 0,
                       kOperands = 0, kAffine = 0;
  static constexpr bool kReadsNewH = false;
  static constexpr int kDh[1] = {0}, kHOf[1] = {0};
  static constexpr const char* kParamNames[1] = {nullptr};
};

// The states as engines hold them: h, and beside it the others, in their order, which are called c.
template <class C>
struct States {
  static constexpr int kExtra = C::kStates - 1;  // of c
  static constexpr bool kReadsH = C::kReads >> C::kRecurrent & 1;
  // The number in the cell of state e of c.
  static constexpr int OfExtra(int e) { return e < C::kRecurrent ? e : e + 1; }
  static constexpr bool ReadsExtra(int e) { return C::kReads >> OfExtra(e) & 1; }
  // Of c, the state that is the output; -1 if that is h.
  static constexpr int kOutputExtra =
      C::kOutput == C::kRecurrent ? -1 : C::kOutput - (C::kOutput > C::kRecurrent);
};

// The products of a step with W_hh, each with gates of its own, whose rows follow each other.
template <class C>
struct Products {
  static constexpr int kCount = 1 + C::kOperands;
  static constexpr int Gates(int k) { return C::kOperands == 0 ? C::kH : C::kHOf[k]; }
  // The number of its first gate.
  static constexpr int First(int k) { return k == 0 ? 0 : First(k - 1) + Gates(k - 1); }
  // As bits, the gradients that no later product goes back from; of product 0, all others.
  static constexpr uint64_t Gradients(int k) {
    uint64_t own = k == 0 ? ~uint64_t(0) : 0, later = 0;
    for (int q = First(k); q < C::kH; q++)
      (q < First(k + 1) ? own : later) |= uint64_t(1) << C::kDh[q];
    return own & ~later;
  }
  static constexpr int Most() {
    int most = 0;
    for (int k = 0; k < kCount; k++) most = Gates(k) > most ? Gates(k) : most;
    return most;
  }
};

// How many states have an affine update.
template <class C>
constexpr int kAffineStates = [] {
  int count = 0;
  for (int j = 0; j < C::kStates; j++) count += C::kAffine >> j & 1;
  return count;
}();

template <int N, int M>
constexpr bool AllBelow(const int (&index)[N]) {
  for (int i : index)
    if (i < 0 || i >= M) return false;
  return true;
}

template <class C>
constexpr bool CheckCell() {
  static_assert(C::kX >= 1 && C::kH >= 0 && C::kStates >= 1 && C::kSaved >= 0,
                "a cell has gates and states");
  static_assert(C::kX <= kMaxGates && C::kH <= kMaxGates, "there is room for gates");
  static_assert(sizeof(C::kDx) / sizeof(int) == C::kX + C::kGiven &&
                    (C::kH == 0 || sizeof(C::kDh) / sizeof(int) == C::kH),
                "one gradient per gate");
  static_assert(AllBelow<C::kX + C::kGiven, C::kD>(C::kDx) &&
                    AllBelow<sizeof(C::kDh) / sizeof(int), C::kD>(C::kDh),
                "gradient indices lie below kD");
  static_assert(C::kRecurrent >= 0 && C::kRecurrent < C::kStates && C::kOutput >= 0 &&
                    C::kOutput < C::kStates && C::kReads >> C::kStates == 0,
                "h, the output and what is read are states");
  static_assert(C::kParams >= 0 && C::kParams <= kMaxParams, "there is room for parameters");
  static_assert(C::kShows < C::kStates &&
                    (C::kShows < 0 ||
                     (C::kOutput == C::kRecurrent && C::kShows != C::kOutput && C::kOperands == 0)),
                "h shows another state");
  static_assert(C::kAffine >> C::kStates == 0 && (C::kAffine == 0 || C::kH == 0),
                "affine are states of a cell without a recurrent product");
  static_assert(C::kParams == 0 || sizeof(C::kParamNames) / sizeof(char*) == C::kParams,
                "one name per parameter");
  static_assert(C::kGiven >= 0 && C::kOperands >= 0 && C::kOperands <= C::kSaved &&
                    sizeof(C::kHOf) / sizeof(int) == Products<C>::kCount &&
                    Products<C>::First(C::kOperands + 1) == C::kH && C::kD <= 64,
                "each product has gates");
  return true;
}

// `tape`: values of a unit that the engine keeps for the backward.
template <class C>
constexpr CellFacts FactsOf(int tape) {
  // A projection changes the width of h, which is then no value of a unit.
  const bool projectable = C::kH > 0 && C::kOutput == C::kRecurrent && !States<C>::kReadsH &&
                           !C::kReadsNewH && C::kOperands == 0;
  bool adds = C::kX == C::kH && C::kOperands == 0;
  for (int q = 0; q < C::kH && adds; q++) adds = C::kDx[q] == C::kDh[q];
  return {C::kX,         C::kH,       States<C>::kExtra,  tape,          C::kParams, C::kGiven,
          C::kOperands,  projectable, States<C>::kReadsH, C::kReadsNewH, adds,       C::kShows >= 0,
          C::kParamNames};
}

}  // namespace frnn
