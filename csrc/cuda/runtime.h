// All that the engine's host code asks of CUDA and cuBLAS. runtime.cpp answers on a card;
// tests/cpp/fake_runtime.cpp in tests, keeps account of what is used, and fails when it is told to.
//
// What fails throws Error. Everything works on the current device.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "core/params.h"

namespace frnn {
namespace cuda {
namespace runtime {

using Stream = void*;  // as torch hands it over: null is the default stream
using Event = struct EventTag*;
using Drawing = struct DrawingTag*;  // what a capture has recorded
using Graph = struct GraphTag*;      // ready to be launched
using Blas = struct BlasTag*;        // a cuBLAS handle

// A kernel, and the size of its blocks.
struct Shape {
  const void* kernel;
  unsigned block_x, block_y = 1;
  size_t shared = 0;      // bytes of dynamic shared memory
  unsigned cluster = 1;   // blocks of a cluster
  bool together = false;  // its blocks wait for each other: all must be on the card at once
};
struct Grid {
  unsigned x, y = 1;
};

class FRNN_EXPORT Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};
// Blocks that wait for each other are more than the card can have at once.
class FRNN_EXPORT DoesNotFit : public Error {
 public:
  DoesNotFit(const std::string& what, const Shape& shape) : Error(what), shape(shape) {}
  Shape shape;
};

// ---- a device ----

CudaDevice Facts(int device);
// Of all multiprocessors of the device, those on which kernels of this stream may run.
int Multiprocessors(Stream stream, int all);
// Blocks that can be on the card at once, if nothing else runs.
int64_t BlocksAtOnce(const Shape& shape, Stream stream, int multiprocessors);

// Zeroed memory at an address that host and card share.
uint32_t* NewSharedWord();
void Free(uint32_t* word) noexcept;

// ---- streams ----

Stream NewStream();  // does not wait for the default stream
void Free(Stream stream) noexcept;
Event NewEvent();
void Free(Event event) noexcept;
void Record(Event event, Stream stream);
void Wait(Stream stream, Event event);  // for what the event has recorded last
void Synchronize(Stream stream) noexcept;

// arguments: the address of each.
FRNN_EXPORT void Start(const Shape& shape, const Grid& grid, Stream stream, void** arguments);
FRNN_EXPORT void Fill(Stream stream, void* data, int byte, size_t bytes);

// ---- graphs ----

bool IsCapturing(Stream stream);
void BeginCapture(Stream stream);
Drawing EndCapture(Stream stream);
size_t Nodes(Drawing drawing);
Graph Instantiate(Drawing drawing);
void Launch(Graph graph, Stream stream);
void Free(Drawing drawing) noexcept;
void Free(Graph graph) noexcept;  // runs to its end first, if it runs

// ---- cuBLAS, in its own words: column-major, enumerations as int ----

struct Gemm {
  int op_a, op_b;
  int64_t m, n, k;
  const void* alpha;
  const void* a;
  int type_a;
  int64_t lda;
  const void* b;
  int type_b;
  int64_t ldb;
  const void* beta;
  void* c;
  int type_c;
  int64_t ldc;
  int compute, algorithm;
  int64_t count, stride_a, stride_b,
      stride_c;  // of a batch; the strides are nothing to one product
};
Blas NewBlas();
void Free(Blas blas) noexcept;
void SetStream(Blas blas, Stream stream);  // and takes the workspace away
void SetWorkspace(Blas blas, void* data, size_t bytes);
void SetMathMode(Blas blas, int mode);
void Multiply(Blas blas, const Gemm& gemm);

// ---- owners ----

template <class Handle>
struct Freer {
  using pointer = Handle;
  void operator()(Handle handle) const noexcept { Free(handle); }
};
template <class Handle>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Freer<Handle>>;

}  // namespace runtime
}  // namespace cuda
}  // namespace frnn
