// The operators of binding.h once more, on the CPU, as functions that Python calls without torch's
// dispatcher: that takes longer than the kernel of a small step. This library is a Python module
// too (PyInit__direct), which fused_rnn/ops.py loads and calls.
//
// A function here takes what is usual and returns None for everything else: other types, devices
// and layouts, shapes that do not fit, a lack of memory. The caller then goes through the operator,
// which copes, or says what is wrong.
//
// It is missing, and all goes through the operators, where Python.h was not found.
#if defined(__ELF__) && __has_include(<Python.h>)
// Of the functions that every Python from 3.10 on has, so that one library serves all of them.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <numeric>

#include "ops/cpu.h"
#include "ops/dlpack.h"

// Python itself has these. Weak, so that the linker still refuses a symbol of ours that is missing.
// clang-format off
#pragma weak PyCapsule_GetPointer
#pragma weak PyDict_GetItemWithError
#pragma weak PyDict_Size
#pragma weak PyErr_Clear
#pragma weak PyErr_Occurred
#pragma weak PyEval_RestoreThread
#pragma weak PyEval_SaveThread
#pragma weak PyLong_AsLongLong
#pragma weak PyLong_FromLongLong
#pragma weak PyModule_Create2
#pragma weak PyObject_CallNoArgs
#pragma weak PyObject_CallObject
#pragma weak PyList_GetItem
#pragma weak PyList_Size
#pragma weak PyObject_GenericGetDict
#pragma weak PyObject_GetAttr
#pragma weak PyObject_IsTrue
#pragma weak PyTuple_GetItem
#pragma weak PyTuple_New
#pragma weak PyTuple_SetItem
#pragma weak PyTuple_Size
#pragma weak PyTuple_Type
#pragma weak PyUnicode_AsUTF8AndSize
#pragma weak PyUnicode_InternFromString
#pragma weak Py_DecRef
#pragma weak Py_IncRef
#pragma weak _Py_FalseStruct
#pragma weak _Py_NoneStruct
#pragma weak _Py_TrueStruct
// clang-format on

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

namespace frnn {
namespace {

struct Unsupported {};  // thrown where the operator has to take over
struct Raised {};       // thrown where Python's error is for the caller

// Set once, by Setup.
const dlpack::Exchange* exchange = nullptr;
PyObject *tensor_type, *parameter_type;
AtenTensorHandle seen, nothing;  // the tensor that is looked at, see IsNegative; an undefined one
// How every extension of torch gets from a tensor of Python to that of C++: a member function of
// pybind11::detail::type_caster<at::Tensor>, whose one member is the tensor.
bool (*look_at)(AtenTensorHandle caster, PyObject* tensor, bool convert);
c10::DispatchKey autograd_key;
PyObject *module_type, *module_call, *module_call_impl;  // torch.nn.Module, and what it came with
PyObject* global_hooks;                                  // those of all modules: a tuple of dicts
PyObject* forward_mode;                                  // the dict of torch.autograd.forward_ad
PyObject* record_step;                                   // ops.py: makes a step differentiable

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
  PyObject* const is_usual = Interned("_is_usual");
  PyObject* const hooks[4] = {Interned("_forward_hooks"), Interned("_forward_pre_hooks"),
                              Interned("_backward_hooks"), Interned("_backward_pre_hooks")};
  PyObject* const requires_grad = Interned("requires_grad");
  PyObject* const current_level = Interned("_current_level");
};
const Names& names() {
  static const Names found;
  return found;
}

// An object of Python that is ours, or null.
struct Owned {
  explicit Owned(PyObject* object) : object(object) {}
  ~Owned() { Py_DecRef(object); }
  Owned(const Owned&) = delete;
  static PyObject* Another(PyObject* object) {
    Py_IncRef(object);
    return object;
  }
  PyObject* const object;
};

bool Has(PyObject* object, PyObject* name, PyObject* value) {
  const Owned found(PyObject_GetAttr(object, name));
  return found.object == value;
}

// Whether the numbers of a tensor are to be negated, as in z.conj().imag, of which DLPack does not
// tell. Tensor.is_neg() takes longer than the rest of a look at a tensor: it lets go of Python's lock.
// `seen` holds the tensor until LookAway.
bool IsNegative(PyObject* tensor) {
  return !look_at(seen, tensor, false) ||
         at::native::is_neg(*reinterpret_cast<const at::Tensor*>(seen));
}
void LookAway() {
  if (seen != nullptr) aoti_torch_assign_tensors(nothing, seen);
}

// A tensor argument, with as much of torch's Tensor as Call needs. It owns nothing.
class Borrowed {
 public:
  explicit Borrowed(PyObject* object, bool may_be_empty = false) {
    // A subclass may be anything, such as a tensor without data.
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (type != tensor_type && type != parameter_type) throw Unsupported();
    dlpack::Tensor t;
    if (exchange->from_python(object, &t) != 0) throw Unsupported();
    if (t.device.type != dlpack::kCpu || t.dims < 1 || t.dims > kMaxDims) throw Unsupported();
    if (IsNegative(object)) throw Unsupported();
    data_ = static_cast<char*>(t.data) + t.byte_offset;
    dtype_ = TypeOf(t.dtype);
    dims_ = t.dims;
    std::copy(t.shape, t.shape + dims_, shape_);
    std::copy(t.strides, t.strides + dims_, strides_);
    if (numel() == 0 ? !may_be_empty : !HasMemory()) throw Unsupported();
  }
  // Contiguous.
  Borrowed(void* data, ScalarType dtype, const Dims& shape)
      : data_(static_cast<char*>(data)), dtype_(dtype), dims_(int(shape.size())) {
    std::copy(shape.begin(), shape.end(), shape_);
    int64_t stride = 1;
    for (int i = dims_; i-- > 0; stride *= shape_[i]) strides_[i] = stride;
  }

