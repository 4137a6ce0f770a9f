// csrc/cpu/plan.h for tests/test_cpu_plan.py.
#include <pybind11/pybind11.h>

#include "bind_storage.h"
#include "cpu/plan.h"

namespace py = pybind11;
using namespace frnn;
using namespace frnn::cpu;

PYBIND11_MODULE(bind_cpu_plan, m) {
  BindStorage(m);
  py::enum_<parts::MatrixUnit>(m, "MatrixUnit")
      .value("none", parts::MatrixUnit::kNone)
      .value("vectors", parts::MatrixUnit::kVectors)
      .value("tiles", parts::MatrixUnit::kTiles)
      .value("fixed_tiles", parts::MatrixUnit::kFixedTiles);
  py::enum_<parts::Cut>(m, "Cut")
      .value("one", parts::Cut::kOne)
      .value("two", parts::Cut::kTwo)
      .value("three", parts::Cut::kThree)
      .value("fixed", parts::Cut::kFixed);
  py::enum_<Packing>(m, "Packing")
      .value("none", Packing::kNone)
      .value("once", Packing::kOnce)
      .value("each_use", Packing::kEachUse)
      .value("turned", Packing::kTurned)
      .value("given", Packing::kGiven);
  py::class_<Vectors>(m, "Vectors").def(py::init([](int bytes, int registers) {
    return Vectors{bytes, registers};
  }));
  py::class_<Machine>(m, "Machine")
      .def(py::init<>())
      .def_readwrite("unit", &Machine::unit)
      .def_readwrite("cores", &Machine::cores)
      .def_readwrite("l2_bytes", &Machine::l2_bytes)
      .def_readwrite("crowded", &Machine::crowded);
  py::class_<Problem>(m, "Problem")
      .def(py::init<>())
      .def_readwrite("storage", &Problem::storage)
      .def_readwrite("threads", &Problem::threads)
      .def_readwrite("T", &Problem::T)
      .def_readwrite("B", &Problem::B)
      .def_readwrite("I", &Problem::I)
      .def_readwrite("H", &Problem::H)
      .def_readwrite("Hout", &Problem::Hout)
      .def_readwrite("rows", &Problem::rows)
      .def_readwrite("gates_x", &Problem::gates_x)
      .def_readwrite("gates_h", &Problem::gates_h)
      .def_readwrite("scalar_bytes", &Problem::scalar_bytes)
      .def_readwrite("vector_bytes", &Problem::vector_bytes)
      .def_readwrite("panel_vecs", &Problem::panel_vecs)
      .def_readwrite("panels", &Problem::panels)
      .def_readwrite("operands", &Problem::operands)
      .def_readwrite("packed", &Problem::packed)
      .def_readwrite("bytes", &Problem::bytes)
      .def_readwrite("invariant", &Problem::invariant);
  py::class_<Plan>(m, "Plan")
      .def_readonly("threads", &Plan::threads)
      .def_readonly("one_chain", &Plan::one_chain)
      .def_readonly("spins", &Plan::spins)
      .def_readonly("is_short", &Plan::is_short)
      .def_readonly("tiled", &Plan::tiled);
  py::class_<ForwardPlan, Plan>(m, "ForwardPlan")
      .def_readonly("w_ih", &ForwardPlan::w_ih)
      .def_readonly("w_hh", &ForwardPlan::w_hh)
      .def_readonly("gates_rows", &ForwardPlan::gates_rows)
      .def_readonly("paired", &ForwardPlan::paired)
      .def_readonly("x_cut", &ForwardPlan::x_cut)
      .def_readonly("h_cut", &ForwardPlan::h_cut);
  py::class_<BackwardPlan, Plan>(m, "BackwardPlan")
      .def_readonly("w_ih", &BackwardPlan::w_ih)
      .def_readonly("w_hh", &BackwardPlan::w_hh)
      .def_readonly("dx_rows", &BackwardPlan::dx_rows)
      .def_readonly("cut", &BackwardPlan::cut)
      .def_readonly("d_cut", &BackwardPlan::d_cut)
      .def_readonly("grad_cut", &BackwardPlan::grad_cut)
      .def_readonly("d_grad_cut", &BackwardPlan::d_grad_cut);
  m.def("plan_forward", &PlanForward);
  m.def("plan_backward", &PlanBackward);
  m.def("tile_rows", &TileRows);
  m.def("tile_vecs", &TileVecs);
  m.def("chains", &Chains);
  m.def("depth_at_once", &DepthAtOnce);
}
