// csrc/cuda/runtime.h without a card. Streams are queues on the host: what they are given waits, and
// runs when a caller waits for its stream, then in any order that events allow (by chance, so that
// an order nobody asked for shows). Work that a caller does not wait for, use of what was freed, and
// products without a workspace of their own are errors. Any call can be told to fail.
#pragma once
#include <functional>

#include "cuda/runtime.h"

namespace frnn {
namespace cuda {
namespace fake {

using runtime::Stream;

FRNN_EXPORT void Start(const runtime::Shape& shape, const runtime::Grid& grid, Stream stream,
                       std::function<void()> work);
void Compute(const runtime::Gemm& gemm);  // host.cpp

// The stream of a caller, one for each thread.
class CurrentStream {
 public:
  explicit CurrentStream(int device);
  ~CurrentStream();  // where an exception has passed Done by, what it would throw is a fault
  Stream get() const;
  void Done();  // runs all that the stream was given; nothing may be left in others

 private:
  bool done_ = false;
};

}  // namespace fake
}  // namespace cuda
}  // namespace frnn
