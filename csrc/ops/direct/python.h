// The functions of Python that direct calls use, and its objects as C++ likes them.
#pragma once
// Of the functions that every Python from 3.10 on has, so that one library serves all of them.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <cstdint>
#include <vector>

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

namespace frnn::direct {

struct Unsupported {};  // thrown where the operator has to take over
struct Raised {};       // thrown where Python's error is for the caller

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

inline bool Has(PyObject* object, PyObject* name, PyObject* value) {
  const Owned found(PyObject_GetAttr(object, name));
  return found.object == value;
}

inline const char* TextOf(PyObject* object) {
  const char* text = PyUnicode_AsUTF8AndSize(object, nullptr);
  if (text == nullptr) throw Unsupported();
  return text;
}
inline bool FlagOf(PyObject* object) {
  const int value = PyObject_IsTrue(object);
  if (value < 0) throw Unsupported();
  return value == 1;
}
inline int64_t IntegerOf(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw Unsupported();
  return value;
}

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
// Other Python threads run while this lives.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace frnn::direct
