// math_sweep.cpp for tests/test_math.py: a function for each instruction set that it is compiled for,
// which TIERS lists.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "math_sweep.h"

#define TIER(name) std::vector<MathSweep> name();
TIERS
#undef TIER

PYBIND11_MODULE(bind_math, m) {
  pybind11::class_<MathSweep>(m, "MathSweep")
      .def_readonly("type", &MathSweep::type)
      .def_readonly("errors", &MathSweep::errors)
      .def_readonly("special", &MathSweep::special);
#define TIER(name) m.def(#name, &name);
  TIERS
#undef TIER
}
