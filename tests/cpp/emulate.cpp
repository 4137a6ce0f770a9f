// The machine behind emulate.h: a launch, and the scheduler of its clusters and warps.
//
// One launch runs at a time, on the host thread that asked for it. A fiber starts CUDA threads one
// after the other as long as none waits; a thread that waits keeps the fiber, and the next thread
// gets another. So a kernel without barriers costs a function call per thread.
#include "emulate.h"

#include <pthread.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "emulate_fibers.h"
#include "emulate_reports.h"

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
constexpr int kPatience = 5000;    // rounds without progress until a launch is given up
constexpr unsigned kResident = 2;  // clusters at a time in a launch that is not cooperative
// Most threads of a launch whose blocks are all resident: each has a stack.
constexpr unsigned kThreads = 16384;

std::recursive_mutex launch_mutex;

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
  const uint64_t threads = uint64_t(c.block.x) * c.block.y * c.block.z;
  const uint64_t ctas = CtasOfGrid();
  if (c.grid.x == 0 || c.grid.y == 0 || c.grid.z == 0 || c.grid.x > INT_MAX || c.grid.y > 65535 ||
      c.grid.z > 65535)
    Report("the grid is empty or too large");
  else if (threads == 0 || threads > 1024 || c.block.z > 64)
    Report(Format("a block of %llu threads, z = %u", (unsigned long long)threads, c.block.z));
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

void SyncThreads() { Sync(MyCta().barrier, MyCta().alive, "__syncthreads"); }

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
