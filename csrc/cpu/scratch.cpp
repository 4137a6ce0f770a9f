#include "core/scratch.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>

#include "core/params.h"

namespace frnn {
namespace {

// Sanitizers see the end of a block only if it ends where it should, and is not used twice.
constexpr size_t kLine = 64, kPage = 4096, kHuge = size_t(2) << 20;
constexpr size_t kKept = kSanitized ? 0 : size_t(512) << 20;  // bytes, while no call runs
constexpr int kMostBlocks = kKept / kPooledBytes + 1;

// No constructor and no destructor has to run: calls may still run while the process exits.
struct Pool {
  std::atomic_flag busy = ATOMIC_FLAG_INIT;
  Block free[kMostBlocks] = {};  // in the order of their release
  int count = 0;
  size_t kept = 0;
} pool;

// Holds the pool, unless another thread does. Nobody waits for that one: in a forked child it may not
// exist.
class Hold {
 public:
  Hold() : held_(!pool.busy.test_and_set(std::memory_order_acquire)) {}
  Hold(const Hold&) = delete;
  ~Hold() {
    if (held_) pool.busy.clear(std::memory_order_release);
  }
  explicit operator bool() const { return held_; }

 private:
  const bool held_;
};

// Of a pool that is held.
Block TakeOut(int i) {
  const Block block = pool.free[i];
  std::copy(pool.free + i + 1, pool.free + pool.count, pool.free + i);
  pool.count--;
  pool.kept -= block.bytes;
  return block;
}

// Gives blocks back to the system, the oldest first, until those that are kept have so many bytes.
// Whether there were any.
bool Shrink(size_t bytes) noexcept {
  for (bool any = false;; any = true) {
    Block block;
    if (const Hold hold; hold && pool.kept > bytes) block = TakeOut(0);
    if (block.address == nullptr) return any;
    std::free(block.address);
  }
}

size_t Capacity(size_t bytes, Use use) {
  if (kSanitized) return bytes;
  if (use == Use::kScratch) return RoundUp(bytes > 0 ? bytes : 1, kHuge);
  size_t unit = kPage;
  while (unit <= bytes / 32) unit *= 2;
  return RoundUp(bytes, unit);
}

// null: there is none left.
void* FromSystem(size_t bytes, size_t alignment) {
  if (alignment <= alignof(std::max_align_t)) return std::malloc(bytes);
  void* address = nullptr;
  return posix_memalign(&address, alignment, bytes) == 0 ? address : nullptr;
}
// `room` bytes for the `wanted` ones.
void* FromSystemOrPool(size_t room, size_t alignment, size_t wanted) {
  void* address = FromSystem(room, alignment);
  if (address == nullptr && Shrink(0)) address = FromSystem(room, alignment);
  if (address == nullptr) throw OutOfMemory(wanted);
  return address;
}

}  // namespace

Block Acquire(size_t bytes, Use use) {
  const size_t capacity = Capacity(bytes, use);
  // A block that is far too large may be wanted a moment later.
  const size_t largest = use == Use::kScratch ? 4 * std::max(bytes, kHuge) : capacity;
  if (const Hold hold; hold) {
    int best = -1;
    for (int i = 0; i < pool.count; i++) {
      const size_t size = pool.free[i].bytes;
      if (size >= bytes && size <= largest && (best < 0 || size < pool.free[best].bytes)) best = i;
    }
    if (best >= 0) return TakeOut(best);
  }
  const size_t alignment = kSanitized ? kLine : (capacity < kHuge ? kPage : kHuge);
  const Block block{FromSystemOrPool(capacity, alignment, bytes), capacity};
#ifdef MADV_HUGEPAGE
  if (alignment == kHuge) madvise(block.address, capacity, MADV_HUGEPAGE);
#endif
  return block;
}

void Release(const Block& block) noexcept {
  bool kept = false;
  if (const Hold hold; hold && block.bytes <= kKept && pool.count < kMostBlocks) {
    pool.free[pool.count++] = block;
    pool.kept += block.bytes;
    kept = true;
  }
  if (kept)
    Shrink(kKept);
  else
    std::free(block.address);
}

void* Allocate(size_t bytes, size_t alignment) { return FromSystemOrPool(bytes, alignment, bytes); }

}  // namespace frnn
