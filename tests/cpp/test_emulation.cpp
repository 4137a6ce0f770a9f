// Small kernels under the emulation, each with mutants: one barrier, poll or wait taken out, which
// the emulation must find for at least one seed. test_emulation.py builds and runs this.
//
//   test_emulation           the names of the cases
//   test_emulation NAME...   runs them; exit status 1 when one fails
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "emulate.h"

namespace frnn::cuda {
template <class T>
using Buffer = std::vector<T>;

#ifdef __SANITIZE_ADDRESS__
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
  return sums == want;
}

void TestReduction() {
  Right("reduction", RunReduce<kReduceRight>);
  Mutant("no barrier after the write", RunReduce<kNoBarrierAfterWrite>);
  Mutant("no barrier in the tree", RunReduce<kNoBarrierInTree>);
  Mutant("no barrier before the buffer is used again", RunReduce<kNoBarrierBeforeReuse>);
}

// ---- warp: shuffles, exchange through shared memory between lanes ----

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
  return y == want;
}

__global__ void Shuffles(int* out) {
  const int lane = int(threadIdx.x);
  int sum = lane;
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  const double wide = __shfl_xor_sync(~0u, lane + .5, 3);
  const int part = lane < 8 ? __shfl_xor_sync(0xFFu, lane, 7) : __shfl_xor_sync(~0xFFu, lane, 1);
  const int values[] = {sum, int(wide * 2), part};
  for (int i = 0; i < 3; i++) out[i * 32 + lane] = values[i];
}

bool RunShuffles() {
  Buffer<int> out(96), want(96);
  Launch(Shuffles, 1, 32, 0, nullptr, out.data());
  for (int lane = 0; lane < 32; lane++) {
    const int values[] = {496, (lane ^ 3) * 2 + 1, lane < 8 ? 7 - lane : lane ^ 1};
    for (int i = 0; i < 3; i++) want[i * 32 + lane] = values[i];
  }
  return out == want;
}

