"""Gate functions: largest error in ulp against long double, and the special values.

The sweep is a small C++ program over csrc/core/math.h, built for every vector width there is.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")
# The bounds that csrc/core/math.h states.
BOUNDS = {"tanh": 3.0, "sigmoid": 3.0}

PROGRAM = r"""
#include <cmath>
#include <cstdio>
#include <limits>
#include "core/math.h"
using namespace frnn;

template <class V, class F>
typename Lanes<V>::T Eval(F f, typename Lanes<V>::T x) {
  V y = f(splat<V>(x));
  typename Lanes<V>::T first;
  memcpy(&first, &y, sizeof(first));
  return first;
}

template <class V>
void Sweep(const char* type) {
  using T = typename Lanes<V>::T;
  const auto t = [](V v) { return frnn::tanh(v); };
  const auto s = [](V v) { return frnn::sigmoid(v); };
  double worst[2] = {0, 0};
  const auto check = [&](int i, T got, long double want) {
    const T r = T(want);
    if (std::fabs(r) < std::numeric_limits<T>::min()) return;  // may be flushed to zero
    const long double ulp =
        std::nextafter(std::fabs(r), std::numeric_limits<T>::infinity()) - std::fabs(r);
    const double err = double(std::fabs((long double)got - want) / ulp);
    if (!(err <= worst[i])) worst[i] = err;
  };
  for (int i = -200000; i <= 200000; i++) {
    const double u = i / 200000.0;
    const T x = T(u * u * u * (sizeof(T) == 4 ? 110 : 760));
    check(0, Eval<V>(t, x), tanhl((long double)x));
    check(1, Eval<V>(s, x), 1 / (1 + expl(-(long double)x)));
  }
  std::printf("%s tanh %.3f sigmoid %.3f\n", type, worst[0], worst[1]);
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const auto relu_of = [](V v) { return relu(v); };
  const bool special =
      Eval<V>(t, inf) == 1 && Eval<V>(t, -inf) == -1 && std::signbit(Eval<V>(t, T(-0.0))) &&
      Eval<V>(t, std::numeric_limits<T>::denorm_min()) > 0 &&
      Eval<V>(s, inf) == 1 && Eval<V>(s, -inf) == 0 && Eval<V>(s, T(0)) == T(0.5) &&
      Eval<V>(s, T(-2000)) == 0 && Eval<V>(s, T(2000)) == 1 &&
      std::isnan(Eval<V>(t, nan)) && std::isnan(Eval<V>(s, nan)) &&
      std::isnan(Eval<V>(relu_of, nan));
  std::printf("%s special %d\n", type, int(special));
}

int main() {
  Sweep<float>("float");
  Sweep<double>("double");
#ifdef WIDTH
  Sweep<Vec<float, WIDTH / 4>>("float_vector");
  Sweep<Vec<double, WIDTH / 8>>("double_vector");
#endif
}
"""

TIERS = {
    "scalar": ([], set()),
    "generic": (["-DWIDTH=16"], set()),
    "avx2": (["-DWIDTH=32", "-mavx2", "-mfma"], {"avx2", "fma"}),
    "avx512": (
        ["-DWIDTH=64", "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"],
        {"avx512f", "avx512vl"},
    ),
}


def cpu_flags() -> set[str]:
    try:
        return set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    except (OSError, IndexError):
        return set()


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("tier", TIERS)
def test_gate_functions(tier: str, tmp_path: Path) -> None:
    flags, needed = TIERS[tier]
    if not needed <= cpu_flags():
        pytest.skip(f"this machine has no {tier}")
    source, program = tmp_path / "sweep.cpp", tmp_path / "sweep"
    source.write_text(PROGRAM)
    base = ["-std=c++17", "-O2", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", f"-I{CSRC}"]
    subprocess.run([str(COMPILER), *base, *flags, str(source), "-o", str(program)], check=True)
    lines = subprocess.run(
        [str(program)], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert len(lines) == (4 if tier == "scalar" else 8)
    for line in lines:
        kind, *words = line.split()
        if words[0] == "special":
            assert words[1] == "1", f"{kind}: inf, NaN, zero or overflow wrong"
        else:
            for name, value in zip(words[::2], words[1::2], strict=True):
                assert float(value) <= BOUNDS[name], f"{kind} {name}: {value} ulp"