  int64_t dim() const { return dims_; }
  int64_t size(int64_t i) const { return shape_[i < 0 ? i + dims_ : i]; }
  int64_t stride(int64_t i) const { return strides_[i < 0 ? i + dims_ : i]; }
  torch::headeronly::IntHeaderOnlyArrayRef sizes() const { return {shape_, size_t(dims_)}; }
  ScalarType scalar_type() const { return dtype_; }
  bool is_cpu() const { return true; }
  bool is_contiguous() const {
    int64_t expected = 1;
    for (int i = dims_; i-- > 0; expected *= shape_[i])
      if (shape_[i] != 1 && strides_[i] != expected) return false;
    return true;
  }
  int64_t numel() const {
    return std::accumulate(shape_, shape_ + dims_, int64_t(1), std::multiplies<>());
  }
  const void* const_data_ptr() const { return data_; }
  void* data_ptr() const { return data_; }

  // The same tensor with a dimension of size 1 before the others.
  Borrowed Unsqueezed() const {
    Borrowed t = *this;
    if (++t.dims_ > kMaxDims) throw Unsupported();
    std::copy(shape_, shape_ + dims_, t.shape_ + 1);
    std::copy(strides_, strides_ + dims_, t.strides_ + 1);
    t.shape_[0] = 1;
    t.strides_[0] = shape_[0] * strides_[0];
    return t;
  }
  void SwapLeading() {
    std::swap(shape_[0], shape_[1]);
    std::swap(strides_[0], strides_[1]);
  }

 private:
  static constexpr int kMaxDims = 4;

  // A storage that was resized to nothing, as FSDP does to save memory, begins at null, and this tensor
  // at its offset from there.
  bool HasMemory() const {
    const auto address = int64_t(reinterpret_cast<uintptr_t>(data_));
    if (address >> 44 != 0) return true;  // offsets are not as large
    int64_t offset = 0;
    return aoti_torch_get_storage_offset(seen, &offset) == 0 && offset * BytesOf(dtype_) != address;
  }

  static ScalarType TypeOf(dlpack::DataType t) {
    if (t.lanes != 1) throw Unsupported();
    if (t.kind == dlpack::kFloat && t.bits == 32) return ScalarType::Float;
    if (t.kind == dlpack::kFloat && t.bits == 64) return ScalarType::Double;
    if (t.kind == dlpack::kFloat && t.bits == 16) return ScalarType::Half;
    if (t.kind == dlpack::kBfloat && t.bits == 16) return ScalarType::BFloat16;
    if (t.kind == dlpack::kInt && t.bits == 64) return ScalarType::Long;
    throw Unsupported();
  }

