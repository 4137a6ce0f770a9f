// What several modules of tests bind alike.
#pragma once
#include <pybind11/pybind11.h>

#include "core/params.h"

namespace frnn {

// Of one module alone: another in the process has its own.
inline void BindStorage(pybind11::module_& m) {
  pybind11::enum_<Storage>(m, "Storage", pybind11::module_local())
      .value("float32", Storage::kFloat)
      .value("float64", Storage::kDouble)
      .value("bfloat16", Storage::kBFloat16)
      .value("float16", Storage::kHalf);
}

}  // namespace frnn
