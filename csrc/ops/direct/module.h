// What direct calls ask of a module before they take its place.
#pragma once
#include "ops/direct/arguments.h"

namespace frnn::direct {

// Of tensors, tuples of them, and None.
inline bool WantsGrad(PyObject* object) {
  if (object == Py_None) return false;
  if (Py_TYPE(object) != &PyTuple_Type) return !Has(object, names().requires_grad, Py_False);
  for (Py_ssize_t i = 0, n = PyTuple_Size(object); i < n; i++)
    if (WantsGrad(PyTuple_GetItem(object, i))) return true;
  return false;
}
inline bool WantsGrad(const References& weights, PyObject* x, PyObject* hx) {
  // In the body of a custom_op autograd has had its turn.
  if (!aoti_torch_grad_mode_is_enabled() || c10::impl::tls_is_dispatch_key_excluded(autograd_key))
    return false;
  for (PyObject* weight : weights.objects())
    if (WantsGrad(weight)) return true;
  return WantsGrad(x) || WantsGrad(hx);
}

// What an instance itself holds, its class not asked.
class Attributes {
 public:
  explicit Attributes(PyObject* object) : dict_(PyObject_GenericGetDict(object, nullptr)) {
    if (dict_ == nullptr) throw Unsupported();
  }
  ~Attributes() { Py_DecRef(dict_); }
  Attributes(const Attributes&) = delete;

  PyObject* Find(PyObject* name) const { return PyDict_GetItemWithError(dict_, name); }
  PyObject* Get(PyObject* name) const {
    PyObject* value = Find(name);
    if (value == nullptr) throw Unsupported();
    return value;
  }

 private:
  PyObject* dict_;
};

// Whether torch.nn.Module.__call__ would do nothing but call the usual forward: no hooks, and nothing
// that it goes through replaced, of the module or of its class.
inline bool IsPlain(PyObject* module, const Attributes& own) {
  for (PyObject* name : names().hooks)
    if (PyDict_Size(own.Get(name)) != 0) return false;
  for (Py_ssize_t i = 0, n = PyTuple_Size(global_hooks); i < n; i++)
    if (PyDict_Size(PyTuple_GetItem(global_hooks, i)) != 0) return false;
  for (PyObject* name : {names().forward, names().call_impl, names().compiled_call_impl})
    if (own.Find(name) != nullptr) return false;
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(module));
  PyObject* usual = PyObject_GetAttr(type, names().usual_forward);
  Py_DecRef(usual);
  return usual != nullptr && Has(type, names().forward, usual) &&
         Has(type, names().call_impl, module_call_impl) &&
         Has(module_type, names().call, module_call);
}

// Whether the forward checks no more than is checked here. The module knows, if it was asked before.
inline bool IsUsual(PyObject* module, const Attributes& own) {
  if (own.Find(names().verified) != nullptr) return true;
  const Owned ask(PyObject_GetAttr(module, names().is_usual));
  if (ask.object == nullptr) return false;
  return Owned(PyObject_CallNoArgs(ask.object)).object == Py_True;
}

}  // namespace frnn::direct
