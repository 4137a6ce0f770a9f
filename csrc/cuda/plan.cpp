#include "cuda/plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
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

// Units by rows of a block. Small blocks where large ones would leave multiprocessors without work;
// units first, as memory is coalesced along them.
void Tile(const CudaDevice& device, const Problem& problem, Plan* plan) {
  int64_t threads = kGateThreads;
  while (threads > 64 && problem.H * problem.B / threads < device.multiprocessors) threads /= 2;
  const int64_t warp = 32;
  plan->threads_x = int(std::min(threads, RoundUp(std::max<int64_t>(problem.H, 1), warp)));
  plan->threads_y = int(std::max<int64_t>(1, threads / plan->threads_x));
}

// A scan does twice the work, so that it is for layers that leave most of a card idle: a multiprocessor
// of so many threads has enough to do.
constexpr int64_t kScanThreads = 1024;
// Shorter chunks are not worth a launch more.
constexpr int64_t kScanLength = 8;

// Steps of a chunk: with N chunks of L steps, all do 2 L steps side by side and N one after the other,
// which is least for N = sqrt(2 T); but the card has room for so many only.
int64_t ScanLength(const CudaDevice& device, const Problem& problem, int64_t steps, bool forced) {
  int64_t chunks = 1;
  while ((chunks + 1) * (chunks + 1) <= 2 * steps) chunks++;
  const int64_t threads = problem.B * problem.H * problem.dirs;
  if (!forced) chunks = std::min(chunks, device.multiprocessors * kScanThreads / threads);
  chunks = std::max<int64_t>(chunks, 1);
  return std::max((steps + chunks - 1) / chunks, forced ? 1 : kScanLength);
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
  return device.major >= 8 && products && !problem.projected && !problem.norms &&
         problem.has_resident && problem.aligned && problem.H * size % 16 == 0 && problem.H > 0 &&
         problem.B > 0;
}

int64_t TilesOf(const Problem& problem) { return (problem.B + kTileRows - 1) / kTileRows; }

constexpr double kNever = std::numeric_limits<double>::infinity();

// The kernels that keep their weights. Each gives its plan, if there is one.
struct Shapes {
  const CudaDevice& device;
  const Problem& problem;
  const std::function<int64_t(const Plan&)>& together;

  int64_t size() const { return StorageSize(problem.storage); }
  int64_t Blocks(const Plan& plan) const {
    return BlocksOfCopy(problem.H, plan.groups) * plan.copies * problem.dirs;
  }
  // A warp's blocks of k where all warps share them: a power of two.
  int64_t BlocksOfWarp() const {
    int64_t blocks = 1;
    while (blocks * kWarps * kBlockBytes < problem.H * size()) blocks *= 2;
    return blocks;
  }
  void Set(Plan* plan, Variant variant, int64_t blocks, int64_t groups, int64_t tiles) const {
    plan->variant = variant;
    plan->blocks = int(blocks), plan->groups = int(groups), plan->tiles = int(tiles);
    plan->copies = int((TilesOf(problem) + tiles - 1) / tiles);
  }

  bool Local(Plan* plan) const {
    if (problem.stages) return false;
    int64_t groups = 1;
    while (groups * kUnits < problem.H) groups *= 2;
    const int64_t blocks = (groups * kUnits * size() + kBlockBytes - 1) / kBlockBytes;
    if (groups > kLocalGroups || !IsLocalShape(problem.gates_h, blocks, groups)) return false;
    Set(plan, Variant::kLocal, blocks, groups, 1);
    return true;
  }

  // As few tiles as can be, since a block reads and adds up each in turn, then as few units.
  bool Resident(Plan* plan) const {
    if (!device.together) return false;
    const int64_t blocks = BlocksOfWarp();
    for (int64_t tiles = 1; tiles <= kBlockRows; tiles *= 2)
      for (int64_t groups = 1; groups <= 2; groups++) {
        const auto exists = problem.stages ? IsStagedShape : IsResidentShape;
        if (!exists(problem.gates_h, blocks, groups, tiles)) continue;
        Set(plan, Variant::kResident, blocks, groups, tiles);
        const int64_t sums = SumsOf(kWarps, problem.gates_h * groups * tiles);
        if (2 * int64_t(sizeof(float)) * sums <= device.shared_bytes &&
            Blocks(*plan) <= device.multiprocessors && Blocks(*plan) <= together(*plan))
          return true;
      }
    return false;
  }

  // The fastest.
  bool Cluster(Plan* plan) const {
    if (device.major < 9 || !device.together || problem.stages) return false;
    const int64_t blocks = BlocksOfWarp();
    double least = kNever;
    for (int64_t tiles = 1; tiles <= kBlockRows; tiles *= 2)
      for (int64_t groups = 1; groups <= kBlockRows; groups *= 2) {
        const int64_t of_copy = BlocksOfCopy(problem.H, groups);
        if (of_copy < 2 || of_copy > kClusterBlocks ||
            !IsClusterShape(problem.gates_h, blocks, groups, tiles))
          continue;
        Plan one = *plan;
        Set(&one, Variant::kCluster, blocks, groups, tiles);
        const double time = StepTime(one);
        if (time < least) *plan = one, least = time;
      }
    return least < kNever;
  }

