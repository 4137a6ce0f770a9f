// What direct calls ask of torch, beside tensors: who watches its dispatcher, and what it told Setup.
#pragma once
#include <cstring>
#include <memory>
#include <vector>

#include "ops/direct/python.h"
#include "ops/dlpack.h"
#include "ops/tensor.h"

// What torch has to do beside running an operator. It tells in C++ alone; these functions take and
// return what no release lays out differently, and their names are old. Weak: without one of them
// there are no direct calls.
#define FRNN_WEAK __attribute__((weak))
namespace c10 {
enum class DispatchKey : uint16_t;
namespace impl {
struct TorchDispatchModeTLS {
  FRNN_WEAK static int64_t stack_len();
};
FRNN_WEAK bool tls_is_dispatch_key_excluded(DispatchKey);
}  // namespace impl
}  // namespace c10
namespace at {
class Tensor;
FRNN_WEAK bool hasCallbacks();
namespace native {
FRNN_WEAK bool is_neg(const Tensor&);
}
namespace autocast {
FRNN_WEAK bool is_autocast_enabled(c10::DeviceType);
}
namespace functorch {
struct DynamicLayer;
FRNN_WEAK const std::vector<DynamicLayer>& getDynamicLayerStack();
}  // namespace functorch
namespace impl {
struct PythonTorchFunctionTLS {
  FRNN_WEAK static int64_t stack_len();
};
}  // namespace impl
}  // namespace at
namespace torch::jit::tracer {
struct TracingState;
FRNN_WEAK const std::shared_ptr<TracingState>& getTracingState();
}  // namespace torch::jit::tracer

namespace frnn::direct {

// Set once, by Setup.
inline const dlpack::Exchange* exchange = nullptr;
inline PyObject *tensor_type, *parameter_type;
inline Py_ssize_t tensor_offset;  // of the at::Tensor in its object of Python, in bytes
inline c10::DispatchKey autograd_key;
// torch.nn.Module, and what it came with.
inline PyObject *module_type, *module_call, *module_call_impl;
inline PyObject* global_hooks;  // those of all modules: a tuple of dicts
inline PyObject* forward_mode;  // the dict of torch.autograd.forward_ad
inline PyObject* record_step;   // makes a step differentiable

// Interned: a dict finds them by their address.
struct Names {
  static PyObject* Interned(const char* text) { return PyUnicode_InternFromString(text); }
  PyObject* const hx = Interned("hx");
  PyObject* const num_layers = Interned("num_layers");
  PyObject* const bidirectional = Interned("bidirectional");
  PyObject* const bias = Interned("bias");
  PyObject* const batch_first = Interned("batch_first");
  PyObject* const dropout = Interned("dropout");
  PyObject* const proj_size = Interned("proj_size");
  PyObject* const training = Interned("training");
  PyObject* const parameters = Interned("_parameters");
  PyObject* const weight_names = Interned("_flat_weights_names");
  PyObject* const forward = Interned("forward");
  PyObject* const usual_forward = Interned("_usual_forward");
  PyObject* const call = Interned("__call__");
  PyObject* const call_impl = Interned("_call_impl");
  PyObject* const compiled_call_impl = Interned("_compiled_call_impl");
  PyObject* const verified = Interned("_verified");
  PyObject* const frozen = Interned("_frozen");
  PyObject* const words = Interned("words");
  PyObject* const is_usual = Interned("_is_usual");
  PyObject* const hooks[4] = {Interned("_forward_hooks"), Interned("_forward_pre_hooks"),
                              Interned("_backward_hooks"), Interned("_backward_pre_hooks")};
  PyObject* const requires_grad = Interned("requires_grad");
  PyObject* const current_level = Interned("_current_level");
};
inline const Names& names() {
  static const Names found;
  return found;
}

// The tensor of C++ in one of Python, which stays the owner. Extensions usually copy it, which takes
// Python's lock each time, to count.
inline AtenTensorHandle TensorIn(PyObject* object) {
  return reinterpret_cast<AtenTensorHandle>(reinterpret_cast<char*>(object) + tensor_offset);
}
// How every extension of torch gets from a tensor of Python to that of C++: a member function of
// pybind11::detail::type_caster<at::Tensor>, whose one member is the tensor.
using Load = bool (*)(AtenTensorHandle caster, PyObject* tensor, bool convert);

// Finds tensor_offset by a tensor: where its object, of so many bytes, has what `load` gets from it.
// -1: nowhere, or at several places.
inline Py_ssize_t FindTensor(Load load, PyObject* object, Py_ssize_t bytes) {
  AtenTensorHandle tensor;
  if (aoti_torch_new_uninitialized_tensor(&tensor) != 0) return -1;
  Py_ssize_t found = -1;
  if (load(tensor, object, false)) {
    int places = 0;
    for (Py_ssize_t at = sizeof(PyObject); at + Py_ssize_t(sizeof(void*)) <= bytes;
         at += sizeof(void*))
      if (std::memcmp(reinterpret_cast<char*>(object) + at, tensor, sizeof(void*)) == 0)
        found = at, places++;
    if (places != 1) found = -1;
  }
  aoti_torch_delete_tensor_object(tensor);
  return found;
}

// Whether somebody counts on torch's dispatcher: the call is then the operator's. Modes, autocast,
// transforms, a tracer; whoever records the operators that run, in this thread or in all.
inline bool IsWatched() {
  if (c10::impl::TorchDispatchModeTLS::stack_len() != 0 ||
      at::impl::PythonTorchFunctionTLS::stack_len() != 0 ||
      at::autocast::is_autocast_enabled(c10::DeviceType::CPU) ||
      !at::functorch::getDynamicLayerStack().empty() || torch::jit::tracer::getTracingState() ||
      at::hasCallbacks())
    return true;
  PyObject* level = PyDict_GetItemWithError(forward_mode, names().current_level);
  return level == nullptr || PyLong_AsLongLong(level) >= 0;
}

// Whether this torch has all that is declared at the head of this file.
inline bool TorchTells() {
  return c10::impl::TorchDispatchModeTLS::stack_len && c10::impl::tls_is_dispatch_key_excluded &&
         at::impl::PythonTorchFunctionTLS::stack_len && at::autocast::is_autocast_enabled &&
         at::functorch::getDynamicLayerStack && torch::jit::tracer::getTracingState &&
         at::hasCallbacks && at::native::is_neg;
}

}  // namespace frnn::direct
