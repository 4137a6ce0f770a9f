// The functions of csrc/core/math.h over the numbers of a type, compared with long double. It is
// compiled once for each instruction set; see tests/test_math.py, which gives TIER, and WIDTH in bytes
// where there are vectors.
#include "math_sweep.h"

#include <cmath>
#include <limits>
#include <vector>

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
  MathSweep found{type, {}, false};
  const auto check = [](double& worst, T got, long double want) {
    const T r = T(want);
    if (std::fabs(r) < Limits::min()) return;  // may be flushed to zero
    if (got == r) return;
    const long double ulp = std::nextafter(std::fabs(r), Limits::infinity()) - std::fabs(r);
    const double error = double(std::fabs((long double)got - want) / ulp);
    if (!(error <= worst)) worst = error;
  };
  // x runs over [-range, range], denser near 0; or, where that is asked for, over all positive numbers.
  const auto sweep = [&](const char* name, double range, auto ours, auto exact) {
    double& worst = found.errors[name];
    for (int i = -200000; i <= 200000; i++) {
      const double u = i / 200000.0;
      const T x = T(range > 0 ? u * u * u * range : std::exp2(u * Limits::max_exponent));
      check(worst, Eval<V>(ours, x), exact((long double)x));
    }
  };
#define EACH(name) [](V v) { return frnn::name(v); }
  using L = long double;
  const double large = sizeof(T) == 4 ? 110 : 760;
  sweep("tanh", large, EACH(tanh), [](L x) { return tanhl(x); });
  sweep("sigmoid", large, EACH(sigmoid), [](L x) { return 1 / (1 + expl(-x)); });
  sweep("exp", large, EACH(exp), [](L x) { return expl(x); });
  sweep("expm1", large, EACH(expm1), [](L x) { return expm1l(x); });
  sweep("log", 0, EACH(log), [](L x) { return logl(x); });
  sweep(
      "log near 1", 0.9, [](V v) { return frnn::log(V(v + T(1))); },
      [](L x) { return logl((L)(T)(T(x) + T(1))); });
  sweep("log1p", 0, EACH(log1p), [](L x) { return log1pl(x); });
  sweep("log1p near 0", 0.99, EACH(log1p), [](L x) { return log1pl(x); });
  sweep("softplus", large, EACH(softplus),
        [](L x) { return (x > 0 ? x : 0) + log1pl(expl(-fabsl(x))); });
  sweep("erf", 7, EACH(erf), [](L x) { return erfl(x); });
  sweep("sqrt", 0, EACH(sqrt), [](L x) { return sqrtl(x); });
  sweep("sin", 2000, EACH(sin), [](L x) { return sinl(x); });
  sweep("cos", 2000, EACH(cos), [](L x) { return cosl(x); });
  sweep("abs", large, EACH(abs), [](L x) { return fabsl(x); });
  sweep("sign", large, EACH(sign), [](L x) { return L((x > 0) - (x < 0)); });
  sweep(
      "maximum", large, [](V v) { return frnn::maximum(v, V(T(1) - v)); },
      [](L x) { return (L)std::fmax(T(x), T(1) - T(x)); });
  sweep(
      "minimum", large, [](V v) { return frnn::minimum(v, V(T(1) - v)); },
      [](L x) { return (L)std::fmin(T(x), T(1) - T(x)); });

  const T inf = Limits::infinity(), nan = Limits::quiet_NaN(), tiny = Limits::denorm_min();
#define AT(name, x) Eval<V>(EACH(name), x)
  const bool gates = AT(tanh, inf) == 1 && AT(tanh, -inf) == -1 &&
                     std::signbit(AT(tanh, T(-0.0))) && AT(tanh, tiny) > 0 &&
                     AT(sigmoid, inf) == 1 && AT(sigmoid, -inf) == 0 && AT(sigmoid, 0) == T(0.5) &&
                     AT(sigmoid, -2000) == 0 && AT(sigmoid, 2000) == 1;
  const bool powers = AT(exp, inf) == inf && AT(exp, -inf) == 0 && AT(exp, 2000) == inf &&
                      AT(exp, -2000) == 0 && AT(exp, 0) == 1 && AT(expm1, inf) == inf &&
                      AT(expm1, -inf) == -1 && AT(expm1, 2000) == inf &&
                      std::signbit(AT(expm1, T(-0.0))) && AT(expm1, T(-0.0)) == 0;
  const bool logs = AT(log, 0) == -inf && AT(log, inf) == inf && std::isnan(AT(log, -1)) &&
                    AT(log, 1) == 0 && AT(log1p, -1) == -inf && AT(log1p, inf) == inf &&
                    std::isnan(AT(log1p, -2)) && AT(log1p, tiny) == tiny &&
                    std::signbit(AT(log1p, T(-0.0))) && AT(softplus, inf) == inf &&
                    AT(softplus, -inf) == 0;
  const bool others =
      AT(erf, inf) == 1 && AT(erf, -inf) == -1 && std::signbit(AT(erf, T(-0.0))) &&
      AT(sqrt, inf) == inf && std::isnan(AT(sqrt, -1)) && std::isnan(AT(sin, inf)) &&
      std::isnan(AT(cos, -inf)) && std::signbit(AT(sin, T(-0.0))) && AT(cos, 0) == 1 &&
      std::fabs(AT(sin, T(1e6)) - std::sin(T(1e6))) < 1e-6 && AT(sign, T(-0.0)) == 0 &&
      AT(abs, -inf) == inf && Eval<V>([](V v) { return frnn::maximum(v, V{}); }, -inf) == 0 &&
      Eval<V>([](V v) { return frnn::minimum(v, V{}); }, -inf) == -inf;
  bool nans = true;
#define STAYS(name) nans = nans && std::isnan(AT(name, nan))
  STAYS(tanh);
  STAYS(sigmoid);
  STAYS(relu);
  STAYS(exp);
  STAYS(expm1);
  STAYS(log);
  STAYS(log1p);
  STAYS(softplus);
  STAYS(erf);
  STAYS(sqrt);
  STAYS(sin);
  STAYS(cos);
  STAYS(abs);
  nans = nans && std::isnan(Eval<V>([](V v) { return frnn::maximum(v, V{}); }, nan)) &&
         std::isnan(Eval<V>([](V v) { return frnn::maximum(V{}, v); }, nan)) &&
         std::isnan(Eval<V>([](V v) { return frnn::minimum(v, V{}); }, nan)) &&
         std::isnan(Eval<V>([](V v) { return frnn::minimum(V{}, v); }, nan));
  found.special = gates && powers && logs && others && nans;
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
