// Gate functions for every V (float, double, vectors of them). Coefficients are minimax fits made
// for this file.
//
// Largest error over all floats: tanh 2.7, sigmoid 2.5 ulp; over a dense sweep of doubles
// (tests/test_math.py): 2.5, 2.1. Of the others, which cells that are compiled from Python use, at
// most 3 ulp in that sweep. Special values are those of libm: sigmoid(-inf) = 0, tanh(+-inf) = +-1,
// tanh(-0) = -0, NaN stays NaN.
#pragma once
#include <cmath>
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
  return at_most(at_least(x, splat<V>(lo)), splat<V>(hi));
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
  static constexpr float kZero = -104.0f, kFinite = 89.0f;  // e^x is 0 below; half is finite
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
  static constexpr double kZero = -746.0, kFinite = 710.0;
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

// e^x = 2^n (1 + q), |q| < 0.42, for kLo <= x <= kHi.
template <class V>
struct ExpReduced {
  typename Lanes<V>::I n;
  V q;
};
template <class V>
FRNN_HD ExpReduced<V> exp_reduced(V x) {
  using T = typename Lanes<V>::T;
  using I = typename Lanes<V>::I;
  using K = ExpConstants<T>;
  const V shifted = x * K::kLog2e + K::kRound;  // its low mantissa bits hold n = round(x / ln 2)
  const V n = shifted - K::kRound;
  V r = x - n * K::kLn2Hi;
  r = r - n * K::kLn2Lo;
  return {I(bit_cast<I>(shifted) - bit_cast<typename Lanes<V>::Int>(T(K::kRound))),
          (r * r) * K::P(r) + r};
}
// Half of 2^n, since the last 2^n is no number of the type; where n is smallest half is zero, and at
// kHi it is inf.
template <class V>
struct ExpParts {
  V half, q;
};
template <class V>
FRNN_HD ExpParts<V> exp_parts(V x) {
  using I = typename Lanes<V>::I;
  using K = ExpConstants<typename Lanes<V>::T>;
  const auto e = exp_reduced(x);
  return {bit_cast<V>(I((e.n + (K::kBias - 1)) << K::kMantissa)), e.q};
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

// ---- what cells from Python use besides ----

// The rule for one number, lane by lane.
template <class V, class F>
FRNN_HD V each(const V& x, const F& f) {
  using T = typename Lanes<V>::T;
  if constexpr (Lanes<V>::kSize == 1) {
    return V(f(bit_cast<T>(x)));
  } else {
    T lanes[Lanes<V>::kSize];
    memcpy(lanes, &x, sizeof(x));
#pragma omp simd
    for (int i = 0; i < Lanes<V>::kSize; i++) lanes[i] = f(lanes[i]);
    return load<V>(lanes);
  }
}

template <class V>
FRNN_HD V abs(V x) {
  using I = typename Lanes<V>::I;
  return bit_cast<V>(I(bit_cast<I>(x) & std::numeric_limits<typename Lanes<V>::Int>::max()));
}
template <class V>
FRNN_HD V sign(V x) {
  using T = typename Lanes<V>::T;
  const V zero{};
  return x > zero ? splat<V>(T(1)) : (x < zero ? splat<V>(T(-1)) : zero);
}
// NaN if one of both is.
template <class V>
FRNN_HD V maximum(V a, V b) {
  const V larger = a < b ? b : a;
  return b == b ? larger : b;
}
template <class V>
FRNN_HD V minimum(V a, V b) {
  const V smaller = a > b ? b : a;
  return b == b ? smaller : b;
}
template <class V>
FRNN_HD V sqrt(V x) {
  return each(x, [](typename Lanes<V>::T lane) { return std::sqrt(lane); });
}

// 2^n (1 + q) in two factors, since the type may have neither 2^n nor 2^-n.
template <class V>
FRNN_HD V exp(V x) {
  using T = typename Lanes<V>::T;
  using I = typename Lanes<V>::I;
  using K = ExpConstants<T>;
  const auto e = exp_reduced(clamp(x, K::kZero, K::kHi));
  const I half = e.n >> 1;
  return (e.q + T(1)) * bit_cast<V>(I((half + K::kBias) << K::kMantissa)) *
         bit_cast<V>(I((e.n - half + K::kBias) << K::kMantissa));
}

// As tanh: near 0 it is q.
template <class V>
FRNN_HD V expm1(V x) {
  using T = typename Lanes<V>::T;
  using K = ExpConstants<T>;
  const auto e = exp_parts(clamp(x, K::kLo, K::kFinite));
  const V m = e.half * e.q + (e.half - T(0.5));
  return bit_cast<V>(typename Lanes<V>::I(bit_cast<typename Lanes<V>::I>(V(m + m)) | sign_bits(x)));
}

// log(1 + f) = f - s (f - R), with s = f / (2 + f) and R = 2 atanh(s) / s - 2 = z Q(z), z = s^2. Q is
// for sqrt(1/2) <= 1 + f < sqrt(2), Wide for 0 <= f <= 1.
template <class T>
struct LogConstants;
template <>
struct LogConstants<float> {
  static constexpr float kSubnormal = 33554432.0f;  // 2^25 makes them normal
  static constexpr int kShift = 25;
  template <class V>
  FRNN_HD static V Q(V z) {
    constexpr float kQ[] = {0.666666665526f, 0.400001230904f, 0.285506990492f, 0.233334160127f};
    return horner(z, kQ);
  }
  template <class V>
  FRNN_HD static V Wide(V z) {
    constexpr float kQ[] = {0.666664131595f, 0.400216978406f, 0.279991579183f, 0.28024386068f};
    return horner(z, kQ);
  }
};
template <>
struct LogConstants<double> {
  static constexpr double kSubnormal = 18014398509481984.0;  // 2^54
  static constexpr int kShift = 54;
  template <class V>
  FRNN_HD static V Q(V z) {
    constexpr double kQ[] = {0.666666666666666664605, 0.400000000000008924728,
                             0.285714285707947661177, 0.222222223936035397779,
                             0.181817954483358769094, 0.153862496761680934033,
                             0.13268516444528897524,  0.130892173471514676348};
    return horner(z, kQ);
  }
  template <class V>
  FRNN_HD static V Wide(V z) {
    constexpr double kQ[] = {0.666666666666663040576,  0.400000000001571720205,
                             0.28571428547861226111,   0.222222239693397254183,
                             0.181817439370851201628,  0.153865596902026441803,
                             0.133009763748507708346,  0.12106065902866509283,
                             0.0834018428758183251332, 0.17018431426532906064};
    return horner(z, kQ);
  }
};

template <class V>
FRNN_HD V log(V x) {
  using T = typename Lanes<V>::T;
  using I = typename Lanes<V>::I;
  using Int = typename Lanes<V>::Int;
  using K = ExpConstants<T>;
  using L = LogConstants<T>;
  using Limits = std::numeric_limits<T>;
  const V zero{};
  const auto tiny = x < splat<V>(Limits::min());
  const V y = tiny ? V(x * L::kSubnormal) : x;
  // y = 2^k m, sqrt(1/2) <= m < sqrt(2)
  const I bits = bit_cast<I>(y),
          k = (bits - bit_cast<Int>(T(0.70710678118654752440))) >> K::kMantissa;
  const V f = bit_cast<V>(I(bits - (k << K::kMantissa))) - T(1);
  const V s = f / (f + T(2)), z = s * s;
  V n = bit_cast<V>(I(k + bit_cast<Int>(T(K::kRound)))) - K::kRound;
  n = tiny ? V(n - T(L::kShift)) : n;
  const V found = n * K::kLn2Hi - ((s * (f - z * L::Q(z)) - n * K::kLn2Lo) - f);
  const V infinity = splat<V>(Limits::infinity());
  return x > zero ? (x < infinity ? found : x)
                  : (x == zero ? V(-infinity) : splat<V>(Limits::quiet_NaN()));
}

// The logarithm of 1 + x as it is rounded, and what that lacks.
template <class V>
FRNN_HD V log1p(V x) {
  using T = typename Lanes<V>::T;
  using I = typename Lanes<V>::I;
  const V u = x + T(1), lacks = x - (u - T(1));
  const V y = log(u), infinity = splat<V>(std::numeric_limits<T>::infinity());
  const V found = u > V{} && u < infinity ? V(y + lacks / u) : y;
  return bit_cast<V>(
      I(bit_cast<I>(found) | (bit_cast<I>(x) == sign_bits(x) ? bit_cast<I>(x) : I{})));
}

// log(1 + e^x) = max(x, 0) + log(1 + f) with f = e^-|x| <= 1: no power of two has to be taken out.
template <class V>
FRNN_HD V softplus(V x) {
  using T = typename Lanes<V>::T;
  const V zero{}, f = exp(V(-abs(x)));
  const V s = f / (f + T(2)), z = s * s;
  return (x < zero ? zero : x) + (f - s * (f - z * LogConstants<T>::Wide(z)));
}

// erf(x) = x P(x^2) for |x| < 1. Beyond, 1 - e^-C(|x| - 1), up to where that rounds to 1.
template <class T>
struct ErfConstants;
template <>
struct ErfConstants<float> {
  static constexpr float kOne = 4.0f;
  template <class V>
  FRNN_HD static V P(V z) {
    constexpr float kP[] = {1.12837916591f,    -0.376126271354f,  0.112836001695f,
                            -0.0268544443012f, 0.00518953477657f, -0.000802083626249f,
                            7.88910276704e-5f};
    return horner(z, kP);
  }
  template <class V>
  FRNN_HD static V C(V u) {
    constexpr float kC[] = {1.8496055165f,   2.63896681621f,    0.843118332992f,   0.0415007073865f,
                            -0.00989093209f, 0.00182619713464f, -0.00018558370282f};
    return horner(u, kC);
  }
};
template <>
struct ErfConstants<double> {
  static constexpr double kOne = 6.0;
  template <class V>
  FRNN_HD static V P(V z) {
    constexpr double kP[] = {
        1.12837916709551256679,    -0.376126389031835465737,   0.112837916709452513999,
        -0.0268661706432759747259, 0.00522397760742180676698,  -8.54832598963082544231e-4,
        1.20552953188702652448e-4, -1.49247446378310235833e-5, 1.64475174232780778926e-6,
        -1.6209174357205104677e-7, 1.37229710159723556745e-8,  -7.80118145671305958669e-10};
    return horner(z, kP);
  }
  template <class V>
  FRNN_HD static V C(V u) {
    constexpr double kC[] = {
        1.84960550993324825631,     2.63896751423478823262,      0.843107256358677659939,
        0.0415610980417950277399,   -0.0100338253743030129705,   0.00197790256744892341987,
        -2.37322480303255961134e-4, -2.62778764848708106251e-5,  2.71591117569615010386e-5,
        -9.60889543259917746095e-6, 2.05976252831122875376e-6,   -1.42864478175359839516e-7,
        -9.75558167133076599211e-8, 5.20424489293708689491e-8,   -1.49131897224720695452e-8,
        2.86449594495832505215e-9,  -3.68326494966793752736e-10, 2.8823531986961048613e-11,
        -1.03946183324536073414e-12};
    return horner(u, kC);
  }
};
template <class V>
FRNN_HD V erf(V x) {
  using T = typename Lanes<V>::T;
  using I = typename Lanes<V>::I;
  using K = ErfConstants<T>;
  const V size = abs(x), most = splat<V>(K::kOne), one = splat<V>(T(1));
  const V u = V(size > most ? most : size) - T(1);
  const V far = one - exp(V(-K::C(u)));
  const V near = x * K::P(V(x * x));
  return size < one ? near : bit_cast<V>(I(bit_cast<I>(far) | sign_bits(x)));
}

// sin and cos of x = n pi/2 + r, |r| <= pi/4: r (1 + z S(z)) and 1 - z/2 + z^2 C(z), z = r^2. Pi/2 is
// the sum of three numbers, of which n times the first two are exact up to kMost; libm does the rest.
template <class T>
struct TrigConstants;
template <>
struct TrigConstants<float> {
  static constexpr float kMost = 1600.0f, kTwoOverPi = 0.636619772f;
  static constexpr float kFirst = 1.570556640625f, kSecond = 2.3967027664184570313e-4f,
                         kThird = 1.5893254712295856734e-8f;
  template <class V>
  FRNN_HD static V S(V z) {
    constexpr float kS[] = {-0.166666545888f, 0.00833215499579f, -1.95140788147e-4f};
    return horner(z, kS);
  }
  template <class V>
  FRNN_HD static V C(V z) {
    constexpr float kC[] = {0.0416666462661f, -0.00138873369752f, 2.44348353155e-5f};
    return horner(z, kC);
  }
};
template <>
struct TrigConstants<double> {
  static constexpr double kMost = 50000.0, kTwoOverPi = 0.63661977236758134308;
  static constexpr double kFirst = 1.5707963267923332751, kSecond = 2.5633441515839557891e-12,
                          kThird = 1.056299906698742764e-23;
  template <class V>
  FRNN_HD static V S(V z) {
    constexpr double kS[] = {-0.166666666666666666394,   0.00833333333333332218168,
                             -1.98412698412543867834e-4, 2.75573192138311209101e-6,
                             -2.50521048165075347541e-8, 1.60583543364084506395e-10,
                             -7.57808028173316171878e-13};
    return horner(z, kS);
  }
  template <class V>
  FRNN_HD static V C(V z) {
    constexpr double kC[] = {0.0416666666666666666109,  -0.00138888888888888733019,
                             2.48015873015707345073e-5, -2.75573192150455605988e-7,
                             2.08767542910874581782e-9, -1.14702846741210666996e-11,
                             4.73771835210458692442e-14};
    return horner(z, kC);
  }
};
// sin(x + turns pi/2)
template <class V>
FRNN_HD V sin_turned(V x, int turns) {
  using T = typename Lanes<V>::T;
  using I = typename Lanes<V>::I;
  using Int = typename Lanes<V>::Int;
  using K = TrigConstants<T>;
  const auto far = abs(x) > splat<V>(K::kMost) || x != x;
  bool any = false;
  if constexpr (Lanes<V>::kSize == 1) {
    any = far;
  } else {
    for (int i = 0; i < Lanes<V>::kSize; i++) any |= far[i] != 0;
  }
  if (any) return each(x, [turns](T lane) { return turns ? std::cos(lane) : std::sin(lane); });
  const V shifted = x * K::kTwoOverPi + ExpConstants<T>::kRound,
          n = shifted - ExpConstants<T>::kRound;
  const I quarter = bit_cast<I>(shifted) + Int(turns);
  const V r = ((x - n * K::kFirst) - n * K::kSecond) - n * K::kThird, z = r * r;
  const V sine = r * (z * K::S(z) + T(1)), cosine = T(1) - (z * T(0.5) - (z * z) * K::C(z));
  const V found = (quarter & Int(1)) != I{} ? cosine : sine;
  return bit_cast<V>(I(bit_cast<I>(found) ^ ((quarter & Int(2)) << (sizeof(T) * 8 - 2))));
}
template <class V>
FRNN_HD V sin(V x) {
  return sin_turned(x, 0);
}
template <class V>
FRNN_HD V cos(V x) {
  return sin_turned(x, 1);
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
