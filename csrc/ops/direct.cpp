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
#pragma weak PyErr_Clear
#pragma weak PyErr_Occurred
#pragma weak PyEval_RestoreThread
#pragma weak PyEval_SaveThread
#pragma weak PyLong_AsLongLong
#pragma weak PyModule_Create2
#pragma weak PyObject_CallFunctionObjArgs
#pragma weak PyTuple_New
#pragma weak PyTuple_SetItem
#pragma weak PyUnicode_AsUTF8AndSize
#pragma weak Py_DecRef
#pragma weak Py_IncRef
#pragma weak _Py_FalseStruct
#pragma weak _Py_NoneStruct
#pragma weak _Py_TrueStruct
// clang-format on

namespace frnn {
namespace {

struct Unusual {};  // thrown where the operator has to take over

// Set once, by Setup.
const dlpack::Exchange* exchange = nullptr;
PyObject *tensor_type, *parameter_type;
PyObject* is_negative;  // torch.Tensor.is_neg

// A tensor argument, with as much of torch's Tensor as Call needs. It owns nothing.
class Borrowed {
 public:
  explicit Borrowed(PyObject* object) {
    // A subclass may be anything, such as a tensor without data.
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (type != tensor_type && type != parameter_type) throw Unusual();
    dlpack::Tensor t;
    if (exchange->from_python(object, &t) != 0) throw Unusual();
    if (t.device.type != dlpack::kCpu || t.data == nullptr || t.dims < 1 || t.dims > kMaxDims)
      throw Unusual();
    data_ = static_cast<char*>(t.data) + t.byte_offset;
    dtype_ = TypeOf(t.dtype);
    dims_ = t.dims;
    for (int i = 0; i < dims_; i++) {
      if (t.shape[i] == 0) throw Unusual();
      shape_[i] = t.shape[i];
      strides_[i] = t.strides[i];
    }
    // DLPack does not say that the numbers are to be negated, as in z.conj().imag.
    PyObject* negative = PyObject_CallFunctionObjArgs(is_negative, object, nullptr);
    const bool plain = negative == Py_False;
    Py_DecRef(negative);
    if (!plain) throw Unusual();
  }
  // Contiguous, of the type of `like`.
  Borrowed(void* data, const Borrowed& like, std::initializer_list<int64_t> shape)
      : data_(data), dtype_(like.dtype_), dims_(int(shape.size())) {
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
    if (++t.dims_ > kMaxDims) throw Unusual();
    std::copy(shape_, shape_ + dims_, t.shape_ + 1);
    std::copy(strides_, strides_ + dims_, t.strides_ + 1);
    t.shape_[0] = 1;
    t.strides_[0] = shape_[0] * strides_[0];
    return t;
  }

 private:
  static constexpr int kMaxDims = 4;

  static ScalarType TypeOf(dlpack::DataType t) {
    if (t.lanes != 1) throw Unusual();
    if (t.kind == dlpack::kFloat && t.bits == 32) return ScalarType::Float;
    if (t.kind == dlpack::kFloat && t.bits == 64) return ScalarType::Double;
    if (t.kind == dlpack::kFloat && t.bits == 16) return ScalarType::Half;
    if (t.kind == dlpack::kBfloat && t.bits == 16) return ScalarType::BFloat16;
    if (t.kind == dlpack::kInt && t.bits == 64) return ScalarType::Long;
    throw Unusual();
  }

  void* data_;
  ScalarType dtype_;
  int dims_;
  int64_t shape_[kMaxDims], strides_[kMaxDims];
};
using MaybeBorrowed = std::optional<Borrowed>;

Borrowed ContiguousCopy(const Borrowed&) { throw Unusual(); }

// A tensor that is made here, until Python has it. Its memory is the engine's own: as in
// Cpu::NewLarge the storage can not be resized, which nobody has reason to do to a result.
class Made {
 public:
  Made(const std::vector<int64_t>& shape, ScalarType dtype) : block_(new Block) {
    auto& t = block_->managed.tensor;
    t.device = {dlpack::kCpu, 0};
    t.dims = int32_t(shape.size());
    t.shape = block_->shape;
    t.strides = block_->strides;
    size_t bytes = 1;
    for (size_t i = shape.size(); i-- > 0; bytes *= shape[i]) {
      t.shape[i] = shape[i];
      t.strides[i] = int64_t(bytes);
    }
    const uint8_t size = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
    const uint8_t kind = dtype == ScalarType::BFloat16 ? dlpack::kBfloat : dlpack::kFloat;
    t.dtype = {kind, uint8_t(8 * size), 1};
    bytes *= size;
    if (bytes >= size_t(kPooledBytes))
      t.data = AcquireScratch(bytes, &block_->pooled);
    else if (posix_memalign(&t.data, 64, bytes) != 0)
      throw std::bad_alloc();
  }
  void* data() const { return block_->managed.tensor.data; }
  size_t bytes() const {
    const auto& t = block_->managed.tensor;
    return std::accumulate(t.shape, t.shape + t.dims, size_t(t.dtype.bits / 8),
                           std::multiplies<>());
  }
  // Drops the leading dimension, of size 1.
  void Squeeze() {
    auto& t = block_->managed.tensor;
    t.dims--, t.shape++, t.strides++;
  }
  PyObject* ToPython() {
    void* object = nullptr;
    if (exchange->to_python(&block_.release()->managed, &object) != 0) throw Unusual();
    return static_cast<PyObject*>(object);
  }

