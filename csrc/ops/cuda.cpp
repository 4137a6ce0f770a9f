// The operators on CUDA devices. With FUSED_RNN_EMULATE they run the same engine on CPU tensors, for
// tests on machines without a card.
#include <cstring>
#include <vector>

#include "ops/binding.h"

#ifdef FUSED_RNN_EMULATE
#include "fake_runtime.h"
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace frnn {
namespace {

#ifdef FUSED_RNN_EMULATE
using CurrentStream = cuda::fake::CurrentStream;

// NaN in every type: what is read before it is written shows.
Tensor Fresh(Tensor t) {
  if (t.numel() > 0) std::memset(t.mutable_data_ptr(), 0xFF, t.numel() * t.element_size());
  return t;
}
#else
Tensor Fresh(Tensor t) { return t; }

// The stream that torch works in on a device, which is the current one meanwhile.
class CurrentStream {
 public:
  explicit CurrentStream(int device) : guard_(device) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream_));
  }
  void* get() const { return stream_; }
  void Done() const {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};
#endif

struct Cuda {
  using Kernels = CudaKernels;
  static constexpr int kSavedLead = 0;
  static constexpr bool kHsInStorageType = true;
  static constexpr bool kPacks = false;
  static bool Invariant() { return false; }
#ifdef FUSED_RNN_EMULATE
  static constexpr const char* kName = "CPU";
  static int32_t Index(const Tensor&) { return 0; }
  static bool Owns(const Tensor& t, int32_t) { return t.is_cpu(); }
#else
  static constexpr const char* kName = "CUDA";
  static int32_t Index(const Tensor& t) { return t.get_device_index(); }
  static bool Owns(const Tensor& t, int32_t index) {
    return t.is_cuda() && t.get_device_index() == index;
  }
#endif
  static const Kernels* Find(const char* cell, Storage storage) {
    return FindCudaKernels(cell, storage);
  }
  static int64_t HsStride(int64_t H, int64_t Hout) { return Hout + (H == Hout ? 0 : H); }
  static int64_t SavedUnits(int64_t H) { return H; }
  static Tensor NewLarge(const Tensor& like, const Dims& sizes, ScalarType dtype) {
    return Fresh(New(like, sizes, dtype));
  }
  // Products want rows of x evenly spaced, and not within each other.
  static Tensor Input(const Tensor& x, bool ragged) {
    const int64_t last = x.dim() - 2, row = x.stride(last);
    const bool even = ragged || x.size(0) == 1 || x.size(1) == 1 || x.stride(0) == x.size(1) * row;
    const int64_t apart = !ragged && x.size(1) == 1 ? x.stride(0) : row;
    const bool single = x.numel() == x.size(-1);
    return even && (apart >= x.size(-1) || single) ? x : torch::stable::contiguous(x);
  }

  static void Forward(const Kernels& kernels, const LayerParams& p, const Tensor& x,
                      bool allow_tf32) {
    Run(kernels.layer_fwd, p, x, allow_tf32);
  }
  static void Scale(const Kernels& kernels, void* data, const void* mask, int64_t n, Storage,
                    const Tensor& x) {
    CurrentStream stream(Index(x));
    kernels.scale(data, mask, n, {Index(x), stream.get(), false, nullptr, nullptr});
    stream.Done();
  }
  static void Backward(const Kernels& kernels, const LayerGradParams& p, const Tensor& x,
                       bool allow_tf32) {
    Run(kernels.layer_bwd, p, x, allow_tf32);
  }

 private:
  struct Lender {
    const Tensor& like;
    std::vector<Tensor> memory;
    static void* Workspace(void* self, int64_t bytes) {
      Lender& lender = *static_cast<Lender*>(self);
      lender.memory.push_back(Fresh(New(lender.like, {bytes}, ScalarType::Byte)));
      return lender.memory.back().mutable_data_ptr();
    }
  };
  template <class P>
  static void Run(void (*engine)(const P&, const CudaCall&), const P& p, const Tensor& x,
                  bool allow_tf32) {
    Lender lender{x, {}};
    CurrentStream stream(Index(x));
    engine(p, {Index(x), stream.get(), allow_tf32, &lender, &Lender::Workspace});
    stream.Done();
  }
};

}  // namespace
}  // namespace frnn

#ifdef FUSED_RNN_EMULATE
FRNN_REGISTER(frnn::Cuda, CPU)
#else
FRNN_REGISTER(frnn::Cuda, CUDA)
#endif