  char* data_;
  ScalarType dtype_;
  int dims_;
  int64_t shape_[kMaxDims], strides_[kMaxDims];
};
using MaybeBorrowed = std::optional<Borrowed>;

Borrowed ContiguousCopy(const Borrowed&) { throw Unsupported(); }
void CheckMemory(const char*, const Borrowed&) {}  // which every Borrowed has

// A tensor that is made here, until Python has it. Its memory is the engine's own: as in
// Cpu::NewLarge the storage can not be resized, which nobody has reason to do to a result.
class NewTensor {
 public:
  NewTensor(const Dims& shape, ScalarType dtype, bool pooled = true) {
    int64_t bytes = 0;
    if (!CountBytes(shape, dtype, bytes)) throw Unsupported();
    pooled = pooled && bytes >= kPooledBytes;
    // Small data lie behind the head, in the same allocation.
    void* memory = Allocate(sizeof(Head) + (pooled ? 0 : kDataAlign + bytes), alignof(Head));
    head_.reset(new (memory) Head);
    auto& t = head_->managed.tensor;
    t.device = {dlpack::kCpu, 0};
    t.dims = int32_t(shape.size());
    t.shape = head_->shape;
    t.strides = head_->strides;
    int64_t stride = 1;
    for (size_t i = shape.size(); i-- > 0; stride *= shape[i]) {
      t.shape[i] = shape[i];
      t.strides[i] = stride;
    }
    const uint8_t kind = dtype == ScalarType::BFloat16 ? dlpack::kBfloat : dlpack::kFloat;
    t.dtype = {kind, uint8_t(8 * BytesOf(dtype)), 1};
    if (pooled) {
      head_->block = Acquire(size_t(bytes), Use::kResult);
      t.data = head_->block.address;
    } else {
      char* end = reinterpret_cast<char*>(head_.get() + 1);
      t.data = end + (-reinterpret_cast<uintptr_t>(end) & (kDataAlign - 1));
    }
  }
  void* data() const { return head_->managed.tensor.data; }
  void SwapLeading() {
    std::swap(head_->shape[0], head_->shape[1]);
    std::swap(head_->strides[0], head_->strides[1]);
  }
  // Drops the leading dimension, of size 1.
  void Squeeze() {
    auto& t = head_->managed.tensor;
    t.dims--, t.shape++, t.strides++;
  }
  PyObject* ToPython() {
    void* object = nullptr;
    bool freed = false;
    Head* head = head_.release();
    head->freed = &freed;
    const bool failed = exchange->to_python(&head->managed, &object) != 0;
    // A call that fails has freed it or not, by how far it came.
    if (!freed) head->freed = nullptr;
    if (failed && !freed) head_.reset(head);
    if (failed) throw Unsupported();
    return static_cast<PyObject*>(object);
  }

 private:
  struct Head {
    dlpack::Managed managed = {{1, 0}, this, Free, 0, {}};
    int64_t shape[4], strides[4];
    Block block;            // of the data, if they are the pool's
    bool* freed = nullptr;  // who wants to know

    static void Free(dlpack::Managed* m) { Delete()(static_cast<Head*>(m->context)); }
  };
  struct Delete {
    void operator()(Head* head) const {
      if (head->freed != nullptr) *head->freed = true;
      if (head->block.address != nullptr) Release(head->block);
      std::free(head);
    }
  };
  static constexpr size_t kDataAlign = 64;
  std::unique_ptr<Head, Delete> head_;
};

// Other Python threads run while this lives.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

MaybeBorrowed BorrowedOrNone(PyObject* object) {
  return object == Py_None ? MaybeBorrowed() : Borrowed(object);
}

struct Hidden {
  MaybeBorrowed h, c;
};

// As users write hidden states: h, a pair (h, c), or None.
Hidden HiddenState(PyObject* object) {
  if (Py_TYPE(object) != &PyTuple_Type) return {BorrowedOrNone(object), {}};
  if (PyTuple_Size(object) != 2) throw Unsupported();
  return {Borrowed(PyTuple_GetItem(object, 0)), Borrowed(PyTuple_GetItem(object, 1))};
}

// Values of a dict. They are kept: another thread may put others there.
class References {
 public:
  References() = default;
  References(const References&) = delete;
  ~References() {
    for (PyObject* object : objects_) Py_DecRef(object);
  }
  void Reserve(Py_ssize_t n) { objects_.reserve(n); }
  void Add(PyObject* dict, PyObject* name) {
    PyObject* object = PyDict_GetItemWithError(dict, name);
    if (object == nullptr) throw Unsupported();
    Py_IncRef(object);
    objects_.push_back(object);
  }
  // All those that a list names.
  void AddNamed(PyObject* dict, PyObject* list) {
    const Py_ssize_t n = PyList_Size(list);
    if (n < 0) throw Unsupported();
    Reserve(n);
    for (Py_ssize_t i = 0; i < n; i++) Add(dict, PyList_GetItem(list, i));
  }
  const std::vector<PyObject*>& objects() const { return objects_; }
  int64_t size() const { return int64_t(objects_.size()); }
  MaybeBorrowed Tensor(int64_t i) const { return BorrowedOrNone(objects_[i]); }

