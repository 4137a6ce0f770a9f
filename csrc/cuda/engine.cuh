// An instance of the engine: a cell and a type in memory, with the plan and the graph around it.
#pragma once
#include <cstdlib>

#include "cuda/matrices.cuh"
#include "cuda/resident.cuh"
#include "cuda/steps.cuh"
#include "cuda/steps_backward.cuh"
#include "cuda/steps_forward.cuh"

namespace frnn {
namespace cuda {

template <class C, class T>
struct Engine {
  static_assert(CheckCell<C>());

  template <class P>
  static constexpr bool kBackward = std::is_same_v<P, LayerGradParams>;

  template <class P>
  static Plan PlanOf(const P& p, const Call& call) {
    Problem problem{C::kX, C::kH, p.H, p.B, p.T, kStorage<T>, p.dirs};
    problem.projected = p.H != p.Hout;
    problem.has_resident = kHasResident<C, T>;
    problem.allow_tf32 = call.allow_tf32;
    problem.aligned = true;
    problem.stages = Steps<C, T>::ChangesStates(p);
    problem.norms = NormOfX(p) || NormOfH(p) || Steps<C, T>::NormOfShown(p);
    problem.blocks = p.blocks;
    problem.operands = C::kOperands > 0;
    problem.affine = Steps<C, T>::CanScan(p);
    problem.kept = kBackward<P> || p.hs != nullptr || p.saved != nullptr;
    for (int d = 0; d < p.dirs; d++)
      problem.aligned &= p.blocks > 1 || reinterpret_cast<uintptr_t>(p.w[d].w_hh) % 16 == 0;
    const auto at_once = [&](const Plan& plan) {
      int64_t blocks = 0;
      if constexpr (kHasResident<C, T>)
        WithResidentInstance<C, T>(plan, [&](auto instance) {
          blocks = call.context.device.BlocksAtOnce(instance.Shape(kBackward<P>, p.H),
                                                    call.streams[0], call.device.multiprocessors);
        });
      return blocks;
    };
    return MakePlan(call.device, problem, std::getenv("FUSED_RNN_VARIANT"), at_once);
  }

  // Two calls with equal keys, on the same device, do the same work on the same memory.
  static std::string Key(LayerGradParams p, const Plan& plan, const Call& call, const void* which) {
    std::string key;
    if (p.ragged) key.append(reinterpret_cast<const char*>(p.batch_sizes), p.T * sizeof(int64_t));
    p.batch_sizes = p.offsets = nullptr;
    const void* rest[] = {which, call.workspace, call.streams[0],
                          reinterpret_cast<void*>(uintptr_t(call.allow_tf32))};
    key.append(reinterpret_cast<const char*>(&p), sizeof(p));
    key.append(reinterpret_cast<const char*>(&plan), sizeof(plan));
    key.append(reinterpret_cast<const char*>(rest), sizeof(rest));
    return key;
  }

  // By the plan, and if the card cannot do that after all, by the next one. Nothing that was begun
  // matters: all that a call writes, it writes anew.
  template <class P>
  static void Run(const P& p, const CudaCall& from, int64_t (*size)(const P&, const Plan&),
                  void (*work)(const P&, const Plan&, const Call&)) {
    Call call(from);
    for (bool done = false; !done;) {
      const Plan plan = PlanOf(p, call);
      call.TakeWorkspace(plan.streams, size(p, plan));
      try {
        RunPlan(p, plan, call, work);
        done = true;
      } catch (const runtime::DoesNotFit& error) {
        call.context.device.Refuse(error.shape, call.device.multiprocessors);
      }
    }
  }
  template <class P>
  static void RunPlan(const P& p, const Plan& plan, const Call& call,
                      void (*work)(const P&, const Plan&, const Call&)) {
    if (plan.variant == Variant::kSteps || plan.variant == Variant::kOne)
      return work(p, plan, call);
    LayerGradParams all{};
    static_cast<P&>(all) = p;
    call.context.graphs.Run(Key(all, plan, call, reinterpret_cast<const void*>(work)),
                            call.streams[0], call.context.capture.get(),
                            [&](runtime::Stream stream) {
                              Call in = call;
                              in.streams[0] = stream;
                              work(p, plan, in);
                            });
  }

  static void Forward(const LayerParams& p, const CudaCall& call) {
    Run(p, call, &Steps<C, T>::ForwardWorkspace, &Steps<C, T>::Forward);
  }
  static void Backward(const LayerGradParams& p, const CudaCall& call) {
    Run(p, call, &Steps<C, T>::BackwardWorkspace, &Steps<C, T>::Backward);
  }

  static void Scale(void* data, const void* by, int64_t n, const CudaCall& call) {
    constexpr int64_t kWidth = 256;
    const int64_t rows = (n + kWidth - 1) / kWidth;
    if (n == 0) return;
    Start(ScaleBy<T>, ShapeOf(ScaleBy<T>, unsigned(kWidth)),
          {1, unsigned(std::min<int64_t>(rows, 65535))}, call.stream, n, kWidth,
          static_cast<T*>(data), static_cast<const T*>(by));
  }

  static constexpr CudaKernels Kernels() {
    return {FactsOf<C>(Tape<C>::kSize), &Forward, &Backward, &Scale};
  }
};

}  // namespace cuda
}  // namespace frnn
