// Facts of a card, asked once.
#include "cuda/device.h"

#include <map>
#include <mutex>

namespace frnn {

CudaDevice FactsOfDevice(int index) {
  static std::mutex mutex;
  static std::map<int, CudaDevice> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(index); found != known.end()) return found->second;
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    cuda::Check(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
    return value;
  };
  return known[index] = {attribute(cudaDevAttrMultiProcessorCount),
                         attribute(cudaDevAttrComputeCapabilityMajor),
                         attribute(cudaDevAttrL2CacheSize),
                         attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

}  // namespace frnn
