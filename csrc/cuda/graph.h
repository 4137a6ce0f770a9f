// Order between the two streams of a call, and calls replayed from CUDA graphs.
#pragma once
#include <functional>
#include <string>

#include "core/params.h"

namespace frnn {
namespace cuda {

// The second stream starts after what the first was given; the first waits for the second.
void Fork(const CudaCall& call);
void Join(const CudaCall& call);

// Runs work(call). If a call with the same key came before in this thread, captures it into a graph,
// and replays that from then on. The key must hold everything that work depends on: sizes, pointers,
// streams. While the caller itself captures a graph, work just becomes part of that.
void RunAsGraph(const CudaCall& call, std::string key,
                const std::function<void(const CudaCall&)>& work);

}  // namespace cuda
}  // namespace frnn
