// What math_sweep.cpp finds of a type.
#pragma once
#include <map>
#include <string>

struct MathSweep {
  const char* type;
  std::map<std::string, double> errors;  // the largest of each function, in units of the last place
  bool special;                          // infinities, NaN, zeros and what overflows are right
};