 private:
  struct Block {
    dlpack::Managed managed = {{1, 0}, this, Free, 0, {}};
    int64_t shape[4], strides[4];
    size_t pooled = 0;  // bytes, if it is the pool's

    ~Block() {
      void* data = managed.tensor.data;
      if (pooled > 0)
        ReleaseScratch(data, pooled);
      else
        std::free(data);
    }
    static void Free(dlpack::Managed* m) { delete static_cast<Block*>(m->context); }
  };
  std::unique_ptr<Block> block_;
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

// Arguments in the order of the schemas.
class Reader {
 public:
  Reader(PyObject* const* arguments, Py_ssize_t n) : next_(arguments), end_(arguments + n) {}
  const char* Text() {
    const char* text = PyUnicode_AsUTF8AndSize(Next(), nullptr);
    if (text == nullptr) throw Unusual();
    return text;
  }
  MaybeBorrowed Tensor() {
    PyObject* object = Next();
    return object == Py_None ? MaybeBorrowed() : Borrowed(object);
  }
  Borrowed Present() {
    const MaybeBorrowed t = Tensor();
    if (!t.has_value()) throw Unusual();
    return *t;
  }
  std::array<MaybeBorrowed, 2 * kWeights> Weights() {
    std::array<MaybeBorrowed, 2 * kWeights> weights;
    for (auto& w : weights) w = Tensor();
    return weights;
  }
  int64_t Integer() {
    const int64_t value = PyLong_AsLongLong(Next());
    if (value == -1 && PyErr_Occurred()) throw Unusual();
    return value;
  }
  void End() const {
    if (next_ != end_) throw Unusual();
  }

