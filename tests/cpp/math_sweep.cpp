// The gate functions of csrc/core/math.h over the numbers of a type, compared with long double. It is
// compiled once for each instruction set; see tests/test_math.py, which gives TIER, and WIDTH in bytes
// where there are vectors.
#include "math_sweep.h"

#include <cmath>
#include <limits>

#include "core/math.h"

using namespace frnn;

namespace {

template <class V, class F>
typename Lanes<V>::T Eval(F f, typename Lanes<V>::T x) {
  V y = f(splat<V>(x));
  typename Lanes<V>::T first;
  memcpy(&first, &y, sizeof(first));
  return first;
}

template <class V>
MathSweep Sweep(const char* type) {
  using T = typename Lanes<V>::T;
  using Limits = std::numeric_limits<T>;
  const auto tanh_of = [](V v) { return frnn::tanh(v); };
  const auto sigmoid_of = [](V v) { return frnn::sigmoid(v); };
  const auto relu_of = [](V v) { return relu(v); };
  MathSweep found{type, 0, 0, false};
  const auto check = [](double& worst, T got, long double want) {
    const T r = T(want);
    if (std::fabs(r) < Limits::min()) return;  // may be flushed to zero
    const long double ulp = std::nextafter(std::fabs(r), Limits::infinity()) - std::fabs(r);
    const double error = double(std::fabs((long double)got - want) / ulp);
    if (!(error <= worst)) worst = error;
  };
  for (int i = -200000; i <= 200000; i++) {
    const double u = i / 200000.0;
    const T x = T(u * u * u * (sizeof(T) == 4 ? 110 : 760));
    check(found.tanh, Eval<V>(tanh_of, x), tanhl((long double)x));
    check(found.sigmoid, Eval<V>(sigmoid_of, x), 1 / (1 + expl(-(long double)x)));
  }
  const T inf = Limits::infinity(), nan = Limits::quiet_NaN();
  const auto t = [&](T x) { return Eval<V>(tanh_of, x); };
  const auto s = [&](T x) { return Eval<V>(sigmoid_of, x); };
  found.special = t(inf) == 1 && t(-inf) == -1 && std::signbit(t(T(-0.0))) &&
                  t(Limits::denorm_min()) > 0 && s(inf) == 1 && s(-inf) == 0 && s(0) == T(0.5) &&
                  s(-2000) == 0 && s(2000) == 1 && std::isnan(t(nan)) && std::isnan(s(nan)) &&
                  std::isnan(Eval<V>(relu_of, nan));
  return found;
}

}  // namespace

std::vector<MathSweep> TIER() {
  return {
      Sweep<float>("float"),
      Sweep<double>("double"),
#ifdef WIDTH
      Sweep<Vec<float, WIDTH / 4>>("float vector"),
      Sweep<Vec<double, WIDTH / 8>>("double vector"),
#endif
  };
}
