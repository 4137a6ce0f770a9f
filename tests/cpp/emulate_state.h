// What the parts of the emulation share (emulate.h): the threads, warps and CTAs of the launch that runs,
// whose turn it is, and how a thread waits.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "emulate.h"

namespace frnn::cuda::emulate {

constexpr size_t kPage = 4096;
constexpr size_t kShared = 227 << 10;  // most shared memory of a CTA, sm_90
constexpr size_t kArena = (kShared + kPage - 1) / kPage * kPage;

inline size_t RoundUp(size_t n, size_t to) { return (n + to - 1) / to * to; }

// ---- the state of a launch ----

struct Fiber;
struct Warp;
struct Cta;

struct Thread {
  uint3 index;
  Warp* warp = nullptr;
  int lane = 0;
  Fiber* fiber = nullptr;       // null: not started
  const char* where = nullptr;  // the primitive it waits in
  Thread* next = nullptr;       // in the list of a barrier's waiters
  bool exited = false;
  unsigned mask = 0;  // of the warp operation it waits in
  void* slot = nullptr;
  FinishMeeting finish = nullptr;
};

struct Warp {
  Cta* cta = nullptr;
  Thread* lanes = nullptr;
  unsigned exist = 0, exited = 0, ready = 0, meeting = 0;  // bits of lanes
  uint64_t frozen_until = 0;
  bool listed = false;  // in Grid::active
};

struct Barrier {
  unsigned arrived = 0;
  Thread* waiters = nullptr;
};

struct Cluster;
struct Cta {
  Cluster* cluster = nullptr;
  uint3 index;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned alive = 0;
  Barrier barrier;        // of __syncthreads
  char* arena = nullptr;  // shared memory: static from the start, dynamic against the end
};

// CTAs that are resident together and know each other's shared memory. Most have one.
struct Cluster {
  std::vector<Cta> ctas;
  unsigned alive = 0;  // threads
  Barrier barrier;
};

struct Delivery {  // of StoreAsync
  const Cta* to;
  uint4* address;
  uint4 value;
  uint64_t* barrier;
};

struct Site {
  const void* site;
  size_t offset, bytes;
};

struct Grid {
  const void* kernel;
  LaunchConfig config;
  void (*body)(void*);
  void* arguments;
  uint64_t random, round = 0;
  std::string error;
  std::vector<std::unique_ptr<Cluster>> clusters, spare;  // resident, to be used again
  std::vector<uint64_t> order;                            // of clusters, for a seed
  uint64_t next_cluster = 0;
  std::vector<Cluster*> done;
  std::vector<Warp*> active;                     // all warps that may have a ready lane
  std::multimap<uint64_t, Delivery> deliveries;  // by the round of their arrival
  std::vector<Site> sites;
  size_t static_bytes = 0;

  // The turn of a warp: its lanes from first, upwards or downwards.
  Warp* warp = nullptr;
  int position = 32, first = 0, step = 1;
  bool paused = false;
};

inline Grid* grid;       // the launch that runs
inline Thread* current;  // null: the scheduler
inline Fiber* running;   // the fiber of current

inline unsigned Random(unsigned n) {  // xorshift64
  uint64_t& x = grid->random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return unsigned((x >> 32) * n >> 32);
}
inline bool Seeded() { return settings.seed != 0; }

// In the arena of a CTA.
inline size_t DynamicOffset() { return kArena - RoundUp(grid->config.shared, 16); }
inline Cta& MyCta() { return *current->warp->cta; }
inline uint64_t CtasOfGrid() {
  const dim3 n = grid->config.grid;
  return uint64_t(n.x) * n.y * n.z;
}

// ---- waiting ----

void Leave(Fiber& from);  // for the next ready lane of the warp, or for the scheduler

inline void Suspend() {
  current->fiber = running;
  Leave(*running);
}

inline void MakeReady(Thread* t) {
  Warp& w = *t->warp;
  w.ready |= 1u << t->lane;
  if (!w.listed) {
    w.listed = true;
    grid->active.push_back(&w);
  }
}

// The running thread waits until somebody makes it ready.
inline void Block(const char* where) {
  Thread* t = current;
  t->where = where;
  Suspend();
  t->where = nullptr;
}

// All threads that have not exited are there.
inline void Complete(Barrier& b) {
  ++progress;
  b.arrived = 0;
  for (Thread* t = std::exchange(b.waiters, nullptr); t; t = t->next) MakeReady(t);
}
// Waits for `alive` threads.
inline void Sync(Barrier& b, unsigned alive, const char* where) {
  if (++b.arrived == alive) return Complete(b);
  current->next = b.waiters;
  b.waiters = current;
  Block(where);
}

// ---- what the scheduler asks of the other parts ----

// Of shared memory, emulate_memory.cpp.
char* MapGuarded(size_t bytes);
void PrepareShared(Cta& cta);
void CheckShared(Cta& cta);
void FreeArenas(Cluster& cluster);
// Of clusters, emulate_clusters.cpp: the stores that are due.
void Deliver();
// Of fibers, emulate_fibers.cpp.
void Turn(Warp& w);
void RestartFibers();

}  // namespace frnn::cuda::emulate
