// The host's side of csrc/cuda, on tests/cpp/fake_runtime.cpp, for tests/test_cuda_host.py.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/context.h"
#include "fake_runtime.h"
#include "fake_state.h"

namespace py = pybind11;
using namespace frnn;
using namespace frnn::cuda;

namespace {

using Address = uintptr_t;
Address Of(const void* p) { return reinterpret_cast<Address>(p); }
runtime::Stream ToStream(Address a) { return reinterpret_cast<runtime::Stream>(a); }

std::vector<std::string>& Ran() {
  static std::vector<std::string> ran;
  return ran;
}
// Work that notes that it was done.
void Note(Address stream, const std::string& name, int times) {
  for (int i = 0; i < times; i++)
    fake::Start({nullptr, 1}, {1}, ToStream(stream), [name] { Ran().push_back(name); });
}

// A call that does what Python says. `two`: with a second stream beside the first.
void RunCall(int device, bool two, const std::function<void(const Call&)>& work) {
  fake::CurrentStream stream(device);
  std::vector<char> memory;
  const CudaCall from{device, stream.get(), false, &memory, [](void* memory, int64_t bytes) {
                        auto& m = *static_cast<std::vector<char>*>(memory);
                        m.resize(size_t(bytes));
                        return static_cast<void*>(m.data());
                      }};
  Call call(from);
  call.TakeWorkspace(two ? 2 : 1, 512);
  Beside beside(call, two);
  work(call);
  beside.Join();
  stream.Done();
}

}  // namespace

void frnn::cuda::fake::Compute(const runtime::Gemm&) { Ran().push_back("product"); }

PYBIND11_MODULE(bind_cuda_host, m) {
  py::register_exception<runtime::Error>(m, "RuntimeFailure", PyExc_RuntimeError);

  // ---- the fake ----
  auto& state = fake::GetState();
  m.def("fail_at", [&](int call) { state.fail_at = call; });
  m.def("calls", [&] { return state.calls; });
  m.def("log", [&] { return state.log; });
  m.def("faults", [&] { return state.faults; });
  m.def("live", [&] { return state.live; });
  m.def("limit", [&](int multiprocessors) {
    state.limit = [=](runtime::Stream) { return multiprocessors; };
  });
  m.def("alarm", &fake::Alarm);
  m.def("clear", [&] {
    state.log.clear(), state.faults.clear(), state.limit = nullptr, state.fail_at = 0;
    Ran().clear();
  });
  m.def("ran", [] { return Ran(); });
  m.def("note", &Note, py::arg("stream"), py::arg("name"), py::arg("times") = 1);
  m.def("own_stream", [] { return Of(fake::CurrentStream(0).get()); });
  m.def("wait", [] { fake::CurrentStream(0).Done(); });
  m.def("new_stream", [] { return Of(runtime::NewStream()); });
  m.def("free_stream", [](Address stream) { runtime::Free(ToStream(stream)); });
  m.def("capture", [](Address stream, const std::function<void()>& work) {
    runtime::BeginCapture(ToStream(stream));
    work();
    const runtime::Owned<runtime::Drawing> drawing(runtime::EndCapture(ToStream(stream)));
    return runtime::Nodes(drawing.get());
  });

  // ---- the engine ----
  py::class_<GraphCache>(m, "GraphCache")
      .def(py::init<>())
      .def("run",
           [](GraphCache& cache, const std::string& key, Address stream, Address capture,
              const std::function<void(Address)>& work) {
             cache.Run(key, ToStream(stream), ToStream(capture),
                       [&](runtime::Stream in) { work(Of(in)); });
           })
      .def_property_readonly("graphs", &GraphCache::graphs)
      .def_property_readonly("bytes", &GraphCache::bytes)
      .def_readonly_static("most_graphs", &GraphCache::kGraphs)
      .def_readonly_static("most_bytes", &GraphCache::kBytes)
      .def_readonly_static("node_bytes", &GraphCache::kNodeBytes);
  py::class_<Call>(m, "Call")
      .def_property_readonly("context", [](const Call& call) { return Of(&call.context); })
      .def_property_readonly("device", [](const Call& call) { return Of(&call.context.device); })
      .def_property_readonly("multiprocessors",
                             [](const Call& call) { return call.device.multiprocessors; })
      .def_property_readonly("together", [](const Call& call) { return call.device.together; })
      .def_property_readonly("workspace", [](const Call& call) { return Of(call.workspace); })
      .def("stream", [](const Call& call, int i) { return Of(call.streams[i]); })
      .def("queue",
           [](const Call& call, int i) {
             const CudaQueue queue = call.Queue(i);
             return std::make_tuple(Of(queue.stream), Of(queue.workspace), queue.workspace_bytes);
           })
      .def("multiply",
           [](const Call& call, int i) {
             Product product{};
             product.m = product.n = product.k = 1;
             Multiply(call.Queue(i), product, false);
           })
      .def("run",
           [](const Call& call, const std::string& key, const std::function<void(Address)>& work) {
             call.context.graphs.Run(key, call.streams[0], call.context.capture.get(),
                                     [&](runtime::Stream in) { work(Of(in)); });
           })
      .def("blocks_at_once",
           [](const Call& call, Address kernel, size_t shared, unsigned cluster) {
             runtime::Shape shape{reinterpret_cast<const void*>(kernel), 256};
             shape.shared = shared, shape.cluster = cluster;
             return call.context.device.BlocksAtOnce(shape, call.streams[0],
                                                     call.device.multiprocessors);
           })
      .def("refuse", [](const Call& call, Address kernel) {
        call.context.device.Refuse({reinterpret_cast<const void*>(kernel), 256},
                                   call.device.multiprocessors);
      });
  m.def("call", &RunCall, py::arg("device"), py::arg("two"), py::arg("work"));
}
