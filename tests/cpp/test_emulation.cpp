// Small kernels under the emulation, each with mutants: one barrier, poll or wait taken out, which
// the emulation must find for at least one seed. test_emulation.py builds and runs this.
//
//   test_emulation           the names of the cases
//   test_emulation NAME...   runs them; exit status 1 when one fails
//
// Built with RACES, the race check is on (see emulate.cpp).
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "emulate.h"

namespace frnn::cuda {
using emulate::Buffer;

#ifdef RACES
constexpr uint64_t kRightSeeds = 5, kMutantSeeds = 5;
#elif defined(__SANITIZE_ADDRESS__)
constexpr uint64_t kRightSeeds = 8, kMutantSeeds = 60;
#else
constexpr uint64_t kRightSeeds = 30, kMutantSeeds = 60;
#endif

int failures = 0;

void Fail(const char* format, const std::string& a, const std::string& b = "") {
  std::printf(format, a.c_str(), b.c_str());
  std::printf("\n");
  failures++;
}

std::string FirstLine(const std::string& text) { return text.substr(0, text.find('\n')); }

// Runs once with this seed: "" when the results are right, otherwise why not.
std::string Try(const std::function<bool()>& run, uint64_t seed) {
  emulate::settings.seed = seed;
  try {
    return run() ? "" : "wrong results";
  } catch (const emulate::Error& e) {
    return e.what();
  }
}

void Right(const std::string& name, const std::function<bool()>& run) {
  for (uint64_t seed = 0; seed < kRightSeeds; seed++) {
    const std::string why = Try(run, seed);
    if (!why.empty()) return Fail("FAILED %s: %s", name + " seed " + std::to_string(seed), why);
  }
  std::printf("%s: right for %d seeds\n", name.c_str(), int(kRightSeeds));
}

void Mutant(const std::string& name, const std::function<bool()>& run) {
  for (uint64_t seed = 0; seed < kMutantSeeds; seed++) {
    const std::string why = Try(run, seed);
    if (why.empty()) continue;
    std::printf("  %s: found by seed %d: %s\n", name.c_str(), int(seed), FirstLine(why).c_str());
    return;
  }
  Fail("FAILED %s: the mutant was not found%s", name);
}

// The launch must end with an error that holds this text, and the next one must work.
__global__ void Fill(int* p, int value) { p[threadIdx.x] = value; }
void Reported(const std::string& name, const std::string& text, const std::function<void()>& run) {
  for (uint64_t seed = 0; seed < 4; seed++) {
    std::string why = Try([&] { return run(), true; }, seed);
    if (why.find(text) == std::string::npos)
      return Fail("FAILED %s: \"%s\"", name + " does not say \"" + text + "\"", why);
    if (seed == 0) std::printf("  %s: %s\n", name.c_str(), why.c_str());
    Buffer<int> p(64);
    Launch(Fill, 1, 64, 0, nullptr, p.data(), 7);
    for (int v : p)
      if (v != 7) return Fail("FAILED %s: the next launch is wrong%s", name);
  }
}

template <class T>
bool Equal(const Buffer<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

// Small whole numbers, so that sums are exact in any order.
float Number(size_t i) { return float((i * 2654435761u >> 7) % 17) - 8; }

// ---- block reduction: rows of kThreads numbers, the shared buffer used again for each row ----

enum ReduceMutation { kReduceRight, kNoBarrierAfterWrite, kNoBarrierInTree, kNoBarrierBeforeReuse };
template <int kThreads, int kMutation>
__global__ void Reduce(const float* x, float* sums, int rows) {
  FRNN_SHARED(part, float[kThreads]);
  const int i = int(threadIdx.x);
  for (int row = 0; row < rows; row++) {
    part[i] = x[(size_t(blockIdx.x) * rows + row) * kThreads + i];
    if (kMutation != kNoBarrierAfterWrite) __syncthreads();
    for (int n = kThreads / 2; n > 0; n /= 2) {
      if (i < n) part[i] += part[i + n];
      if (kMutation != kNoBarrierInTree) __syncthreads();
    }
    if (i == kThreads - 1) sums[blockIdx.x * rows + row] = part[0];
    if (kMutation != kNoBarrierBeforeReuse) __syncthreads();
  }
}

template <int kMutation>
bool RunReduce() {
  constexpr int kThreads = 64, kRows = 4, kBlocks = 2;
  Buffer<float> x(kBlocks * kRows * kThreads), sums(kBlocks * kRows);
  std::vector<float> want(sums.size());
  for (size_t i = 0; i < x.size(); i++) want[i / kThreads] += x[i] = Number(i);
  Launch(Reduce<kThreads, kMutation>, kBlocks, kThreads, 0, nullptr, x.data(), sums.data(), kRows);
  return Equal(sums, want);
}

void TestReduction() {
  Right("reduction", RunReduce<kReduceRight>);
  Mutant("no barrier after the write", RunReduce<kNoBarrierAfterWrite>);
  Mutant("no barrier in the tree", RunReduce<kNoBarrierInTree>);
  Mutant("no barrier before the buffer is used again", RunReduce<kNoBarrierBeforeReuse>);
}

// ---- warp: shuffles, votes, exchange through shared memory between lanes ----

enum WarpMutation { kWarpRight, kNoSyncBetween, kNoSyncBeforeReuse };
template <int kMutation>
__global__ void WarpExchange(const float* x, float* y, int rounds) {
  FRNN_SHARED(box, float[2][32]);
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  float v = x[threadIdx.x];
  for (int i = 0; i < rounds; i++) {
    box[warp][lane] = v;
    if (kMutation != kNoSyncBetween) __syncwarp();
    v = box[warp][(lane + 5) % 32] + 1;
    if (kMutation != kNoSyncBeforeReuse) __syncwarp();
  }
  y[threadIdx.x] = v;
}

template <int kMutation>
bool RunWarpExchange() {
  constexpr int kRounds = 6;
  Buffer<float> x(64), y(64);
  std::vector<float> want(64);
  for (int i = 0; i < 64; i++) x[i] = Number(i);
  for (int i = 0; i < 64; i++) want[i] = x[i / 32 * 32 + (i + 5 * kRounds) % 32] + kRounds;
  Launch(WarpExchange<kMutation>, 1, 64, 0, nullptr, x.data(), y.data(), kRounds);
  return Equal(y, want);
}

__global__ void Shuffles(int* out) {
  const int lane = int(threadIdx.x);
  int sum = lane;
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  const double wide = __shfl_sync(~0u, lane + .5, lane / 2);
  const int votes = int(__ballot_sync(~0u, lane % 3 == 0));
  const int values[] = {
      sum,
      __shfl_up_sync(~0u, lane, 3),
      __shfl_down_sync(~0u, lane, 3),
      __shfl_down_sync(~0u, lane, 1, 8),
      __shfl_sync(~0u, lane, 9, 8),
      int(wide * 2),
      votes,
      __any_sync(~0u, lane == 7) + 2 * __all_sync(~0u, lane == 7) + 4 * __all_sync(~0u, lane < 32),
      lane < 8 ? __shfl_xor_sync(0xFFu, lane, 7) : __shfl_xor_sync(~0xFFu, lane, 1),
      __syncthreads_count(lane < 5) + 100 * __syncthreads_or(lane == 31) +
          1000 * __syncthreads_and(lane != 3),
  };
  for (int i = 0; i < 10; i++) out[i * 32 + lane] = values[i];
}

bool RunShuffles() {
  Buffer<int> out(320);
  Launch(Shuffles, 1, 32, 0, nullptr, out.data());
  std::vector<int> want(320);
  for (int lane = 0; lane < 32; lane++) {
    const int values[] = {496,
                          lane < 3 ? lane : lane - 3,
                          lane > 28 ? lane : lane + 3,
                          lane % 8 == 7 ? lane : lane + 1,
                          lane / 8 * 8 + 1,
                          lane / 2 * 2 + 1,
                          int(0x49249249u),
                          1 + 4,
                          lane < 8 ? 7 - lane : lane ^ 1,
                          5 + 100};
    for (int i = 0; i < 10; i++) want[i * 32 + lane] = values[i];
  }
  return Equal(out, want);
}

void TestWarp() {
  Right("shuffles and votes", RunShuffles);
  Right("exchange in a warp", RunWarpExchange<kWarpRight>);
  Mutant("no __syncwarp between write and read", RunWarpExchange<kNoSyncBetween>);
  Mutant("no __syncwarp before the box is used again", RunWarpExchange<kNoSyncBeforeReuse>);
}

// ---- coordinates: 3-d grids and blocks, blocks that are no multiple of a warp ----

__global__ void Coordinates(uint4* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  __syncthreads();
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] =
      make_uint4(block, thread, threadIdx.y * 100 + threadIdx.z, blockIdx.y * 100 + blockIdx.z);
}

void TestCoordinates() {
  Right("coordinates", [] {
    const dim3 grid(3, 2, 2), block(5, 3, 3);
    Buffer<uint4> out(12 * 45);
    Launch(Coordinates, grid, block, 0, nullptr, out.data());
    for (unsigned i = 0; i < out.size(); i++) {
      const unsigned b = i / 45, t = i % 45;
      if (out[i].x != b || out[i].y != t || out[i].z != t / 5 % 3 * 100 + t / 15 ||
          out[i].w != b / 3 % 2 * 100 + b / 6)
        return false;
    }
    return true;
  });
}

// ---- grid barrier: two buffers in turn, each CTA reads what its neighbours wrote ----

template <bool kSync>
__global__ void PingPong(float* a, float* b, int steps) {
  const int n = int(gridDim.x * blockDim.x), i = int(blockIdx.x * blockDim.x + threadIdx.x);
  for (int t = 0; t < steps; t++) {
    const float* from = t % 2 ? b : a;
    (t % 2 ? a : b)[i] = from[(i + int(blockDim.x)) % n] + from[(i + 1) % n];
    if (kSync) GridSync();
  }
}

template <bool kSync>
bool RunPingPong() {
  constexpr int kBlocks = 4, kThreads = 32, n = kBlocks * kThreads, kSteps = 5;
  Buffer<float> a(n), b(n);
  std::vector<float> want(n), next(n);
  for (int i = 0; i < n; i++) want[i] = a[i] = Number(i);
  for (int t = 0; t < kSteps; t++) {
    for (int i = 0; i < n; i++) next[i] = want[(i + kThreads) % n] + want[(i + 1) % n];
    want.swap(next);
  }
  LaunchConfig config;
  config.grid = kBlocks;
  config.block = kThreads;
  config.cooperative = true;
  Launch(PingPong<kSync>, config, nullptr, a.data(), b.data(), kSteps);
  return Equal(kSteps % 2 ? b : a, want);
}

void TestGrid() {
  Right("grid", RunPingPong<true>);
  Mutant("no grid barrier", RunPingPong<false>);
  Buffer<float> a(128), b(128);
  Reported("not cooperative", "GridSync in a launch that is not cooperative", [&] {
    std::fill(a.begin(), a.end(), 0.f);
    Launch(PingPong<true>, 2, 64, 0, nullptr, a.data(), b.data(), 2);
  });
}

// ---- flag: the payload by plain stores, then a flag; CTA i waits for CTA i - 1 ----

enum FlagMutation { kFlagRight, kNoPoll, kRelaxedStore, kRelaxedLoad };
template <int kMutation>
__global__ void Chain(float* data, uint32_t* flags) {
  const int lane = int(threadIdx.x);
  float v = float(lane);
  if (blockIdx.x > 0) {
    uint32_t* flag = flags + blockIdx.x - 1;
    if (kMutation == kRelaxedLoad) {
      while (LoadRelaxed(flag) != 32) {
      }
    } else if (kMutation != kNoPoll) {
      while (LoadAcquire(flag) != 32) SpinPause();
    }
    v = data[(blockIdx.x - 1) * 32 + (lane + 1) % 32] + 1;
  }
  data[blockIdx.x * 32 + lane] = v;
  if (kMutation == kRelaxedStore)
    atomicAdd(flags + blockIdx.x, 1);
  else
    ReduceAddRelease(flags + blockIdx.x, 1);
}

template <int kMutation>
bool RunChain(bool cooperative) {
  constexpr int kBlocks = 5;
  Buffer<float> data(kBlocks * 32);
  Buffer<uint32_t> flags(kBlocks);
  std::fill(flags.begin(), flags.end(), 0u);
  std::vector<float> want(data.size());
  for (int i = 0; i < kBlocks * 32; i++) want[i] = float((i % 32 + i / 32) % 32 + i / 32);
  LaunchConfig config;
  config.grid = kBlocks;
  config.block = 32;
  config.cooperative = cooperative;
  Launch(Chain<kMutation>, config, nullptr, data.data(), flags.data());
  return Equal(data, want);
}

void TestFlag() {
  Right("flag", [] { return RunChain<kFlagRight>(true); });
  Mutant("no poll", [] { return RunChain<kNoPoll>(true); });
#ifndef RACES
  Mutant("not cooperative", [] { return RunChain<kFlagRight>(false); });
#else
  // Only the race check sees these two: without it the host is sequentially consistent.
  Mutant("relaxed in place of release", [] { return RunChain<kRelaxedStore>(true); });
  Mutant("relaxed in place of acquire", [] { return RunChain<kRelaxedLoad>(true); });
#endif
}

// ---- words that say themselves whether they are there: a vector passes through all CTAs ----

enum WordMutation { kWordRight, kNoWordPoll, kOneWordPolled, kNoPoisonRewrite };
template <int kMutation>
__global__ void Words(uint4* y, int steps) {
  const unsigned ctas = gridDim.x, i = threadIdx.x;
  const auto at = [&](int t, unsigned cta) {
    return y + (size_t(t) * ctas + cta) * blockDim.x + i;
  };
  for (int t = 0; t < steps; t++) {
    uint4 v = make_uint4(i, i + 1, i + 2, blockIdx.x);
    if (t > 0) {
      const uint4* from = at(t - 1, (blockIdx.x + 1) % ctas);
      bool there;
      do {
        v = LoadRelaxed(from);
        there = v.x != ~0u;
        if (kMutation != kOneWordPolled) there = there && v.y != ~0u && v.z != ~0u && v.w != ~0u;
      } while (!there && kMutation != kNoWordPoll);
      v = make_uint4(v.y, v.z, v.w, v.x + 0x40000000u);
    }
    if (i == 3 && v.w == 0x80000003u) v.w = ~0u;  // a result that looks like poison
    if (kMutation != kNoPoisonRewrite && v.w == ~0u) v.w = 0x7FFFFFFFu;
    StoreRelaxed(at(t, blockIdx.x), v);
  }
}

template <int kMutation>
bool RunWords() {
  constexpr unsigned kBlocks = 4, kThreads = 32;
  constexpr int kSteps = 9;
  Buffer<uint4> y(kSteps * kBlocks * kThreads);
  LaunchConfig config;
  config.grid = kBlocks;
  config.block = kThreads;
  config.cooperative = true;
  Launch(Words<kMutation>, config, nullptr, y.data(), kSteps);
  for (unsigned b = 0; b < kBlocks; b++)
    for (unsigned i = 0; i < kThreads; i++) {
      uint4 v = make_uint4(i, i + 1, i + 2, (b + kSteps - 1) % kBlocks);
      for (int t = 0; t < kSteps; t++) {
        if (t > 0) v = make_uint4(v.y, v.z, v.w, v.x + 0x40000000u);
        if (i == 3 && v.w == 0x80000003u) v.w = 0x7FFFFFFFu;
      }
      const uint4 got = y[((kSteps - 1) * kBlocks + b) * kThreads + i];
      if (std::memcmp(&got, &v, sizeof(v)) != 0) return false;
    }
  return true;
}

void TestWords() {
  Right("words", RunWords<kWordRight>);
  Mutant("no poll", RunWords<kNoWordPoll>);
  Mutant("one word of four polled", RunWords<kOneWordPolled>);
  Mutant("a value that looks like poison", RunWords<kNoPoisonRewrite>);
}

// ---- cluster: every CTA sends its numbers to all, as h in a recurrent layer ----

enum ClusterMutation {
  kClusterRight,
  kNoFirstSync,
  kNoWait,
  kWrongParity,
  kNoExpect,
  kFewerBytes,
  kMoreBytes,
  kOneBuffer,
  kNoInit,
  kLastStepSends
};
template <int kMutation>
__global__ void Exchange(float* y, int steps) {
  constexpr int kThreads = 32;
  FRNN_SHARED(bar, uint64_t[2]);
  float* box = DynamicShared<float>();  // [2, ClusterSize(), kThreads]
  const unsigned n = ClusterSize(), rank = ClusterRank(), i = threadIdx.x;
  if (i < 2 && kMutation != kNoInit) MbarrierInit(bar + i, 1);
  MbarrierInitFence();
  if (kMutation != kNoFirstSync)
    ClusterSync();
  else
    __syncthreads();
  float v = float(blockIdx.x + i);
  for (int t = 0; t < steps; t++) {
    const int now = kMutation == kOneBuffer ? 0 : t % 2;
    const unsigned parity = (kMutation == kOneBuffer ? t : t / 2) % 2;
    float* mine = box + now * n * kThreads;
    const bool send = t + 1 < steps || kMutation == kLastStepSends;
    if (send) {
      const unsigned bytes = n * kThreads * 4;
      if (i == 0 && kMutation != kNoExpect)
        MbarrierExpectTx(bar + now, kMutation == kFewerBytes  ? bytes - 4
                                    : kMutation == kMoreBytes ? bytes + 4
                                                              : bytes);
      for (unsigned k = 0; k < n; k++) StoreAsync(mine + rank * kThreads + i, v, bar + now, k);
      if (t + 1 == steps) break;
      if (kMutation != kNoWait)
        MbarrierWait(bar + now, kMutation == kWrongParity ? parity ^ 1 : parity);
      v = 0;
      for (unsigned k = 0; k < n; k++) v += mine[k * kThreads + (i + k + 1) % kThreads];
      // No barrier: who overwrites this buffer has got what all sent into the other one afterwards.
    }
  }
  y[blockIdx.x * kThreads + i] = v;
  if (kMutation != kLastStepSends) ClusterSync();
}

template <int kMutation>
bool RunExchange() {
  constexpr unsigned kCluster = 4, kBlocks = 8, kThreads = 32;
  constexpr int kSteps = 6;
  Buffer<float> y(kBlocks * kThreads);
  std::vector<float> want(y.size()), next(y.size());
  for (unsigned b = 0; b < kBlocks; b++)
    for (unsigned i = 0; i < kThreads; i++) want[b * kThreads + i] = float(b + i);
  for (int t = 0; t + 1 < kSteps; t++) {
    for (unsigned b = 0; b < kBlocks; b++)
      for (unsigned i = 0; i < kThreads; i++) {
        float v = 0;
        for (unsigned k = 0; k < kCluster; k++)
          v += want[(b / kCluster * kCluster + k) * kThreads + (i + k + 1) % kThreads];
        next[b * kThreads + i] = v;
      }
    want.swap(next);
  }
  LaunchConfig config;
  config.grid = kBlocks;
  config.block = kThreads;
  config.cluster = kCluster;
  config.shared = 2 * kCluster * kThreads * 4;
  Launch(Exchange<kMutation>, config, nullptr, y.data(), kSteps);
  return Equal(y, want);
}

// MbarrierInitFence has no mutant: inits are seen in order here, with and without it.
void TestCluster() {
  Right("cluster", RunExchange<kClusterRight>);
  Mutant("mbarriers not initialised", RunExchange<kNoInit>);
  Mutant("no cluster barrier after the init", RunExchange<kNoFirstSync>);
  Mutant("no wait", RunExchange<kNoWait>);
  Mutant("wrong parity", RunExchange<kWrongParity>);
  Mutant("no expected bytes", RunExchange<kNoExpect>);
  Mutant("too few bytes expected", RunExchange<kFewerBytes>);
  Mutant("too many bytes expected", RunExchange<kMoreBytes>);
  Mutant("one buffer instead of two", RunExchange<kOneBuffer>);
  Mutant("stores under way at the exit", RunExchange<kLastStepSends>);
}

// ---- distributed shared memory by plain stores and cluster barriers: a reduce-scatter ----

enum ScatterMutation { kScatterRight, kNoArriveWait, kNoSyncAfterRead, kNoSyncBeforeExit };
template <int kMutation>
__global__ void Scatter(const float* x, float* y, int steps) {
  FRNN_SHARED(box, float[4][32]);  // [from, i]
  FRNN_SHARED(sum, float[32]);
  const unsigned n = ClusterSize(), rank = ClusterRank(), i = threadIdx.x;
  ClusterSync();
  float v = 0;
  for (int t = 0; t < steps; t++) {
    for (unsigned k = 0; k < n; k++)
      MapShared(&box[rank][i], k)[0] = x[blockIdx.x * 32 + i] + t + k;
    if (kMutation != kNoArriveWait) {
      ClusterArrive();
      ClusterWait();
    }
    for (unsigned k = 0; k < n; k++) v += box[k][i];
    if (kMutation != kNoSyncAfterRead) ClusterSync();
  }
  sum[i] = v;
  ClusterSync();
  y[blockIdx.x * 32 + i] = *MapShared(&sum[i], (rank + 1) % n);
  if (kMutation != kNoSyncBeforeExit) ClusterSync();
}

template <int kMutation>
bool RunScatter() {
  constexpr unsigned kCluster = 4, kBlocks = 8;
  constexpr int kSteps = 3;
  Buffer<float> x(kBlocks * 32), y(kBlocks * 32);
  std::vector<float> want(y.size());
  for (size_t i = 0; i < x.size(); i++) x[i] = Number(i);
  for (unsigned b = 0; b < kBlocks; b++)
    for (unsigned i = 0; i < 32; i++)
      for (int t = 0; t < kSteps; t++)
        for (unsigned k = 0; k < kCluster; k++)
          want[b * 32 + i] += x[(b / kCluster * kCluster + k) * 32 + i] + t + (b + 1) % kCluster;
  LaunchConfig config;
  config.grid = kBlocks;
  config.block = 32;
  config.cluster = kCluster;
  Launch(Scatter<kMutation>, config, nullptr, x.data(), y.data(), kSteps);
  return Equal(y, want);
}

void TestScatter() {
  Right("scatter", RunScatter<kScatterRight>);
  Mutant("no cluster barrier before the read", RunScatter<kNoArriveWait>);
  Mutant("no cluster barrier after the read", RunScatter<kNoSyncAfterRead>);
#ifndef RACES  // nobody races; the memory is gone
  Mutant("no cluster barrier before the exit", RunScatter<kNoSyncBeforeExit>);
#endif
}

// ---- mbarriers by arrivals: CTA 0 fills the box of CTA 1, both ways through remote arrivals ----

enum MailboxMutation { kMailboxRight, kNoFullWait, kNoEmptyWait, kNoFullArrive, kNoLocalWait };
template <int kMutation>
__global__ void Mailbox(const float* x, float* y, int steps) {
  FRNN_SHARED(bars, uint64_t[3]);  // full, empty, read
  FRNN_SHARED(box, float[32]);
  FRNN_SHARED(mine, float[32]);
  const unsigned i = threadIdx.x;
  if (i < 3) MbarrierInit(bars + i, 32);
  MbarrierInitFence();
  ClusterSync();
  for (int t = 0; t < steps; t++) {
    if (ClusterRank() == 0) {
      if (t > 0 && kMutation != kNoEmptyWait) MbarrierWait(bars + 1, (t - 1) % 2);
      *MapShared(box + i, 1) = x[t * 32 + i];
      if (kMutation != kNoFullArrive) MbarrierArriveRemote(bars, 1);
    } else {
      if (kMutation != kNoFullWait) MbarrierWait(bars, t % 2);
      mine[i] = box[31 - i];
      MbarrierArrive(bars + 2);
      if (kMutation != kNoLocalWait) MbarrierWait(bars + 2, t % 2);
      y[t * 32 + i] = mine[(i + 1) % 32];
      __syncthreads();
      MbarrierArriveRemote(bars + 1, 0);
    }
  }
  ClusterSync();
}

template <int kMutation>
bool RunMailbox() {
  constexpr int kSteps = 4;
  Buffer<float> x(kSteps * 32), y(kSteps * 32);
  std::vector<float> want(y.size());
  for (size_t i = 0; i < x.size(); i++) x[i] = Number(i);
  for (size_t i = 0; i < x.size(); i++) want[i] = x[i / 32 * 32 + 31 - (i + 1) % 32];
  LaunchConfig config;
  config.grid = 2;
  config.block = 32;
  config.cluster = 2;
  Launch(Mailbox<kMutation>, config, nullptr, x.data(), y.data(), kSteps);
  return Equal(y, want);
}

void TestMailbox() {
  Right("mailbox", RunMailbox<kMailboxRight>);
  Mutant("no wait for a full box", RunMailbox<kNoFullWait>);
  Mutant("no wait for an empty box", RunMailbox<kNoEmptyWait>);
  Mutant("no arrival", RunMailbox<kNoFullArrive>);
  Mutant("no wait for the block's own threads", RunMailbox<kNoLocalWait>);
}

// ---- named barriers: two warps make, two warps use, one buffer ----

enum NamedMutation { kNamedRight, kNoFull, kNoEmpty };
template <int kMutation>
__global__ void Pipeline(const float* x, float* y, int steps) {
  FRNN_SHARED(box, float[64]);
  const unsigned i = threadIdx.x % 64;
  for (int t = 0; t < steps; t++) {
    if (threadIdx.x < 64) {
      if (t > 0 && kMutation != kNoEmpty) NamedBarrier(2, 128);
      box[i] = x[t * 64 + i];
      if (kMutation != kNoFull) NamedBarrierArrive(1, 128);
    } else {
      if (kMutation != kNoFull) NamedBarrier(1, 128);
      y[(blockIdx.x * steps + t) * 64 + i] = box[63 - i] + 1;
      if (t + 1 < steps && kMutation != kNoEmpty) NamedBarrierArrive(2, 128);
    }
  }
}

template <int kMutation>
bool RunPipeline() {
  constexpr int kSteps = 5;
  Buffer<float> x(kSteps * 64), y(2 * kSteps * 64);
  std::vector<float> want(y.size());
  for (int i = 0; i < kSteps * 64; i++) x[i] = Number(i);
  for (int i = 0; i < 2 * kSteps * 64; i++) want[i] = x[i / 64 % kSteps * 64 + 63 - i % 64] + 1;
  Launch(Pipeline<kMutation>, 2, 128, 0, nullptr, x.data(), y.data(), kSteps);
  return Equal(y, want);
}

void TestNamed() {
  Right("named barriers", RunPipeline<kNamedRight>);
  Mutant("no barrier before the read", RunPipeline<kNoFull>);
  Mutant("no barrier before the write", RunPipeline<kNoEmpty>);
}

// ---- asynchronous copies, global to shared ----

enum CopyMutation {
  kCopyRight,
  kNoCommit,
  kNoCopyWait,
  kWaitForOlder,
  kNoCopyBarrier,
  kNoBulkWait
};
template <int kMutation>
__global__ void Copies(const float4* x, float* y) {
  FRNN_SHARED(box, float4[2][32]);
  FRNN_SHARED(bulk, float4[32]);
  FRNN_SHARED(bar, uint64_t);
  const unsigned i = threadIdx.x;
  for (int k = 0; k < 2; k++) {
    CopyAsync<16>(&box[k][i], x + k * 32 + i);
    if (kMutation != kNoCommit) CopyAsyncCommit();
  }
  if (i == 0) {
    MbarrierInit(&bar, 1);
    MbarrierExpectTx(&bar, 512);
    CopyBulk(bulk, x + 64, 512, &bar);
  }
  CopyAsyncWait<1>();
  __syncthreads();
  float v = box[0][31 - i].x;
  if (kMutation == kNoCopyWait) {
  } else if (kMutation == kWaitForOlder) {
    CopyAsyncWait<1>();
  } else {
    CopyAsyncWait<0>();
  }
  if (kMutation != kNoCopyBarrier) __syncthreads();
  v += box[1][31 - i].y;
  if (kMutation != kNoBulkWait) MbarrierWait(&bar, 0);
  y[i] = v + bulk[31 - i].z;
  CopyAsyncWait<0>();
  MbarrierWait(&bar, 0);
}

template <int kMutation>
bool RunCopies() {
  Buffer<float4> x(96);
  Buffer<float> y(32);
  for (int i = 0; i < 96; i++) x[i] = {Number(i), Number(i + 100), Number(i + 200), 0};
  std::vector<float> want(32);
  for (int i = 0; i < 32; i++) want[i] = x[31 - i].x + x[63 - i].y + x[95 - i].z;
  Launch(Copies<kMutation>, 1, 32, 0, nullptr, x.data(), y.data());
  return Equal(y, want);
}

void TestCopies() {
  Right("copies", RunCopies<kCopyRight>);
  Mutant("no wait", RunCopies<kNoCopyWait>);
  Mutant("no commit", RunCopies<kNoCommit>);
  Mutant("wait for the older group only", RunCopies<kWaitForOlder>);
  Mutant("no barrier after the wait", RunCopies<kNoCopyBarrier>);
  Mutant("no wait for the bulk copy", RunCopies<kNoBulkWait>);
}

// ---- matrices: one tile, against a plain loop ----

enum MmaKind { kBf16, kF16, kTf32 };
// d[16, 8] = a[16, K] b[K, 8]; a row-major, b column-major ([8, K]).
template <int kKind, bool kSwapped>
__global__ void Tile(const float* a, const float* b, float* d) {
  constexpr int K = kKind == kTf32 ? 8 : 16;
  const int r = int(threadIdx.x) / 4, q = int(threadIdx.x) % 4;
  const auto pack = [](const float* p) {
    return kKind == kBf16 ? PackBf16(p[0], p[1]) : PackF16(p[0], p[1]);
  };
  float sum[4] = {};
  uint32_t fragment[4], b0, b1;
  for (int i = 0; i < 4; i++) {
    const int row = r + i % 2 * 8;
    fragment[i] =
        kKind == kTf32 ? ToTf32(a[row * K + q + i / 2 * 4]) : pack(a + row * K + q * 2 + i / 2 * 8);
  }
  if (kSwapped) {
    const uint32_t t = fragment[1];
    fragment[1] = fragment[2];
    fragment[2] = t;
  }
  b0 = kKind == kTf32 ? ToTf32(b[r * K + q]) : pack(b + r * K + q * 2);
  b1 = kKind == kTf32 ? ToTf32(b[r * K + q + 4]) : pack(b + r * K + q * 2 + 8);
  if (kKind == kBf16) MmaBf16(sum, fragment, b0, b1);
  if (kKind == kF16) MmaF16(sum, fragment, b0, b1);
  if (kKind == kTf32) MmaTf32(sum, fragment, b0, b1);
  for (int i = 0; i < 4; i++) d[(r + i / 2 * 8) * 8 + q * 2 + i % 2] = sum[i];
}

template <int kKind, bool kSwapped>
bool RunTile() {
  constexpr int K = kKind == kTf32 ? 8 : 16;
  Buffer<float> a(16 * K), b(8 * K), d(128);
  for (size_t i = 0; i < a.size(); i++) a[i] = Number(i);
  for (size_t i = 0; i < b.size(); i++) b[i] = Number(i + 999);
  std::vector<float> want(128);
  for (int i = 0; i < 128; i++)
    for (int k = 0; k < K; k++) want[i] += a[i / 8 * K + k] * b[i % 8 * K + k];
  Launch(Tile<kKind, kSwapped>, 1, 32, 0, nullptr, a.data(), b.data(), d.data());
  return Equal(d, want);
}

// ldmatrix: two warps read the same 16x16 tile, in shared memory as [16, 24].
template <bool kTransposed, bool kSync>
__global__ void Matrices(const uint16_t* x, uint32_t* out) {
  uint16_t (*tile)[24] = DynamicShared<uint16_t[24]>();
  const int lane = int(threadIdx.x % 32);
  for (int i = int(threadIdx.x); i < 256; i += 64) tile[i / 16][i % 16] = x[i];
  if (kSync) __syncthreads();
  uint32_t r[4];
  const uint16_t* row = &tile[lane % 16][lane / 16 * 8];
  if (kTransposed)
    LoadMatrix4Transposed(r, row);
  else
    LoadMatrix4(r, row);
  for (int i = 0; i < 4; i++) out[threadIdx.x / 32 * 128 + i * 32 + lane] = r[i];
}

template <bool kTransposed, bool kSync>
bool RunMatrices() {
  Buffer<uint16_t> x(256);
  Buffer<uint32_t> out(256);
  for (int i = 0; i < 256; i++) x[i] = uint16_t(i * 7);
  Launch(Matrices<kTransposed, kSync>, 1, 64, 16 * 48, nullptr, x.data(), out.data());
  std::vector<uint32_t> want(256);
  for (int m = 0; m < 4; m++)
    for (int lane = 0; lane < 32; lane++) {
      const int i = lane / 4, j = lane % 4 * 2, row = m % 2 * 8, column = m / 2 * 8;
      const auto at = [&](int r, int c) { return uint32_t(x[(row + r) * 16 + column + c]); };
      want[m * 32 + lane] = want[128 + m * 32 + lane] =
          kTransposed ? at(j, i) | at(j + 1, i) << 16 : at(i, j) | at(i, j + 1) << 16;
    }
  return Equal(out, want);
}

void TestMatrices() {
  Right("bf16", RunTile<kBf16, false>);
  Right("fp16", RunTile<kF16, false>);
  Right("tf32", RunTile<kTf32, false>);
  Right("ldmatrix", RunMatrices<false, true>);
  Right("ldmatrix, transposed", RunMatrices<true, true>);
#ifndef RACES  // these fragments are wrong, but nobody races; ldmatrix is not seen by the check
  Mutant("bf16, fragments swapped", RunTile<kBf16, true>);
  Mutant("fp16, fragments swapped", RunTile<kF16, true>);
  Mutant("tf32, fragments swapped", RunTile<kTf32, true>);
  Mutant("ldmatrix, no barrier", RunMatrices<false, false>);
#endif
}

// ---- conversions ----

void TestConversions() {
  Right("conversions", [] {
    // Every half and bfloat16 survives the way to float and back; so does every midpoint between
    // neighbours, which goes to the even one, and the floats next to it.
    for (unsigned i = 0; i < 0x10000; i++) {
      const __half h = __ushort_as_half(uint16_t(i));
      const __nv_bfloat16 b = __ushort_as_bfloat16(uint16_t(i));
      const float fh = __half2float(h), fb = __bfloat162float(b);
      const bool nan_h = (i & 0x7FFF) > 0x7C00, nan_b = (i & 0x7FFF) > 0x7F80;
      if (nan_h != (fh != fh) || nan_b != (fb != fb)) return false;
      if (__half_as_ushort(__float2half_rn(fh)) != (nan_h ? 0x7FFF : i)) return false;
      if (__bfloat16_as_ushort(__float2bfloat16_rn(fb)) != (nan_b ? 0x7FFF : i)) return false;
      const unsigned even = i % 2 ? i + 1 : i;
      if ((i & 0x7FFF) < 0x7BFF) {
        const float middle = (fh + __half2float(__ushort_as_half(uint16_t(i + 1)))) / 2;
        if (__half_as_ushort(__float2half_rn(middle)) != even) return false;
        if (__half_as_ushort(__float2half_rn(std::nextafter(middle, fh))) != i) return false;
        if (__half_as_ushort(__float2half_rn(std::nextafter(middle, 2 * middle))) != i + 1)
          return false;
      }
      if ((i & 0x7FFF) < 0x7F7F) {
        const float middle = __uint_as_float(i << 16 | 0x8000);
        if (__bfloat16_as_ushort(__float2bfloat16_rn(middle)) != even) return false;
      }
    }
    return __half_as_ushort(65519.f) == 0x7BFF && __half_as_ushort(65520.f) == 0x7C00 &&
           __half2float(__ushort_as_half(0x0001)) == 0x1p-24f &&
           __half2float(__ushort_as_half(0x3555)) == 0.333251953125f &&
           __half_as_ushort(0x1p-25f) == 0 && __half_as_ushort(0x1.8p-25f) == 1 &&
           __bfloat16_as_ushort(3.140625f) == 0x4049 &&
           __bfloat16_as_ushort(__uint_as_float(0x7F7FFFFF)) == 0x7F80 &&
           PackBf16(1.f, -2.f) == 0xC0003F80u && PackF16(1.f, -2.f) == 0xC0003C00u &&
           ToTf32(__uint_as_float(0x3F801000)) == 0x3F802000 &&
           ToTf32(__uint_as_float(0x3F800FFF)) == 0x3F800000;
  });
}

// ---- reports ----

__global__ void Write(float* p, int first) { p[first + int(threadIdx.x)] = 1; }
__global__ void Read(const float* p, float* q, int at) { *q = p[at]; }
__global__ void WriteDynamic(int at) { DynamicShared<float>()[at] = 1; }
__global__ void WriteStatic(int at) {
  FRNN_SHARED(box, float[8]);
  volatile float* p = box;
  p[at] = 1;
}
__global__ void ReadVector(const float* p, float* q, int at) {
  *q = LoadRelaxed(reinterpret_cast<const float4*>(p + at)).x;
}
__global__ void LostWarp() {
  if (threadIdx.x < 32) NamedBarrier(1, 64);
  if (threadIdx.x >= 32) __syncthreads();
}
__global__ void LostCta(uint32_t* p) {
  while (LoadRelaxed(p + blockIdx.x) != blockIdx.x) {
  }
}
__global__ void ExitedLane(int* out) {
  if (threadIdx.x == 3) return;
  out[threadIdx.x] = __shfl_xor_sync(~0u, int(threadIdx.x), 1);
}
__global__ void DifferentOperations(int* out) {
  out[threadIdx.x] = threadIdx.x % 2 ? __shfl_xor_sync(~0u, 1, 1) : __shfl_down_sync(~0u, 1, 1);
}
__global__ void MaskWithoutMe() { __syncwarp(threadIdx.x == 5 ? 1u : 1u << threadIdx.x); }
__global__ void Trap() {
  if (threadIdx.x == 9) __trap();
}
__global__ void Nested() { Launch(Trap, 1, 1, 0, nullptr); }
__global__ void ManyArrivals() {
  FRNN_SHARED(bar, uint64_t);
  if (threadIdx.x == 0) MbarrierInit(&bar, 2);
  __syncthreads();
  if (threadIdx.x == 1) MbarrierExpectTx(&bar, 8);
  __syncthreads();
  MbarrierArrive(&bar);
}
__global__ void BarrierCounts() { NamedBarrier(3, threadIdx.x < 32 ? 64 : 96); }
__global__ void TwoArrivals() {
  ClusterArrive();
  ClusterArrive();
}
__global__ void CopyAndExit(const float* x) {
  CopyAsync<4>(DynamicShared<float>() + threadIdx.x, x);
}
__global__ void GlobalAsShared(float* x) { *MapShared(x, 0) = 1; }
__global__ void Recursion(float* p, int depth) {
  float frame[1024];
  for (float& f : frame) f = *p;
  if (depth > 0) Recursion(frame, depth - 1);
  *p = frame[depth % 1024];
}

void TestReports() {
  Buffer<float> p(64), q(1);
  Buffer<float> odd(61);
  Buffer<float> exact(61, alignof(float));
  Buffer<int> out(64);
  Buffer<uint32_t> words(64);
  float* null = nullptr;
  std::fill(words.begin(), words.end(), 0u);
  p[0] = 0;
  const auto cooperative = [](unsigned blocks) {
    LaunchConfig config;
    config.grid = blocks;
    config.block = 32;
    config.cooperative = true;
    return config;
  };
  const auto cluster = [](unsigned size) {
    LaunchConfig config;
    config.grid = 4;
    config.block = 32;
    config.cluster = size;
    return config;
  };
  if (!(q[0] != q[0])) Fail("FAILED fresh memory is not NaN", "");
  Reported("one past the end", "thread (63, 0, 0): illegal access, address ",
           [&] { Launch(Write, 1, 64, 0, nullptr, p.data(), 1); });
  Reported("which buffer", "0 bytes past the end of a buffer of 256 bytes",
           [&] { Launch(Write, 1, 64, 0, nullptr, p.data(), 1); });
  Reported("one past an end that is not aligned to 16", "somebody wrote past a buffer of 244 bytes",
           [&] { Launch(Write, 1, 1, 0, nullptr, odd.data(), 61); });
  Reported("the same with the buffer against the page", "0 bytes past the end of a buffer of 244",
           [&] { Launch(Write, 1, 1, 0, nullptr, exact.data(), 61); });
  Reported("one before the start", "somebody wrote before a buffer of 256 bytes",
           [&] { Launch(Write, 1, 1, 0, nullptr, p.data(), -1); });
  Reported("read past the end",
           "kernel frnn::cuda::", [&] { Launch(Read, 1, 1, 0, nullptr, p.data(), q.data(), 64); });
  Reported("null", "address (nil)", [&] { Launch(Write, 1, 1, 0, nullptr, null, 0); });
  Reported("past dynamic shared memory", "0 bytes past the end of the 64 bytes of dynamic shared",
           [&] { Launch(WriteDynamic, 1, 1, 64, nullptr, 16); });
  Reported("past dynamic shared memory, not aligned to 16", "outside of its 60 bytes of dynamic",
           [&] { Launch(WriteDynamic, 1, 1, 60, nullptr, 15); });
  Reported("before dynamic shared memory", "outside of its 64 bytes of dynamic shared memory",
           [&] { Launch(WriteDynamic, 1, 1, 64, nullptr, -1); });
  Reported("past a shared variable", "wrote past a shared variable of 32 bytes",
           [&] { Launch(WriteStatic, 1, 1, 0, nullptr, 8); });
  Reported("not aligned", "access is not aligned",
           [&] { Launch(ReadVector, 1, 1, 0, nullptr, p.data(), q.data(), 2); });
  Reported("warps in different barriers",
           "deadlock, all threads wait\n  block (0, 0, 0): 32 threads "
           "of 64, the first (0, 0, 0), in NamedBarrier",
           [&] { Launch(LostWarp, 1, 64, 0, nullptr); });
  Reported("poll for what nobody writes",
           "deadlock, threads poll for what nobody writes\n  block "
           "(1, 0, 0): 32 threads of 32, the first (0, 0, 0), in LoadRelaxed",
           [&] { Launch(LostCta, 2, 32, 0, nullptr, words.data()); });
  Reported("lane has exited", "exit", [&] { Launch(ExitedLane, 1, 32, 0, nullptr, out.data()); });
  Reported("partial warp", "lanes that do not exist",
           [&] { Launch(DifferentOperations, 1, 20, 0, nullptr, out.data()); });
  Reported("different operations", " meets ",
           [&] { Launch(DifferentOperations, 1, 32, 0, nullptr, out.data()); });
  Reported("mask without the caller", "thread (5, 0, 0): __syncwarp with a mask without the caller",
           [&] { Launch(MaskWithoutMe, 1, 32, 0, nullptr); });
  Reported("trap", "block (0, 0, 0), thread (9, 0, 0): __trap",
           [&] { Launch(Trap, 1, 32, 0, nullptr); });
  Reported("nested", "a launch inside of a kernel", [&] { Launch(Nested, 1, 1, 0, nullptr); });
  Reported("arrivals", "more arrivals at an mbarrier",
           [&] { Launch(ManyArrivals, 1, 32, 0, nullptr); });
  Reported("counts of a named barrier", "others said",
           [&] { Launch(BarrierCounts, 1, 96, 0, nullptr); });
  Reported("two arrivals", "ClusterArrive twice",
           [&] { Launch(TwoArrivals, cluster(2), nullptr); });
  Reported("copies at the exit", "exits while its CopyAsync are under way",
           [&] { Launch(CopyAndExit, 1, 32, 128, nullptr, p.data()); });
  Reported("global memory as shared", "are not in the shared memory of this block",
           [&] { Launch(GlobalAsShared, 1, 1, 0, nullptr, p.data()); });
  Reported("stack", "the stack has overflowed",
           [&] { Launch(Recursion, 1, 1, 0, nullptr, p.data(), 1000); });
  Reported("empty grid", "the grid is empty", [&] { Launch(Trap, 0, 32, 0, nullptr); });
  Reported("large block", "a block of 1056 threads", [&] { Launch(Trap, 1, 1056, 0, nullptr); });
  Reported("shared memory", "bytes of shared memory, of 232448",
           [&] { Launch(WriteDynamic, 1, 1, 232449, nullptr, 0); });
  Reported("clusters", "clusters of 3 in a grid of 4", [&] { Launch(Trap, cluster(3), nullptr); });
  LaunchConfig large = cooperative(133);
  large.shared = 200 << 10;
  Reported("cooperative", "a cooperative launch of 133 blocks, where 132 are resident",
           [&] { Launch(Trap, large, nullptr); });
  Reported("threads", "more than 16384 threads", [&] { Launch(Trap, cooperative(600), nullptr); });
}

const std::map<std::string, void (*)()> kCases = {
    {"cluster", TestCluster},
    {"conversions", TestConversions},
    {"coordinates", TestCoordinates},
    {"copies", TestCopies},
    {"flag", TestFlag},
    {"grid", TestGrid},
    {"mailbox", TestMailbox},
    {"matrices", TestMatrices},
    {"named", TestNamed},
    {"reduction", TestReduction},
    {"reports", TestReports},
    {"scatter", TestScatter},
    {"warp", TestWarp},
    {"words", TestWords},
};

}  // namespace frnn::cuda

int main(int count, char** names) {
  using namespace frnn::cuda;
  if (count == 1)
    for (auto& [name, test] : kCases) std::printf("%s\n", name.c_str());
  for (int i = 1; i < count; i++) {
    const auto it = kCases.find(names[i]);
    if (it == kCases.end()) return std::printf("no case %s\n", names[i]), 2;
    it->second();
  }
  return failures != 0;
}
