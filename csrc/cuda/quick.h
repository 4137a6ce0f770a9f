// A float whose gate functions take the card's approximations of exp and of a quotient, in a third of
// the instructions, and as exact a float to all other functions: gate math stands between a step and
// the next. Errors are a few 1e-7 of 1, and of the value where that is above 1e-4; operands of tensor
// cores are rounded a thousand times coarser.
#pragma once
#include "cuda/device.h"

namespace frnn {
namespace cuda {

struct Quick {
  float v;
  FRNN_HD Quick() : v(0) {}
  FRNN_HD Quick(float v) : v(v) {}
  friend FRNN_HD Quick operator+(Quick a, Quick b) { return a.v + b.v; }
  friend FRNN_HD Quick operator-(Quick a, Quick b) { return a.v - b.v; }
  friend FRNN_HD Quick operator*(Quick a, Quick b) { return a.v * b.v; }
  friend FRNN_HD Quick operator/(Quick a, Quick b) { return a.v / b.v; }
  friend FRNN_HD Quick operator-(Quick a) { return -a.v; }
  friend FRNN_HD bool operator<(Quick a, Quick b) { return a.v < b.v; }
  friend FRNN_HD bool operator>(Quick a, Quick b) { return a.v > b.v; }
  friend FRNN_HD bool operator<=(Quick a, Quick b) { return a.v <= b.v; }
  friend FRNN_HD bool operator>=(Quick a, Quick b) { return a.v >= b.v; }
  friend FRNN_HD bool operator==(Quick a, Quick b) { return a.v == b.v; }
  friend FRNN_HD bool operator!=(Quick a, Quick b) { return a.v != b.v; }
};

// 1 / (1 + e^-x)
__device__ __forceinline__ Quick sigmoid(Quick x) { return __fdividef(1.0f, 1.0f + __expf(-x.v)); }

// (1 - e^-2|x|) / (1 + e^-2|x|) with the sign of x; near 0, where that cancels, the series.
__device__ __forceinline__ Quick tanh(Quick x) {
  const float e = __expf(-2.0f * fabsf(x.v)), u = x.v * x.v;
  const float far = copysignf(__fdividef(1.0f - e, 1.0f + e), x.v);
  const float near = x.v + x.v * u * (-1 / 3.0f + u * (2 / 15.0f + u * (-17 / 315.0f)));
  return fabsf(x.v) < 0.25f ? near : far;
}

}  // namespace cuda

template <>
struct Lanes<cuda::Quick> : Lanes<float> {};

}  // namespace frnn
