// What math_sweep.cpp finds of a type.
#pragma once
#include <vector>

struct MathSweep {
  const char* type;
  double tanh, sigmoid;  // largest errors, in units of the last place
  bool special;          // infinities, NaN, zeros and what overflows are right
};
