// CUDA's runtime, and cuBLAS through the copy that torch has loaded: symbols are found among torch's
// libraries, and no header of cuBLAS is needed.
#include "cuda/runtime.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

// cublas_api.h of CUDA 12 and 13. Enumerations travel as int.
extern "C" {
int cublasCreate_v2(void** handle);
int cublasDestroy_v2(void* handle);
int cublasSetStream_v2(void* handle, cudaStream_t stream);
int cublasSetWorkspace_v2(void* handle, void* data, size_t bytes);
int cublasSetMathMode(void* handle, int mode);
int cublasGemmEx_64(void* handle, int op_a, int op_b, int64_t m, int64_t n, int64_t k,
                    const void* alpha, const void* a, int type_a, int64_t lda, const void* b,
                    int type_b, int64_t ldb, const void* beta, void* c, int type_c, int64_t ldc,
                    int compute, int algorithm);
int cublasGemmStridedBatchedEx_64(void* handle, int op_a, int op_b, int64_t m, int64_t n, int64_t k,
                                  const void* alpha, const void* a, int type_a, int64_t lda,
                                  long long stride_a, const void* b, int type_b, int64_t ldb,
                                  long long stride_b, const void* beta, void* c, int type_c,
                                  int64_t ldc, long long stride_c, int64_t count, int compute,
                                  int algorithm);
}

