#include "cuda/graph.h"

#include <list>

#include "cuda/device.h"

namespace frnn {
namespace cuda {
namespace {

cudaStream_t Stream(void* stream) { return static_cast<cudaStream_t>(stream); }

// `after` goes on once `before` has done what it was given so far.
void Order(void* before, void* after) {
  cudaEvent_t event;
  Check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  const cudaError_t recorded = cudaEventRecord(event, Stream(before));
  const cudaError_t waits =
      recorded == cudaSuccess ? cudaStreamWaitEvent(Stream(after), event, 0) : recorded;
  cudaEventDestroy(event);  // takes effect when the event has passed
  Check(waits, "ordering two streams");
}

constexpr size_t kGraphs = 64;  // kept per thread

struct Entry {
  std::string key;
  cudaGraphExec_t graph = nullptr;
  cudaStream_t stream = nullptr;  // where it was launched last
  bool refused = false;           // could not be captured
};

// The work as an executable graph, or null if it can not be captured.
cudaGraphExec_t Capture(const CudaCall& call, const std::function<void(const CudaCall&)>& work) {
  CudaCall captured = call;
  captured.streams[0] = call.capture;
  // Handles first: they may allocate, which a capture forbids.
  captured.Queue(1);
  captured.Queue(0);
  const cudaStream_t stream = Stream(call.capture);
  Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  bool failed = false;
  try {
    work(captured);
  } catch (const std::exception&) {
    failed = true;  // the capture is void, and so is the error: the work is run outside of it
  }
  cudaGraph_t graph = nullptr;
  failed |= cudaStreamEndCapture(stream, &graph) != cudaSuccess;
  cudaGraphExec_t executable = nullptr;
  if (!failed && cudaGraphInstantiate(&executable, graph, 0) != cudaSuccess) executable = nullptr;
  if (graph != nullptr) cudaGraphDestroy(graph);
  if (executable == nullptr) cudaGetLastError();  // clears it
  return executable;
}

}  // namespace

void Fork(const CudaCall& call) { Order(call.streams[0], call.streams[1]); }
void Join(const CudaCall& call) { Order(call.streams[1], call.streams[0]); }

void RunAsGraph(const CudaCall& call, std::string key,
                const std::function<void(const CudaCall&)>& work) {
  cudaStreamCaptureStatus status;
  Check(cudaStreamIsCapturing(Stream(call.streams[0]), &status), "cudaStreamIsCapturing");
  if (status != cudaStreamCaptureStatusNone) return work(call);

  // Most recently used first. Never destroyed: at exit the driver may be gone before.
  thread_local auto& entries = *new std::list<Entry>;
  auto entry = entries.begin();
  while (entry != entries.end() && entry->key != key) ++entry;
  if (entry == entries.end()) {
    entries.emplace_front();
    entries.front().key = std::move(key);
    if (entries.size() > kGraphs) {
      if (const Entry& oldest = entries.back(); oldest.graph != nullptr) {
        cudaStreamSynchronize(oldest.stream);
        cudaGraphExecDestroy(oldest.graph);
      }
      entries.pop_back();
    }
    return work(call);
  }
  entries.splice(entries.begin(), entries, entry);
  if (entry->graph == nullptr && !entry->refused) {
    entry->graph = Capture(call, work);
    entry->refused = entry->graph == nullptr;
  }
  if (entry->refused) return work(call);
  entry->stream = Stream(call.streams[0]);
  Check(cudaGraphLaunch(entry->graph, entry->stream), "cudaGraphLaunch");
}

}  // namespace cuda
}  // namespace frnn
