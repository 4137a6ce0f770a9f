// The CPU's engine under the thread sanitizer: whether two threads of a team ever meet in memory
// without a barrier between. Prints "ok" if results are also the same for any number of threads.
//
// OpenMP's own library is not instrumented, so that every fork and join would look like a race. Here
// is the little of it that the engine calls, on std::thread.
#include <omp.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/params.h"

namespace {
thread_local int thread_number = 0, team_size = 1;
}

extern "C" {
int omp_get_thread_num() noexcept { return thread_number; }
int omp_get_num_threads() noexcept { return team_size; }
int omp_in_parallel() noexcept { return team_size > 1; }
int omp_get_num_procs() noexcept { return 2; }  // teams of three sleep, those of two spin
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  const auto run = [&](int number) {
    thread_number = number;
    team_size = int(threads);
    body(data);
    thread_number = 0;
    team_size = 1;
  };
  for (unsigned i = 1; i < threads; i++) others.emplace_back(run, int(i));
  run(0);
  for (std::thread& thread : others) thread.join();
}
}

namespace {

using namespace frnn;

struct Problem {
  const char* cell;
  Storage storage;
  int64_t T, B, I, H, Hout;
  int dirs;
  bool ragged;
  const char* outside;  // where an element stands that tiles can not hold: "x", "h0", "w", "dy", ""
  bool stages = false;  // with resets, zoneout, a mask of h, and all normalised that can be
};

// One tensor in memory, of numbers in [-1, 1] that every storage type holds.
class Buffer {
 public:
  Buffer(Storage s, int64_t n, std::mt19937* random) : bytes_(Bytes(s) * n) {
    std::uniform_int_distribution<int> draw(-64, 64);
    for (int64_t i = 0; i < n && random != nullptr; i++) Set(s, i, float(draw(*random)) / 64);
  }
  void Set(Storage s, int64_t i, float value) {
    if (s == Storage::kDouble) {
      reinterpret_cast<double*>(bytes_.data())[i] = value;
    } else if (s == Storage::kFloat) {
      reinterpret_cast<float*>(bytes_.data())[i] = value;
    } else {  // bfloat16
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      reinterpret_cast<uint16_t*>(bytes_.data())[i] = uint16_t(bits >> 16);
    }
  }
  void* data() { return bytes_.data(); }
  const std::vector<char>& bytes() const { return bytes_; }
  static int64_t Bytes(Storage s) {
    return s == Storage::kDouble ? 8 : (s == Storage::kFloat ? 4 : 2);
  }