namespace frnn {
namespace cuda {
namespace runtime {
namespace {

std::string Text(const char* what, cudaError_t status) {
  return std::string("fused_rnn: ") + what + ": " + cudaGetErrorString(status);
}
void Check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or whoever asks next would take it for their own
  throw Error(Text(what, status));
}
void CheckBlas(int status, const char* what) {
  if (status != 0)
    throw Error(std::string("fused_rnn: ") + what + " failed, cuBLAS status " +
                std::to_string(status));
}
void Ignore(cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError();
}

cudaStream_t Of(Stream stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t Of(Event event) { return reinterpret_cast<cudaEvent_t>(event); }
cudaGraph_t Of(Drawing drawing) { return reinterpret_cast<cudaGraph_t>(drawing); }
cudaGraphExec_t Of(Graph graph) { return reinterpret_cast<cudaGraphExec_t>(graph); }

// What is made while somebody captures has nothing to do with their capture.
class Aside {
 public:
  Aside() { Ignore(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~Aside() { Ignore(cudaThreadExchangeStreamCaptureMode(&mode_)); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Whether the card takes blocks and clusters like these.
cudaError_t Allow(const Shape& shape) {
  cudaError_t status = cudaSuccess;
  if (shape.shared > 0)
    status = cudaFuncSetAttribute(shape.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  int(shape.shared));
  if (shape.cluster > 8 && status == cudaSuccess)
    status = cudaFuncSetAttribute(shape.kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return status;
}

struct Config {
  Config(const Shape& shape, const Grid& grid, Stream stream) {
    value.gridDim = dim3(grid.x, grid.y), value.blockDim = dim3(shape.block_x, shape.block_y);
    value.dynamicSmemBytes = shape.shared, value.stream = Of(stream), value.attrs = attributes;
    if (shape.together) {
      attributes[value.numAttrs].id = cudaLaunchAttributeCooperative;
      attributes[value.numAttrs++].val.cooperative = 1;
    }
    if (shape.cluster > 1) {
      attributes[value.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[value.numAttrs++].val.clusterDim = {shape.cluster, 1, 1};
    }
  }
  Config(const Config&) = delete;
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t value{};
};

// A function of the driver, or null where it is too old for it.
template <class F>
F* Driver(const char* name, unsigned version) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  if (cudaGetDriverEntryPointByVersion(name, &found, version, cudaEnableDefault, &result) !=
          cudaSuccess ||
      result != cudaDriverEntryPointSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return reinterpret_cast<F*>(found);
}

}  // namespace

CudaDevice Facts(int device) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    Check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
  };
  CudaDevice facts{attribute(cudaDevAttrMultiProcessorCount),
                   attribute(cudaDevAttrComputeCapabilityMajor), attribute(cudaDevAttrL2CacheSize),
                   attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  // What the manual of cuBLAS recommends as a workspace.
  facts.product_bytes = int64_t{facts.major < 9 ? 4 : facts.major < 12 ? 32 : 12} << 20;
  return facts;
}

// MPS limits what the device says it has, a green context what its streams may use.
int Multiprocessors(Stream stream, int all) {
  using GetContext = CUresult(CUstream, CUcontext*, CUgreenCtx*);
  using GetGreen = CUresult(CUgreenCtx, CUdevResource*, CUdevResourceType);
  static GetContext* const context_of = Driver<GetContext>("cuStreamGetCtx", 12050);
  static GetGreen* const resource_of = Driver<GetGreen>("cuGreenCtxGetDevResource", 12040);
  if (context_of == nullptr || resource_of == nullptr) return all;
  CUcontext context = nullptr;
  CUgreenCtx green = nullptr;
  CUdevResource resource{};
  if (context_of(Of(stream), &context, &green) != CUDA_SUCCESS || green == nullptr ||
      resource_of(green, &resource, CU_DEV_RESOURCE_TYPE_SM) != CUDA_SUCCESS)
    return all;
  return std::min(all, int(resource.sm.smCount));
}

int64_t BlocksAtOnce(const Shape& shape, Stream stream, int multiprocessors) {
  int on_one = 0, clusters = 0;
  cudaError_t status = Allow(shape);
  if (status == cudaSuccess)
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &on_one, shape.kernel, int(shape.block_x * shape.block_y), shape.shared);
  const int64_t blocks = int64_t(on_one) * multiprocessors;
  if (shape.cluster == 1) {
    Check(status, "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    return blocks;
  }
  const Config config(shape, {shape.cluster}, stream);
  if (status == cudaSuccess)
    status = cudaOccupancyMaxActiveClusters(&clusters, shape.kernel, &config.value);
  Ignore(status);  // a card that refuses such clusters has none
  return std::min(blocks, int64_t(clusters) * shape.cluster);
}

uint32_t* NewSharedWord() {
  const Aside aside;
  void* word = nullptr;
  Check(cudaHostAlloc(&word, sizeof(uint32_t), cudaHostAllocMapped | cudaHostAllocPortable),
        "cudaHostAlloc");
  return new (word) uint32_t(0);
}
void Free(uint32_t* word) noexcept { Ignore(cudaFreeHost(word)); }

Stream NewStream() {
  const Aside aside;
  cudaStream_t stream;
  Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  return stream;
}
void Free(Stream stream) noexcept { Ignore(cudaStreamDestroy(Of(stream))); }
Event NewEvent() {
  const Aside aside;
  cudaEvent_t event;
  Check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  return reinterpret_cast<Event>(event);
}
void Free(Event event) noexcept { Ignore(cudaEventDestroy(Of(event))); }
void Record(Event event, Stream stream) {
  Check(cudaEventRecord(Of(event), Of(stream)), "cudaEventRecord");
}
void Wait(Stream stream, Event event) {
  Check(cudaStreamWaitEvent(Of(stream), Of(event), 0), "cudaStreamWaitEvent");
}
void Synchronize(Stream stream) noexcept { Ignore(cudaStreamSynchronize(Of(stream))); }

void Start(const Shape& shape, const Grid& grid, Stream stream, void** arguments) {
  cudaError_t status = Allow(shape);
  const Config config(shape, grid, stream);
  if (status == cudaSuccess) status = cudaLaunchKernelExC(&config.value, shape.kernel, arguments);
  const bool refused = status == cudaErrorInvalidClusterSize || status == cudaErrorInvalidValue ||
                       status == cudaErrorInvalidConfiguration;
  if (status == cudaErrorCooperativeLaunchTooLarge || (shape.cluster > 1 && refused)) {
    cudaGetLastError();
    throw DoesNotFit(Text("launching a kernel", status), shape);
  }
  Check(status, "launching a kernel");
}
void Fill(Stream stream, void* data, int byte, size_t bytes) {
  Check(cudaMemsetAsync(data, byte, bytes, Of(stream)), "cudaMemsetAsync");
}

bool IsCapturing(Stream stream) {
  cudaStreamCaptureStatus status;
  Check(cudaStreamIsCapturing(Of(stream), &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}
void BeginCapture(Stream stream) {
  Check(cudaStreamBeginCapture(Of(stream), cudaStreamCaptureModeThreadLocal),
        "cudaStreamBeginCapture");
}
Drawing EndCapture(Stream stream) {
  cudaGraph_t graph = nullptr;
  const cudaError_t status = cudaStreamEndCapture(Of(stream), &graph);
  if (status != cudaSuccess && graph != nullptr) Ignore(cudaGraphDestroy(graph));
  Check(status, "cudaStreamEndCapture");
  return reinterpret_cast<Drawing>(graph);
}
size_t Nodes(Drawing drawing) {
  size_t nodes = 0;
  Check(cudaGraphGetNodes(Of(drawing), nullptr, &nodes), "cudaGraphGetNodes");
  return nodes;
}
Graph Instantiate(Drawing drawing) {
  cudaGraphExec_t graph = nullptr;
  Check(cudaGraphInstantiate(&graph, Of(drawing), 0), "cudaGraphInstantiate");
  return reinterpret_cast<Graph>(graph);
}
void Launch(Graph graph, Stream stream) {
  Check(cudaGraphLaunch(Of(graph), Of(stream)), "cudaGraphLaunch");
}
void Free(Drawing drawing) noexcept { Ignore(cudaGraphDestroy(Of(drawing))); }
// The driver frees a graph that is in flight when it has ended (cuda.h, cuGraphExecDestroy).
void Free(Graph graph) noexcept { Ignore(cudaGraphExecDestroy(Of(graph))); }

Blas NewBlas() {
  const Aside aside;
  void* handle = nullptr;
  CheckBlas(cublasCreate_v2(&handle), "cublasCreate");
  return static_cast<Blas>(handle);
}
void Free(Blas blas) noexcept { cublasDestroy_v2(blas); }
void SetStream(Blas blas, Stream stream) {
  CheckBlas(cublasSetStream_v2(blas, Of(stream)), "cublasSetStream");
}
void SetWorkspace(Blas blas, void* data, size_t bytes) {
  CheckBlas(cublasSetWorkspace_v2(blas, data, bytes), "cublasSetWorkspace");
}
void SetMathMode(Blas blas, int mode) {
  CheckBlas(cublasSetMathMode(blas, mode), "cublasSetMathMode");
}
void Multiply(Blas blas, const Gemm& g) {
  if (g.count > 1)
    return CheckBlas(cublasGemmStridedBatchedEx_64(blas, g.op_a, g.op_b, g.m, g.n, g.k, g.alpha,
                                                   g.a, g.type_a, g.lda, g.stride_a, g.b, g.type_b,
                                                   g.ldb, g.stride_b, g.beta, g.c, g.type_c, g.ldc,
                                                   g.stride_c, g.count, g.compute, g.algorithm),
                     "cublasGemmStridedBatchedEx");
  CheckBlas(cublasGemmEx_64(blas, g.op_a, g.op_b, g.m, g.n, g.k, g.alpha, g.a, g.type_a, g.lda, g.b,
                            g.type_b, g.ldb, g.beta, g.c, g.type_c, g.ldc, g.compute, g.algorithm),
            "cublasGemmEx");
}

}  // namespace runtime
}  // namespace cuda
}  // namespace frnn