 private:
  std::vector<PyObject*> objects_;
};

const char* TextOf(PyObject* object) {
  const char* text = PyUnicode_AsUTF8AndSize(object, nullptr);
  if (text == nullptr) throw Unsupported();
  return text;
}
bool FlagOf(PyObject* object) {
  const int value = PyObject_IsTrue(object);
  if (value < 0) throw Unsupported();
  return value == 1;
}
int64_t IntegerOf(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw Unsupported();
  return value;
}

// Arguments in the order of the schemas.
class Reader {
 public:
  Reader(PyObject* const* arguments, Py_ssize_t n) : next_(arguments), end_(arguments + n) {}
  PyObject* Object() { return Next(); }
  const char* Text() { return TextOf(Next()); }
  MaybeBorrowed Tensor() { return BorrowedOrNone(Next()); }
  Borrowed Present() {
    const MaybeBorrowed t = Tensor();
    if (!t.has_value()) throw Unsupported();
    return *t;
  }
  Borrowed MaybeEmpty() { return Borrowed(Next(), true); }
  Hidden HiddenState() { return frnn::HiddenState(Next()); }
  // A dict, and a list of those of its keys that are wanted.
  void Named(References& kept) {
    PyObject* dict = Next();
    kept.AddNamed(dict, Next());
  }
  bool Flag() { return FlagOf(Next()); }
  int64_t Integer() { return IntegerOf(Next()); }
  void End() const {
    if (next_ != end_) throw Unsupported();
  }

