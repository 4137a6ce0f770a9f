// The CPU as a device of binding.h.
#pragma once
#include <cstdlib>
#include <cstring>

#include "core/scratch.h"
#include "ops/binding.h"

// Since torch 2.11; absent (null) in 2.10, which our stable ABI target still admits.
extern "C" __attribute__((weak)) AOTITorchError
torch_from_blob(void* data, int64_t dim, const int64_t* sizes, const int64_t* strides,
                int64_t offset, int32_t dtype, int32_t device_type, int32_t device_index,
                AtenTensorHandle* result, int32_t layout, const uint8_t* metadata,
                int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);

// What torch.use_deterministic_algorithms was told. Weak, as those of ops/direct/torch.h: old names, of
// what no release lays out differently.
namespace at {
class Context {
 public:
  __attribute__((weak)) bool deterministicAlgorithms() const;
};
__attribute__((weak)) Context& globalContext();
}  // namespace at

namespace frnn {

struct Cpu {
  using Kernels = CpuKernels;
  static constexpr const char* kName = "CPU";
  static constexpr int kSavedLead = 1;
  static constexpr bool kHsInStorageType = false;
  static constexpr bool kPacks = true;

  static bool Invariant() {
    static const bool always = [] {
      const char* asked = std::getenv("FUSED_RNN_BATCH_INVARIANT");
      return asked != nullptr && std::strcmp(asked, "1") == 0;
    }();
    return always ||
           (&at::globalContext != nullptr && at::globalContext().deterministicAlgorithms());
  }

  template <class T>
  static int32_t Index(const T&) {
    return 0;
  }
  template <class T>
  static bool Owns(const T& t, int32_t) {
    return t.is_cpu();
  }
  static const Kernels* Find(const char* cell, Storage storage) {
    return FindCpuKernels(cell, storage);
  }
  static int64_t HsStride(int64_t H, int64_t Hout) { return frnn::HsStride(H, Hout); }
  static int64_t SavedUnits(int64_t H) { return Padded(H); }
  template <class T>
  static const T& Input(const T& rows, bool) {
    return rows;
  }

  // Large tensors come from the engine's own pool: tens of megabytes that come and go at every
  // training step would be fresh pages from the allocator, and faulting them in took a fifth of a
  // GRU's step.
  static Tensor NewLarge(const Tensor& like, const Dims& sizes, ScalarType dtype) {
    int64_t bytes = 0;
    if (torch_from_blob == nullptr || !CountBytes(sizes, dtype, bytes) || bytes < kPooledBytes)
      return New(like, sizes, dtype);
    Dims strides = sizes;
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i]) strides[i] = stride;
    const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    const Block block = Acquire(size_t(bytes), Use::kResult);
    // A call that fails has called the deleter or not, by how far it came.
    static thread_local void* last_released;
    last_released = nullptr;
    AtenTensorHandle handle;
    const AOTITorchError failed = torch_from_blob(
        block.address, int64_t(sizes.size()), sizes.data(), strides.data(), 0, type,
        aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
        [](void* address, void* size) {
          last_released = address;
          Release({address, size_t(size)});
        },
        reinterpret_cast<void*>(block.bytes));
    if (failed && last_released != block.address) Release(block);
    if (failed) throw OutOfMemory(size_t(bytes));
    return Tensor(handle);
  }

  static void Forward(const Kernels& kernels, const LayerParams& p, const Tensor&, bool) {
    kernels.layer_fwd(p);
  }
  static void Backward(const Kernels& kernels, const LayerGradParams& p, const Tensor&, bool) {
    kernels.layer_bwd(p);
  }
  static void Scale(const Kernels& kernels, void* data, const void* mask, int64_t n,
                    Storage storage, const Tensor&) {
    kernels.scale(data, mask, n, storage);
  }
};

}  // namespace frnn
