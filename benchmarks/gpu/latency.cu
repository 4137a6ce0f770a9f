// What a step costs before any arithmetic: `latency PART` prints one JSON line per measurement.
//
// Every wait is bounded: a thread that has waited too long sets `gave_up` and waits no more, so that
// a kernel ends whatever happens. Figures are medians over kRuns launches.
#include <cooperative_groups.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "cuda/primitives.h"
#include "primitives.h"

namespace cg = cooperative_groups;
using namespace frnn::cuda;

namespace {

constexpr int kWarmRuns = 3, kRuns = 9;
constexpr int kRounds = 4000;  // barriers or messages in one launch
constexpr int kThreads = 256;
constexpr unsigned kPatience = 1u << 20;  // polls of one thread in one launch, about a second
constexpr size_t kBufferBytes = 256u << 20;
constexpr int kMostShared = 200 << 10;  // bytes that keep any other CTA from the SM

__device__ unsigned gave_up;

class Patience {
 public:
  // Polls until ready() holds or patience is at its end.
  template <class Ready>
  __device__ void Await(Ready ready) {
    while (!ready()) {
      if (++polls_ >= kPatience) {
        gave_up = 1;
        return;
      }
    }
  }

 private:
  unsigned polls_ = 0;
};

// Counters only grow, so "arrived" is a comparison that survives overflow.
__device__ bool Reached(unsigned value, unsigned target) {
  return static_cast<int>(value - target) >= 0;
}

// ---- barriers over a grid -----------------------------------------------------------------------

__global__ void CooperativeGroups(unsigned*, int rounds) {
  for (int i = 0; i < rounds; i++) cg::this_grid().sync();
}

// One counter that every CTA adds to.
__global__ void Counter(unsigned* counter, int rounds) {
  Patience patience;
  for (int i = 1; i <= rounds; i++) {
    __syncthreads();
    if (threadIdx.x == 0) {
      ReduceAddRelease(counter, 1);
      patience.Await([&] { return Reached(LoadAcquire(counter), i * gridDim.x); });
    }
    __syncthreads();
  }
}

// One word per CTA, read by a thread per word.
__global__ void Flags(unsigned* flags, int rounds) {
  Patience patience;
  for (int i = 1; i <= rounds; i++) {
    __syncthreads();
    if (threadIdx.x == 0) StoreRelease(flags + blockIdx.x, i);
    if (threadIdx.x < gridDim.x) {
      patience.Await([&] { return Reached(LoadAcquire(flags + threadIdx.x), i); });
    }
    __syncthreads();
  }
}

__global__ void SyncThreads(unsigned*, int rounds) {
  for (int i = 0; i < rounds; i++) __syncthreads();
}

// ---- clusters, from sm_90 on --------------------------------------------------------------------

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FRNN_CLUSTERS 1
#endif

__global__ void ClusterBarrier(unsigned*, int rounds) {
#ifdef FRNN_CLUSTERS
  for (int i = 0; i < rounds; i++) ClusterSync();
#endif
}

// A word to and fro between CTA 0 of a cluster and CTA `other`: stored into the peer's shared
// memory, polled in one's own.
__global__ void DistributedShared(unsigned*, int rounds, int other) {
#ifdef FRNN_CLUSTERS
  __shared__ unsigned word;
  if (threadIdx.x == 0) word = 0;
  ClusterSync();
  const unsigned rank = ClusterRank();
  if (threadIdx.x == 0 && (rank == 0 || rank == other)) {
    Patience patience;
    volatile unsigned* mine = &word;
    volatile unsigned* theirs = MapShared(&word, rank == 0 ? other : 0);
    for (int i = 1; i <= rounds; i++) {
      if (rank == 0) *theirs = i;
      patience.Await([&] { return Reached(*mine, i); });
      if (rank != 0) *theirs = i;
    }
  }
  ClusterSync();  // a peer's memory is gone when it exits
#endif
}

// The same by st.async, which arrives at an mbarrier.
__global__ void AsyncStore(unsigned*, int rounds, int other) {
#ifdef FRNN_CLUSTERS
  __shared__ __align__(16) unsigned word;
  __shared__ uint64_t arrived;
  if (threadIdx.x == 0) MbarrierInit(&arrived, 1);
  MbarrierInitFence();
  ClusterSync();
  const unsigned rank = ClusterRank();
  if (threadIdx.x == 0 && (rank == 0 || rank == other)) {
    Patience patience;
    const unsigned peer = rank == 0 ? other : 0;
    for (unsigned i = 0; i < rounds; i++) {
      MbarrierExpectTx(&arrived, 4);
      if (rank == 0) StoreAsync(&word, i, &arrived, peer);
      patience.Await([&] { return MbarrierTryWait(&arrived, i & 1); });
      if (rank != 0) StoreAsync(&word, i, &arrived, peer);
    }
  }
  ClusterSync();
#endif
}

// ---- through L2 ---------------------------------------------------------------------------------

// A word to and fro between CTA 0 and CTA `other`; half a round is what a published word costs its
// reader. The two words lie in lines of their own.
template <bool kOrdered>
__global__ void PingPong(unsigned* words, int rounds, int other) {
  const bool first = blockIdx.x == 0;
  if (threadIdx.x != 0 || (!first && blockIdx.x != other)) return;
  Patience patience;
  unsigned *mine = words + (first ? 0 : 64), *theirs = words + (first ? 64 : 0);
  auto send = [&](int i) { kOrdered ? StoreRelease(mine, i) : StoreRelaxed(mine, i); };
  auto read = [&] { return kOrdered ? LoadAcquire(theirs) : LoadRelaxed(theirs); };
  for (int i = 1; i <= rounds; i++) {
    if (first) send(i);
    patience.Await([&] { return Reached(read(), i); });
    if (!first) send(i);
  }
}

// Loads in flight per thread.
constexpr int kFlight = 4;

// Every CTA reads the same `bytes`, `rounds` times.
__global__ void Broadcast(const uint4* data, int bytes, int rounds, unsigned* sink) {
  const int vectors = bytes / 16;
  unsigned sum = 0;
  for (int round = 0; round < rounds; round++) {
    for (int i = threadIdx.x; i < vectors; i += blockDim.x * kFlight) {
      uint4 v[kFlight];
#pragma unroll
      for (int k = 0; k < kFlight; k++) {
        v[k] = LoadRelaxed(data + min(i + k * static_cast<int>(blockDim.x), vectors - 1));
      }
#pragma unroll
      for (int k = 0; k < kFlight; k++) sum ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }
  }
  if (sum == 12345) *sink = sum;  // so that the loads stay
}

// A step's exchange of h without its arithmetic: each CTA publishes its share of `words`, then polls
// them all. Words of all ones are not there yet; each step has a slot of its own.
__global__ void Exchange(unsigned* slots, int words, int steps) {
  const int share = words / gridDim.x, vectors = words / 4;
  Patience patience;
  for (int t = 0; t < steps; t++) {
    unsigned* slot = slots + static_cast<size_t>(t) * words;
    for (int i = threadIdx.x; i < share; i += blockDim.x) {
      StoreRelaxed(slot + blockIdx.x * share + i, static_cast<unsigned>(t));
    }
    const uint4* data = reinterpret_cast<const uint4*>(slot);
    for (int i = threadIdx.x; i < vectors; i += blockDim.x * kFlight) {
      patience.Await([&] {
        uint4 v[kFlight];
#pragma unroll
        for (int k = 0; k < kFlight; k++) {
          v[k] = LoadRelaxed(data + min(i + k * static_cast<int>(blockDim.x), vectors - 1));
        }
        bool there = true;
#pragma unroll
        for (int k = 0; k < kFlight; k++) {
          there &= v[k].x != ~0u && v[k].y != ~0u && v[k].z != ~0u && v[k].w != ~0u;
        }
        return there;
      });
    }
    __syncthreads();
  }
}

// ---- launches and tensor cores ------------------------------------------------------------------

__global__ void Empty(unsigned*) {}

// Products of kTiles resident tiles of W, 16 x 16, with kColumns of 8 batch rows each.
template <int kTiles, int kColumns>
__global__ void __launch_bounds__(kThreads, 1) Mma(unsigned* sink, int rounds) {
  uint32_t a[kTiles][4], b[2] = {threadIdx.x, threadIdx.x * 3};
  float d[kTiles][kColumns][4] = {};
#pragma unroll
  for (int i = 0; i < kTiles; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) a[i][j] = threadIdx.x * (4 * i + j);
  }
  for (int round = 0; round < rounds; round++) {
#pragma unroll
    for (int i = 0; i < kTiles; i++) {
#pragma unroll
      for (int n = 0; n < kColumns; n++) MmaBf16(d[i][n], a[i], b[0], b[1]);
    }
    b[0] ^= round;
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kTiles; i++) {
#pragma unroll
    for (int n = 0; n < kColumns; n++) sum += d[i][n][0] + d[i][n][1] + d[i][n][2] + d[i][n][3];
  }
  if (sum == 12345.f) *sink = 1;
}