  // About how many nanoseconds a step takes as a product and a kernel, from a graph: two launches, what
  // they read and write in the second-level cache, 300 operations a picosecond.
  double GraphTime() const {
    const double rows = double(problem.B * problem.dirs), units = double(problem.H);
    const double values = double(problem.gates_x + 2 * problem.gates_h + 4);
    return 4000 + rows * units * values * 4 / 5500 +
           rows * 2 * double(problem.gates_h) * units * units / double(problem.blocks) / 3e5;
  }

  // And in one of these kernels, all copies together if they must take turns. Measured on an H200:
  // what is published through memory is there after 660, by an asynchronous store into the shared memory
  // of a peer after 153. From a data sheet or another's measurement: a multiprocessor reads 42 bytes a
  // nanosecond from the second-level cache, 20 from its peers (arXiv 2402.13499), 128 a cycle from its
  // shared memory. The others are estimates.
  double StepTime(const Plan& plan) const {
    const bool memory = plan.variant == Variant::kResident;
    const bool local = plan.variant == Variant::kLocal;
    const double tiles = plan.tiles;
    const int64_t weights = problem.gates_h * plan.groups;
    const int64_t deep = local ? plan.blocks : kWarps * plan.blocks;
    const int split = memory ? kWarps : SplitOf(weights, deep);
    const double read = tiles * double(deep * kBlockBytes * kTileRows);  // by all warps together
    const double add = 2 * tiles * double(SumsOf(split, weights) * int64_t(sizeof(float)));
    const double products = 2 * tiles * double(weights * deep) / 4;  // of each of four tensor cores
    const double items = std::ceil(tiles * plan.groups * 4 / kWarps);
    const double cycles =
        160 + 7 * products + (add + (memory ? 0 : read * kWarps / split)) / 128 + 80 * items;
    const double exchange = memory ? 660 + read / 42 : local ? 0 : 153 + read / 20;
    const int64_t at_once = local ? device.multiprocessors : together(plan);
    if (at_once < (local ? 1 : BlocksOfCopy(problem.H, plan.groups))) return kNever;
    return (exchange + cycles / 1.7) * double((Blocks(plan) + at_once - 1) / at_once);
  }
};

}  // namespace

Plan MakePlan(const CudaDevice& device, const Problem& problem, const char* force,
              const std::function<int64_t(const Plan&)>& together) {
  Plan plan{};
  plan.stages = problem.stages;
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
  // A third of the launches or less. Each kOneStepRows rows read the weights anew.
  const int64_t weights =
      (problem.gates_x + problem.gates_h) * problem.H * problem.H * StorageSize(problem.storage);
  const bool single = problem.T == 1 && !problem.kept && !problem.projected &&
                      problem.gates_x + problem.gates_h <= kOneStepGates && !problem.stages &&
                      !problem.norms && !problem.operands && problem.blocks == 1 &&
                      problem.B <= (weights <= device.l2_bytes / 2 ? 4 : 1) * kOneStepRows;
  const std::string forced = force == nullptr ? "" : force;
  const auto may = [&](const char* variant) {
    return forced.empty() ? problem.T >= kResidentSteps : forced == variant;
  };
  const bool one = forced.empty() || forced == "one";
  const bool local = may("local"), cluster = may("cluster"), resident = may("resident");
  if (forced == "steps")
    plan.variant = Variant::kSteps;
  else if (forced == "graph" || forced == "scan" ||
           (!forced.empty() && (one || local || cluster || resident)))
    plan.variant = Variant::kGraph;
  else if (!forced.empty())
    throw std::invalid_argument("FUSED_RNN_VARIANT is '" + forced +
                                "': use steps, graph, scan, one, resident, cluster or local");
  if (one && single) plan.variant = Variant::kOne;
  if (FitsTensorCores(device, problem)) {
    const Shapes shapes{device, problem, together};
    const Plan base = plan;
    double least = forced.empty() ? shapes.GraphTime() : kNever;
    const auto offer = [&](bool wanted, bool (Shapes::*fit)(Plan*) const) {
      Plan fitted = base;
      if (!wanted || !(shapes.*fit)(&fitted)) return;
      const double time = shapes.StepTime(fitted);
      if (time < least) plan = fitted, least = time;
    };
    offer(local, &Shapes::Local);
    offer(cluster, &Shapes::Cluster);
    offer(resident, &Shapes::Resident);
  }
  if (plan.keeps_weights()) {
    plan.streams = 1;
    const int64_t step_bytes = problem.gates_x * problem.H * problem.B * problem.dirs * 4;
    plan.chunk_steps = std::clamp<int64_t>(kResidentGates / step_bytes, 1, problem.T);
  }
  if (problem.affine && problem.B > 0 && problem.H > 0 && (forced.empty() || forced == "scan")) {
    // Of the steps whose input products, which a scan reads twice, are there together.
    const int64_t length = ScanLength(device, problem, plan.chunk_steps, !forced.empty());
    if (2 * length <= plan.chunk_steps || !forced.empty())
      plan.variant = Variant::kScan, plan.scan_length = length;
  }
  return plan;
}

}  // namespace cuda
}  // namespace frnn
