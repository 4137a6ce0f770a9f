// Scratch memory that is kept between calls: a fresh mapping costs a page fault per 4 KB, which is
// a large part of a short call. Blocks are 2 MB aligned and ask for huge pages (the largest single
// gain in large layers).
#pragma once
#include <cstddef>

#include "core/sanitize.h"

namespace frnn {

void* AcquireScratch(size_t bytes, size_t* capacity);
void ReleaseScratch(void* block, size_t capacity);
constexpr long kPooledBytes = 1 << 20;  // tensors from here on are worth a block of their own

// Carves aligned pieces out of one block. First pass (base null) only counts.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (base_) ReleaseScratch(base_, capacity_);
  }
  // layout(scratch) takes all its pieces with Take; it is called twice.
  template <class F>
  void Build(const F& layout) {
    layout(*this);
    base_ = static_cast<char*>(AcquireScratch(used_, &capacity_));
    used_ = 0;
    layout(*this);
  }
  template <class T>
  T* Take(size_t n) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    // A cache line past the end: tiles may read (never use) up to one vector too far. Odd lines: no
    // 4 KB aliasing.
    const size_t bytes = n * sizeof(T), room = (bytes + 63) / 64 * 64 + 192;
    if (base_) ForbidMemory(base_ + used_ + bytes, room - bytes);
    used_ += room;
    return piece;
  }

 private:
  char* base_ = nullptr;
  size_t used_ = 0, capacity_ = 0;
};

}  // namespace frnn
