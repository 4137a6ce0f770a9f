#include "core/scratch.h"

#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace frnn {
namespace {

// Sanitizers see the end of a block only if it ends where it should, and is not used twice.
constexpr size_t kHuge = kSanitized ? 64 : size_t(2) << 20;
constexpr size_t kKept = kSanitized ? 0 : size_t(512) << 20;  // bytes, while no call runs

struct Block {
  void* address;
  size_t bytes;
};
// Never destroyed: calls may still run while the process exits.
struct Pool {
  std::mutex mutex;
  std::vector<Block> free;
  size_t kept = 0;
};
Pool& pool() {
  static Pool* p = new Pool;
  return *p;
}

}  // namespace

void* AcquireScratch(size_t bytes, size_t* capacity) {
  // try_lock: in a forked child the lock may be held by a thread that does not exist there.
  std::unique_lock<std::mutex> lock(pool().mutex, std::try_to_lock);
  if (lock.owns_lock()) {
    auto& free = pool().free;
    size_t best = free.size();
    // Not one that is far too large: it may be wanted a moment later.
    const size_t largest = 4 * (bytes > kHuge ? bytes : kHuge);
    for (size_t i = 0; i < free.size(); i++)
      if (free[i].bytes >= bytes && free[i].bytes <= largest &&
          (best == free.size() || free[i].bytes < free[best].bytes))
        best = i;
    if (best < free.size()) {
      const Block block = free[best];
      free.erase(free.begin() + best);
      pool().kept -= block.bytes;
      *capacity = block.bytes;
      return block.address;
    }
  }
  *capacity = (bytes + kHuge - 1) / kHuge * kHuge;
  void* address = nullptr;
  if (*capacity == 0) *capacity = kHuge;
  if (kSanitized) *capacity = bytes;
  if (posix_memalign(&address, kHuge, *capacity) != 0) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  madvise(address, *capacity, MADV_HUGEPAGE);
#endif
  return address;
}

void ReleaseScratch(void* block, size_t capacity) {
  {
    std::unique_lock<std::mutex> lock(pool().mutex, std::try_to_lock);
    if (lock.owns_lock() && pool().kept + capacity <= kKept) {
      pool().free.push_back({block, capacity});
      pool().kept += capacity;
      return;
    }
  }
  free(block);
}

}  // namespace frnn
