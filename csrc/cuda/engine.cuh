// An instance of the engine: a cell and a type in memory, with the plan and the graph around it.
#pragma once
#include <cstdlib>

#include "cuda/steps.cuh"

namespace frnn {
namespace cuda {

template <class C, class T>
struct Engine {
  static_assert(CheckCell<C>());

  static Plan PlanOf(const LayerParams& p, const CudaCall& call) {
    Problem problem{C::kX, C::kH, p.H, p.B, p.T, kStorage<T>, p.dirs};
    problem.projected = p.H != p.Hout;
    problem.output_is_h = States<C>::kOutputExtra < 0;
    problem.allow_tf32 = call.allow_tf32;
    problem.aligned = true;
    for (int d = 0; d < p.dirs; d++)
      problem.aligned &= reinterpret_cast<uintptr_t>(p.w[d].w_hh) % 16 == 0;
    return MakePlan(call.device, problem, std::getenv("FUSED_RNN_VARIANT"));
  }

  // Two calls with equal keys do the same work on the same memory. Batch sizes are compared by value.
  static std::string Key(LayerGradParams p, const Plan& plan, const CudaCall& call,
                         const void* which) {
    std::string key(reinterpret_cast<const char*>(p.batch_sizes), p.T * sizeof(int64_t));
    p.batch_sizes = p.offsets = nullptr;
    const void* rest[] = {which, call.workspace, call.streams[0],
                          reinterpret_cast<void*>(uintptr_t(call.allow_tf32)),
                          reinterpret_cast<void*>(uintptr_t(plan.variant))};
    key.append(reinterpret_cast<const char*>(&p), sizeof(p));
    key.append(reinterpret_cast<const char*>(rest), sizeof(rest));
    return key;
  }

  template <class P, class Work>
  static void Run(const P& p, const CudaCall& call, const Work& work) {
    const Plan plan = PlanOf(p, call);
    if (plan.variant == Variant::kSteps) return work(p, plan, call);
    LayerGradParams all{};
    static_cast<P&>(all) = p;
    RunAsGraph(call, Key(all, plan, call, reinterpret_cast<const void*>(work)),
               [&](const CudaCall& c) { work(p, plan, c); });
  }

  static int64_t ForwardWorkspace(const LayerParams& p, const CudaCall& call) {
    return Steps<C, T>::ForwardWorkspace(p, PlanOf(p, call));
  }
  static int64_t BackwardWorkspace(const LayerGradParams& p, const CudaCall& call) {
    return Steps<C, T>::BackwardWorkspace(p, PlanOf(p, call));
  }
  static void Forward(const LayerParams& p, const CudaCall& call) {
    Run(p, call, &Steps<C, T>::Forward);
  }
  static void Backward(const LayerGradParams& p, const CudaCall& call) {
    Run(p, call, &Steps<C, T>::Backward);
  }

  static void Scale(void* data, const void* by, int64_t n, const CudaCall& call) {
    constexpr int64_t kWidth = 256;
    const int64_t rows = (n + kWidth - 1) / kWidth;
    if (n == 0) return;
    const unsigned blocks = unsigned(std::min<int64_t>(rows, 65535));
    Launch(ScaleBy<T>, dim3(1, blocks), dim3(unsigned(kWidth)), 0,
           static_cast<cudaStream_t>(call.streams[0]), n, kWidth, static_cast<T*>(data),
           static_cast<const T*>(by));
  }

  static constexpr CudaKernels Kernels() {
    return {FactsOf<C>(Tape<C>::kSize),
            &ForwardWorkspace,
            &BackwardWorkspace,
            &Forward,
            &Backward,
            &Scale};
  }
};

}  // namespace cuda
}  // namespace frnn
