// How a layer is run on a card: a pure function of the card and the problem, so that it is tested
// without one (tests/cpp/plan_test.cpp).
#pragma once
#include <cstdint>

#include "core/params.h"

namespace frnn {
namespace cuda {

enum class Variant { kSteps, kGraph };  // launch every step; or replay them from a CUDA graph

struct Problem {
  int64_t gates_x, gates_h;  // per unit
  int64_t H, B, T;
  Storage storage;
  int dirs;
  bool ragged, training;  // neither makes a difference to the variants that there are
};

struct Plan {
  Variant variant;
  int threads_x, threads_y;  // a block of a gate kernel: units by rows
  int streams;               // 2: both directions side by side
  int64_t chunk_steps;       // steps whose input products are computed ahead, together
};

// `force`: "steps" or "graph" (FUSED_RNN_VARIANT), or null. Throws std::invalid_argument otherwise.
Plan MakePlan(const CudaDevice& device, const Problem& problem, const char* force);

}  // namespace cuda
}  // namespace frnn
