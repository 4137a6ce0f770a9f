// csrc/cuda/plan.h for tests/test_cuda_engine.py.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>

#include "bind_storage.h"
#include "cuda/plan.h"

namespace py = pybind11;
using namespace frnn;
using namespace frnn::cuda;

PYBIND11_MODULE(bind_cuda_plan, m) {
  BindStorage(m);
  py::enum_<Variant>(m, "Variant")
      .value("one", Variant::kOne)
      .value("steps", Variant::kSteps)
      .value("graph", Variant::kGraph)
      .value("scan", Variant::kScan)
      .value("resident", Variant::kResident)
      .value("cluster", Variant::kCluster)
      .value("local", Variant::kLocal);
  py::class_<CudaDevice>(m, "Device")
      .def(py::init<>())
      .def_readwrite("multiprocessors", &CudaDevice::multiprocessors)
      .def_readwrite("major", &CudaDevice::major)
      .def_readwrite("l2_bytes", &CudaDevice::l2_bytes)
      .def_readwrite("shared_bytes", &CudaDevice::shared_bytes);
  py::class_<Problem>(m, "Problem")
      .def(py::init<>())
      .def_readwrite("gates_x", &Problem::gates_x)
      .def_readwrite("gates_h", &Problem::gates_h)
      .def_readwrite("H", &Problem::H)
      .def_readwrite("B", &Problem::B)
      .def_readwrite("T", &Problem::T)
      .def_readwrite("storage", &Problem::storage)
      .def_readwrite("dirs", &Problem::dirs)
      .def_readwrite("projected", &Problem::projected)
      .def_readwrite("has_resident", &Problem::has_resident)
      .def_readwrite("allow_tf32", &Problem::allow_tf32)
      .def_readwrite("aligned", &Problem::aligned)
      .def_readwrite("kept", &Problem::kept)
      .def_readwrite("stages", &Problem::stages)
      .def_readwrite("norms", &Problem::norms)
      .def_readwrite("blocks", &Problem::blocks)
      .def_readwrite("affine", &Problem::affine);
  py::class_<Plan>(m, "Plan")
      .def_readonly("variant", &Plan::variant)
      .def_readonly("threads_x", &Plan::threads_x)
      .def_readonly("threads_y", &Plan::threads_y)
      .def_readonly("streams", &Plan::streams)
      .def_readonly("chunk_steps", &Plan::chunk_steps)
      .def_readonly("blocks", &Plan::blocks)
      .def_readonly("groups", &Plan::groups)
      .def_readonly("tiles", &Plan::tiles)
      .def_readonly("copies", &Plan::copies)
      .def_readonly("scan_length", &Plan::scan_length);
  m.def("make_plan", &MakePlan);  // None for no forced variant
}
