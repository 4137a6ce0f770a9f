// Kernels of the `resident` engine: one launch for a whole sequence. Each block owns some units and
// keeps their weights in registers over all steps; per step it multiplies what the other blocks
// published by them (tensor cores), does the gate math, and publishes its own part.
//
// A copy is a set of blocks that hold all units once. Copies share the batch and never talk to each
// other. Within a copy blocks talk through memory without flags: what is published is filled with
// kUnwritten before the launch, and a reader polls the words that it needs until none is that. Each
// word vouches for itself alone, so relaxed accesses do. All blocks must be resident: a cooperative
// launch.
//
// Where the blocks of a copy are a cluster they store what they publish into each other's shared memory,
// and where a block has all units it talks to itself alone: a local kernel. Copies need not be resident
// together then.
//
//   forward   a block has kGroups * 16 units; h_{t-1} [B, H] by W_hh [kH H, H], all gates of a unit
//             in one block. Published: h_t, into the rows that the backward reads.
//   backward  the same units; dgh_t [B, kH H] by W_hh^T [H, kH H]. Published: the gate gradients. Or
//             in shared memory, of which there is less traffic: dgh_t of the block's own units by the
//             W_hh that it has in the forward, too. Published: these parts of dh_{t-1}, to the blocks
//             that have those units, who add them up.
#pragma once
#include <stdexcept>
#include <utility>

#include "cuda/plan.h"
#include "cuda/resident_backward.cuh"
#include "cuda/resident_forward.cuh"

namespace frnn {
namespace cuda {

// They take minutes to compile: libraries that are compiled while somebody waits do without.
#ifdef FRNN_STEPS_ONLY
constexpr bool kCompilesResident = false;
#else
constexpr bool kCompilesResident = true;
#endif
// Whether a cell has resident kernels for a type: blocks tell each other h, which is the output.
template <class C, class T>
constexpr bool kHasResident = kCompilesResident && kStorage<T> != Storage::kDouble && C::kH > 0 &&
                              States<C>::kOutputExtra < 0 && C::kGiven == 0 && C::kOperands == 0;

// The instances: what a plan may ask for.
template <class C, class T, int kBlocks, int kGroups, int kTiles, class E, bool kStages = false>
struct ResidentInstance {
  using Products = ResidentProducts<C, T, kBlocks, kGroups, kTiles, E>;
  static constexpr auto kForward = &ResidentForward<C, T, kBlocks, kGroups, kTiles, E, kStages>;
  static constexpr auto kBackward = &ResidentBackward<C, T, kBlocks, kGroups, kTiles, E, kStages>;

  static runtime::Shape Shape(bool backward, int64_t H) {
    runtime::Shape shape =
        backward ? ShapeOf(kBackward, kWarps * 32) : ShapeOf(kForward, kWarps * 32);
    const int64_t blocks = BlocksOfCopy(H, kGroups), rows = kTiles * kTileRows;
    using Box = Mailbox<E::kCluster>;
    constexpr int64_t kFloat = sizeof(float);
    shape.shared = Notes::kBytes;
    if (backward) {
      const int64_t parts = E::kCluster ? blocks : Products::kPartsBack;
      shape.shared += Box::Bytes(parts * Products::SumsBack::kSize * kFloat);
      const int64_t own = 2 * rows * LocalStride<T>(Products::kWidth) * sizeof(T);
      shape.shared += E::kShared ? own : 0;
    } else {
      shape.shared += 2 * Products::Forward::kParts * Products::Sums::kSize * kFloat;
      const int64_t h = rows * LocalStride<T>(blocks * kGroups * kUnits) * sizeof(T);
      shape.shared += E::kShared ? Box::Bytes(h) : 0;
    }
    shape.together = !E::kShared;
    if (E::kCluster) shape.cluster = unsigned(blocks);
    return shape;
  }
  static void Forward(unsigned copies, const ResidentForwardArgs<T>& args, runtime::Stream stream) {
    Start(kForward, Shape(false, args.steps.H), Grid(copies, args.steps.H), stream, args);
  }
  static void Backward(unsigned copies, const ResidentBackwardArgs<T>& args,
                       runtime::Stream stream) {
    Start(kBackward, Shape(true, args.steps.H), Grid(copies, args.steps.H), stream, args);
  }
  static runtime::Grid Grid(unsigned copies, int64_t H) {
    return {copies * unsigned(BlocksOfCopy(H, kGroups))};
  }
};

template <int... k, class F>
void ForEachOf(const F& f) {
  (f(std::integral_constant<int, k>()), ...);
}

// f(instance) for the instance of the plan.
template <class C, class T, class F>
void WithResidentInstance(const Plan& plan, const F& f) {
  bool found = false;
  const auto offer = [&](bool wanted, auto instance) {
    if (!wanted) return;
    found = true;
    f(instance);
  };
  ForEachOf<1, 2, 4, 8>([&](auto blocks) {
    ForEachOf<1, 2, 4>([&](auto groups) {
      ForEachOf<1, 2, 4>([&](auto tiles) {
        if constexpr (IsResidentShape(C::kH, blocks, groups, tiles))
          offer(plan.variant == Variant::kResident && !plan.stages && plan.blocks == blocks &&
                    plan.groups == groups && plan.tiles == tiles,
                ResidentInstance<C, T, blocks, groups, tiles, InMemory>());
        if constexpr (IsStagedShape(C::kH, blocks, groups, tiles))
          offer(plan.variant == Variant::kResident && plan.stages && plan.blocks == blocks &&
                    plan.groups == groups && plan.tiles == tiles,
                ResidentInstance<C, T, blocks, groups, tiles, InMemory, true>());
        if constexpr (IsClusterShape(C::kH, blocks, groups, tiles))
          offer(plan.variant == Variant::kCluster && plan.blocks == blocks &&
                    plan.groups == groups && plan.tiles == tiles,
                ResidentInstance<C, T, blocks, groups, tiles, InCluster>());
      });
    });
  });
  ForEachOf<1, 2, 4, 8>([&](auto groups) {
    constexpr int kBlocks = DivideUp(groups * kUnits * int(sizeof(T)), kBlockBytes);
    if constexpr (IsLocalShape(C::kH, kBlocks, groups))
      offer(plan.variant == Variant::kLocal && plan.groups == groups,
            ResidentInstance<C, T, kBlocks, groups, 1, InBlock>());
  });
  if (!found) throw std::logic_error("fused_rnn: a plan without a kernel");
}

}  // namespace cuda
}  // namespace frnn
