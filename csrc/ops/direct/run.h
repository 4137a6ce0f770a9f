// A stack of layers forward and backward, with tensors of Python.
#pragma once
#include <algorithm>
#include <optional>
#include <vector>

#include "ops/cpu.h"
#include "ops/direct/arguments.h"

namespace frnn::direct {

using DirectCall = Call<Cpu, Borrowed>;

// What the schemas of the operators have in common. Dropout is the operators' alone.
struct Inputs {
  Shape shape;
  Borrowed x;
  MaybeBorrowed h0, c0, batch_sizes;
  std::vector<Borrowed> weights;
  Words packed = {};

  // (cell, layers, directions, present, x, h0, c0, batch_sizes, weights)
  static Inputs Of(Reader& arguments) {
    Shape shape{};
    shape.cell = arguments.Text();
    shape.layers = arguments.Integer();
    shape.directions = arguments.Integer();
    shape.present = arguments.Integer();
    const Borrowed x = arguments.Present();
    const MaybeBorrowed h0 = arguments.Tensor(), c0 = arguments.Tensor();
    Inputs in{shape, x, h0, c0, arguments.Tensor(), {}, {}};
    PyObject* weights = arguments.Object();
    const Py_ssize_t n = PyTuple_Size(weights);
    in.weights.reserve(size_t(std::max<Py_ssize_t>(n, 0)));
    for (Py_ssize_t i = 0; i < n; i++) in.weights.emplace_back(PyTuple_GetItem(weights, i));
    return in;
  }
  DirectCall ToCall() const {
    return {shape, x, h0, c0, weights.data(), weights.size(), batch_sizes};
  }
};

// Outputs of a stack of layers, before they are Python's.
struct Outputs {
  std::optional<NewTensor> y, h_n, c_n, between, hs, saved;
  bool keeps_h_n = false;  // for the backward

  // The states as a module returns them: h_n, or (h_n, c_n).
  PyObject* HiddenState() { return c_n.has_value() ? ToTuple({&h_n, &c_n}) : h_n->ToPython(); }
};
struct Wanted {
  bool y;     // false: of one step of one layer and direction, whose y is h_n
  bool tape;  // for the backward
};

// Whether it takes some microseconds, by the products that it needs.
inline bool IsBrief(const DirectCall& call) {
  const LayerGradParams& p = call.p;
  const int64_t width = std::max(p.I, call.stack.Width());
  return call.runs() * p.rows * p.H *
             (call.kernels.gates_x * width + call.kernels.gates_h * p.Hout) <
         1000000;
}

inline Outputs Run(const Inputs& in, Wanted wanted) {
  DirectCall call = in.ToCall();
  // A module packs anew what does not fit.
  if (in.packed.data && !call.TakePacked(in.packed.data, in.packed.count, in.weights.data()))
    throw Unsupported();
  LayerGradParams& p = call.p;
  Stack& stack = call.stack;
  const ScalarType dtype = in.x.scalar_type();
  Outputs out;
  out.h_n.emplace(call.HShape(), dtype);
  p.h_n = out.h_n->data();
  if (stack.extra_states > 0) {
    out.c_n.emplace(call.CShape(), dtype);
    p.c_n = out.c_n->data();
  }
  if (wanted.y) out.y.emplace(call.YShape(), dtype);
  p.y = wanted.y ? out.y->data() : p.h_n;
  stack.keeps_between = wanted.tape;
  if (stack.layers > 1) {
    out.between.emplace(call.BetweenShape(), dtype);
    stack.between = out.between->data();
  }
  if (wanted.tape) {
    const bool own_tape = !wanted.y && IsOwnTape(p);
    if (!own_tape) out.hs.emplace(call.HsShape(stack.layers), call.HsType());
    if (!own_tape || call.kernels.tape > 0)
      out.saved.emplace(call.SavedShape(stack.layers), call.computing());
    call.PutTape(DataOf(out.hs), DataOf(out.saved), true);
    out.keeps_h_n = own_tape && call.kernels.reads_new_h;
  }
  // Not for what is done sooner than the lock is passed on and got back.
  std::optional<WithoutGil> released;
  if (!IsBrief(call)) released.emplace();
  stack.Forward([&](const LayerParams& layer) { call.kernels.layer_fwd(layer); },
                [](void*, int) {});
  return out;
}

// The gradients of x, h0, c0 and the weights, as far as they are wanted.
using Gradients = std::vector<std::optional<NewTensor>>;
template <class Wants>
inline Gradients RunBackward(const Inputs& in, DirectCall& call, const MaybeBorrowed& dy,
                             const MaybeBorrowed& dh_n, const MaybeBorrowed& dc_n,
                             const Wants& wants) {
  Stack& stack = call.stack;
  call.TakeGradients(dy, dh_n, dc_n);
  if (call.SkipsRowsOf(in.x) || !stack.keeps_tape) throw Unsupported();
  const ScalarType dtype = in.x.scalar_type();
  Gradients gradients(3 + in.weights.size());
  for (size_t i = 0; i < gradients.size(); i++) {
    const MaybeBorrowed like = i == 0 ? in.x : i == 1 ? in.h0 : i == 2 ? in.c0 : in.weights[i - 3];
    if (!like.has_value() || !wants(int(i))) continue;
    const auto sizes = like->sizes();
    // As in the operator, the pool's memory is for what is gone soon.
    gradients[i].emplace(Dims(sizes.begin(), sizes.end()), dtype, i == 0);
    *call.GradientSlot(int64_t(i)) = gradients[i]->data();
  }
  std::optional<NewTensor> passed[2];
  for (int i = 0; i < std::min(2, stack.layers - 1); i++) {
    passed[i].emplace(call.YShape(), dtype);
    stack.grad_between[i] = passed[i]->data();
  }
  {
    const WithoutGil released;
    stack.Backward([](const LayerParams&) {},
                   [&](const LayerGradParams& layer) { call.kernels.layer_bwd(layer); },
                   [](void*, int) {});
  }
  return gradients;
}

}  // namespace frnn::direct
