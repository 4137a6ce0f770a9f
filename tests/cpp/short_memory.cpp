// Preloaded into a process, it counts what one library asks the allocator for, and lets it fail: every
// allocation from one on, or that one alone. Others, such as torch and Python, are left in peace. The
// process reaches the functions at the end through ctypes.
#include <link.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

extern "C" {
// What glibc calls its own.
void* __libc_malloc(size_t bytes);
void* __libc_memalign(size_t alignment, size_t bytes);
void __libc_free(void* address);
}

namespace {

std::atomic<uintptr_t> code_begin{0}, code_end{0};  // of the library
std::atomic<long> asked{0}, first_failure{-1};      // of its allocations; -1: none fails
std::atomic<bool> just_one{false};

// The addresses that it has: a hash table that nothing is moved in.
constexpr size_t kSlots = 1 << 16;
std::atomic<void*> slots[kSlots];
void* const kGone = &slots;  // was there, and others may lie behind
std::atomic<long> alive{0};

size_t SlotOf(void* address) { return (reinterpret_cast<uintptr_t>(address) >> 4) * 2654435761u; }

void Remember(void* address) {
  for (size_t i = SlotOf(address);; i++) {
    void* seen = slots[i % kSlots].load();
    if (seen != nullptr && seen != kGone) continue;
    if (slots[i % kSlots].compare_exchange_strong(seen, address)) break;
  }
  alive++;
}
void Forget(void* address) {
  if (alive == 0) return;
  for (size_t i = SlotOf(address), end = i + kSlots; i < end; i++) {
    void* seen = slots[i % kSlots].load();
    if (seen == nullptr) return;
    if (seen != address) continue;
    slots[i % kSlots].store(kGone);
    alive--;
    return;
  }
}

// An allocation for code at `caller`; null if it fails.
void* Allocated(void* caller, size_t alignment, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(caller);
  const bool ours = at >= code_begin && at < code_end;
  if (ours) {
    const long number = asked++, first = first_failure;
    if (first >= 0 && (just_one ? number == first : number >= first)) return nullptr;
  }
  void* address = alignment == 0 ? __libc_malloc(bytes) : __libc_memalign(alignment, bytes);
  if (ours && address != nullptr) Remember(address);
  return address;
}
void* NewOrThrow(void* caller, size_t alignment, size_t bytes) {
  void* address = Allocated(caller, alignment, bytes);
  if (address == nullptr) throw std::bad_alloc();
  return address;
}

}  // namespace

#define CALLER __builtin_return_address(0)

extern "C" {
void* malloc(size_t bytes) {
  void* address = Allocated(CALLER, 0, bytes);
  if (address == nullptr) errno = ENOMEM;
  return address;
}
void* memalign(size_t alignment, size_t bytes) { return Allocated(CALLER, alignment, bytes); }
void* aligned_alloc(size_t alignment, size_t bytes) { return Allocated(CALLER, alignment, bytes); }
int posix_memalign(void** address, size_t alignment, size_t bytes) {
  void* found = Allocated(CALLER, alignment, bytes);
  if (found == nullptr) return ENOMEM;
  *address = found;
  return 0;
}
void free(void* address) {
  if (address != nullptr) Forget(address);
  __libc_free(address);
}

// The library whose path ends so. False if it is not loaded, or not the only one.
bool short_memory_watch(const char* name) {
  struct Search {
    const char* name;
    int found;
  } search{name, 0};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto* search = static_cast<Search*>(data);
        const size_t path = strlen(info->dlpi_name), end = strlen(search->name);
        if (path < end || strcmp(info->dlpi_name + path - end, search->name) != 0) return 0;
        for (int i = 0; i < info->dlpi_phnum; i++) {
          const auto& part = info->dlpi_phdr[i];
          if (part.p_type != PT_LOAD || !(part.p_flags & PF_X)) continue;
          code_begin = info->dlpi_addr + part.p_vaddr;
          code_end = code_begin + part.p_memsz;
        }
        search->found++;
        return 0;
      },
      &search);
  return search.found == 1;
}
// From now on `first` allocations succeed, -1: all. Starts to count.
void short_memory_fail(long first, bool one) {
  just_one = one;
  asked = 0;
  first_failure = first;
}
long short_memory_asked() { return asked; }
long short_memory_alive() { return alive; }
}

void* operator new(size_t bytes) { return NewOrThrow(CALLER, 0, bytes); }
void* operator new[](size_t bytes) { return NewOrThrow(CALLER, 0, bytes); }
void* operator new(size_t bytes, std::align_val_t alignment) {
  return NewOrThrow(CALLER, size_t(alignment), bytes);
}
void* operator new[](size_t bytes, std::align_val_t alignment) {
  return NewOrThrow(CALLER, size_t(alignment), bytes);
}
void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  return Allocated(CALLER, 0, bytes);
}
