// What the CUDA engine asks of the libraries of a card, on the host: products, streams, facts.
#include <cstdlib>
#include <vector>

#include "cuda/device.h"
#include "cuda/graph.h"
#include "cuda/product.h"

namespace frnn {

// An H100, or one with fewer multiprocessors: then blocks have to take more units and rows.
CudaDevice FactsOfDevice(int) {
  const char* few = std::getenv("FUSED_RNN_EMULATE_MULTIPROCESSORS");
  return {few != nullptr ? std::atoi(few) : 132, 9, 50 << 20, 227 << 10};
}

namespace cuda {
namespace {

// Operands are read as they lie; sums are in the type that cuBLAS accumulates in.
template <class In, class Out>
void Compute(const Product& p) {
  using A = Wide<In>;
  const In* a = static_cast<const In*>(p.a);
  const In* b = static_cast<const In*>(p.b);
  Out* c = static_cast<Out*>(p.c);
  std::vector<A> right(p.k * p.n), sum(p.n);
  for (int64_t k = 0; k < p.k; k++)
    for (int64_t j = 0; j < p.n; j++)
      right[k * p.n + j] = Widen(p.transpose_b ? b[j * p.ldb + k] : b[k * p.ldb + j]);
  for (int64_t i = 0; i < p.m; i++) {
    sum.assign(p.n, A(0));
    for (int64_t k = 0; k < p.k; k++) {
      const A left = Widen(p.transpose_a ? a[k * p.lda + i] : a[i * p.lda + k]);
      for (int64_t j = 0; j < p.n; j++) sum[j] += left * right[k * p.n + j];
    }
    for (int64_t j = 0; j < p.n; j++) {
      Out& out = c[i * p.ldc + j];
      out = Narrow<Out>(sum[j] + (p.accumulate ? A(Widen(out)) : A(0)));
    }
  }
}

template <class In>
void Dispatch(const Product& p) {
  if (p.result == p.operands) return Compute<In, In>(p);
  Compute<In, Wide<In>>(p);
}

}  // namespace

void Multiply(const CudaQueue&, const Product& p, bool) {
  switch (p.operands) {
    case Storage::kFloat:
      return Dispatch<float>(p);
    case Storage::kDouble:
      return Dispatch<double>(p);
    case Storage::kBFloat16:
      return Dispatch<__nv_bfloat16>(p);
    case Storage::kHalf:
      return Dispatch<__half>(p);
  }
}

// Everything runs at once, in the order in which it is given.
void Fork(const CudaCall&) {}
void Join(const CudaCall&) {}
void RunAsGraph(const CudaCall& call, std::string,
                const std::function<void(const CudaCall&)>& work) {
  work(call);
}

}  // namespace cuda
}  // namespace frnn
