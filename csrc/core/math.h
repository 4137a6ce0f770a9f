// Gate functions for every V (float, double, vectors of them). Coefficients are minimax fits made
// for this file.
//
// Largest error over all floats: tanh 2.7, sigmoid 2.5 ulp; over a dense sweep of doubles
// (tests/test_math.py): 2.5, 2.1. Special values are those of libm: sigmoid(-inf) = 0,
// tanh(+-inf) = +-1, tanh(-0) = -0, NaN stays NaN.
#pragma once
#include <limits>

#include "core/vec.h"

namespace frnn {

// The sign bit of every lane.
template <class V>
FRNN_HD typename Lanes<V>::I sign_bits(V x) {
  return bit_cast<typename Lanes<V>::I>(x) & std::numeric_limits<typename Lanes<V>::Int>::min();
}

// NaN in x stays NaN.
template <class V>
FRNN_HD V clamp(V x, typename Lanes<V>::T lo, typename Lanes<V>::T hi) {
  x = x < splat<V>(lo) ? splat<V>(lo) : x;
  return x > splat<V>(hi) ? splat<V>(hi) : x;
}

// c[0] + c[1] u + ... by Horner's rule.
template <class V, class T, int N>
FRNN_HD V horner(V u, const T (&c)[N]) {
  V p = splat<V>(c[N - 1]);
  FRNN_UNROLL
  for (int i = N - 2; i >= 0; i--) p = p * u + c[i];
  return p;
}

// Constants of exp by element type: its range, the rounding constant 1.5 * 2^mantissa, ln 2 in two
// parts, and P of exp(r) = 1 + r + r^2 P(r) on |r| <= ln(2)/2.
template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kLo = -87.336544f, kHi = 89.25f, kRound = 12582912.0f;
  static constexpr float kLog2e = 1.44269504f, kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
  static constexpr int kMantissa = 23, kBias = 127;
  template <class V>
  FRNN_HD static V P(V r) {
    constexpr float kP[] = {0.499999934256f, 0.166665203368f, 0.04166839212f, 0.00836875088853f,
                            0.00138144755195f};
    return horner(r, kP);
  }
};
template <>
struct ExpConstants<double> {
  static constexpr double kLo = -708.39641853226408, kHi = 710.25, kRound = 6755399441055744.0;
  static constexpr double kLog2e = 1.4426950408889634074, kLn2Hi = 0.693147180369123816490,
                          kLn2Lo = 1.90821492927058770002e-10;
  static constexpr int kMantissa = 52, kBias = 1023;
  template <class V>
  FRNN_HD static V P(V r) {
    constexpr double kP[] = {
        0.50000000000000000441,     0.1666666666666668349,    0.04166666666666609176,
        0.0083333333333169803769,   0.0013888888889116431275, 0.00019841269896519699497,
        0.000024801586925622791954, 2.7557234723813174451e-6, 2.7557582338831296606e-7,
        2.5112085745614438384e-8,   2.0826570383926599069e-9};
    return horner(r, kP);
  }
};

// e^x = 2 half (1 + q), |q| < 0.42, for kLo <= x <= kHi. Half of 2^n, since the last 2^n is no number
// of the type; where n is smallest half is zero, and at kHi it is inf.
template <class V>
struct ExpParts {
  V half, q;
};
template <class V>
FRNN_HD ExpParts<V> exp_parts(V x) {
  using T = typename Lanes<V>::T;
  using I = typename Lanes<V>::I;
  using K = ExpConstants<T>;
  const V shifted = x * K::kLog2e + K::kRound;  // its low mantissa bits hold n = round(x / ln 2)
  const V n = shifted - K::kRound;
  V r = x - n * K::kLn2Hi;
  r = r - n * K::kLn2Lo;
  const I exponent =
      bit_cast<I>(shifted) - bit_cast<typename Lanes<V>::Int>(T(K::kRound)) + (K::kBias - 1);
  return {bit_cast<V>(I(exponent << K::kMantissa)), (r * r) * K::P(r) + r};
}

// 1 / (1 + e^-x)
template <class V>
FRNN_HD V sigmoid(V x) {
  using T = typename Lanes<V>::T;
  using K = ExpConstants<T>;
  const auto e = exp_parts(clamp(V(-x), K::kLo, K::kHi));
  return T(0.5) / (e.half * (e.q + T(1)) + T(0.5));
}

// (e^2x - 1) / (e^2x + 1), where the numerator is q itself for small x; rounds to +-1 from |x| = 20 on.
template <class V>
FRNN_HD V tanh(V x) {
  using T = typename Lanes<V>::T;
  const V y = clamp(x, T(-20), T(20));
  const auto e = exp_parts(V(y + y));
  const V m = e.half * e.q + (e.half - T(0.5));
  const V t = m / (m + T(1));
  return bit_cast<V>(bit_cast<typename Lanes<V>::I>(t) | sign_bits(x));  // of -0
}

template <class V>
FRNN_HD V relu(V x) {
  const V zero{};
  return x < zero ? zero : x;  // NaN stays NaN, as in torch
}

// Derivatives from the function's own value y.
template <class V>
FRNN_HD V sigmoid_grad(V y) {
  return y * (typename Lanes<V>::T(1) - y);
}
template <class V>
FRNN_HD V tanh_grad(V y) {
  return typename Lanes<V>::T(1) - y * y;
}
// A gradient dy as it goes through: as in torch it is 0 where the function is, even if it is inf, and
// dy where the function is NaN.
template <class V>
FRNN_HD V relu_backward(V dy, V y) {
  const V zero{};
  return y <= zero ? zero : dy;
}

}  // namespace frnn