// ---- host ---------------------------------------------------------------------------------------

struct Device {
  int sms = 0;
  bool clusters = false;
  int shared = 0;  // bytes that a CTA may ask for
  cudaStream_t stream = nullptr;
  unsigned* buffer = nullptr;
};
Device device;

void Need(cudaError_t error) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "%s\n", cudaGetErrorString(error));
  exit(1);
}

struct Launch {
  Launch(int ctas, int threads, int shared = 0, int cluster = 1, bool cooperative = false) {
    config.gridDim = dim3(ctas);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = device.stream;
    config.attrs = attributes;
    if (cluster > 1) {
      auto& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    }
    if (cooperative) {
      auto& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
  }
  Launch(const Launch&) = delete;  // config points at attributes

  template <class... Args>
  cudaError_t operator()(void (*kernel)(Args...), std::common_type_t<Args>... args) const {
    return cudaLaunchKernelEx(&config, kernel, args...);
  }

  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2] = {};
};

// One line of output: {"kind": "...", SETTING, "unit": "...", "value": 1.5} or an "error".
class Figure {
 public:
  Figure(const char* kind, const char* unit) : kind_(kind), unit_(unit) {}
  Figure& With(const char* name, int value) {
    settings_ += ", \"" + std::string(name) + "\": " + std::to_string(value);
    return *this;
  }
  void Print(double value) const { Line("\"value\": " + std::to_string(value)); }
  void Fail(const char* error) const { Line("\"error\": \"" + std::string(error) + "\""); }

