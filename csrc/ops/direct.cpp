// The operators of binding.h once more, on the CPU, as functions that Python calls without torch's
// dispatcher: that takes longer than the kernel of a small step. This library is a Python module
// too (PyInit__direct), which fused_rnn/ops/direct.py loads and calls.
//
// A function here takes what is usual and returns None for everything else: other types, devices
// and layouts, shapes that do not fit, a lack of memory. The caller then goes through the operator,
// which copes, or says what is wrong.
//
// It is missing, and all goes through the operators, where Python.h was not found.
#if defined(__ELF__) && __has_include(<Python.h>)
#include <algorithm>
#include <vector>

#include "ops/direct/module.h"
#include "ops/direct/run.h"
#include "ops/direct/step.h"

namespace frnn::direct {
namespace {

// The boundary to Python, which no exception of C++ may cross: None stands for all but Raised, and for
// null.
template <PyObject* (*function)(Reader&)>
PyObject* Guarded(PyObject*, PyObject* const* arguments, Py_ssize_t n) {
  try {
    Reader reader(arguments, n);
    if (PyObject* result = function(reader)) return result;
  } catch (const Raised&) {
    return nullptr;
  } catch (...) {
  }
  PyErr_Clear();
  Py_IncRef(Py_None);
  return Py_None;
}
template <PyObject* (*function)(Reader&)>
PyObject* Unwatched(Reader& arguments) {
  return IsWatched() ? nullptr : function(arguments);
}

// (inputs, packed weights, tape?) -> (y, h_n, c_n or None), and with a tape (.., between or None, hs,
// saved)
PyObject* Forward(Reader& arguments) {
  Inputs in = Inputs::Of(arguments);
  in.packed = Words::Of(arguments.Tensor());
  const bool tape = arguments.Flag();
  arguments.End();
  Outputs out = Run(in, {true, tape});
  if (!tape) return ToTuple({&out.y, &out.h_n, &out.c_n});
  return ToTuple({&out.y, &out.h_n, &out.c_n, &out.between, &out.hs, &out.saved});
}

// (inputs, dy, dh_n, dc_n, between, hs, saved, a tuple: which gradients are wanted) -> as many, None
// for the others
PyObject* Backward(Reader& arguments) {
  const Inputs in = Inputs::Of(arguments);
  const MaybeBorrowed dy = arguments.Tensor(), dh_n = arguments.Tensor(), dc_n = arguments.Tensor();
  const MaybeBorrowed between = arguments.Tensor();
  const Borrowed hs = arguments.Present();
  const Borrowed saved = arguments.MaybeEmpty();  // some cells save nothing
  PyObject* wanted = arguments.Object();
  arguments.End();
  if (PyTuple_Size(wanted) != Py_ssize_t(3 + in.weights.size())) throw Unsupported();
  DirectCall call = in.ToCall();
  call.TakeForward(between, hs, saved);
  Gradients gradients = RunBackward(in, call, dy, dh_n, dc_n,
                                    [&](int i) { return PyTuple_GetItem(wanted, i) == Py_True; });
  return MakeTuple(gradients.size(), [&](size_t i) { return ToPythonOrNone(gradients[i]); });
}

// ---- a stack of layers, without gradients and dropout, as modules call it ----

// Its weights are flat, in the order of their names: those of each layer and direction in turn.
PyObject* RunStack(const Shape& shape, bool batch_first, Borrowed x, const Hidden& hx,
                   const References& flat, const Words& packed) {
  if (x.dim() != 3) throw Unsupported();
  if (batch_first) x.SwapLeading();
  Inputs in{shape, x, hx.h, hx.c, {}, {}, packed};
  in.weights.reserve(size_t(flat.size()));
  for (PyObject* weight : flat.objects()) in.weights.emplace_back(weight);
  Outputs out = Run(in, {true, false});
  if (hx.h.has_value() && hx.c.has_value() != out.c_n.has_value()) throw Unsupported();
  if (batch_first) out.y->SwapLeading();
  return MakeTuple(2, [&](size_t i) { return i == 0 ? out.y->ToPython() : out.HiddenState(); });
}

// (cell, x, hx, parameters, names, layers, directions, present, batch_first, packed weights) -> (y, hx).
// hx is h, or a pair (h, c).
PyObject* InferStack(Reader& arguments) {
  Shape shape{};
  shape.cell = arguments.Text();
  const Borrowed x = arguments.Present();
  const Hidden hx = arguments.HiddenState();
  References flat;
  arguments.Named(flat);
  shape.layers = arguments.Integer();
  shape.directions = arguments.Integer();
  shape.present = arguments.Integer();
  const bool batch_first = arguments.Flag();
  const Words packed = Words::Of(arguments.Tensor());
  arguments.End();
  return RunStack(shape, batch_first, x, hx, flat, packed);
}

// (cell, dh, dc, bits and tensors as autograd got them, of which inputs of record_step a gradient is
// wanted) -> the gradients of its inputs
PyObject* StepBackward(Reader& arguments) {
  const char* cell = arguments.Text();
  const MaybeBorrowed dh = arguments.Tensor(), dc = arguments.Tensor();
  const int64_t bits = arguments.Integer();
  PyObject *tensors = arguments.Object(), *wanted = arguments.Object();
  arguments.End();
  const Py_ssize_t n = PyTuple_Size(wanted), count = n - 2;  // beside the cell and what was found
  if (count < 3) throw Unsupported();
  std::vector<MaybeBorrowed> kept(kStepResults + size_t(count));
  std::vector<Py_ssize_t> places = {0, 1, 2};  // of x, h and c, and of the inputs that are there
  Py_ssize_t at = 0;
  for (size_t i = 0; i < kept.size(); i++) {
    if (!(bits >> i & 1)) continue;
    PyObject* object = PyTuple_GetItem(tensors, at++);
    if (object == nullptr) throw Unsupported();
    kept[i] = Borrowed(object, true);  // some cells save nothing
    if (i >= kStepResults + 3) places.push_back(Py_ssize_t(i - kStepResults));
  }
  const MaybeBorrowed &h_n = kept[0], &hs = kept[1], &saved = kept[2];
  const Step step(cell, {kept.begin() + kStepResults, kept.end()});
  DirectCall call = step.in.ToCall();
  if (hs.has_value())
    call.TakeForward({}, *hs, saved.value());
  else
    call.TakeStep(step.Layered(h_n), saved);
  Gradients gradients =
      RunBackward(step.in, call, {}, step.Layered(dh), step.Layered(dc),
                  [&](int i) { return PyTuple_GetItem(wanted, 1 + places[size_t(i)]) == Py_True; });
  for (int i = 0; i < 3; i++) step.Squeeze(gradients[size_t(i)]);
  size_t given = 0;
  return MakeTuple(size_t(n), [&](size_t i) {
    if (given < places.size() && Py_ssize_t(i) == 1 + places[given])
      return ToPythonOrNone(gradients[given++]);
    return Owned::Another(Py_None);
  });
}

// (cell, x, hx, parameters, names, packed weights) -> hx
PyObject* OneStep(Reader& arguments) {
  PyObject *cell = arguments.Object(), *x = arguments.Object(), *hx = arguments.Object();
  References named;
  arguments.Named(named);
  const Words packed = Words::Of(arguments.Tensor());
  arguments.End();
  return RunStep(cell, x, hx, named, packed, WantsGrad(named, x, hx));
}

// ---- modules ----

// What a module has packed: (address, words), or None.
Words PackedBy(PyObject* frozen) {
  const Owned found(PyObject_GetAttr(frozen, names().words));
  if (found.object == nullptr || Py_TYPE(found.object) != &PyTuple_Type) throw Unsupported();
  const int64_t address = IntegerOf(PyTuple_GetItem(found.object, 0));
  return {reinterpret_cast<const void*>(address), IntegerOf(PyTuple_GetItem(found.object, 1))};
}

// (module, the arguments of its call, those by name, cell, the names of the weights of a step, or None)
// -> what the call returns. Without names it is that of a stack of layers.
PyObject* CallModule(Reader& arguments) {
  PyObject *module = arguments.Object(), *inputs = arguments.Object();
  PyObject *named = arguments.Object(), *cell = arguments.Object();
  PyObject* step_names = arguments.Object();
  arguments.End();
  const Py_ssize_t given = PyTuple_Size(inputs), given_by_name = PyDict_Size(named);
  PyObject* hx = given == 2                         ? PyTuple_GetItem(inputs, 1)
                 : given == 1 && given_by_name == 1 ? PyDict_GetItemWithError(named, names().hx)
                 : given == 1                       ? Py_None
                                                    : nullptr;
  if (hx == nullptr || given + given_by_name > 2) return nullptr;
  PyObject* input = PyTuple_GetItem(inputs, 0);
  if (reinterpret_cast<PyObject*>(Py_TYPE(input)) != tensor_type) return nullptr;

  const Attributes own(module);
  const bool one_step = step_names != Py_None;
  References weights;
  weights.AddNamed(own.Get(names().parameters),
                   one_step ? step_names : own.Get(names().weight_names));
  const bool wants_grad = WantsGrad(weights, input, hx);
  PyObject* const frozen = own.Find(names().frozen);
  if (wants_grad && (!one_step || frozen != nullptr)) return nullptr;
  if (!IsPlain(module, own) || IsWatched() || !IsUsual(module, own)) return nullptr;
  // Kept: another thread may put another one there.
  const Owned kept(frozen == nullptr ? nullptr : Owned::Another(frozen));
  const Words packed = frozen == nullptr ? Words() : PackedBy(frozen);
  if (one_step) return RunStep(cell, input, hx, weights, packed, wants_grad);

  if (FlagOf(own.Get(names().training)) && FlagOf(own.Get(names().dropout))) return nullptr;
  Shape shape{TextOf(cell), IntegerOf(own.Get(names().num_layers)),
              FlagOf(own.Get(names().bidirectional)) ? 2 : 1, 0};
  const CellFacts* facts = FindAny<Cpu>(shape.cell);
  if (facts == nullptr) return nullptr;
  shape.present = facts->Present(FlagOf(own.Get(names().bias)), FlagOf(own.Get(names().proj_size)));
  return RunStack(shape, FlagOf(own.Get(names().batch_first)), Borrowed(input), HiddenState(hx),
                  weights, packed);
}

// What torch has to offer -> True, or None where this torch offers something else.
PyObject* Setup(Reader& arguments) {
  const auto* found = static_cast<const dlpack::Exchange*>(
      PyCapsule_GetPointer(arguments.Object(), "dlpack_exchange_api"));
  if (found == nullptr || found->version.major != 1 || found->from_python == nullptr ||
      found->to_python == nullptr || !TorchTells())
    return nullptr;
  for (PyObject** field : {&tensor_type, &parameter_type, &record_step, &module_type, &module_call,
                           &module_call_impl, &global_hooks, &forward_mode})
    *field = Owned::Another(arguments.Object());
  autograd_key = c10::DispatchKey(arguments.Integer());
  const auto load = reinterpret_cast<Load>(arguments.Integer());
  const auto bytes = Py_ssize_t(arguments.Integer());
  PyObject *tensor = arguments.Object(), *parameter = arguments.Object();
  if (load == nullptr) return nullptr;
  tensor_offset = FindTensor(load, tensor, bytes);
  if (tensor_offset < 0 || FindTensor(load, parameter, bytes) != tensor_offset) return nullptr;
  arguments.End();
  exchange = found;
  return Owned::Another(Py_True);
}

PyCFunction AsMethod(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

}  // namespace
}  // namespace frnn::direct

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__direct() {
  using namespace frnn::direct;
  static PyMethodDef methods[] = {
      {"setup", AsMethod(Guarded<Setup>), METH_FASTCALL, nullptr},
      {"call_module", AsMethod(Guarded<CallModule>), METH_FASTCALL, nullptr},
      {"forward", AsMethod(Guarded<Unwatched<Forward>>), METH_FASTCALL, nullptr},
      {"backward", AsMethod(Guarded<Unwatched<Backward>>), METH_FASTCALL, nullptr},
      {"infer_stack", AsMethod(Guarded<Unwatched<InferStack>>), METH_FASTCALL, nullptr},
      {"step", AsMethod(Guarded<Unwatched<OneStep>>), METH_FASTCALL, nullptr},
      {"step_backward", AsMethod(Guarded<Unwatched<StepBackward>>), METH_FASTCALL, nullptr},
      {nullptr, nullptr, 0, nullptr},
  };
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_direct", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

#endif
