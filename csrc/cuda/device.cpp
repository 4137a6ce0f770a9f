// Facts of a card, asked once.
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "core/params.h"

namespace frnn {

CudaDevice FactsOfDevice(int index) {
  static std::mutex mutex;
  static std::map<int, CudaDevice> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [found, is_new] = known.try_emplace(index);
  if (is_new) {
    int sms = 0, l2 = 0;
    const cudaError_t status[] = {
        cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, index),
        cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, index)};
    for (const cudaError_t s : status)
      if (s != cudaSuccess) {
        known.erase(found);
        throw std::runtime_error(std::string("fused_rnn: device ") + std::to_string(index) + ": " +
                                 cudaGetErrorString(s));
      }
    found->second = {sms, l2};
  }
  return found->second;
}

}  // namespace frnn