 private:
  std::vector<char> bytes_;
};

// Forward and backward; returns all results.
std::vector<std::vector<char>> Run(const Problem& q, int threads) {
  const CpuKernels* kernels = FindCpuKernels(q.cell, q.storage);
  std::mt19937 random(1);
  std::vector<Buffer*> kept;
  const auto make = [&](int64_t n, bool filled = false, Storage* other = nullptr) {
    kept.push_back(new Buffer(other ? *other : q.storage, n, filled ? &random : nullptr));
    return kept.back()->data();
  };
  std::vector<int64_t> sizes(q.T, q.B), offsets(q.T + 1, 0);
  for (int64_t t = 0; t < q.T; t++) {
    if (q.ragged) sizes[t] = q.B - t * (q.B - 1) / q.T;
    offsets[t + 1] = offsets[t] + sizes[t];
  }
  LayerGradParams p{};
  p.storage = q.storage;
  p.dirs = q.dirs;
  p.threads = threads;
  p.ragged = q.ragged;
  p.T = q.T, p.B = q.B, p.I = q.I, p.H = q.H, p.Hout = q.Hout, p.rows = offsets[q.T];
  p.batch_sizes = sizes.data();
  p.offsets = offsets.data();
  const int64_t extra = kernels->extra_states, width = q.dirs * q.Hout;
  p.x = make(p.rows * q.I, true);
  p.x_t_stride = q.ragged ? 0 : q.B * q.I;
  p.x_b_stride = q.I;
  if (!std::strcmp(q.outside, "x")) kept.back()->Set(q.storage, p.rows * q.I / 2, 1e30f);
  p.h0 = make(q.dirs * q.B * q.Hout, true);
  if (!std::strcmp(q.outside, "h0")) kept.back()->Set(q.storage, 3, 1e30f);
  p.c0 = extra ? make(q.dirs * q.B * extra * q.H, true) : nullptr;
  for (int d = 0; d < q.dirs; d++) {
    const int64_t gx = kernels->gates_x * q.H, gh = kernels->gates_h * q.H;
    p.w[d].w_ih = make(gx * q.I, true), p.dw[d].w_ih = make(gx * q.I);
    p.w[d].w_hh = make(gh * q.Hout, true), p.dw[d].w_hh = make(gh * q.Hout);
    if (!std::strcmp(q.outside, "w")) kept[kept.size() - 2]->Set(q.storage, 5, 1e30f);
    p.w[d].b_ih = make(gx, true), p.dw[d].b_ih = make(gx);
    p.w[d].b_hh = make(gh, true), p.dw[d].b_hh = make(gh);
    if (q.H != q.Hout) p.w[d].w_hr = make(q.Hout * q.H, true), p.dw[d].w_hr = make(q.Hout * q.H);
    if (!q.stages) continue;
    const auto normalise = [&](int tensor, int64_t n) {
      p.w[d][tensor] = make(n, true), p.dw[d][tensor] = make(n);
    };
    normalise(DirectionWeights::kGains + kInput, gx);
    normalise(DirectionWeights::kGains + kRecurrent, gh);
    if (kernels->shows) normalise(DirectionWeights::kGains + kShown, q.H);
    if (kernels->shows) normalise(DirectionWeights::kShift, q.H);
  }
  std::vector<uint8_t> resets(p.rows);
  for (int64_t r = 0; r < p.rows; r++) resets[r] = r % 7 == 3;
  if (q.stages) {
    const double eps = 1e-3;
    p.norm = Norm::kLayer;
    std::memcpy(&p.norm_eps, &eps, sizeof(eps));
    p.reset = resets.data();
    p.h_mask = make(q.dirs * q.B * q.Hout, true);
    if (q.H == q.Hout) p.zoneout = make(q.dirs * p.rows * (1 + extra) * q.H, true);
    p.zoneout_rows = p.rows;
  }
  p.y = make(p.rows * width);
  p.h_n = make(q.dirs * q.B * q.Hout);
  p.c_n = make(q.dirs * q.B * extra * q.H);
  Storage computing = q.storage == Storage::kDouble ? Storage::kDouble : Storage::kFloat;
  p.hs = make(q.dirs * (q.B + p.rows) * HsStride(q.H, q.Hout), false, &computing);
  p.saved = make(q.dirs * p.rows * (kernels->tape + kernels->NormTape(p.w[0])) * Padded(q.H), false,
                 &computing);
  p.dy = make(p.rows * width, true);
  p.dy_t_stride = q.ragged ? 0 : q.B * width;
  p.dy_b_stride = width;
  if (!std::strcmp(q.outside, "dy")) kept.back()->Set(q.storage, p.rows * width / 2, 1e30f);
  p.dx = make(p.rows * q.I);
  p.dh0 = make(q.dirs * q.B * q.Hout);
  p.dc0 = extra ? make(q.dirs * q.B * extra * q.H) : nullptr;

  LayerParams infer = p;  // the same twice: with a tape and without
  infer.hs = infer.saved = nullptr;
  kernels->layer_fwd(infer);
  kernels->layer_fwd(p);
  kernels->layer_bwd(p);
  std::vector<std::vector<char>> found;
  for (Buffer* buffer : kept) {
    found.push_back(buffer->bytes());
    delete buffer;
  }
  return found;
}

}  // namespace

int main(int count, char** names) {
  const Storage f = Storage::kFloat, d = Storage::kDouble, b = Storage::kBFloat16;
  std::vector<Problem> problems;
  for (const char* cell : {"rnn_tanh", "gru", "lstm"}) {
    problems.push_back(
        {cell, f, 7, 40, 33, 150, 150, 2, false, ""});  // tiles, where there are some
    problems.push_back({cell, b, 7, 40, 33, 150, 150, 1, true, ""});
    problems.push_back({cell, d, 5, 20, 17, 150, 150, 2, true, ""});
    problems.push_back({cell, f, 3, 4, 33, 200, 200, 1, false, ""});     // weights as they lie
    problems.push_back({cell, f, 150, 2, 200, 160, 160, 1, false, ""});  // several chunks
    for (const char* outside : {"x", "h0", "w", "dy"})
      problems.push_back({cell, f, 7, 40, 33, 150, 150, 1, false, outside});
    problems.push_back({cell, f, 7, 40, 33, 150, 150, 2, true, "", true});
    problems.push_back({cell, d, 7, 20, 33, 150, 150, 1, false, "", true});
  }
  problems.push_back({"lstm", f, 7, 40, 33, 150, 60, 2, true, ""});
  problems.push_back({"lstm", d, 7, 20, 33, 150, 60, 1, false, ""});
  problems.push_back({"lstm", f, 7, 40, 33, 150, 60, 1, true, "", true});
  const int most = count > 1 ? std::atoi(names[1]) : 4;
  if (most == 0) {  // to see that a race is found
    int counter = 0;
#pragma omp parallel num_threads(2)
    counter += omp_get_thread_num();
    std::printf("%d\n", counter);
    return 0;
  }
  for (const Problem& problem : problems) {
    const auto want = Run(problem, 1);
    for (int threads = 2; threads <= most; threads++)
      if (Run(problem, threads) != want) {
        std::printf("%s T%ld B%ld H%ld: other results on %d threads\n", problem.cell,
                    long(problem.T), long(problem.B), long(problem.H), threads);
        return 1;
      }
  }
  std::printf("ok %s\n", CpuCapability());
}
