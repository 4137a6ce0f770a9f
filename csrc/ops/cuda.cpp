// The operators on CUDA devices. With FUSED_RNN_EMULATE they run the same engine on CPU tensors, for
// tests on machines without a card.
#include <cstring>
#include <map>

#include "ops/binding.h"

#ifndef FUSED_RNN_EMULATE
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#endif

namespace frnn {
namespace {

#ifdef FUSED_RNN_EMULATE
struct Streams {
  explicit Streams(int) {}
  void Lend(CudaCall* call) {
    call->blas = [](void*, void*) -> void* { return nullptr; };
  }
};

// NaN in every type: what is read before it is written shows.
Tensor Fresh(Tensor t) {
  if (t.numel() > 0) std::memset(t.mutable_data_ptr(), 0xFF, t.numel() * t.element_size());
  return t;
}
#else
Tensor Fresh(Tensor t) { return t; }

// The streams of a call, and torch's cuBLAS handle and workspace for each of them.
class Streams {
 public:
  explicit Streams(int device) : device_(device), guard_(device) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current_));
    // Helpers belong to a thread and a stream, so that concurrent calls never share a workspace.
    thread_local std::map<std::pair<int, void*>, Helpers> known;
    const auto [found, is_new] = known.try_emplace({device, current_});
    helpers_ = &found->second;
    if (!is_new) return;
    for (void** stream : {&helpers_->second, &helpers_->capture})
      STABLE_TORCH_ERROR_CODE_CHECK(torch_get_cuda_stream_from_pool(false, device, stream));
  }
  ~Streams() { torch_set_current_cuda_stream(current_, device_); }

  void Lend(CudaCall* call) {
    call->streams[0] = current_;
    call->streams[1] = helpers_->second;
    call->capture = helpers_->capture;
    call->binding = this;
    call->blas = [](void* self, void* stream) -> void* {
      void* handle = nullptr;
      const int device = static_cast<Streams*>(self)->device_;
      STABLE_TORCH_ERROR_CODE_CHECK(torch_set_current_cuda_stream(stream, device));
      STABLE_TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
      return handle;
    };
  }

 private:
  struct Helpers {
    void *second = nullptr, *capture = nullptr;
  };
  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* current_ = nullptr;
  Helpers* helpers_ = nullptr;
};
#endif

struct Cuda {
  using Kernels = CudaKernels;
  static constexpr int kSavedLead = 0;
  static constexpr bool kHsInStorageType = true;
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
    Run(kernels.fwd_workspace, kernels.layer_fwd, p, x, allow_tf32);
  }
  static void Scale(const Kernels& kernels, void* data, const void* mask, int64_t n, Storage,
                    const Tensor& x) {
    Streams streams(Index(x));
    CudaCall call{};
    streams.Lend(&call);
    kernels.scale(data, mask, n, call);
  }
  static void Backward(const Kernels& kernels, const LayerGradParams& p, const Tensor& x,
                       bool allow_tf32) {
    Run(kernels.bwd_workspace, kernels.layer_bwd, p, x, allow_tf32);
  }

 private:
  template <class P>
  static void Run(int64_t (*size)(const P&, const CudaCall&),
                  void (*engine)(const P&, const CudaCall&), const P& p, const Tensor& x,
                  bool allow_tf32) {
    Streams streams(Index(x));
    CudaCall call{};
    call.device = FactsOfDevice(Index(x));
    call.allow_tf32 = allow_tf32;
    const Tensor workspace = Fresh(New(x, {size(p, call)}, ScalarType::Byte));
    call.workspace = workspace.mutable_data_ptr();
    streams.Lend(&call);
    engine(p, call);
  }
};

}  // namespace
}  // namespace frnn

#ifdef FUSED_RNN_EMULATE
FRNN_REGISTER(frnn::Cuda, CPU)
#else
FRNN_REGISTER(frnn::Cuda, CUDA)
#endif
