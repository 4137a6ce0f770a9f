// Matrix products, as the engine asks for them.
#pragma once
#include "core/params.h"
#include "cuda/runtime.h"

namespace frnn {
namespace cuda {

// A stream, the cuBLAS handle that works in it, and the memory that its products may use meanwhile.
// cuBLAS's own would be shared by all streams, and torch's can be freed by others, while a graph that
// was captured with it goes on using it.
struct CudaQueue {
  runtime::Stream stream;
  runtime::Blas blas;
  void* workspace;
  int64_t workspace_bytes;
};

// C[m, n] = op(A) op(B) + beta C, row-major: A is [m, k] (transposed: [k, m]), B is [k, n]
// (transposed: [n, k]). float32 and 16-bit operands accumulate in float32.
struct Product {
  Storage operands, result;
  bool transpose_a, transpose_b;
  int64_t m, n, k;
  const void* a;
  int64_t lda;
  const void* b;
  int64_t ldb;
  bool accumulate;  // beta = 1, else 0
  void* c;
  int64_t ldc;
  // Of so many products, each of whose operands lies so far behind that of the one before.
  int64_t count = 1, a_apart = 0, b_apart = 0, c_apart = 0;
};

FRNN_EXPORT void Multiply(const CudaQueue& queue, const Product& product, bool allow_tf32);

}  // namespace cuda
}  // namespace frnn