  // Time run() and print what of_us makes of its microseconds. prepare() is not timed.
  void Time(
      const std::function<cudaError_t()>& run, const std::function<double(double)>& of_us,
      const std::function<void()>& prepare = [] {}) const {
    cudaEvent_t start, end;
    Need(cudaEventCreate(&start));
    Need(cudaEventCreate(&end));
    std::vector<float> us;
    cudaError_t error = cudaSuccess;
    for (int i = 0; i < kWarmRuns + kRuns && error == cudaSuccess; i++) {
      prepare();
      Need(cudaEventRecord(start, device.stream));
      error = run();
      Need(cudaEventRecord(end, device.stream));
      if (error == cudaSuccess) error = cudaStreamSynchronize(device.stream);
      float ms = 0;
      if (error == cudaSuccess) error = cudaEventElapsedTime(&ms, start, end);
      if (i >= kWarmRuns) us.push_back(ms * 1e3f);
    }
    unsigned stuck = 0;
    if (error == cudaSuccess) error = cudaMemcpyFromSymbol(&stuck, gave_up, sizeof stuck);
    if (error != cudaSuccess) {
      cudaGetLastError();  // a launch that was refused; what spoils the context fails again soon
      Fail(cudaGetErrorString(error));
    } else if (stuck) {
      stuck = 0;
      Need(cudaMemcpyToSymbol(gave_up, &stuck, sizeof stuck));
      Fail("a wait gave up");
    } else {
      std::nth_element(us.begin(), us.begin() + us.size() / 2, us.end());
      Print(of_us(us[us.size() / 2]));
    }
    Need(cudaEventDestroy(start));
    Need(cudaEventDestroy(end));
  }

 private:
  void Line(const std::string& last) const {
    printf("{\"kind\": \"%s\"%s, \"unit\": \"%s\", %s}\n", kind_, settings_.c_str(), unit_,
           last.c_str());
    fflush(stdout);
  }
  const char *kind_, *unit_;
  std::string settings_;
};

double NsPerRound(double us) { return us * 1e3 / kRounds; }
double NsOneWay(double us) { return us * 1e3 / kRounds / 2; }
void Zero() { Need(cudaMemsetAsync(device.buffer, 0, 1 << 20, device.stream)); }

