// Gate functions for every V (float, double, vectors of them). Coefficients are minimax fits made
// for this file.
//
// Largest error seen over a dense sweep (tests/test_math.py): exp 1, tanh 2, sigmoid 3 ulp, in
// float and in double. inf and NaN behave as in libm: exp(-inf) = 0, sigmoid(-inf) = 0, tanh(+-inf)
// = +-1, NaN stays NaN.
#pragma once
#include <limits>

#include "core/vec.h"

namespace frnn {

// The sign bit of every lane.
template <class V>
FRNN_HD typename Lanes<V>::I sign_bits(V x) {
  return bit_cast<typename Lanes<V>::I>(x) & std::numeric_limits<typename Lanes<V>::Int>::min();
}

// NaN in x stays NaN: the comparison is false.
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

// Constants of exp by element type: range in which the result is a normal number, the rounding
// constant 1.5 * 2^mantissa, ln 2 in two parts, and P of exp(r) = 1 + r + r^2 P(r) on |r| <=
// ln(2)/2.
template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kLo = -87.336544f, kHi = 88.722839f, kRound = 12582912.0f;
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
  static constexpr double kLo = -708.39641853226408, kHi = 709.78271289338397,
                          kRound = 6755399441055744.0;
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

// e^x for kLo <= x <= kHi.
template <class V>
FRNN_HD V exp_in_range(V x) {
  using T = typename Lanes<V>::T;
  using I = typename Lanes<V>::I;
  using K = ExpConstants<T>;
  const V shifted = x * K::kLog2e + K::kRound;  // its low mantissa bits hold n = round(x / ln 2)
  const V n = shifted - K::kRound;
  V r = x - n * K::kLn2Hi;
  r = r - n * K::kLn2Lo;
  const V p = (r * r) * K::P(r) + r + T(1);
  // 2^n as 2^(n-1) * 2, since n reaches kBias + 1.
  const I exponent =
      bit_cast<I>(shifted) - bit_cast<typename Lanes<V>::Int>(T(K::kRound)) + (K::kBias - 1);
  return p * bit_cast<V>(I(exponent << K::kMantissa)) * T(2);
}

// e^x. Results below the smallest normal number are flushed to zero.
template <class V>
FRNN_HD V exp(V x) {
  using K = ExpConstants<typename Lanes<V>::T>;
  const V y = exp_in_range(clamp(x, K::kLo, K::kHi));
  return x < splat<V>(K::kLo) ? V{} : (x > splat<V>(K::kHi) ? splat<V>(__builtin_huge_val()) : y);
}

// 1 / (1 + e^-x)
template <class V>
FRNN_HD V sigmoid(V x) {
  using T = typename Lanes<V>::T;
  return T(1) / (exp(V(-x)) + T(1));
}

// tanh(x) = x + x u R(u), u = x^2, on |x| <= 0.625: R is a polynomial (float) or P / Q (double).
template <class V, class T>
FRNN_HD V tanh_small(V u, T) {
  if constexpr (sizeof(T) == 4) {
    constexpr float kR[] = {-0.333332811948f, 0.133314205937f, -0.0537378129018f, 0.0206325884235f,
                            -0.00569742576101f};
    return horner(u, kR);
  } else {
    constexpr double kP[] = {-0.3333333333333332346176, -0.02049676108151013867026,
                             -0.0001990878017384883783124};
    constexpr double kQ[] = {1.0, 0.461490283244515225544, 0.02328861479852018384277,
                             0.0002064370957328126608979};
    return horner(u, kP) / horner(u, kQ);
  }
}

// Above 0.625, |tanh(x)| = 1 - 2 / (e^(2|x|) + 1), which rounds to 1 from |x| = 20 on.
template <class V>
FRNN_HD V tanh(V x) {
  using T = typename Lanes<V>::T;
  const auto sign = sign_bits(x);
  const V a = bit_cast<V>(bit_cast<typename Lanes<V>::I>(x) ^ sign);
  const V u = a * a;
  const V small = a + a * (u * tanh_small(u, T()));
  const V a2 = a + a;
  const V large = T(1) - T(2) / (exp_in_range(a2 > splat<V>(40) ? splat<V>(40) : a2) + T(1));
  const V y = a < splat<V>(T(0.625)) ? small : large;
  return bit_cast<V>(bit_cast<typename Lanes<V>::I>(y) | sign);
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
template <class V>
FRNN_HD V relu_grad(V y) {
  const V zero{};
  return y > zero ? splat<V>(1) : zero;
}

}  // namespace frnn
