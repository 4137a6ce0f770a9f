#include "cuda/plan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace frnn {
namespace cuda {
namespace {

// From so many launches on, a graph that is replayed is worth its capture: a launch from the host
// costs 2 to 3 us, a node of a graph about 1.3 us.
constexpr int64_t kGraphLaunches = 8;
// Rows of an input product that fill a card; more rows at once make it no faster.
constexpr int64_t kFullRows = 4096;
// A block of a product makes about so many rows and columns of its result. With a block for each
// multiprocessor, one direction fills the card.
constexpr int64_t kTile = 128;

int64_t WideSize(Storage s) { return s == Storage::kDouble ? 8 : 4; }

// Units by rows of a block of at most 256 threads. Small blocks where large ones would leave
// multiprocessors without work; units first, as memory is coalesced along them.
void Tile(const CudaDevice& device, const Problem& problem, Plan* plan) {
  int64_t threads = 256;
  while (threads > 64 && problem.H * problem.B / threads < device.multiprocessors) threads /= 2;
  const int64_t warp = 32;
  plan->threads_x = int(std::min(threads, RoundUp(std::max<int64_t>(problem.H, 1), warp)));
  plan->threads_y = int(std::max<int64_t>(1, threads / plan->threads_x));
}

// Input products of a kernel that keeps its weights may take so much memory; a new launch costs some
// steps.
constexpr int64_t kResidentGates = int64_t{256} << 20;
// Fewer steps do not pay for loading the weights.
constexpr int64_t kResidentSteps = 8;

// Whether a warp's tensor cores can do the products, from rows that are read 16 bytes at a time.
bool FitsTensorCores(const CudaDevice& device, const Problem& problem) {
  const int64_t size = StorageSize(problem.storage);
  const bool products = size == 2 || (problem.storage == Storage::kFloat && problem.allow_tf32);
  return device.major >= 8 && products && !problem.projected && problem.output_is_h &&
         problem.gates_h > 0 && problem.aligned && problem.H * size % 16 == 0 && problem.H > 0 &&
         problem.B > 0;
}

int64_t TilesOf(const Problem& problem) { return (problem.B + kTileRows - 1) / kTileRows; }

// The shape of a local kernel, if there is one. With 64 units, a block that has all of them was slower
// than four that share them.
bool FitLocal(const CudaDevice& device, const Problem& problem, Plan* plan) {
  if (problem.H > 2 * kUnits || !FitsTensorCores(device, problem)) return false;
  plan->variant = Variant::kLocal;
  plan->groups = problem.H > kUnits ? 2 : 1, plan->tiles = 1;
  plan->copies = int(TilesOf(problem));
  return true;
}

// The shape of a resident kernel, if there is one: as few tiles as can be, since a block reads and adds
// up each in turn, then as few units.
bool FitResident(const CudaDevice& device, const Problem& problem,
                 const std::function<int64_t(const Plan&)>& together, Plan* plan) {
  if (!device.together || !FitsTensorCores(device, problem)) return false;
  int64_t blocks = 1;
  while (blocks * kWarps * kBlockBytes < problem.H * StorageSize(problem.storage)) blocks *= 2;
  if (blocks > kResidentBlocks) return false;
  plan->variant = Variant::kResident;
  plan->blocks = int(blocks);
  for (int64_t tiles = 1; tiles <= kResidentRows; tiles *= 2)
    for (int64_t groups = 1; groups <= 2 && groups * tiles <= kResidentRows; groups++) {
      if (problem.gates_h * blocks * groups > kResidentTiles) continue;
      const int64_t shared = 2 * sizeof(float) * SumsOf(kWarps, problem.gates_h * groups * tiles);
      const int64_t copies = (TilesOf(problem) + tiles - 1) / tiles;
      const int64_t ctas = BlocksOfCopy(problem.H, groups) * problem.dirs * copies;
      plan->groups = int(groups), plan->tiles = int(tiles), plan->copies = int(copies);
      if (shared <= device.shared_bytes && ctas <= device.multiprocessors &&
          ctas <= together(*plan))
        return true;
    }
  return false;
}

}  // namespace

Plan MakePlan(const CudaDevice& device, const Problem& problem, const char* force,
              const std::function<int64_t(const Plan&)>& together) {
  Plan plan{};
  Tile(device, problem, &plan);

  const int64_t tiles =
      ((problem.B + kTile - 1) / kTile) * ((problem.gates_h * problem.H + kTile - 1) / kTile);
  plan.streams = problem.dirs == 2 && tiles < device.multiprocessors ? 2 : 1;

  // Gates of a chunk should come back from the second-level cache, and are held by every stream.
  const int64_t row_bytes = problem.gates_x * problem.H * WideSize(problem.storage) * plan.streams;
  const int64_t cached_rows = device.l2_bytes / 2 / std::max<int64_t>(1, row_bytes);
  const int64_t rows = std::max(kFullRows, cached_rows);
  plan.chunk_steps = std::clamp<int64_t>(rows / std::max<int64_t>(1, problem.B), 1, problem.T);

  const int64_t launches = (problem.gates_h > 0 ? 2 : 1) * problem.T * problem.dirs;
  plan.variant = launches >= kGraphLaunches ? Variant::kGraph : Variant::kSteps;
  bool resident = problem.T >= kResidentSteps, local = resident;
  if (force != nullptr && *force != '\0') {
    resident = !std::strcmp(force, "resident"), local = !std::strcmp(force, "local");
    if (!std::strcmp(force, "steps"))
      plan.variant = Variant::kSteps;
    else if (resident || local || !std::strcmp(force, "graph"))
      plan.variant = Variant::kGraph;
    else
      throw std::invalid_argument(std::string("FUSED_RNN_VARIANT is '") + force +
                                  "': use steps, graph, resident or local");
  }
  Plan fitted = plan;
  if ((local && FitLocal(device, problem, &fitted)) ||
      (resident && FitResident(device, problem, together, &fitted)))
    plan = fitted;
  if (plan.keeps_weights()) {
    plan.streams = 1;
    const int64_t step_bytes = problem.gates_x * problem.H * problem.B * problem.dirs * 4;
    plan.chunk_steps = std::clamp<int64_t>(kResidentGates / step_bytes, 1, problem.T);
  }
  return plan;
}

}  // namespace cuda
}  // namespace frnn
