// One step of a cell.
#pragma once
#include <algorithm>
#include <vector>

#include "ops/direct/run.h"

namespace frnn::direct {

// What a step reads: x, h, c, and the tensors of its cell in their order, each of which may be missing.
// x and the states are [B, features], or [features] alone.
struct Step {
  Step(const char* cell, const std::vector<MaybeBorrowed>& inputs)
      : added(inputs[0].has_value() ? 3 - int(inputs[0]->dim()) : 0), in{{cell, 1, 1, 0},
                                                                         Layered(inputs[0]).value(),
                                                                         Layered(inputs[1]),
                                                                         Layered(inputs[2]),
                                                                         {},
                                                                         {},
                                                                         {}} {
    for (size_t i = 3; i < inputs.size(); i++)
      if (inputs[i].has_value()) {
        in.weights.push_back(*inputs[i]);
        in.shape.present |= int64_t(1) << (i - 3);
      }
  }
  // With the dimensions that a layer has beside those of a step, which come back out of NewTensor.
  MaybeBorrowed Layered(MaybeBorrowed t) const {
    if (added != 1 && added != 2) throw Unsupported();
    for (int i = 0; i < added && t.has_value(); i++) t = t->Unsqueezed();
    return t;
  }
  void Squeeze(std::optional<NewTensor>& t) const {
    for (int i = 0; i < added && t.has_value(); i++) t->Squeeze();
  }

  const int added;
  Inputs in;
};

// What the backward of a step reads: h_n, hs and saved, then the inputs. Each may be missing.
constexpr size_t kStepResults = 3;

// To hx, which is differentiable if that is `wanted`. Autograd then takes what the backward reads:
// (cell, the inputs, (hx, what there is to read as bits, and as tensors)) -> hx.
inline PyObject* RunStep(PyObject* cell, PyObject* x, PyObject* hx, const References& weights,
                         const Words& packed, bool wanted) {
  const bool pair = Py_TYPE(hx) == &PyTuple_Type;
  if (pair && PyTuple_Size(hx) != 2) throw Unsupported();
  std::vector<PyObject*> inputs = {x, pair ? PyTuple_GetItem(hx, 0) : hx,
                                   pair ? PyTuple_GetItem(hx, 1) : Py_None};
  if (pair && (inputs[1] == Py_None || inputs[2] == Py_None)) throw Unsupported();
  inputs.insert(inputs.end(), weights.objects().begin(), weights.objects().end());
  std::vector<MaybeBorrowed> tensors;
  tensors.reserve(inputs.size());
  for (PyObject* input : inputs) tensors.push_back(BorrowedOrNone(input));
  Step step(TextOf(cell), tensors);
  step.in.packed = packed;
  Outputs out = Run(step.in, {false, wanted});
  if (hx != Py_None && pair != out.c_n.has_value()) throw Unsupported();
  step.Squeeze(out.h_n);
  step.Squeeze(out.c_n);
  if (!wanted) return out.HiddenState();

  const Owned states(out.HiddenState()), hs(ToPythonOrNone(out.hs)),
      saved(ToPythonOrNone(out.saved));
  PyObject* const h_n = out.c_n.has_value() ? PyTuple_GetItem(states.object, 0) : states.object;
  std::vector<PyObject*> kept = {out.keeps_h_n ? h_n : Py_None, hs.object, saved.object};
  kept.insert(kept.end(), inputs.begin(), inputs.end());
  int64_t bits = 0;
  for (size_t i = 0; i < kept.size(); i++) bits |= int64_t(kept[i] != Py_None) << i;
  kept.erase(std::remove(kept.begin(), kept.end(), Py_None), kept.end());
  const Owned found(MakeTuple(3, [&](size_t i) {
    if (i == 0) return Owned::Another(states.object);
    if (i == 1) return PyLong_FromLongLong(bits);
    return MakeTuple(kept.size(), [&](size_t j) { return Owned::Another(kept[j]); });
  }));
  const Owned call(MakeTuple(inputs.size() + 2, [&](size_t i) {
    return Owned::Another(i == 0 ? cell : i <= inputs.size() ? inputs[i - 1] : found.object);
  }));
  PyObject* result = PyObject_CallObject(record_step, call.object);
  if (result == nullptr) throw Raised();
  return result;
}

}  // namespace frnn::direct
