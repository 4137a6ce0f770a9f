// The part of DLPack 1.x by which a torch tensor is read and made from C: the memory layout of its
// structs, which is the same in every release of that major version. torch's own header may not be
// included beside its stable ABI, and not every torch has it.
#pragma once
#include <cstdint>

namespace frnn::dlpack {

constexpr int32_t kCpu = 1;
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4;

struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t type, index;
};
struct DataType {
  uint8_t kind, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t dims;
  DataType dtype;
  int64_t *shape, *strides;  // strides in elements
  uint64_t byte_offset;
};
// A tensor that frees itself and its data.
struct Managed {
  Version version;
  void* context;
  void (*free)(Managed*);
  uint64_t flags;
  Tensor tensor;
};
// What torch.Tensor.__dlpack_c_exchange_api__ points to. Functions return 0, or set Python's error.
struct Exchange {
  Version version;
  const void* older;
  int (*allocate)(Tensor*, Managed**, void*, void (*)(void*, const char*, const char*));
  int (*managed_from_python)(void* object, Managed**);
  int (*to_python)(Managed*, void** object);
  int (*from_python)(void* object, Tensor*);  // on loan: valid while the object is left alone
  int (*stream)(int32_t, int32_t, void**);
};

}  // namespace frnn::dlpack
