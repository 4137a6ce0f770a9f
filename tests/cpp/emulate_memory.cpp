// The memory of emulate.h: guard pages, and the shared memory of a CTA, where what nobody may write is
// poison.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "emulate_reports.h"
#include "emulate_state.h"

namespace frnn::cuda::emulate {

namespace {
constexpr size_t kGap = 64;  // unused bytes after each shared variable

std::vector<char*> idle_arenas;

void Poison(void* p, size_t bytes) { std::memset(p, 0xFF, bytes); }
bool IsPoison(const char* p, size_t bytes) {
  return std::all_of(p, p + bytes, [](char c) { return c == char(0xFF); });
}
}  // namespace

// [guard page][bytes][guard page]; gives the address of bytes, a multiple of the page.
char* MapGuarded(size_t bytes) {
  void* p = mmap(nullptr, bytes + 2 * kPage, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw Error("emulation: mmap failed");
  char* base = static_cast<char*>(p) + kPage;
  mprotect(base - kPage, kPage, PROT_NONE);
  mprotect(base + bytes, kPage, PROT_NONE);
  return base;
}

// ---- shared memory ----

void PrepareShared(Cta& cta) {
  if (!idle_arenas.empty()) {
    cta.arena = idle_arenas.back();
    idle_arenas.pop_back();
  } else {
    cta.arena = MapGuarded(kArena);
  }
  Poison(cta.arena, grid->static_bytes);
  const size_t from = DynamicOffset() - kGap;
  Poison(cta.arena + from, kArena - from);
}

void CheckShared(Cta& cta) {
  for (const Site& s : grid->sites)
    if (!IsPoison(cta.arena + s.offset + s.bytes, kGap))
      Report(Format("the block wrote past a shared variable of %zu bytes", s.bytes));
  const size_t bytes = grid->config.shared;
  const char* dynamic = cta.arena + DynamicOffset();
  if (!IsPoison(dynamic - kGap, kGap) ||
      !IsPoison(dynamic + bytes, size_t(cta.arena + kArena - dynamic) - bytes))
    Report(Format("the block wrote outside of its %zu bytes of dynamic shared memory", bytes));
}

void FreeArenas(Cluster& cluster) {
  for (Cta& cta : cluster.ctas)
    if (cta.arena) idle_arenas.push_back(std::exchange(cta.arena, nullptr));
}

char* DynamicShared() {
  if (!grid->config.shared) Fail("DynamicShared in a launch without dynamic shared memory");
  return MyCta().arena + DynamicOffset();
}

char* StaticShared(const void* site, size_t bytes, size_t align) {
  Cta& mine = MyCta();
  auto it = std::find_if(grid->sites.begin(), grid->sites.end(),
                         [&](const Site& s) { return s.site == site; });
  const bool fresh = it == grid->sites.end();
  if (fresh) {
    const size_t offset = RoundUp(grid->static_bytes, std::max<size_t>(align, 16));
    grid->static_bytes = offset + bytes + kGap;
    if (offset + bytes + grid->config.shared > kShared || bytes > (48 << 10))
      Fail(Format("%zu bytes of static shared memory are too much", bytes));
    grid->sites.push_back({site, offset, bytes});
    for (auto& cluster : grid->clusters)
      for (const Cta& cta : cluster->ctas)
        if (cta.arena) Poison(cta.arena + offset, bytes + kGap);
    it = grid->sites.end() - 1;
  }
  if (!mine.arena) PrepareShared(mine);
  return mine.arena + it->offset;
}

}  // namespace frnn::cuda::emulate
