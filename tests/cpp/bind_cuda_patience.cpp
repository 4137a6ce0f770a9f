// csrc/cuda/resident.cuh, emulated, for tests/test_cuda_engine.py: kernels that wait for a block that
// does not come (of the two blocks of a layer one is not launched), and where local kernels put what
// they share.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "cells/rnn.h"
#include "cuda/resident.cuh"

using namespace frnn;
using namespace frnn::cuda;
using T = __nv_bfloat16;
using Instance = ResidentInstance<RnnTanh, T, 1, 1, 1, InMemory>;

namespace {

constexpr int64_t H = 32, B = 3, kSteps = 4, kRows = B * kSteps;

template <class V>
std::vector<V> Filled(int64_t n, int byte) {
  std::vector<V> v(n);
  std::memset(static_cast<void*>(v.data()), byte, n * sizeof(V));
  return v;
}

// The word that was left, and for each time which part of what the block has is NaN.
using Result = std::tuple<uint32_t, std::vector<double>>;

template <class Kernel, class Args>
Result Run(Kernel kernel, bool backward, const Args& args, const std::vector<T>& rows) {
  fake::CurrentStream stream(0);
  Start(kernel, Instance::Shape(backward, H), {1}, stream.get(), args);
  stream.Done();
  std::vector<double> parts;
  for (int64_t time = 0; time < kSteps; time++) {
    int nans = 0;
    for (int64_t b = 0; b < B; b++)
      for (int64_t u = 0; u < kUnits; u++) nans += std::isnan(Widen(rows[(time * B + b) * H + u]));
    parts.push_back(double(nans) / double(B * kUnits));
  }
  return {*args.steps.patience.alarm, parts};
}

ResidentSteps StepsWith(uint32_t* alarm) {
  return {H, B, kSteps, 0, kSteps, nullptr, 1, 1, {alarm, 256}};
}

Result Forward() {
  uint32_t alarm = 0;
  auto w = Filled<T>(H * H, 0), hs = Filled<T>(kRows * H, 0xFF), y = hs, last = hs;
  auto gx = Filled<float>(kRows * H, 0);
  for (int64_t i = 0; i < B * H; i++) hs[i] = Narrow<T>(0.5f);
  ResidentForwardArgs<T> args{};
  args.steps = StepsWith(&alarm);
  auto& a = args.dir[0];
  a.way = 1, a.w_hh = w.data(), a.gx = gx.data(), a.hs = hs.data(), a.y = y.data();
  a.h_last = a.c_last = last.data();
  return Run(Instance::kForward, false, args, y);
}

Result Backward() {
  uint32_t alarm = 0;
  auto w = Filled<T>(H * H, 0), hs = Filled<T>(kRows * H, 0), dgh = Filled<T>(kRows * H, 0xFF);
  auto tape = Filled<float>(kRows * H * Tape<RnnTanh>::kSize, 0), dh = Filled<float>(B * H, 0);
  ResidentBackwardArgs<T> args{};
  args.steps = StepsWith(&alarm);
  auto& a = args.dir[0];
  a.way = 1, a.w_hh_t = w.data(), a.hs = hs.data(), a.tape = tape.data();
  a.dgx = a.dgh = dgh.data(), a.dh = dh.data();
  return Run(Instance::kBackward, true, args, dgh);
}

}  // namespace

PYBIND11_MODULE(bind_cuda_patience, m) {
  m.def("forward", &Forward);
  m.def("backward", &Backward);
  m.def("local_place", [](int size, int64_t width, int row, int k) {
    return size == 4 ? row * LocalStride<float>(width) + LocalPlace<float>(row, k)
                     : row * LocalStride<T>(width) + LocalPlace<T>(row, k);
  });
}
