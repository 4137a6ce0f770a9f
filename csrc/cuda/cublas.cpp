// Products by cuBLAS.
#include "cuda/product.h"

namespace frnn {
namespace cuda {
namespace {

// CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: partial sums stay float.
constexpr int kMath = 16;
constexpr int kNoTranspose = 0, kTranspose = 1;  // CUBLAS_OP_N, CUBLAS_OP_T
constexpr int kFloat32 = 68, kFastTf32 = 77,
              kFloat64 = 70;       // CUBLAS_COMPUTE_32F, .._FAST_TF32, _64F
constexpr int kAnyAlgorithm = -1;  // CUBLAS_GEMM_DEFAULT

int DataType(Storage s) {  // cudaDataType_t: CUDA_R_32F, CUDA_R_64F, CUDA_R_16BF, CUDA_R_16F
  switch (s) {
    case Storage::kFloat:
      return 0;
    case Storage::kDouble:
      return 1;
    case Storage::kBFloat16:
      return 14;
    default:
      return 2;
  }
}

}  // namespace

void Multiply(const CudaQueue& queue, const Product& p, bool allow_tf32) {
  const double one64 = 1, beta64 = p.accumulate;
  const float one32 = 1, beta32 = p.accumulate;
  const bool wide = p.operands == Storage::kDouble;
  runtime::SetStream(queue.blas, queue.stream);
  runtime::SetWorkspace(queue.blas, queue.workspace, size_t(queue.workspace_bytes));
  runtime::SetMathMode(queue.blas, kMath);
  // cuBLAS is column-major, where a row-major matrix reads as its transpose: C^T = op(B)^T op(A)^T.
  runtime::Gemm gemm{};
  gemm.op_a = p.transpose_b ? kTranspose : kNoTranspose;
  gemm.op_b = p.transpose_a ? kTranspose : kNoTranspose;
  gemm.m = p.n, gemm.n = p.m, gemm.k = p.k;
  gemm.alpha = wide ? static_cast<const void*>(&one64) : &one32;
  gemm.a = p.b, gemm.type_a = DataType(p.operands), gemm.lda = p.ldb;
  gemm.b = p.a, gemm.type_b = DataType(p.operands), gemm.ldb = p.lda;
  gemm.beta = wide ? static_cast<const void*>(&beta64) : &beta32;
  gemm.c = p.c, gemm.type_c = DataType(p.result), gemm.ldc = p.ldc;
  gemm.compute =
      wide ? kFloat64 : (p.operands == Storage::kFloat && allow_tf32 ? kFastTf32 : kFloat32);
  gemm.algorithm = kAnyAlgorithm;
  gemm.count = p.count, gemm.stride_a = p.b_apart, gemm.stride_b = p.a_apart;
  gemm.stride_c = p.c_apart;
  runtime::Multiply(queue.blas, gemm);
}

}  // namespace cuda
}  // namespace frnn
