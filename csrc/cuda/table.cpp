// The instances by name.
#include <cstring>

#include "core/added.h"
#include "core/params.h"

namespace frnn {
namespace {
AddedCells<CudaKernels> added;
}  // namespace

#define CELL(name, type, header)                                                  \
  extern const CudaKernels k_cuda_##name##_float, k_cuda_##name##_double,         \
      k_cuda_##name##_bfloat16, k_cuda_##name##_half;                             \
  static const CudaKernels* const k_cuda_##name[] = {                             \
      &k_cuda_##name##_float, &k_cuda_##name##_double, &k_cuda_##name##_bfloat16, \
      &k_cuda_##name##_half};
#include "cells/registry.def"
#undef CELL

const CudaKernels* FindCudaKernels(const char* cell, Storage storage) {
#define CELL(name, type, header) \
  if (!std::strcmp(cell, #name)) return k_cuda_##name[int(storage)];
#include "cells/registry.def"
#undef CELL
  return added.Find(cell, storage);
}

void AddCudaKernels(const char* cell, Storage storage, const CudaKernels& kernels) {
  added.Add(cell, storage, kernels);
}

}  // namespace frnn
