#include "fake_runtime.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <random>
#include <set>
#include <thread>
#include <utility>

#include "fake_state.h"

namespace frnn {
namespace cuda {
namespace {

using runtime::Error;
using runtime::Stream;

std::recursive_mutex& Mutex() {
  static auto& mutex = *new std::recursive_mutex;
  return mutex;
}
using Lock = std::lock_guard<std::recursive_mutex>;

struct EventState;
struct Task {
  std::function<void()> work;  // or, of an event, null
  std::shared_ptr<EventState> event;
  uint64_t version = 0;
  bool waits = false;  // for the event; else it is recorded
  std::thread::id owner = std::this_thread::get_id();
};
using Tasks = std::vector<std::pair<Stream, Task>>;
struct Capture {
  Stream origin;
  std::set<Stream> streams;
  Tasks tasks;
};
struct EventState {
  uint64_t recorded = 0;
  std::weak_ptr<Capture> capture;
};
struct BlasState {
  Stream stream = nullptr;
  void* workspace = nullptr;
  size_t bytes = 0;
  int mode = 0;
};

// Queues, and how far events have come.
struct Machine {
  std::map<Stream, std::deque<Task>> queues;
  std::map<std::shared_ptr<EventState>, uint64_t> passed;

  // Runs until this stream has nothing left, or with none all of them.
  void Run(const Stream* until) {
    static std::mt19937 random(1);
    for (;;) {
      std::vector<Stream> ready;
      bool left = false;
      for (auto& [stream, queue] : queues) {
        if (queue.empty()) continue;
        left |= until == nullptr || stream == *until;
        const Task& task = queue.front();
        if (!task.waits || passed[task.event] >= task.version) ready.push_back(stream);
      }
      if (!left) return;
      if (ready.empty()) throw std::logic_error("streams wait for each other for ever");
      auto& queue = queues[ready[random() % ready.size()]];
      const Task task = std::move(queue.front());
      queue.pop_front();
      if (task.work) task.work();
      if (!task.work && !task.waits) {
        uint64_t& version = passed[task.event];
        version = std::max(version, task.version);
      }
    }
  }
};

template <class T>
using Objects = std::map<const void*, T>;

struct World {
  fake::State state;
  Machine machine;
  std::map<Stream, std::shared_ptr<Capture>> captures;
  Objects<std::shared_ptr<EventState>> events;
  Objects<std::shared_ptr<Tasks>> drawings, graphs;
  Objects<BlasState> handles;
  std::set<const void*> streams;
  std::map<uint32_t*, std::unique_ptr<uint32_t>> words;
  uintptr_t next = 0x1000;  // of handles, none of which is an address
};
World& The() {
  static auto& world = *new World;
  return world;
}

// A call that can fail.
void Called(const char* name) {
  auto& state = The().state;
  state.calls++;
  state.counts[name]++;
  if (state.log.size() < 1000) state.log.push_back(name);
  if (state.fail_at > 0 && --state.fail_at == 0)
    throw Error(std::string("fused_rnn: ") + name + ": as it was told to fail");
}
void Fault(const std::string& what) {
  The().state.faults.push_back(what);
  throw std::logic_error(what);
}

template <class Handle>
Handle Made(const char* kind) {
  The().state.live[kind]++;
  return reinterpret_cast<Handle>(The().next += 16);
}
template <class T>
T& Known(Objects<T>& objects, const void* handle, const char* kind) {
  const auto found = objects.find(handle);
  if (found == objects.end()) Fault(std::string("use of what is no ") + kind + ", or was freed");
  return found->second;
}
template <class Container>
void Gone(Container& objects, const void* handle, const char* kind) {
  if (objects.erase(handle) == 0)
    The().state.faults.push_back(std::string("freed what is no ") + kind);
  else
    The().state.live[kind]--;
}

thread_local char own_stream;
Stream OwnStream() { return &own_stream; }
void CheckStream(Stream stream) {
  const auto own = reinterpret_cast<uintptr_t>(stream) >= 0x1000000;  // of a thread
  if (stream != nullptr && !own && The().streams.count(stream) == 0)
    Fault("use of what is no stream, or was freed");
}

std::shared_ptr<Capture> CaptureOf(Stream stream) {
  const auto found = The().captures.find(stream);
  return found == The().captures.end() ? nullptr : found->second;
}
void Enqueue(Stream stream, Task task) {
  CheckStream(stream);
  if (const auto capture = CaptureOf(stream))
    capture->tasks.emplace_back(stream, std::move(task));
  else
    The().machine.queues[stream].push_back(std::move(task));
}

int LimitOf(Stream stream) {
  const auto& state = The().state;
  const char* few = std::getenv("FUSED_RNN_EMULATE_MULTIPROCESSORS");
  const int all = few != nullptr ? std::atoi(few) : state.multiprocessors;
  return state.limit ? std::min(all, state.limit(stream)) : all;
}

// What of this thread is queued in other streams than its own, and drops all of it.
size_t DropLeft() {
  size_t left = 0;
  for (auto& [stream, queue] : The().machine.queues) {
    const auto mine = [](const Task& task) { return task.owner == std::this_thread::get_id(); };
    const auto end = std::remove_if(queue.begin(), queue.end(), mine);
    left += std::count_if(end, queue.end(), [](const Task& task) { return bool(task.work); });
    queue.erase(end, queue.end());
  }
  return left;
}

}  // namespace

namespace fake {

State& GetState() { return The().state; }
void Alarm() {
  const Lock lock(Mutex());
  for (auto& [word, owner] : The().words) *word = 1;
}

void Start(const runtime::Shape& shape, const runtime::Grid& grid, Stream stream,
           std::function<void()> work) {
  const Lock lock(Mutex());
  Called("Start");
  const auto& state = The().state;
  const int64_t room = state.room >= 0 ? state.room : LimitOf(stream);
  const bool refused =
      shape.cluster > 1 && (shape.cluster > room || shape.cluster > state.taken_cluster);
  if (refused || (shape.together && int64_t{grid.x} * grid.y > room))
    throw runtime::DoesNotFit("fused_rnn: too many blocks", shape);
  if (shape.cluster > 1) The().state.counts["clusters"]++;
  if (shape.together) The().state.counts["together"]++;
  Enqueue(stream, {std::move(work), nullptr});
}

CurrentStream::CurrentStream(int) {}
Stream CurrentStream::get() const { return OwnStream(); }
void CurrentStream::Done() {
  const Lock lock(Mutex());
  done_ = true;
  const Stream own = OwnStream();
  try {
    The().machine.Run(&own);
  } catch (...) {
    DropLeft();
    throw;
  }
  if (DropLeft() > 0) Fault("work in a stream that the caller does not wait for");
}
CurrentStream::~CurrentStream() {
  if (done_) return;
  try {
    Done();
  } catch (const std::exception& error) {
    // An emulated kernel may well complain of a call that was cut off.
  }
}

}  // namespace fake

namespace runtime {

CudaDevice Facts(int) {
  const Lock lock(Mutex());
  Called("Facts");
  CudaDevice facts{The().state.multiprocessors, 9, 50 << 20, 227 << 10};  // an H100
  facts.product_bytes = 4096;
  return facts;
}
int Multiprocessors(Stream stream, int all) {
  const Lock lock(Mutex());
  return std::min(all, LimitOf(stream));
}
int64_t BlocksAtOnce(const Shape& shape, Stream, int multiprocessors) {
  const Lock lock(Mutex());
  Called("BlocksAtOnce");
  const int64_t told = The().state.blocks_at_once;
  if (shape.cluster > The().state.cluster) return 0;
  return told >= 0 ? told : multiprocessors / shape.cluster * shape.cluster;
}

uint32_t* NewSharedWord() {
  const Lock lock(Mutex());
  Called("NewSharedWord");
  auto word = std::make_unique<uint32_t>(0);
  uint32_t* const address = word.get();
  The().words[address] = std::move(word);
  The().state.live["word"]++;
  return address;
}
void Free(uint32_t* word) noexcept {
  const Lock lock(Mutex());
  The().words.erase(word);
  The().state.live["word"]--;
}

Stream NewStream() {
  const Lock lock(Mutex());
  Called("NewStream");
  const Stream stream = Made<Stream>("stream");
  The().streams.insert(stream);
  return stream;
}
void Free(Stream stream) noexcept {
  const Lock lock(Mutex());
  Gone(The().streams, stream, "stream");
}
Event NewEvent() {
  const Lock lock(Mutex());
  Called("NewEvent");
  const Event event = Made<Event>("event");
  The().events[event] = std::make_shared<EventState>();
  return event;
}
void Free(Event event) noexcept {
  const Lock lock(Mutex());
  Gone(The().events, event, "event");
}
void Record(Event event, Stream stream) {
  const Lock lock(Mutex());
  Called("Record");
  const auto state = Known(The().events, event, "event");
  state->capture = CaptureOf(stream);
  Enqueue(stream, {nullptr, state, ++state->recorded, false});
}
void Wait(Stream stream, Event event) {
  const Lock lock(Mutex());
  Called("Wait");
  const auto state = Known(The().events, event, "event");
  const auto capture = state->capture.lock();
  if (capture && !CaptureOf(stream)) {
    capture->streams.insert(stream);
    The().captures[stream] = capture;
  }
  if (capture != CaptureOf(stream)) throw Error("fused_rnn: a capture depends on what is outside");
  Enqueue(stream, {nullptr, state, state->recorded, true});
}
void Synchronize(Stream stream) noexcept {
  const Lock lock(Mutex());
  if (CaptureOf(stream)) return;
  try {
    The().machine.Run(&stream);
  } catch (const std::exception&) {
  }
}

void Fill(Stream stream, void* data, int byte, size_t bytes) {
  const Lock lock(Mutex());
  Called("Fill");
  Enqueue(stream, {[=] { std::memset(data, byte, bytes); }, nullptr});
}

bool IsCapturing(Stream stream) {
  const Lock lock(Mutex());
  Called("IsCapturing");
  return CaptureOf(stream) != nullptr;
}
void BeginCapture(Stream stream) {
  const Lock lock(Mutex());
  Called("BeginCapture");
  CheckStream(stream);
  if (CaptureOf(stream)) throw Error("fused_rnn: a capture of a capture");
  auto capture = std::make_shared<Capture>();
  capture->origin = stream;
  capture->streams.insert(stream);
  The().captures[stream] = capture;
}
Drawing EndCapture(Stream stream) {
  const Lock lock(Mutex());
  const auto capture = CaptureOf(stream);
  if (!capture || capture->origin != stream) Fault("the end of what is no capture");
  for (const Stream of : capture->streams) The().captures.erase(of);
  Called("EndCapture");
  for (const Stream of : capture->streams) {
    if (of == stream) continue;
    const Task* last = nullptr;
    bool joined = true;
    for (const auto& [at, task] : capture->tasks) {
      if (at == of) last = &task, joined = false;
      if (at == stream && last && task.waits && task.event == last->event &&
          task.version == last->version)
        joined = true;
    }
    if (!joined) throw Error("fused_rnn: a capture with a stream that was not joined");
  }
  const Drawing drawing = Made<Drawing>("drawing");
  The().drawings[drawing] = std::make_shared<Tasks>(std::move(capture->tasks));
  return drawing;
}
size_t Nodes(Drawing drawing) {
  const Lock lock(Mutex());
  Called("Nodes");
  return Known(The().drawings, drawing, "drawing")->size();
}
Graph Instantiate(Drawing drawing) {
  const Lock lock(Mutex());
  Called("Instantiate");
  const auto tasks = Known(The().drawings, drawing, "drawing");
  const Graph graph = Made<Graph>("graph");
  The().graphs[graph] = tasks;
  return graph;
}
void Launch(Graph graph, Stream stream) {
  const Lock lock(Mutex());
  Called("Launch");
  const auto tasks = Known(The().graphs, graph, "graph");
  const auto replay = [tasks] {
    Machine machine;
    for (const auto& [at, task] : *tasks) machine.queues[at].push_back(task);
    machine.Run(nullptr);
  };
  Enqueue(stream, {replay, nullptr});
}
void Free(Drawing drawing) noexcept {
  const Lock lock(Mutex());
  Gone(The().drawings, drawing, "drawing");
}
void Free(Graph graph) noexcept {
  const Lock lock(Mutex());
  Gone(The().graphs, graph, "graph");
}

Blas NewBlas() {
  const Lock lock(Mutex());
  Called("NewBlas");
  const Blas blas = Made<Blas>("blas");
  The().handles[blas];
  return blas;
}
void Free(Blas blas) noexcept {
  const Lock lock(Mutex());
  Gone(The().handles, blas, "blas");
}
void SetStream(Blas blas, Stream stream) {
  const Lock lock(Mutex());
  Called("SetStream");
  Known(The().handles, blas, "blas") = {stream};
}
void SetWorkspace(Blas blas, void* data, size_t bytes) {
  const Lock lock(Mutex());
  Called("SetWorkspace");
  auto& state = Known(The().handles, blas, "blas");
  state.workspace = data, state.bytes = bytes;
}
void SetMathMode(Blas blas, int mode) {
  const Lock lock(Mutex());
  Called("SetMathMode");
  Known(The().handles, blas, "blas").mode = mode;
}
void Multiply(Blas blas, const Gemm& gemm) {
  const Lock lock(Mutex());
  Called("Multiply");
  const BlasState state = Known(The().handles, blas, "blas");
  if (state.workspace == nullptr || state.bytes == 0) Fault("a product without a workspace");
  if (state.mode != 16) Fault("a product that may round its partial sums");
  // Scalars are read by the call, all else when it runs.
  const bool wide = gemm.compute == 70;
  const double beta =
      wide ? *static_cast<const double*>(gemm.beta) : double(*static_cast<const float*>(gemm.beta));
  const auto work = [=] {
    std::memset(state.workspace, 0xFF, state.bytes);  // it is the product's alone
    const float beta32 = float(beta);
    Gemm now = gemm;
    now.alpha = nullptr;  // 1
    now.beta = wide ? static_cast<const void*>(&beta) : &beta32;
    fake::Compute(now);
  };
  Enqueue(state.stream, {work, nullptr});
}

}  // namespace runtime
}  // namespace cuda
}  // namespace frnn

// For tests of the whole engine, whose library is torch's to load.
#define EXPORTED extern "C" __attribute__((visibility("default")))
using frnn::cuda::fake::GetState;
EXPORTED void frnn_fake_fail_at(int call) { GetState().fail_at = call; }
EXPORTED int frnn_fake_calls() { return GetState().calls; }
EXPORTED int frnn_fake_live(const char* kind) { return GetState().live[kind]; }
EXPORTED int frnn_fake_faults() { return int(GetState().faults.size()); }
EXPORTED void frnn_fake_blocks(int told, int room) {
  GetState().blocks_at_once = told, GetState().room = room;
}
EXPORTED void frnn_fake_clusters(unsigned told, unsigned taken) {
  GetState().cluster = told, GetState().taken_cluster = taken;
}
EXPORTED void frnn_fake_alarm() { frnn::cuda::fake::Alarm(); }
EXPORTED int frnn_fake_count(const char* name) { return GetState().counts[name]; }
