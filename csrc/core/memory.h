// Memory that is there, or an error that says how much was wanted.
#pragma once
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

#include "core/macros.h"

namespace frnn {

// In the words of torch's allocator. Takes no memory itself.
class OutOfMemory : public std::exception {
 public:
  explicit OutOfMemory(size_t bytes) noexcept {
    std::snprintf(text_, sizeof(text_), "can't allocate memory: you tried to allocate %zu bytes",
                  bytes);
  }
  // Of what others allocate, who do not say how much: a few bytes for each tensor.
  OutOfMemory() noexcept : text_("can't allocate memory: not even a few bytes") {}
  const char* what() const noexcept override { return text_; }

 private:
  char text_[80];
};

// For std::free. Throws OutOfMemory.
FRNN_EXPORT void* Allocate(size_t bytes, size_t alignment);

// The same for containers.
template <class T>
struct Allocator {
  using value_type = T;
  Allocator() = default;
  template <class U>
  Allocator(const Allocator<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(Allocate(n * sizeof(T), alignof(T))); }
  void deallocate(T* p, size_t) { std::free(p); }
  friend bool operator==(const Allocator&, const Allocator&) { return true; }
  friend bool operator!=(const Allocator&, const Allocator&) { return false; }
};
template <class T>
using Vector = std::vector<T, Allocator<T>>;

}  // namespace frnn
