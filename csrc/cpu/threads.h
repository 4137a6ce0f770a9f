// A team of threads that walks a sequence together: one parallel region per call, one light barrier
// per step.
#pragma once
#include <omp.h>
#include <time.h>

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
  // microseconds. Then somebody must be without a core, and gets one only from a thread that sleeps:
  // sched_yield may return at once, and did, for a whole time slice per step. Who had to sleep spins
  // for a shorter time when it waits next.
  void Sync() {
    if (size == 1) return;
    flags_[id].phase.store(++phase_, std::memory_order_release);
    int spins = 0;
    bool slept = false;
    for (int other = 0; other < size; other++)
      while (flags_[other].phase.load(std::memory_order_acquire) < phase_) {
        if (++spins < patience_) {
          Pause();
        } else {
          const timespec moment = {0, 1000};  // the system makes 50 us of it
          nanosleep(&moment, nullptr);
          slept = true;
        }
      }
    if (slept)
      patience_ = patience_ > 2 * kLeastSpins ? patience_ / 2 : kLeastSpins;
    else if (patience_ < kMostSpins)
      patience_ *= 2;
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
  static constexpr int kLeastSpins = 32, kMostSpins = 2048;
  Flag* flags_;
  int64_t phase_ = 0;
  int patience_ = kMostSpins;
};

// One copy of the body in the code, for both ways to run it.
template <class F>
FRNN_NOINLINE void RunBody(const F& body, Team& team) {
  body(team);
}

// How many of the wanted threads a call may plan for.
inline int TeamSize(int wanted) {
  if (wanted <= 1 || omp_in_parallel()) return 1;
  return wanted < kMaxThreads ? wanted : kMaxThreads;
}

// Runs body(team) on exactly n threads, or not at all: false where OpenMP has fewer to give (a thread
// limit, dynamic adjustment), since a body has divided its memory by n.
template <class F>
bool RunTeam(int n, const F& body) {
  if (n == 1) {
    Team team(0, 1, nullptr);
    RunBody(body, team);
    return true;
  }
  Flag flags[kMaxThreads];
  bool complete = true;
#pragma omp parallel num_threads(n)
  {
    if (omp_get_num_threads() == n) {
      Team team(omp_get_thread_num(), n, flags);
      RunBody(body, team);
    } else if (omp_get_thread_num() == 0) {
      complete = false;
    }
  }
  return complete;
}

FRNN_END
