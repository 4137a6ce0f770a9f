// What a call works with on a card: its device, what its thread has there, its two streams, its
// workspace.
#pragma once
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "cuda/graph.h"
#include "cuda/product.h"
#include "cuda/runtime.h"

namespace frnn {
namespace cuda {

struct Context;

// A device, for all threads. It lives as long as the process.
class FRNN_EXPORT Device {
 public:
  static Device& Get(int index);  // the current one

  // Its facts, with the multiprocessors that a stream may use. Throws if since the last time kernels
  // have given up waiting for each other.
  CudaDevice FactsFor(runtime::Stream stream);

  // Blocks of a kernel that can be on the card at once, asked of the card the first time. Where it
  // turned out to be wrong: none.
  int64_t BlocksAtOnce(const runtime::Shape& shape, runtime::Stream stream, int multiprocessors);
  void Refuse(const runtime::Shape& shape, int multiprocessors);

  // A word in which kernels that give up leave a number other than 0.
  uint32_t* alarm() const { return alarm_.get(); }

  std::unique_ptr<Context> Take();
  void Return(std::unique_ptr<Context> context);

 private:
  explicit Device(int index);

  const CudaDevice facts_;
  const runtime::Owned<uint32_t*> alarm_;
  std::mutex mutex_;
  bool together_ = true;  // whether blocks may wait for each other
  std::map<std::tuple<const void*, size_t, unsigned, int>, int64_t> at_once_;
  std::vector<std::unique_ptr<Context>> idle_;
};

// What one thread has of a device: streams that nobody else works in, a cuBLAS handle, graphs. It is
// handed on when the thread ends, so there are as many as threads worked there at once.
struct Context {
  static Context& Get(int device);  // of this thread

  explicit Context(Device& device) : device(device) {}
  Device& device;
  const runtime::Owned<runtime::Stream> second{runtime::NewStream()}, capture{runtime::NewStream()};
  const runtime::Owned<runtime::Event> event{runtime::NewEvent()};
  const runtime::Owned<runtime::Blas> blas{runtime::NewBlas()};
  GraphCache graphs;
};

// One call.
struct FRNN_EXPORT Call {
  explicit Call(const CudaCall& from);

  // Memory for the engine, behind that for the products in so many streams.
  void TakeWorkspace(int streams, int64_t bytes);
  CudaQueue Queue(int i) const;

  const CudaCall& from;
  Context& context;
  CudaDevice device;
  bool allow_tf32;
  runtime::Stream streams[2];  // the caller's own, and one more
  void* workspace = nullptr;

 private:
  char* of_products_ = nullptr;
};

// The second stream of a call beside the first: it starts after what the first was given before. Both
// go on together after Join, or when an exception ends the work: then, too, the caller's memory must
// not go to others while the second stream still uses it.
class FRNN_EXPORT Beside {
 public:
  Beside(const Call& call, bool wanted);
  ~Beside();
  void Join();

 private:
  const Call& call_;
  bool open_ = false;
};

}  // namespace cuda
}  // namespace frnn