 private:
  PyObject* Next() {
    if (next_ == end_) throw Unsupported();
    return *next_++;
  }
  PyObject *const *next_, *const *end_;
};

// A tuple of n objects, which make(i) returns for it to own.
template <class F>
PyObject* MakeTuple(size_t n, const F& make) {
  PyObject* tuple = PyTuple_New(Py_ssize_t(n));
  if (tuple == nullptr) throw Unsupported();
  try {
    for (size_t i = 0; i < n; i++) PyTuple_SetItem(tuple, Py_ssize_t(i), make(i));
  } catch (...) {
    Py_DecRef(tuple);
    throw;
  }
  return tuple;
}
PyObject* ToPythonOrNone(std::optional<NewTensor>& t) {
  return t.has_value() ? t->ToPython() : Owned::Another(Py_None);
}
void* DataOf(const std::optional<NewTensor>& t) { return t.has_value() ? t->data() : nullptr; }
PyObject* ToTuple(std::initializer_list<std::optional<NewTensor>*> tensors) {
  return MakeTuple(tensors.size(), [&](size_t i) { return ToPythonOrNone(*tensors.begin()[i]); });
}

// Whether somebody counts on torch's dispatcher: the call is then the operator's. Modes, autocast,
// transforms, a tracer; whoever records the operators that run, in this thread or in all.
bool IsWatched() {
  if (c10::impl::TorchDispatchModeTLS::stack_len() != 0 ||
      at::impl::PythonTorchFunctionTLS::stack_len() != 0 ||
      at::autocast::is_autocast_enabled(c10::DeviceType::CPU) ||
      !at::functorch::getDynamicLayerStack().empty() || torch::jit::tracer::getTracingState() ||
      at::hasCallbacks())
    return true;
  PyObject* level = PyDict_GetItemWithError(forward_mode, names().current_level);
  return level == nullptr || PyLong_AsLongLong(level) >= 0;
}

// The boundary to Python, which no exception of C++ may cross: None stands for all but Raised, and for
// null.
template <PyObject* (*function)(Reader&)>
PyObject* Guarded(PyObject*, PyObject* const* arguments, Py_ssize_t n) {
  const struct AtEnd {
    ~AtEnd() { LookAway(); }
  } at_end;
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

using DirectCall = Call<Cpu, Borrowed>;

// What the schemas of the operators have in common. Dropout is the operators' alone.
struct Inputs {
  Shape shape;
  Borrowed x;
  MaybeBorrowed h0, c0, batch_sizes;
  std::vector<Borrowed> weights;

  // (cell, layers, directions, present, x, h0, c0, batch_sizes, weights)
  static Inputs Of(Reader& arguments) {
    Shape shape{};
    shape.cell = arguments.Text();
    shape.layers = arguments.Integer();
    shape.directions = arguments.Integer();
    shape.present = arguments.Integer();
    const Borrowed x = arguments.Present();
    const MaybeBorrowed h0 = arguments.Tensor(), c0 = arguments.Tensor();
    Inputs in{shape, x, h0, c0, arguments.Tensor(), {}};
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
bool IsBrief(const DirectCall& call) {
  const LayerGradParams& p = call.p;
  const int64_t width = std::max(p.I, call.stack.Width());
  return call.runs() * p.rows * p.H *
             (call.kernels.gates_x * width + call.kernels.gates_h * p.Hout) <
         1000000;
}

Outputs Run(const Inputs& in, Wanted wanted) {
  DirectCall call = in.ToCall();
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
Gradients RunBackward(const Inputs& in, DirectCall& call, const MaybeBorrowed& dy,
                      const MaybeBorrowed& dh_n, const MaybeBorrowed& dc_n, const Wants& wants) {
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

// (inputs, tape?) -> (y, h_n, c_n or None), and with a tape (.., between or None, hs, saved)
PyObject* Forward(Reader& arguments) {
  const Inputs in = Inputs::Of(arguments);
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

// Of tensors, tuples of them, and None.
bool WantsGrad(PyObject* object) {
  if (object == Py_None) return false;
  if (Py_TYPE(object) != &PyTuple_Type) return !Has(object, names().requires_grad, Py_False);
  for (Py_ssize_t i = 0, n = PyTuple_Size(object); i < n; i++)
    if (WantsGrad(PyTuple_GetItem(object, i))) return true;
  return false;
}
bool WantsGrad(const References& weights, PyObject* x, PyObject* hx) {
  // In the body of a custom_op autograd has had its turn.
  if (!aoti_torch_grad_mode_is_enabled() || c10::impl::tls_is_dispatch_key_excluded(autograd_key))
    return false;
  for (PyObject* weight : weights.objects())
    if (WantsGrad(weight)) return true;
  return WantsGrad(x) || WantsGrad(hx);
}

// ---- a stack of layers, without gradients and dropout, as modules call it ----

// Its weights are flat, in the order of their names: those of each layer and direction in turn.
PyObject* RunStack(const Shape& shape, bool batch_first, Borrowed x, const Hidden& hx,
                   const References& flat) {
  if (x.dim() != 3) throw Unsupported();
  if (batch_first) x.SwapLeading();
  Inputs in{shape, x, hx.h, hx.c, {}, {}};
  in.weights.reserve(size_t(flat.size()));
  for (PyObject* weight : flat.objects()) in.weights.emplace_back(weight);
  Outputs out = Run(in, {true, false});
  if (hx.h.has_value() && hx.c.has_value() != out.c_n.has_value()) throw Unsupported();
  if (batch_first) out.y->SwapLeading();
  return MakeTuple(2, [&](size_t i) { return i == 0 ? out.y->ToPython() : out.HiddenState(); });
}

// (cell, x, hx, parameters, names, layers, directions, present, batch_first) -> (y, hx). hx is h, or a
// pair (h, c).
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
  arguments.End();
  return RunStack(shape, batch_first, x, hx, flat);
}

// ---- one step of a cell ----

// What a step reads: x, h, c, and the tensors of its cell in their order, each of which may be missing.
// x and the states are [B, features], or [features] alone.
struct Step {
  Step(const char* cell, const std::vector<MaybeBorrowed>& inputs)
      : added(inputs[0].has_value() ? 3 - int(inputs[0]->dim()) : 0), in{{cell, 1, 1, 0},
                                                                         Layered(inputs[0]).value(),
                                                                         Layered(inputs[1]),
                                                                         Layered(inputs[2]),
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
PyObject* RunStep(PyObject* cell, PyObject* x, PyObject* hx, const References& weights,
                  bool wanted) {
  const bool pair = Py_TYPE(hx) == &PyTuple_Type;
  if (pair && PyTuple_Size(hx) != 2) throw Unsupported();
  std::vector<PyObject*> inputs = {x, pair ? PyTuple_GetItem(hx, 0) : hx,
                                   pair ? PyTuple_GetItem(hx, 1) : Py_None};
  if (pair && (inputs[1] == Py_None || inputs[2] == Py_None)) throw Unsupported();
  inputs.insert(inputs.end(), weights.objects().begin(), weights.objects().end());
  std::vector<MaybeBorrowed> tensors;
  tensors.reserve(inputs.size());
  for (PyObject* input : inputs) tensors.push_back(BorrowedOrNone(input));
  const Step step(TextOf(cell), tensors);
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

// (cell, x, hx, parameters, names) -> hx
PyObject* OneStep(Reader& arguments) {
  PyObject *cell = arguments.Object(), *x = arguments.Object(), *hx = arguments.Object();
  References named;
  arguments.Named(named);
  arguments.End();
  return RunStep(cell, x, hx, named, WantsGrad(named, x, hx));
}

// ---- calls of modules ----

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
bool IsPlain(PyObject* module, const Attributes& own) {
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
bool IsUsual(PyObject* module, const Attributes& own) {
  if (own.Find(names().verified) != nullptr) return true;
  const Owned ask(PyObject_GetAttr(module, names().is_usual));
  if (ask.object == nullptr) return false;
  return Owned(PyObject_CallNoArgs(ask.object)).object == Py_True;
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
  if (wants_grad && !one_step) return nullptr;
  if (!IsPlain(module, own) || IsWatched() || !IsUsual(module, own)) return nullptr;
  if (one_step) return RunStep(cell, input, hx, weights, wants_grad);

  if (FlagOf(own.Get(names().training)) && FlagOf(own.Get(names().dropout))) return nullptr;
  Shape shape{TextOf(cell), IntegerOf(own.Get(names().num_layers)),
              FlagOf(own.Get(names().bidirectional)) ? 2 : 1, 0};
  const CellFacts* facts = FindAny<Cpu>(shape.cell);
  if (facts == nullptr) return nullptr;
  shape.present = facts->Present(FlagOf(own.Get(names().bias)), FlagOf(own.Get(names().proj_size)));
  return RunStack(shape, FlagOf(own.Get(names().batch_first)), Borrowed(input), HiddenState(hx),
                  weights);
}

// Whether this torch has all that is declared at the head of this file.
bool TorchTells() {
  return c10::impl::TorchDispatchModeTLS::stack_len && c10::impl::tls_is_dispatch_key_excluded &&
         at::impl::PythonTorchFunctionTLS::stack_len && at::autocast::is_autocast_enabled &&
         at::functorch::getDynamicLayerStack && torch::jit::tracer::getTracingState &&
         at::hasCallbacks && at::native::is_neg;
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
  look_at = reinterpret_cast<decltype(look_at)>(arguments.Integer());
  if (look_at == nullptr) return nullptr;
  for (AtenTensorHandle* tensor : {&nothing, &seen})
    if (aoti_torch_new_uninitialized_tensor(tensor) != 0) return nullptr;
  autograd_key = c10::DispatchKey(arguments.Integer());
  arguments.End();
  exchange = found;
  return Owned::Another(Py_True);
}

PyCFunction AsMethod(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

}  // namespace
}  // namespace frnn

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__direct() {
  using namespace frnn;
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
