// Matrix products on the host, as cuBLAS is asked for them.
#include <vector>

#include "cuda/device.h"

namespace frnn {
namespace cuda {
namespace {

// C^T = op(B)^T op(A)^T row by row, in memory that is column-major. Operands are read as they lie;
// sums are in the type that cuBLAS accumulates in.
template <class In, class Out>
void Compute(const runtime::Gemm& g) {
  using A = Wide<In>;
  const In* a = static_cast<const In*>(g.a);
  const In* b = static_cast<const In*>(g.b);
  Out* c = static_cast<Out*>(g.c);
  const A beta = *static_cast<const A*>(g.beta);
  std::vector<A> right(g.k * g.m), sum(g.m);
  for (int64_t k = 0; k < g.k; k++)
    for (int64_t i = 0; i < g.m; i++)
      right[k * g.m + i] = Widen(g.op_a ? a[i * g.lda + k] : a[k * g.lda + i]);
  for (int64_t j = 0; j < g.n; j++) {
    sum.assign(g.m, A(0));
    for (int64_t k = 0; k < g.k; k++) {
      const A left = Widen(g.op_b ? b[k * g.ldb + j] : b[j * g.ldb + k]);
      for (int64_t i = 0; i < g.m; i++) sum[i] += left * right[k * g.m + i];
    }
    for (int64_t i = 0; i < g.m; i++) {
      Out& out = c[j * g.ldc + i];
      out = Narrow<Out>(sum[i] + (beta != 0 ? beta * A(Widen(out)) : A(0)));
    }
  }
}

template <class In>
void Dispatch(const runtime::Gemm& g) {
  if (g.type_c == g.type_a) return Compute<In, In>(g);
  Compute<In, Wide<In>>(g);
}

}  // namespace

namespace {

void ComputeOne(const runtime::Gemm& g) {
  switch (g.type_a) {  // cudaDataType_t
    case 0:
      return Dispatch<float>(g);
    case 1:
      return Dispatch<double>(g);
    case 14:
      return Dispatch<__nv_bfloat16>(g);
    case 2:
      return Dispatch<__half>(g);
    default:
      throw runtime::Error("fused_rnn: a product of an unknown type");
  }
}

int64_t SizeOf(int type) { return type == 0 ? 4 : type == 1 ? 8 : 2; }

}  // namespace

void fake::Compute(const runtime::Gemm& g) {
  for (int64_t i = 0; i < g.count; i++) {
    runtime::Gemm one = g;
    one.a = static_cast<const char*>(g.a) + i * g.stride_a * SizeOf(g.type_a);
    one.b = static_cast<const char*>(g.b) + i * g.stride_b * SizeOf(g.type_b);
    one.c = static_cast<char*>(g.c) + i * g.stride_c * SizeOf(g.type_c);
    ComputeOne(one);
  }
}

}  // namespace cuda
}  // namespace frnn