template <class Kernel>
void AllowLargeClusters(Kernel kernel) {
  Need(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
}
template <class Kernel>
void AllowShared(Kernel kernel, int bytes) {
  Need(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// Clusters that are co-resident, by their size and the shared memory of a CTA.
void Clusters() {
  if (!device.clusters) return;
  AllowShared(ClusterBarrier, std::min(kMostShared, device.shared));
  AllowLargeClusters(ClusterBarrier);
  for (int kb : {0, 100, 200}) {
    if (kb << 10 > device.shared) continue;
    for (int size : {1, 2, 4, 8, 16}) {
      Figure figure("co-resident", "clusters");
      figure.With("C", size).With("KB", kb);
      Launch launch(size * device.sms, kThreads, kb << 10);
      launch.attributes[0].id = cudaLaunchAttributeClusterDimension;
      launch.attributes[0].val.clusterDim = {static_cast<unsigned>(size), 1, 1};
      launch.config.numAttrs = 1;
      int found = 0;
      const cudaError_t error =
          cudaOccupancyMaxActiveClusters(&found, ClusterBarrier, &launch.config);
      if (error == cudaSuccess) {
        figure.Print(found);
      } else {
        cudaGetLastError();
        figure.Fail(cudaGetErrorString(error));
      }
    }
  }
}

void Barriers() {
  using Kernel = void (*)(unsigned*, int);
  const std::pair<const char*, Kernel> kinds[] = {
      {"grid.sync", CooperativeGroups}, {"counter", Counter}, {"flags", Flags}};
  for (int ctas : {32, 66, 128, device.sms}) {
    if (ctas > device.sms) continue;
    const Launch launch(ctas, kThreads, 0, 1, true);
    for (auto [name, kernel] : kinds) {
      Figure(name, "ns")
          .With("ctas", ctas)
          .Time([&, k = kernel] { return launch(k, device.buffer, kRounds); }, NsPerRound, Zero);
    }
  }
  const Launch one(1, kThreads);
  Figure("syncthreads", "ns")
      .Time([&] { return one(SyncThreads, device.buffer, kRounds); }, NsPerRound);
  if (!device.clusters) return;
  AllowLargeClusters(ClusterBarrier);
  for (int size : {2, 4, 8, 16}) {
    for (int clusters : {1, 4}) {
      const Launch launch(size * clusters, kThreads, 0, size);
      Figure("cluster", "ns")
          .With("C", size)
          .With("clusters", clusters)
          .Time([&] { return launch(ClusterBarrier, device.buffer, kRounds); }, NsPerRound);
    }
  }
}

void OneWay() {
  using Kernel = void (*)(unsigned*, int, int);
  const int shared = std::min(kMostShared, device.shared);  // one CTA per SM
  const std::pair<const char*, Kernel> kinds[] = {{"L2, relaxed", PingPong<false>},
                                                  {"L2, release and acquire", PingPong<true>}};
  for (auto [name, kernel] : kinds) {
    AllowShared(kernel, shared);
    const Launch launch(device.sms, 32, shared, 1, true);
    for (int other : {1, 2, 7, 16, 33, 64, 100, 131}) {
      if (other >= device.sms) continue;
      Figure(name, "ns")
          .With("to", other)
          .Time([&, k = kernel] { return launch(k, device.buffer, kRounds, other); }, NsOneWay,
                Zero);
    }
  }
  if (!device.clusters) return;
  const std::pair<const char*, Kernel> cluster_kinds[] = {
      {"distributed shared memory", DistributedShared}, {"st.async", AsyncStore}};
  for (auto [name, kernel] : cluster_kinds) {
    AllowLargeClusters(kernel);
    for (int size : {2, 4, 8, 16}) {
      const Launch launch(size, 32, 0, size);
      Figure(name, "ns")
          .With("C", size)
          .Time([&, k = kernel] { return launch(k, device.buffer, kRounds, size - 1); }, NsOneWay);
    }
  }
}

void Broadcasts() {
  Zero();
  for (int ctas : {32, 64, 128}) {
    if (ctas > device.sms) continue;
    const Launch launch(ctas, kThreads);
    for (int kb : {32, 64, 128, 256, 512}) {
      const int bytes = kb << 10, rounds = (32 << 20) / bytes;
      Figure("all read the same", "TB/s")
          .With("ctas", ctas)
          .With("KB", kb)
          .Time(
              [&] {
                return launch(Broadcast, reinterpret_cast<const uint4*>(device.buffer), bytes,
                              rounds, device.buffer);
              },
              [&](double us) { return 1e-6 * ctas * bytes * rounds / us; });
    }
  }
}

void Exchanges() {
  constexpr int kSteps = 256;
  for (int ctas : {16, 32, 64, 128}) {
    if (ctas > device.sms) continue;
    const Launch launch(ctas, kThreads, 0, 1, true);
    for (int kb : {4, 16, 32, 64, 128}) {
      const int words = kb * 256;
      Figure("publish and poll", "ns per step")
          .With("ctas", ctas)
          .With("KB", kb)
          .Time([&] { return launch(Exchange, device.buffer, words, kSteps); },
                [](double us) { return us * 1e3 / kSteps; },
                [&] {
                  Need(cudaMemsetAsync(device.buffer, 0xff, size_t{4} * words * kSteps,
                                       device.stream));
                });
    }
  }
}

void Launches() {
  constexpr int kLaunches = 1000;
  for (int ctas : {1, device.sms}) {
    const Launch launch(ctas, kThreads);
    auto all = [&] {
      cudaError_t error = cudaSuccess;
      for (int i = 0; i < kLaunches && error == cudaSuccess; i++) {
        error = launch(Empty, device.buffer);
      }
      return error;
    };
    auto per_kernel = [](double us) { return us / kLaunches; };
    Figure("stream", "us").With("ctas", ctas).Time(all, per_kernel);
    cudaGraph_t graph;
    cudaGraphExec_t runnable;
    Need(cudaStreamBeginCapture(device.stream, cudaStreamCaptureModeThreadLocal));
    Need(all());
    Need(cudaStreamEndCapture(device.stream, &graph));
    Need(cudaGraphInstantiate(&runnable, graph, 0));
    Figure("graph", "us")
        .With("ctas", ctas)
        .Time([&] { return cudaGraphLaunch(runnable, device.stream); }, per_kernel);
    Need(cudaGraphExecDestroy(runnable));
    Need(cudaGraphDestroy(graph));
  }
}

template <int kTiles, int kColumns>
void MmaRate() {
  const int rounds = 400000 / (kTiles * kColumns), warps = kThreads / 32;
  const double flops = 2.0 * 16 * 16 * 8 * kTiles * kColumns * rounds * warps * device.sms;
  const Launch launch(device.sms, kThreads);
  Figure("m16n8k16 bf16", "TFLOP/s")
      .With("tiles", kTiles)
      .With("columns", kColumns)
      .Time([&] { return launch(Mma<kTiles, kColumns>, device.buffer, rounds); },
            [&](double us) { return 1e-6 * flops / us; });
}

void MmaRates() {
  MmaRate<4, 1>();
  MmaRate<16, 1>();
  MmaRate<16, 2>();
  MmaRate<8, 4>();
  MmaRate<4, 8>();
}

// An idle card runs at a fifth of its clock.
void WarmUp() {
  const Launch launch(device.sms, kThreads);
  Need(launch(Mma<4, 4>, device.buffer, 1000000));
  Need(cudaStreamSynchronize(device.stream));
}

}  // namespace

int main(int argc, char** argv) {
  const std::pair<const char*, void (*)()> parts[] = {
      {"clusters", Clusters},    {"barrier", Barriers}, {"oneway", OneWay}, {"exchange", Exchanges},
      {"broadcast", Broadcasts}, {"launch", Launches},  {"mma", MmaRates}};
  for (auto [name, run] : parts) {
    if (argc != 2 || std::strcmp(argv[1], name) != 0) continue;
    cudaDeviceProp properties;
    Need(cudaGetDeviceProperties(&properties, 0));
    device.sms = properties.multiProcessorCount;
    device.clusters = properties.major >= 9;
    device.shared = static_cast<int>(properties.sharedMemPerBlockOptin);
    Need(cudaStreamCreateWithFlags(&device.stream, cudaStreamNonBlocking));
    Need(cudaMalloc(&device.buffer, kBufferBytes));
    WarmUp();
    run();
    return 0;
  }
  fprintf(stderr, "latency clusters|barrier|oneway|exchange|broadcast|launch|mma\n");
  return 2;
}
