// Products by cuBLAS, through the copy that torch has loaded: symbols are found among torch's
// libraries, and no header of the toolkit is needed.
#include <stdexcept>
#include <string>

#include "cuda/product.h"

// cublas_api.h of CUDA 12 and 13. Enumerations travel as int.
extern "C" {
int cublasSetMathMode(void* handle, int mode);
int cublasGemmEx_64(void* handle, int op_a, int op_b, int64_t m, int64_t n, int64_t k,
                    const void* alpha, const void* a, int type_a, int64_t lda, const void* b,
                    int type_b, int64_t ldb, const void* beta, void* c, int type_c, int64_t ldc,
                    int compute, int algorithm);
}

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

void Check(int status, const char* what) {
  if (status != 0)
    throw std::runtime_error(std::string("fused_rnn: ") + what + " failed, cuBLAS status " +
                             std::to_string(status));
}

}  // namespace

void Multiply(const CudaQueue& queue, const Product& p, bool allow_tf32) {
  const double one64 = 1, beta64 = p.accumulate;
  const float one32 = 1, beta32 = p.accumulate;
  const bool wide = p.operands == Storage::kDouble;
  const int compute =
      wide ? kFloat64 : (p.operands == Storage::kFloat && allow_tf32 ? kFastTf32 : kFloat32);
  // torch's handle comes with the mode of torch.matmul, which would round float32 behind our back.
  Check(cublasSetMathMode(queue.blas, kMath), "cublasSetMathMode");
  // cuBLAS is column-major, where a row-major matrix reads as its transpose: C^T = op(B)^T op(A)^T.
  Check(cublasGemmEx_64(queue.blas, p.transpose_b ? kTranspose : kNoTranspose,
                        p.transpose_a ? kTranspose : kNoTranspose, p.n, p.m, p.k,
                        wide ? static_cast<const void*>(&one64) : &one32, p.b, DataType(p.operands),
                        p.ldb, p.a, DataType(p.operands), p.lda,
                        wide ? static_cast<const void*>(&beta64) : &beta32, p.c, DataType(p.result),
                        p.ldc, compute, kAnyAlgorithm),
        "cublasGemmEx");
}

}  // namespace cuda
}  // namespace frnn
