// What a call works in, and its large results: blocks of a pool that are kept between calls, since a
// fresh mapping costs a page fault per 4 KB, which is a large part of a short call. Blocks of 2 MB and
// more are aligned to that and ask for huge pages (the largest single gain in large layers).
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/macros.h"
#include "core/memory.h"
#include "core/sanitize.h"

namespace frnn {

struct Block {
  void* address = nullptr;
  size_t bytes = 0;
};
enum class Use {
  kScratch,  // given back when the call ends: any block will do that is not far too large
  kResult,   // the caller may keep it: at most a sixteenth more than is wanted
};
FRNN_EXPORT Block Acquire(size_t bytes, Use use);  // throws OutOfMemory
FRNN_EXPORT void Release(const Block& block) noexcept;
constexpr int64_t kPooledBytes = 1 << 20;  // results from here on are blocks

// Carves aligned pieces out of one block. First pass (no block yet) only counts.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (block_.address) Release(block_);
  }
  // layout(scratch) takes all its pieces with Take; it is called twice.
  template <class F>
  void Build(const F& layout) {
    layout(*this);
    block_ = Acquire(used_, Use::kScratch);
    used_ = 0;
    layout(*this);
  }
  template <class T>
  T* Take(size_t n) {
    char* base = static_cast<char*>(block_.address);
    T* piece = base ? reinterpret_cast<T*>(base + used_) : nullptr;
    // A cache line past the end: tiles may read (never use) up to one vector too far. Odd lines: no
    // 4 KB aliasing.
    const size_t bytes = n * sizeof(T), room = (bytes + 63) / 64 * 64 + 192;
    if (base) ForbidMemory(base + used_ + bytes, room - bytes);
    used_ += room;
    return piece;
  }

 private:
  Block block_;
  size_t used_ = 0;
};

}  // namespace frnn
