// The machine behind emulate.h: fibers, the scheduler, memory with guard pages, reports.
//
// One launch runs at a time, on the host thread that asked for it. A fiber starts CUDA threads one
// after the other as long as none waits; a thread that waits keeps the fiber, and the next thread
// gets another. So a kernel without barriers costs a function call per thread.
#include "emulate.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace frnn::cuda::emulate {

Settings settings = [] {
  Settings s;
  if (const char* seed = std::getenv("FUSED_RNN_EMULATE_SEED"))
    s.seed = std::strtoull(seed, nullptr, 10);
  return s;
}();
uint3 thread_index, block_index;
dim3 block_dim, grid_dim;
uint64_t progress;
int poll_budget;

namespace {
constexpr size_t kPage = 4096;
constexpr size_t kStack = 256 << 10;            // only the pages touched take memory
constexpr size_t kColours = 64, kColour = 320;  // tops of stacks, spread over the sets of a cache
constexpr size_t kShared = 227 << 10;           // most shared memory of a CTA, sm_90
constexpr size_t kArena = (kShared + kPage - 1) / kPage * kPage;
constexpr size_t kGap = 64;        // unused bytes after each shared variable
constexpr int kPatience = 5000;    // rounds without progress until a launch is given up
constexpr unsigned kResident = 2;  // clusters at a time in a launch that is not cooperative
// Most threads of a launch whose blocks are all resident: each has a stack.
constexpr unsigned kThreads = 16384;

size_t RoundUp(size_t n, size_t to) { return (n + to - 1) / to * to; }

void Poison(void* p, size_t bytes) { std::memset(p, 0xFF, bytes); }
bool IsPoison(const char* p, size_t bytes) {
  return std::all_of(p, p + bytes, [](char c) { return c == char(0xFF); });
}

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

// ---- fibers ----

#ifdef __x86_64__
// Callee-saved registers go on the stack, the stack pointer into *from. SysV ABI.
extern "C" void fused_rnn_switch_stack(void** from, void* to);
asm(R"(
.pushsection .text
.type fused_rnn_switch_stack, @function
fused_rnn_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fused_rnn_switch_stack, .-fused_rnn_switch_stack
.popsection
)");
struct Context {
  void* stack_pointer = nullptr;
  void Start(char* stack, size_t bytes, void (*entry)()) {
    auto** top = reinterpret_cast<void**>(stack + bytes);
    top[-2] = reinterpret_cast<void*>(entry);  // where the switch returns to
    stack_pointer = top - 8;                   // six registers below it
  }
  void SwitchTo(Context& to) { fused_rnn_switch_stack(&stack_pointer, to.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;
  void Start(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void SwitchTo(Context& to) { swapcontext(&context, &to.context); }
};
#endif

struct Fiber {
  Context context;
  char* stack = nullptr;  // null: the host's own
  size_t colour = 0;
#ifdef __SANITIZE_ADDRESS__
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake = nullptr;
#endif
};

// A stack whose frames will not be left one by one.
void ForgetFrames([[maybe_unused]] char* stack) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack, kStack);
#endif
}

void SwitchFiber(Fiber& from, Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.size);
#endif
  from.context.SwitchTo(to.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

// ---- the state of a launch ----

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

std::recursive_mutex launch_mutex;
Grid* grid;                                  // the launch that runs
Thread* current;                             // null: the scheduler
Fiber* running;                              // the fiber of current
Fiber host;                                  // the scheduler's
std::vector<std::unique_ptr<Fiber>> fibers;  // all that were ever made
std::vector<Fiber*> idle_fibers;
std::vector<char*> idle_arenas;

unsigned Random(unsigned n) {  // xorshift64
  uint64_t& x = grid->random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return unsigned((x >> 32) * n >> 32);
}
bool Seeded() { return settings.seed != 0; }

// ---- reports ----

std::string Format(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string Format(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  return text;
}
std::string Name(uint3 i) { return Format("(%u, %u, %u)", i.x, i.y, i.z); }

std::string KernelName() {
  Dl_info info;  // holds the symbol before the address, if this one has none: see -rdynamic
  if (!dladdr(grid->kernel, &info) || info.dli_saddr != grid->kernel)
    return Format("%p", grid->kernel);
  int status = 0;
  char* name = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string text = name ? name : info.dli_sname;
  std::free(name);
  return text;
}

void Report(const std::string& message) {
  if (!grid->error.empty()) return;
  grid->error = "emulation: kernel " + KernelName();
  if (current)
    grid->error +=
        ", block " + Name(current->warp->cta->index) + ", thread " + Name(current->index);
  grid->error += ": " + message;
  if (Seeded()) grid->error += Format(" (seed %llu)", (unsigned long long)settings.seed);
}

// In the arena of a CTA.
size_t DynamicOffset() { return kArena - RoundUp(grid->config.shared, 16); }

std::string Distance(const char* p, const char* begin, size_t bytes) {
  if (p < begin) return Format("%td bytes before", begin - p);
  if (p >= begin + bytes) return Format("%td bytes past the end of", p - begin - ptrdiff_t(bytes));
  return Format("at byte %td of", p - begin);
}

[[maybe_unused]] std::string Describe(const void* address) {
  const char* p = static_cast<const char*>(address);
  std::string text = Format("address %p", address);
  if (!p) return text + ", null, or a 16-byte access that is not aligned";
  for (auto& cluster : grid->clusters)
    for (const Cta& cta : cluster->ctas)
      if (cta.arena && p >= cta.arena - kPage && p < cta.arena + kArena + kPage) {
        const size_t bytes = grid->config.shared;
        const std::string place = "shared memory of block " + Name(cta.index);
        if (!bytes) return text + ", outside of the " + place;
        return text + ", " + Distance(p, cta.arena + DynamicOffset(), bytes) +
               Format(" the %zu bytes of dynamic ", bytes) + place;
      }
  for (auto& fiber : fibers)
    if (p >= fiber->stack - kPage && p < fiber->stack) return text + ", the stack has overflowed";
  return text;
}

// ---- waiting ----

void Leave(Fiber& from);  // for the next ready lane of the warp, or for the scheduler

void Suspend() {
  current->fiber = running;
  Leave(*running);
}

void MakeReady(Thread* t) {
  Warp& w = *t->warp;
  w.ready |= 1u << t->lane;
  if (!w.listed) {
    w.listed = true;
    grid->active.push_back(&w);
  }
}

// The running thread waits until somebody makes it ready.
void Block(const char* where) {
  Thread* t = current;
  t->where = where;
  Suspend();
  t->where = nullptr;
}

// All threads that have not exited are there.
void Complete(Barrier& b) {
  ++progress;
  b.arrived = 0;
  for (Thread* t = std::exchange(b.waiters, nullptr); t; t = t->next) MakeReady(t);
}
// Waits for `alive` threads.
void Sync(Barrier& b, unsigned alive, const char* where) {
  if (++b.arrived == alive) return Complete(b);
  current->next = b.waiters;
  b.waiters = current;
  Block(where);
}

Cta& MyCta() { return *current->warp->cta; }

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

void Deliver() {
  auto& all = grid->deliveries;
  while (!all.empty() && all.begin()->first <= grid->round && grid->error.empty()) {
    const Delivery& d = all.begin()->second;
    *d.address = d.value;
    Update(d.barrier, 0, -int64_t(sizeof(d.value)));
    all.erase(all.begin());
  }
}

// ---- threads, CTAs, clusters ----

void Enter(Thread* t) {
  current = t;
  thread_index = t->index;
  block_index = t->warp->cta->index;
}

void Start(Thread* t) {
  Enter(t);
  ++progress;
}

// The running thread has returned from the kernel.
void Exit() {
  Thread* t = current;
  Warp& w = *t->warp;
  Cta& cta = *w.cta;
  ++progress;
  t->exited = true;
  w.exited |= 1u << t->lane;
  for (unsigned waiting = w.meeting; waiting; waiting &= waiting - 1) {
    const Thread& other = w.lanes[__builtin_ctz(waiting)];
    if (other.mask >> t->lane & 1)
      return Report(Format("exits while lane %d waits for it in %s", other.lane, other.where));
  }
  Cluster& cluster = *cta.cluster;
  --cta.alive;
  --cluster.alive;
  if (cta.barrier.arrived && cta.barrier.arrived == cta.alive) Complete(cta.barrier);
  if (cluster.barrier.arrived && cluster.barrier.arrived == cluster.alive)
    Complete(cluster.barrier);
  if (cta.alive == 0) {
    for (const auto& [due, d] : grid->deliveries)
      if (d.to == &cta) return Report("the block exits while stores to it are under way");
    if (cta.arena) CheckShared(cta);
  }
  if (cluster.alive == 0) grid->done.push_back(&cluster);
}

// The next ready lane of the warp that has its turn, or null.
Thread* NextLane() {
  for (Grid& g = *grid; g.position < 32; g.position++) {
    const int lane = (g.first + g.step * g.position) & 31;
    if (g.warp->ready >> lane & 1) return &g.warp->lanes[lane];
  }
  return nullptr;
}
void Take(Thread* t) {
  t->warp->ready &= ~(1u << t->lane);
  grid->position++;
}

void FiberMain() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  for (;;) {
    Start(current);
    grid->body(grid->arguments);
    Exit();
    Thread* t = grid->error.empty() ? NextLane() : nullptr;
    if (t && !t->fiber) {  // on this fiber, without a switch
      Take(t);
      current = t;
    } else {
      idle_fibers.push_back(running);
      Leave(*running);
    }
  }
}

// Also for a fiber that was left in the middle of a kernel.
void Restart(Fiber& fiber) {
  ForgetFrames(fiber.stack);
  fiber.context.Start(fiber.stack, kStack - fiber.colour * kColour, FiberMain);
}

Fiber* IdleFiber() {
  if (!idle_fibers.empty()) {
    Fiber* fiber = idle_fibers.back();
    idle_fibers.pop_back();
    return fiber;
  }
  fibers.push_back(std::make_unique<Fiber>());
  Fiber* fiber = fibers.back().get();
  fiber->stack = MapGuarded(kStack);
#ifdef __SANITIZE_ADDRESS__
  fiber->bottom = fiber->stack;
  fiber->size = kStack;
#endif
  fiber->colour = fibers.size() % kColours;
  Restart(*fiber);
  return fiber;
}

void Leave(Fiber& from) {
  Thread* t = grid->error.empty() ? NextLane() : nullptr;
  if (!t) return SwitchFiber(from, host);
  Take(t);
  poll_budget = Seeded() ? 1 + int(Random(64)) : 64;
  if (t->fiber) {
    Enter(t);
    running = t->fiber;
  } else {
    running = IdleFiber();
    current = t;
  }
  SwitchFiber(from, *running);
}

// Lanes run until each of them waits for another warp, or for time to pass.
void Turn(Warp& w) {
  Grid& g = *grid;
  g.warp = &w;
  g.paused = false;
  do {
    g.position = 0;
    g.first = Seeded() ? int(Random(32)) : 0;
    g.step = Seeded() && Random(2) ? -1 : 1;
    Leave(host);
    current = nullptr;
  } while (g.error.empty() && w.ready && !g.paused && !Chance(8));
}

std::unique_ptr<Cluster> MakeCluster() {
  const dim3 block = grid->config.block;
  const unsigned threads = block.x * block.y * block.z;
  auto cluster = std::make_unique<Cluster>();
  cluster->ctas = std::vector<Cta>(grid->config.cluster);
  for (Cta& cta : cluster->ctas) {
    cta.cluster = cluster.get();
    cta.threads = std::vector<Thread>(threads);
    cta.warps = std::vector<Warp>((threads + 31) / 32);
    for (unsigned i = 0; i < threads; i++) {
      Thread& t = cta.threads[i];
      Warp& w = cta.warps[i / 32];
      t.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
      t.warp = &w;
      t.lane = int(i % 32);
      if (t.lane == 0) w.lanes = &t;
      w.cta = &cta;
      w.exist |= 1u << t.lane;
    }
  }
  return cluster;
}

void Admit() {
  Grid& g = *grid;
  if (g.spare.empty()) g.spare.push_back(MakeCluster());
  g.clusters.push_back(std::move(g.spare.back()));
  g.spare.pop_back();
  Cluster& cluster = *g.clusters.back();
  uint64_t i = g.order.empty() ? g.next_cluster : g.order[g.next_cluster];
  g.next_cluster++;
  i *= g.config.cluster;
  const dim3 n = g.config.grid;
  cluster.alive = 0;
  for (Cta& cta : cluster.ctas) {
    cta.index = {unsigned(i % n.x), unsigned(i / n.x % n.y), unsigned(i / n.x / n.y)};
    i++;
    cta.alive = unsigned(cta.threads.size());
    cluster.alive += cta.alive;
    for (Thread& t : cta.threads) {
      t.fiber = nullptr;
      t.exited = false;
      t.mask = 0;
    }
    if (g.config.shared) PrepareShared(cta);
    for (Warp& w : cta.warps) {
      w.exited = w.meeting = 0;
      w.frozen_until = 0;
      w.ready = w.exist & ~1u;
      MakeReady(&w.lanes[0]);
    }
  }
}

void FreeArenas(Cluster& cluster) {
  for (Cta& cta : cluster.ctas)
    if (cta.arena) idle_arenas.push_back(std::exchange(cta.arena, nullptr));
}

void Retire() {
  Grid& g = *grid;
  for (Cluster* done : g.done) {
    FreeArenas(*done);
    auto it = std::find_if(g.clusters.begin(), g.clusters.end(),
                           [&](auto& cluster) { return cluster.get() == done; });
    g.spare.push_back(std::move(*it));
    g.clusters.erase(it);
  }
  g.done.clear();
}

uint64_t CtasOfGrid() {
  const dim3 n = grid->config.grid;
  return uint64_t(n.x) * n.y * n.z;
}

// One line for each group of threads of a block that wait in the same place.
void ReportDeadlock(const char* what) {
  std::string text = what;
  int lines = 0;
  for (auto& cluster : grid->clusters)
    for (const Cta& cta : cluster->ctas) {
      std::map<std::string, std::pair<unsigned, uint3>> groups;
      for (const Thread& t : cta.threads)
        if (!t.exited) {
          auto [it, fresh] = groups.try_emplace(t.where ? t.where : "the kernel", 0u, t.index);
          it->second.first++;
        }
      for (auto& [where, group] : groups)
        if (++lines <= 12)
          text += Format("\n  block %s: %u threads of %zu, the first %s, in %s",
                         Name(cta.index).c_str(), group.first, cta.threads.size(),
                         Name(group.second).c_str(), where.c_str());
    }
  if (lines > 12) text += Format("\n  and %d lines more", lines - 12);
  const uint64_t absent = CtasOfGrid() - grid->next_cluster * grid->config.cluster;
  if (absent > 0)
    text += Format("\n  %llu blocks were not resident: the launch is not cooperative",
                   (unsigned long long)absent);
  Report(text);
}

void Schedule() {
  Grid& g = *grid;
  const uint64_t total = CtasOfGrid() / g.config.cluster;
  const uint64_t resident = g.config.cooperative ? total : kResident;
  if (Seeded() && !g.config.cooperative) {
    g.order.resize(total);
    for (uint64_t i = 0; i < total; i++) g.order[i] = i;
    for (uint64_t i = total; i > 1; i--) std::swap(g.order[i - 1], g.order[Random(unsigned(i))]);
  }
  const dim3 block = g.config.block;
  g.active.reserve(std::min(total, resident) * g.config.cluster *
                   ((block.x * block.y * block.z + 31) / 32));
  uint64_t seen = progress;
  int patience = kPatience;
  while (g.error.empty()) {
    while (g.clusters.size() < resident && g.next_cluster < total) Admit();
    if (g.clusters.empty()) return;
    ++g.round;
    bool ran = false;
    uint64_t thaw = UINT64_MAX;
    for (size_t i = 0; i < g.active.size() && g.error.empty();) {
      if (Seeded()) std::swap(g.active[i], g.active[i + Random(unsigned(g.active.size() - i))]);
      Warp& w = *g.active[i];
      if (!w.ready) {
        w.listed = false;
        g.active[i] = g.active.back();
        g.active.pop_back();
        continue;
      }
      ++i;
      if (w.frozen_until <= g.round && Chance(8))
        w.frozen_until = g.round + 1 + Random(settings.max_stall + 1);
      if (w.frozen_until > g.round) {
        thaw = std::min(thaw, w.frozen_until);
        continue;
      }
      Turn(w);
      ran = true;
    }
    Retire();
    Deliver();
    if (!ran && g.error.empty() && !g.clusters.empty()) {  // nothing happens until then
      if (!g.deliveries.empty()) thaw = std::min(thaw, g.deliveries.begin()->first);
      if (thaw == UINT64_MAX) {
        if (g.active.empty()) ReportDeadlock("deadlock, all threads wait");
      } else if (thaw > g.round) {
        g.round = thaw - 1;
      }
    }
    if (progress != seen) {
      seen = progress;
      patience = kPatience;
    } else if (ran && --patience == 0) {
      ReportDeadlock("deadlock, threads poll for what nobody writes");
    }
  }
}

void CheckConfig() {
  const LaunchConfig& c = grid->config;
  const unsigned threads = c.block.x * c.block.y * c.block.z;
  const uint64_t ctas = CtasOfGrid();
  if (c.grid.x == 0 || c.grid.y == 0 || c.grid.z == 0 || c.grid.x > INT_MAX || c.grid.y > 65535 ||
      c.grid.z > 65535)
    Report("the grid is empty or too large");
  else if (threads == 0 || threads > 1024 || c.block.z > 64)
    Report(Format("a block of %u threads, z = %u", threads, c.block.z));
  else if (c.shared > kShared)
    Report(Format("%zu bytes of shared memory, of %zu", c.shared, kShared));
  else if (c.cluster == 0 || c.cluster > 16 || c.grid.x % c.cluster)
    Report(Format("clusters of %u in a grid of %u", c.cluster, c.grid.x));
  else if (c.cooperative && ctas * threads > kThreads)
    Report(Format("more than %u threads, too many for the emulation", kThreads));
  else if (c.cooperative) {
    const size_t per_sm = std::min<size_t>({32, 2048 / threads, (228 << 10) / (c.shared + 1024)});
    if (ctas > per_sm * settings.sms)
      Report(Format("a cooperative launch of %llu blocks, where %zu are resident",
                    (unsigned long long)ctas, per_sm * settings.sms));
  }
}

// ---- faults ----

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};

void OnFault(int number, siginfo_t* info, void*) {
  if (!current) {  // not in device code: as without this handler
    signal(number, SIG_DFL);
    return;
  }
  const char* what = number == SIGILL   ? "illegal instruction (or a check of the compiler's)"
                     : number == SIGFPE ? "division by zero"
                                        : "illegal access";
  Report(std::string(what) + ", " + Describe(info->si_addr));
  Suspend();
}

// Handlers and their stack, for the time of a launch.
class FaultHandlers {
 public:
  FaultHandlers() {
    static char* const stack = MapGuarded(kStack);
    ForgetFrames(stack);
    stack_t mine = {};
    mine.ss_sp = stack;
    mine.ss_size = kStack;
    sigaltstack(&mine, &old_stack_);
    struct sigaction action = {};
    action.sa_sigaction = OnFault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler does not return
    for (size_t i = 0; i < std::size(kSignals); i++) sigaction(kSignals[i], &action, &old_[i]);
  }
  ~FaultHandlers() {
    for (size_t i = 0; i < std::size(kSignals); i++) sigaction(kSignals[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  struct sigaction old_[std::size(kSignals)];
  stack_t old_stack_;
};

// Of a launch that was given up.
void RestartFibers() {
  idle_fibers.clear();
  for (auto& fiber : fibers) {
    Restart(*fiber);
    idle_fibers.push_back(fiber.get());
  }
}
}  // namespace

// ---- what emulate.h declares ----

void Fail(std::string message) {
  Report(message);
  std::string().swap(message);  // this frame is never left
  Suspend();
  std::abort();  // never resumed
}

bool Chance(unsigned n) { return Seeded() && Random(n) == 0; }

void Pause(const char* where) {
  MakeReady(current);
  grid->paused = true;
  Block(where);
}

int Lane() { return current->lane; }

void SyncThreads() { Sync(MyCta().barrier, MyCta().alive, "__syncthreads"); }

void Meet(const char* where, unsigned mask, void* slot, FinishMeeting finish) {
  Thread* t = current;
  Warp& w = *t->warp;
  if (!(mask >> t->lane & 1)) Fail(Format("%s with a mask without the caller", where));
  if (mask & ~w.exist || mask & w.exited)
    Fail(Format("%s with a mask of lanes that do not exist or have exited", where));
  if (const unsigned others = w.meeting & mask) {
    const Thread& other = w.lanes[__builtin_ctz(others)];
    if (other.mask != mask || other.finish != finish ||
        (other.where != where && std::strcmp(other.where, where) != 0))
      Fail(Format("%s of mask %08x meets %s of mask %08x of lane %d", where, mask, other.where,
                  other.mask, other.lane));
  }
  w.meeting |= 1u << t->lane;
  t->mask = mask;
  t->slot = slot;
  t->finish = finish;
  if (mask & ~w.meeting) return Block(where);
  void* slots[32] = {};
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    Thread& other = w.lanes[__builtin_ctz(rest)];
    slots[other.lane] = other.slot;
    other.mask = 0;
  }
  finish(slots, mask);
  w.meeting &= ~mask;
  w.ready |= mask & ~(1u << t->lane);  // the warp is listed: it has its turn
  ++progress;
}

void SyncWarp(unsigned mask) {
  Meet("__syncwarp", mask, nullptr, [](void* const*, unsigned) {});
}

namespace {
struct ShuffleSlot {
  uint64_t value, result;
  int from;
};
}  // namespace

uint64_t Shuffle(const char* where, unsigned mask, uint64_t value, int from) {
  ShuffleSlot slot{value, ~uint64_t(0), from};  // a lane outside of the mask gives poison
  Meet(where, mask, &slot, [](void* const* slots, unsigned mask) {
    for (; mask; mask &= mask - 1) {
      auto* mine = static_cast<ShuffleSlot*>(slots[__builtin_ctz(mask)]);
      if (auto* other = static_cast<ShuffleSlot*>(slots[mine->from])) mine->result = other->value;
    }
  });
  return slot.result;
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

float HalfValue(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, size = uint32_t(bits & 0x7FFF) << 13;
  if ((bits & 0x7C00) == 0x7C00) return BitCast<float>(sign | 0x7F800000 | size);
  const float value = BitCast<float>(size) * 0x1p112f;  // the exponent's bias: 127 - 15
  return bits & 0x8000 ? -value : value;
}

uint16_t HalfBits(float x) {
  if (x != x) return 0x7FFF;
  const uint16_t sign = uint16_t(std::signbit(x) << 15);
  const float size = std::fabs(x);
  if (size >= 65520) return sign | 0x7C00;
  if (size == 0) return sign;  // to which frexp gives the exponent 0
  // In units of the last place of a half, 2^-24 for what is below 2^-14; nearbyint rounds to even.
  int exponent = 0;
  std::frexp(size, &exponent);
  exponent = std::max(exponent, -13);
  const int steps = int(std::nearbyint(std::ldexp(size, 11 - exponent)));
  return uint16_t(sign + ((exponent + 13) << 10) + steps);
}

void Run(const void* kernel, const LaunchConfig& config, void (*body)(void*), void* arguments) {
  std::unique_lock<std::recursive_mutex> lock(launch_mutex);
  if (grid) {
    lock.unlock();
    Fail("a launch inside of a kernel");
  }
  Grid g;
  g.kernel = kernel;
  g.config = config;
  g.body = body;
  g.arguments = arguments;
  g.random = (settings.seed + 1) * 0x9E3779B97F4A7C15u;
  grid = &g;
#ifdef __SANITIZE_ADDRESS__
  pthread_attr_t attributes;
  void* bottom;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &bottom, &host.size);
  pthread_attr_destroy(&attributes);
  host.bottom = bottom;
#endif
  block_dim = config.block;
  grid_dim = config.grid;
  CheckConfig();
  if (g.error.empty()) {
    {
      const FaultHandlers handlers;
      Schedule();
    }
    if (!g.clusters.empty()) RestartFibers();
    for (auto& cluster : g.clusters) FreeArenas(*cluster);
  }
  grid = nullptr;
  if (!g.error.empty()) throw Error(g.error);
}
}  // namespace frnn::cuda::emulate

namespace frnn::cuda {
using namespace emulate;

// ---- clusters ----

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

// ---- matrices ----

namespace {
struct MmaSlot {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};
float Low(uint32_t word, float (*value)(uint16_t)) { return value(uint16_t(word)); }
float High(uint32_t word, float (*value)(uint16_t)) { return value(uint16_t(word >> 16)); }

// d[16, 8] += a[16, K] b[K, 8]
template <int K>
void Multiply(void* const* slots, const float (&a)[16][K], const float (&b)[K][8]) {
  for (int lane = 0; lane < 32; lane++) {
    float* d = static_cast<MmaSlot*>(slots[lane])->d;
    for (int i = 0; i < 4; i++)
      for (int k = 0; k < K; k++) d[i] += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
  }
}

template <float (*kValue)(uint16_t)>
void FinishMma16(void* const* slots, unsigned) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const auto& s = *static_cast<MmaSlot*>(slots[lane]);
    const int r = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; i++) {
      float* two = &a[r + i % 2 * 8][q * 2 + i / 2 * 8];
      two[0] = Low(s.a[i], kValue);
      two[1] = High(s.a[i], kValue);
    }
    for (int i = 0; i < 2; i++) {
      b[q * 2 + i * 8][r] = Low(s.b[i], kValue);
      b[q * 2 + i * 8 + 1][r] = High(s.b[i], kValue);
    }
  }
  Multiply(slots, a, b);
}

void FinishMmaTf32(void* const* slots, unsigned) {
  const auto value = [](uint32_t bits) { return BitCast<float>(bits & ~0x1FFFu); };
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; lane++) {
    const auto& s = *static_cast<MmaSlot*>(slots[lane]);
    const int r = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; i++) a[r + i % 2 * 8][q + i / 2 * 4] = value(s.a[i]);
    for (int i = 0; i < 2; i++) b[q + i * 4][r] = value(s.b[i]);
  }
  Multiply(slots, a, b);
}

}  // namespace

void MmaBf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaSlot slot{d, a, {b0, b1}};
  Meet("MmaBf16", ~0u, &slot, FinishMma16<Bfloat16Value>);
}
void MmaF16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaSlot slot{d, a, {b0, b1}};
  Meet("MmaF16", ~0u, &slot, FinishMma16<HalfValue>);
}
void MmaTf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaSlot slot{d, a, {b0, b1}};
  Meet("MmaTf32", ~0u, &slot, FinishMmaTf32);
}
}  // namespace frnn::cuda
