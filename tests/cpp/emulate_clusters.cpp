// What CTAs of a cluster are to each other: their barrier, mbarriers in shared memory, and stores that
// arrive some time.
#include <cstdlib>
#include <cstring>

#include "emulate_reports.h"
#include "emulate_state.h"

namespace frnn::cuda::emulate {

namespace {
// Where the CTA of that rank has what this one has at p.
Cta& Peer(unsigned rank) {
  Cluster& cluster = *MyCta().cluster;
  if (rank >= cluster.ctas.size())
    Fail(Format("rank %u in a cluster of %zu", rank, cluster.ctas.size()));
  Cta& peer = cluster.ctas[rank];
  if (!peer.alive) Fail("a store to a block that has exited");
  return peer;
}
// In arenas; of dynamic shared memory.
size_t SharedOffset(const void* p, size_t bytes) {
  const size_t at = size_t(static_cast<const char*>(p) - MyCta().arena);
  if (at < DynamicOffset() || at + bytes > DynamicOffset() + grid->config.shared)
    Fail(Format("%zu bytes at %p are not in the shared memory of this block", bytes, p));
  return at;
}

// ---- mbarriers ----

// In the barrier's own 64 bits. Poison reads as uninitialised.
struct MbarrierState {
  uint64_t pending : 20, expected : 20, phase : 1;
  int64_t bytes : 23;
};
static_assert(sizeof(MbarrierState) == 8);
constexpr unsigned kMbarrierLimit = (1 << 20) - 1;

// Reports and gives false when the barrier cannot take the event.
bool Update(uint64_t* barrier, unsigned arrivals, int64_t bytes) {
  MbarrierState s;
  std::memcpy(static_cast<void*>(&s), barrier, sizeof(s));
  const char* wrong = nullptr;
  if (s.expected == kMbarrierLimit)
    wrong = "an mbarrier that was not initialised";
  else if (arrivals > s.pending)
    wrong = "more arrivals at an mbarrier than it was initialised for";
  else if (std::abs(s.bytes + bytes) > int64_t(kMbarrierLimit))
    wrong = "too many bytes at an mbarrier";
  if (wrong) {
    Report(wrong);
    return false;
  }
  s.pending -= arrivals;
  s.bytes += bytes;
  if (s.pending == 0 && s.bytes == 0) {
    s.pending = s.expected;
    s.phase ^= 1;
  }
  std::memcpy(barrier, static_cast<void*>(&s), sizeof(s));
  ++progress;
  return true;
}
}  // namespace

void Deliver() {
  auto& all = grid->deliveries;
  while (!all.empty() && all.begin()->first <= grid->round && grid->error.empty()) {
    const Delivery& d = all.begin()->second;
    *d.address = d.value;
    Update(d.barrier, 0, -int64_t(sizeof(d.value)));
    all.erase(all.begin());
  }
}
}  // namespace frnn::cuda::emulate

namespace frnn::cuda {
using namespace emulate;

void ClusterSync() {
  Cluster& cluster = *MyCta().cluster;
  Sync(cluster.barrier, cluster.alive, "ClusterSync");
}
void InitBarrier(uint64_t* barrier) {
  CheckAligned(barrier);
  SharedOffset(barrier, 8);
  MbarrierState s{};
  s.pending = s.expected = 1;
  std::memcpy(barrier, static_cast<void*>(&s), sizeof(s));
}
void ExpectBytes(uint64_t* barrier, unsigned bytes) {
  SharedOffset(barrier, 8);
  if (!Update(barrier, 1, bytes)) Suspend();
}
void WaitForBytes(uint64_t* barrier, unsigned parity) {
  for (SharedOffset(barrier, 8);;) {
    MbarrierState s;
    std::memcpy(static_cast<void*>(&s), barrier, sizeof(s));
    if (s.expected == kMbarrierLimit) Fail("an mbarrier that was not initialised");
    if (s.phase != parity) return;
    Pause("WaitForBytes");
  }
}
void StoreAsync(uint4* p, const uint4& v, uint64_t* barrier, unsigned rank) {
  CheckAligned(p);
  const size_t at = SharedOffset(p, sizeof(v)), bar = SharedOffset(barrier, 8);
  const Cta& peer = Peer(rank);
  const uint64_t due = grid->round + 1 + (Seeded() ? Random(settings.max_stall + 1) : 0);
  grid->deliveries.insert({due,
                           {&peer, reinterpret_cast<uint4*>(peer.arena + at), v,
                            reinterpret_cast<uint64_t*>(peer.arena + bar)}});
}
}  // namespace frnn::cuda