void TestWarp() {
  Right("shuffles", RunShuffles);
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
      uint4{block, thread, threadIdx.y * 100 + threadIdx.z, blockIdx.y * 100 + blockIdx.z};
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

// ---- words that say themselves whether they are there: a vector passes through all CTAs ----

enum WordMutation { kWordRight, kNoWordPoll, kOneWordPolled, kNoPoisonRewrite };
template <int kMutation>
__global__ void Words(uint4* y, int steps) {
  const unsigned ctas = gridDim.x, i = threadIdx.x;
  const auto at = [&](int t, unsigned cta) {
    return y + (size_t(t) * ctas + cta) * blockDim.x + i;
  };
  for (int t = 0; t < steps; t++) {
    uint4 v = uint4{i, i + 1, i + 2, blockIdx.x};
    if (t > 0) {
      const uint4* from = at(t - 1, (blockIdx.x + 1) % ctas);
      bool there;
      do {
        v = LoadRelaxed(from);
        there = v.w != ~0u;
        if (kMutation != kOneWordPolled) there = there && v.x != ~0u && v.y != ~0u && v.z != ~0u;
      } while (!there && kMutation != kNoWordPoll);
      v = uint4{v.y, v.z, v.w, v.x + 0x40000000u};
    }
    if (i == 3 && v.w == 0x80000003u) v.w = ~0u;  // a result that looks like poison
    if (kMutation != kNoPoisonRewrite && v.w == ~0u) v.w = 0x7FFFFFFFu;
    uint32_t* to = &at(t, blockIdx.x)->x;
    for (const uint32_t word : {v.x, v.y, v.z, v.w}) StoreRelaxed(to++, word);
  }
}

template <int kMutation, bool kCooperative = true>
bool RunWords() {
  constexpr unsigned kBlocks = 4, kThreads = 32;
  constexpr int kSteps = 9;
  Buffer<uint4> y(kSteps * kBlocks * kThreads, uint4{~0u, ~0u, ~0u, ~0u});
  LaunchConfig config;
  config.grid = kBlocks;
  config.block = kThreads;
  config.cooperative = kCooperative;
  Launch(Words<kMutation>, config, nullptr, y.data(), kSteps);
  for (unsigned b = 0; b < kBlocks; b++)
    for (unsigned i = 0; i < kThreads; i++) {
      uint4 v = uint4{i, i + 1, i + 2, (b + kSteps - 1) % kBlocks};
      for (int t = 0; t < kSteps; t++) {
        if (t > 0) v = uint4{v.y, v.z, v.w, v.x + 0x40000000u};
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
  Mutant("not cooperative", RunWords<kWordRight, false>);
}

// ---- clusters: a vector passes through all CTAs, by stores into each other's shared memory. All send
// to all, so that nobody is two steps ahead of another ----

enum ClusterMutation {
  kClusterRight,
  kNoStart,
  kNoInit,
  kNoWait,
  kWrongParity,
  kOneHalf,
  kTooMany
};
template <int kMutation>
__global__ void Ring(uint4* y, int steps) {
  constexpr unsigned kCtas = 4;
  const unsigned rank = blockIdx.x % kCtas, threads = blockDim.x, i = threadIdx.x;
  uint4* halves = DynamicShared<uint4>();  // [2][kCtas][threads]
  uint64_t* barriers = reinterpret_cast<uint64_t*>(halves + 2 * kCtas * threads);
  if (i < 2 && kMutation != kNoInit) InitBarrier(barriers + i);
  if (kMutation != kNoStart) ClusterSync();
  uint4 v{i, i + 1, i + 2, blockIdx.x};
  for (int step = 1; step <= steps; step++) {
    const unsigned half = kMutation == kOneHalf ? 0 : step % 2;
    const unsigned bytes = unsigned(sizeof(v)) * threads * (kMutation == kTooMany ? 5 : kCtas);
    if (i == 0) ExpectBytes(barriers + half, bytes);
    uint4* to = halves + half * kCtas * threads;
    for (unsigned peer = 0; peer < kCtas; peer++)
      StoreAsync(to + rank * threads + i, v, barriers + half, peer);
    const unsigned phase = (kMutation == kOneHalf ? step - 1 : (step - 1) / 2) % 2;
    if (kMutation != kNoWait) WaitForBytes(barriers + half, phase ^ (kMutation == kWrongParity));
    v = to[(rank + 1) % kCtas * threads + threads - 1 - i];
    v = uint4{v.y, v.z, v.w, v.x};
  }
  y[blockIdx.x * threads + i] = v;
}

template <int kMutation>
bool RunRing() {
  constexpr unsigned kBlocks = 12, kThreads = 64;
  constexpr int kSteps = 8;
  Buffer<uint4> y(kBlocks * kThreads);
  LaunchConfig config;
  config.grid = kBlocks;
  config.block = kThreads;
  config.cluster = 4;
  config.shared = 2 * 4 * kThreads * sizeof(uint4) + 2 * sizeof(uint64_t);
  Launch(Ring<kMutation>, config, nullptr, y.data(), kSteps);
  for (unsigned b = 0; b < kBlocks; b++)
    for (unsigned i = 0; i < kThreads; i++) {  // eight turns: all is where it was
      const uint4 want{i, i + 1, i + 2, b}, got = y[b * kThreads + i];
      if (std::memcmp(&got, &want, sizeof(want)) != 0) return false;
    }
  return true;
}

void TestClusters() {
  Right("ring", RunRing<kClusterRight>);
  Mutant("stores to a block that has not started", RunRing<kNoStart>);
  Mutant("no mbarrier", RunRing<kNoInit>);
  Mutant("no wait", RunRing<kNoWait>);
  Mutant("the other phase", RunRing<kWrongParity>);
  Mutant("one half for all steps", RunRing<kOneHalf>);
  Mutant("bytes that do not come", RunRing<kTooMany>);
}

// ---- matrices: one tile, against a plain loop ----

enum MmaKind { kBf16, kF16, kTf32 };
// d[16, 8] = a[16, K] b[K, 8]; a row-major, b column-major ([8, K]).
template <int kKind, bool kSwapped>
__global__ void Tile(const float* a, const float* b, float* d) {
  constexpr int K = kKind == kTf32 ? 8 : 16;
  const int r = int(threadIdx.x) / 4, q = int(threadIdx.x) % 4;
  const auto pack = [](const float* p) {
    const auto bits = kKind == kBf16 ? emulate::Bfloat16Bits : emulate::HalfBits;
    return bits(p[0]) | uint32_t(bits(p[1])) << 16;
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
  return d == want;
}

void TestMatrices() {
  Right("bf16", RunTile<kBf16, false>);
  Right("fp16", RunTile<kF16, false>);
  Right("tf32", RunTile<kTf32, false>);
  Mutant("bf16, fragments swapped", RunTile<kBf16, true>);
  Mutant("fp16, fragments swapped", RunTile<kF16, true>);
  Mutant("tf32, fragments swapped", RunTile<kTf32, true>);
}

// ---- conversions ----

void TestConversions() {
  Right("conversions", [] {
    // Every half and bfloat16 survives the way to float and back; so does every midpoint between
    // neighbours, which goes to the even one, and the floats next to it.
    for (unsigned i = 0; i < 0x10000; i++) {
      const float fh = emulate::HalfValue(uint16_t(i)), fb = emulate::Bfloat16Value(uint16_t(i));
      const bool nan_h = (i & 0x7FFF) > 0x7C00, nan_b = (i & 0x7FFF) > 0x7F80;
      if (nan_h != (fh != fh) || nan_b != (fb != fb)) return false;
      if (__half_as_ushort(__float2half_rn(fh)) != (nan_h ? 0x7FFF : i)) return false;
      if (__bfloat16_as_ushort(__float2bfloat16_rn(fb)) != (nan_b ? 0x7FFF : i)) return false;
      const unsigned even = i % 2 ? i + 1 : i;
      if ((i & 0x7FFF) < 0x7BFF) {
        const float middle = (fh + emulate::HalfValue(uint16_t(i + 1))) / 2;
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
           emulate::HalfValue(0x0001) == 0x1p-24f &&
           emulate::HalfValue(0x3555) == 0.333251953125f && __half_as_ushort(0x1p-25f) == 0 &&
           __half_as_ushort(0x1.8p-25f) == 1 && __bfloat16_as_ushort(3.140625f) == 0x4049 &&
           __bfloat16_as_ushort(__uint_as_float(0x7F7FFFFF)) == 0x7F80 &&
           __bfloat16_as_ushort(-2.f) == 0xC000 && __half_as_ushort(-2.f) == 0xC000 &&
           ToTf32(__uint_as_float(0x3F801000)) == 0x3F802000 &&
           ToTf32(__uint_as_float(0x3F800FFF)) == 0x3F800000;
  });
}

// ---- reports ----

__global__ void Write(float* p, int first) { p[first + int(threadIdx.x)] = 1; }
__global__ void WriteDynamic(int at) { DynamicShared<float>()[at] = 1; }
__global__ void WriteStatic(int at) {
  FRNN_SHARED(box, float[8]);
  volatile float* p = box;
  p[at] = 1;
}
__global__ void ReadVector(const float* p, float* q, int at) {
  *q = float(LoadRelaxed(reinterpret_cast<const uint4*>(p + at)).x);
}
__global__ void LostLanes() {
  if (threadIdx.x < 8) __syncwarp();
  if (threadIdx.x >= 8) __syncthreads();
}
__global__ void LostCta(const uint4* p) {
  while (LoadRelaxed(p + blockIdx.x).x != blockIdx.x) {
  }
}
__global__ void ExitedLane(int* out) {
  if (threadIdx.x == 3) return;
  out[threadIdx.x] = __shfl_xor_sync(~0u, int(threadIdx.x), 1);
}
__global__ void DifferentOperations(int* out) {
  out[threadIdx.x] = threadIdx.x % 2 ? __shfl_xor_sync(~0u, 1, 1) : (__syncwarp(), 0);
}
__global__ void MaskWithoutMe() { __syncwarp(threadIdx.x == 5 ? 1u : 1u << threadIdx.x); }
__global__ void Trap() {
  if (threadIdx.x == 9) __trap();
}
__global__ void Nested() { Launch(Trap, 1, 1, 0, nullptr); }
__global__ void Recursion(float* p, int depth) {
  float frame[1024];
  for (float& f : frame) f = *p;
  if (depth > 0) Recursion(frame, depth - 1);
  *p = frame[depth % 1024];
}

void TestReports() {
  Buffer<float> p(64), q(1);
  Buffer<int> out(64);
  Buffer<uint4> words(2);
  float* null = nullptr;
  const auto cooperative = [](unsigned blocks) {
    LaunchConfig config;
    config.grid = blocks;
    config.block = 32;
    config.cooperative = true;
    return config;
  };
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
  Reported("lanes in different barriers",
           "deadlock, all threads wait\n  block (0, 0, 0): 24 threads "
           "of 32, the first (8, 0, 0), in __syncthreads",
           [&] { Launch(LostLanes, 1, 32, 0, nullptr); });
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
  Reported("stack", "the stack has overflowed",
           [&] { Launch(Recursion, 1, 1, 0, nullptr, p.data(), 1000); });
  Reported("empty grid", "the grid is empty", [&] { Launch(Trap, 0, 32, 0, nullptr); });
  Reported("large block", "a block of 1056 threads", [&] { Launch(Trap, 1, 1056, 0, nullptr); });
  Reported("shared memory", "bytes of shared memory, of 232448",
           [&] { Launch(WriteDynamic, 1, 1, 232449, nullptr, 0); });
  LaunchConfig large = cooperative(133);
  large.shared = 200 << 10;
  Reported("cooperative", "a cooperative launch of 133 blocks, where 132 are resident",
           [&] { Launch(Trap, large, nullptr); });
  Reported("threads", "more than 16384 threads", [&] { Launch(Trap, cooperative(600), nullptr); });
}

const std::map<std::string, void (*)()> kCases = {
    {"clusters", TestClusters},
    {"conversions", TestConversions},
    {"coordinates", TestCoordinates},
    {"matrices", TestMatrices},
    {"reduction", TestReduction},
    {"reports", TestReports},
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
