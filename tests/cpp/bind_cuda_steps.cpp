// Steps of csrc/cuda/steps.cuh, emulated, for tests/test_cuda_engine.py: matrices of more elements than
// 2^31.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>

#include <stdexcept>
#include <vector>

#include "cells/lstm.h"
#include "cuda/matrices.cuh"
#include "cuda/steps_backward.cuh"

using namespace frnn;
using namespace frnn::cuda;

namespace {

// Memory of which only the pages exist that are touched.
class Sparse {
 public:
  explicit Sparse(int64_t elements) : bytes_(elements * sizeof(float)) {
    void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("no address space");
    data_ = static_cast<float*>(p);
  }
  Sparse(const Sparse&) = delete;
  ~Sparse() { munmap(data_, bytes_); }
  float* data() { return data_; }

 private:
  size_t bytes_;
  float* data_;
};

// Two rows, `stride` elements apart, as a kernel copies them.
std::vector<std::vector<float>> Copied(const std::vector<std::vector<float>>& rows,
                                       int64_t stride) {
  const int64_t width = int64_t(rows[0].size());
  Sparse from(stride + width), to(stride + width);
  for (int r = 0; r < 2; r++) std::copy(rows[r].begin(), rows[r].end(), from.data() + r * stride);
  Launch(Convert<float, float>, dim3(1, 1), dim3(32, 1), 0, cudaStream_t{}, int64_t(2), width,
         Rows<float>{to.data(), stride}, Rows<const float>{from.data(), stride},
         static_cast<const uint8_t*>(nullptr));
  return {{to.data(), to.data() + width}, {to.data() + stride, to.data() + stride + width}};
}

int64_t BackwardWorkspace(int64_t T, int64_t B, int64_t I, int64_t H, int dirs) {
  LayerGradParams p{};
  p.dirs = dirs, p.T = T, p.B = B, p.I = I, p.H = p.Hout = H, p.rows = T * B;
  return Steps<LSTM, float>::BackwardWorkspace(p, Plan{});
}

}  // namespace

PYBIND11_MODULE(bind_cuda_steps, m) {
  namespace py = pybind11;
  m.def("copied", &Copied, py::arg("rows"), py::arg("stride"));
  m.def("backward_workspace", &BackwardWorkspace, py::arg("T"), py::arg("B"), py::arg("I"),
        py::arg("H"), py::arg("dirs"));
}
