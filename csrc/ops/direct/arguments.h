// The arguments of a direct call, read one after the other.
#pragma once
#include <vector>

#include "ops/direct/tensor.h"

namespace frnn::direct {

struct Hidden {
  MaybeBorrowed h, c;
};

// Packed weights.
struct Words {
  const void* data = nullptr;  // null: there are none
  int64_t count = 0;

  static Words Of(const MaybeBorrowed& t) {
    if (!t.has_value()) return {};
    if (t->scalar_type() != ScalarType::Long || !t->is_contiguous()) throw Unsupported();
    return {t->const_data_ptr(), t->numel()};
  }
};

// As users write hidden states: h, a pair (h, c), or None.
inline Hidden HiddenState(PyObject* object) {
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
  Hidden HiddenState() { return direct::HiddenState(Next()); }
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

}  // namespace frnn::direct
