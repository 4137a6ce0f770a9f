// Reads problems from stdin, a line each, and prints their plans; see tests/test_cuda_plan.py.
//   multiprocessors major l2_bytes shared_bytes gates_x gates_h H B T storage dirs projected
//   allow_tf32 force|-
#include <iostream>
#include <stdexcept>

#include "cuda/plan.h"

int main() {
  frnn::CudaDevice device;
  frnn::cuda::Problem p;
  int storage, projected, allow_tf32;
  std::string force;
  while (std::cin >> device.multiprocessors >> device.major >> device.l2_bytes >>
         device.shared_bytes >> p.gates_x >> p.gates_h >> p.H >> p.B >> p.T >> storage >> p.dirs >>
         projected >> allow_tf32 >> force) {
    p.storage = frnn::Storage(storage);
    p.projected = projected, p.allow_tf32 = allow_tf32, p.aligned = true;
    try {
      const auto plan = frnn::cuda::MakePlan(device, p, force == "-" ? nullptr : force.c_str());
      std::cout << int(plan.variant) << ' ' << plan.threads_x << ' ' << plan.threads_y << ' '
                << plan.streams << ' ' << plan.chunk_steps << ' ' << plan.blocks << ' '
                << plan.groups << ' ' << plan.tiles << ' ' << plan.copies << '\n';
    } catch (const std::invalid_argument& error) {
      std::cout << "invalid: " << error.what() << '\n';
    }
  }
}
