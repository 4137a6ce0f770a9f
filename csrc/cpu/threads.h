// A team of threads that walks a sequence together: one parallel region per call, one light barrier
// per step.
#pragma once
#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>

#include "core/macros.h"
#include "cpu/tier.h"

FRNN_BEGIN

struct alignas(128) Flag {
  std::atomic<int64_t> phase{0};
};
constexpr int kMaxThreads = 256;

class Team {
 public:
  Team(int id, int size, Flag* flags) : id(id), size(size), flags_(flags) {}
  const int id, size;

  // Every thread of the team has come here before any leaves. Spins first, since a step takes
  // microseconds; then gives the core away, since a spin without end is fatal when there are more
  // threads than cores.
  void Sync() {
    if (size == 1) return;
    flags_[id].phase.store(++phase_, std::memory_order_release);
    for (int other = 0; other < size; other++) {
      int spins = 0;
      while (flags_[other].phase.load(std::memory_order_acquire) < phase_) {
        if (++spins < 2000)
          Pause();
        else
          sched_yield();
      }
    }
  }

  // This thread's part of n items in blocks of `unit`.
  struct Range {
    int64_t begin, end;
  };
  Range Split(int64_t n, int64_t unit = 1) const {
    const int64_t blocks = (n + unit - 1) / unit;
    const int64_t begin = blocks * id / size * unit, end = blocks * (id + 1) / size * unit;
    return {begin < n ? begin : n, end < n ? end : n};
  }

 private:
  static void Pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  Flag* flags_;
  int64_t phase_ = 0;
};

// One copy of the body in the code, for both ways to run it.
template <class F>
FRNN_NOINLINE void RunBody(const F& body, Team& team) {
  body(team);
}

// Runs body(team) on n threads; on the calling thread alone where that is enough, or inside another
// parallel region.
template <class F>
void RunTeam(int n, const F& body) {
  if (n > kMaxThreads) n = kMaxThreads;
  if (n <= 1 || omp_in_parallel()) {
    Team team(0, 1, nullptr);
    RunBody(body, team);
    return;
  }
  static_assert(sizeof(Flag) == 128, "one flag per pair of cache lines");
  Flag flags[kMaxThreads];
#pragma omp parallel num_threads(n)
  {
    Team team(omp_get_thread_num(), omp_get_num_threads(), flags);
    RunBody(body, team);
  }
}

FRNN_END
