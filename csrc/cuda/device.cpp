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
  int multiprocessors = 0, l2_bytes = 0;
  cuda::Check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index),
              "cudaDeviceGetAttribute");
  cuda::Check(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, index),
              "cudaDeviceGetAttribute");
  return known[index] = {multiprocessors, l2_bytes};
}

}  // namespace frnn
