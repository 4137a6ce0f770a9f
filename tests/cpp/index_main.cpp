// Offsets past 2^31 elements, on the host: a matrix whose second row begins there (its pages exist
// only where they are touched), run through a kernel of the engine under emulation.
#include <sys/mman.h>

#include <cstdio>
#include <stdexcept>

#include "cells/lstm.h"
#include "cuda/kernels.cuh"
#include "cuda/steps.cuh"

using namespace frnn;
using namespace frnn::cuda;

template <class T>
T* Sparse(int64_t elements) {
  void* p = mmap(nullptr, elements * sizeof(T), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("no address space");
  return static_cast<T*>(p);
}

int main() {
  const int64_t far = (int64_t(1) << 31) + 8, width = 3;
  float* from = Sparse<float>(far + width);
  float* to = Sparse<float>(far + width);
  for (int64_t u = 0; u < width; u++) from[u] = float(u + 1), from[far + u] = float(u + 10);
  Launch(Convert<float, float>, dim3(1, 1), dim3(32, 1), 0, cudaStream_t{}, int64_t(2), width,
         Rows<float>{to, far}, Rows<const float>{from, far});
  for (int64_t u = 0; u < width; u++)
    if (to[u] != float(u + 1) || to[far + u] != float(u + 10)) return std::puts("copied wrong"), 1;

  // A layer whose gates have more than 2^31 elements: the workspace counts them all.
  LayerGradParams p{};
  p.dirs = 2, p.T = 1000, p.B = 700, p.I = 8, p.H = p.Hout = 1024, p.rows = p.T * p.B;
  const int64_t gates = p.rows * 4 * p.H;  // 2 867 200 000
  const int64_t bytes = Steps<LSTM, float>::BackwardWorkspace(p, Plan{});
  if (gates < (int64_t(1) << 31) || bytes < 2 * gates * int64_t(sizeof(float)) ||
      bytes > 2 * gates * int64_t(sizeof(float)) * 11 / 10)
    return std::puts("workspace"), 1;
  std::puts("ok");
}
