// Matrix products, as the engine asks for them. cublas.cpp answers on a card.
#pragma once
#include "core/params.h"

namespace frnn {
namespace cuda {

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
};

void Multiply(const CudaQueue& queue, const Product& product, bool allow_tf32);

}  // namespace cuda
}  // namespace frnn
