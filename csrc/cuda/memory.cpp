#include "core/memory.h"

namespace frnn {

void* Allocate(size_t bytes, size_t) {
  void* address = std::malloc(bytes);
  if (address == nullptr) throw OutOfMemory(bytes);
  return address;
}

}  // namespace frnn
