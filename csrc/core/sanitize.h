// What the sanitizers of `make sanitize` are told. An ordinary build has nothing of it.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_poison_memory_region(const volatile void* p, size_t bytes);
extern "C" void* __asan_region_is_poisoned(void* p, size_t bytes);
#define FRNN_ASAN
#elif defined(__SANITIZE_THREAD__)
extern "C" void __tsan_read_range(void* p, size_t bytes);
extern "C" void __tsan_write_range(void* p, size_t bytes);
#define FRNN_TSAN
#endif

namespace frnn {

// Memory that is ours and must not be used: what lies between two pieces of a block.
inline void ForbidMemory([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#ifdef FRNN_ASAN
  __asan_poison_memory_region(p, bytes);
#endif
}

// Accesses that no sanitizer sees: of tiles, and of vectors under a mask.
#if defined(FRNN_ASAN) || defined(FRNN_TSAN)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

inline void ShowAccess([[maybe_unused]] const void* p, [[maybe_unused]] int64_t bytes,
                       [[maybe_unused]] bool write) {
#if defined(FRNN_ASAN)
  if (bytes <= 0) return;
  const void* bad = __asan_region_is_poisoned(const_cast<void*>(p), size_t(bytes));
  if (bad != nullptr) (void)*static_cast<const volatile char*>(bad);  // which is reported
#elif defined(FRNN_TSAN)
  if (bytes <= 0) return;
  (write ? __tsan_write_range : __tsan_read_range)(const_cast<void*>(p), size_t(bytes));
#endif
}

}  // namespace frnn
