// Tensors of Python: one that is lent for a call, and one that is made there.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <numeric>

#include "core/scratch.h"
#include "ops/direct/torch.h"
#include "ops/packed.h"
#include "ops/tensor.h"

namespace frnn::direct {

// Whether the numbers of a tensor are to be negated, as in z.conj().imag, of which DLPack does not
// tell. Tensor.is_neg() takes longer than the rest of a look at a tensor: it lets go of Python's lock.
inline bool IsNegative(PyObject* tensor) {
  return at::native::is_neg(*reinterpret_cast<const at::Tensor*>(TensorIn(tensor)));
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
    object_ = object;
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
  PyObject* object() const { return object_; }
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
    return aoti_torch_get_storage_offset(TensorIn(object_), &offset) == 0 &&
           offset * BytesOf(dtype_) != address;
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

  PyObject* object_ = nullptr;
  char* data_;
  ScalarType dtype_;
  int dims_;
  int64_t shape_[kMaxDims], strides_[kMaxDims];
};
using MaybeBorrowed = std::optional<Borrowed>;

inline Borrowed ContiguousCopy(const Borrowed&) { throw Unsupported(); }
inline void CheckMemory(const char*, const Borrowed&) {}  // which every Borrowed has
inline int64_t VersionOf(const Borrowed& t) { return VersionOfTorchs(TensorIn(t.object())); }

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

inline MaybeBorrowed BorrowedOrNone(PyObject* object) {
  return object == Py_None ? MaybeBorrowed() : Borrowed(object);
}

inline PyObject* ToPythonOrNone(std::optional<NewTensor>& t) {
  return t.has_value() ? t->ToPython() : Owned::Another(Py_None);
}
inline void* DataOf(const std::optional<NewTensor>& t) {
  return t.has_value() ? t->data() : nullptr;
}
inline PyObject* ToTuple(std::initializer_list<std::optional<NewTensor>*> tensors) {
  return MakeTuple(tensors.size(), [&](size_t i) { return ToPythonOrNone(*tensors.begin()[i]); });
}

}  // namespace frnn::direct