 private:
  PyObject* Next() {
    if (next_ == end_) throw Unusual();
    return *next_++;
  }
  PyObject *const *next_, *const *end_;
};

// A tuple of these; null where there is None.
PyObject* ToTuple(std::initializer_list<Made*> tensors) {
  PyObject* tuple = PyTuple_New(Py_ssize_t(tensors.size()));
  if (tuple == nullptr) throw Unusual();
  Py_ssize_t i = 0;
  try {
    for (Made* t : tensors) {
      PyObject* item = t ? t->ToPython() : Py_None;
      if (t == nullptr) Py_IncRef(item);
      PyTuple_SetItem(tuple, i++, item);
    }
  } catch (...) {
    Py_DecRef(tuple);
    throw;
  }
  return tuple;
}

// The boundary to Python, which no exception may cross: None stands for all of them.
template <PyObject* (*function)(Reader&)>
PyObject* Guarded(PyObject*, PyObject* const* arguments, Py_ssize_t n) {
  try {
    Reader reader(arguments, n);
    return function(reader);
  } catch (...) {
    PyErr_Clear();
    Py_IncRef(Py_None);
    return Py_None;
  }
}

using DirectCall = Call<Cpu, Borrowed>;
using Weights = std::array<MaybeBorrowed, 2 * kWeights>;

std::optional<Made> NewC(const DirectCall& call, ScalarType dtype) {
  if (call.kernels.extra_states == 0) return std::nullopt;
  return Made(call.CShape(), dtype);
}
Made* OrNull(std::optional<Made>& t) { return t.has_value() ? &*t : nullptr; }
void* DataOrNull(std::optional<Made>& t) { return t.has_value() ? t->data() : nullptr; }

// States of zeros, in the memory returned. The sizes are found before Call checks them.
Made Zeros(const char* cell, const Borrowed& x, const Weights& weights,
           const MaybeBorrowed& batch_sizes, MaybeBorrowed* h0, MaybeBorrowed* c0) {
  const CpuKernels* kernels = Cpu::Find(cell, StorageOf(x, "x"));
  const MaybeBorrowed &w_hh = weights[1], &w_hr = weights[4];
  if (kernels == nullptr || !w_hh.has_value() || w_hh->dim() != 2) throw Unusual();
  int64_t B = x.size(x.dim() - 2);
  if (batch_sizes.has_value()) {
    if (batch_sizes->scalar_type() != ScalarType::Long) throw Unusual();
    const int64_t rows = B;
    B = *static_cast<const int64_t*>(batch_sizes->const_data_ptr());
    if (B <= 0 || B > rows) throw Unusual();
  }
  const int64_t dirs = weights[kWeights].has_value() ? 2 : 1, Hout = w_hh->size(1);
  const int64_t H = w_hr.has_value() ? w_hr->size(-1) : Hout;
  Made zeros({dirs, B, std::max(H, Hout)}, x.scalar_type());
  std::memset(zeros.data(), 0, zeros.bytes());
  *h0 = Borrowed(zeros.data(), x, {dirs, B, Hout});
  if (kernels->extra_states > 0) *c0 = Borrowed(zeros.data(), x, {dirs, B, H});
  return zeros;
}

// (cell, x, h0, c0, ten weights, batch_sizes) -> (y, h_n, c_n or None).
// As a step of a cell, with x [B, I], h0 [B, H] and c0 [B, H], it returns (h, c or None).
// States that are None are zero.
PyObject* LayerInfer(Reader& arguments) {
  const char* cell = arguments.Text();
  Borrowed x = arguments.Present();
  MaybeBorrowed h0 = arguments.Tensor(), c0 = arguments.Tensor();
  const auto weights = arguments.Weights();
  const MaybeBorrowed batch_sizes = arguments.Tensor();
  arguments.End();

  const bool step = x.dim() == 2 && !batch_sizes.has_value();
  if (step) {
    x = x.Unsqueezed();
    if (h0.has_value()) h0 = h0->Unsqueezed();
    if (c0.has_value()) c0 = c0->Unsqueezed();
  }
  std::optional<Made> zeros;
  if (!h0.has_value() && !c0.has_value()) zeros = Zeros(cell, x, weights, batch_sizes, &h0, &c0);
  if (!h0.has_value()) throw Unusual();

  DirectCall call(cell, x, *h0, c0, weights, batch_sizes);
  std::optional<Made> y;
  if (!step) y.emplace(call.YShape(), x.scalar_type());
  Made h_n(call.HShape(), x.scalar_type());
  std::optional<Made> c_n = NewC(call, x.scalar_type());
  call.p.y = step ? h_n.data() : y->data();  // in one step of one direction they are the same
  call.p.h_n = h_n.data();
  call.p.c_n = DataOrNull(c_n);
  {
    const WithoutGil released;
    call.kernels.layer_fwd(call.p);
  }
  if (!step) return ToTuple({&*y, &h_n, OrNull(c_n)});
  h_n.Squeeze();
  if (c_n.has_value()) c_n->Squeeze();
  return ToTuple({&h_n, OrNull(c_n)});
}

// (exchange, Tensor, Parameter, Tensor.is_neg) -> True, or None where this torch's is another.
PyObject* Setup(PyObject*, PyObject* const* arguments, Py_ssize_t n) {
  if (n == 4) {
    const auto* found = static_cast<const dlpack::Exchange*>(
        PyCapsule_GetPointer(arguments[0], "dlpack_exchange_api"));
    if (found != nullptr && found->version.major == 1 && found->from_python && found->to_python) {
      for (int i = 1; i < n; i++) Py_IncRef(arguments[i]);
      tensor_type = arguments[1];
      parameter_type = arguments[2];
      is_negative = arguments[3];
      exchange = found;
    }
  }
  PyErr_Clear();
  PyObject* result = exchange != nullptr ? Py_True : Py_None;
  Py_IncRef(result);
  return result;
}

PyCFunction AsMethod(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

}  // namespace
}  // namespace frnn

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__direct() {
  using namespace frnn;
  static PyMethodDef methods[] = {
      {"setup", AsMethod(Setup), METH_FASTCALL, nullptr},
      {"layer_infer", AsMethod(Guarded<LayerInfer>), METH_FASTCALL, nullptr},
      {nullptr, nullptr, 0, nullptr},
  };
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_direct", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

#endif
