// A team of threads that walks a sequence together: one parallel region per call, one light barrier
// per step.
#pragma once
#include <omp.h>
#include <sched.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>

#include "core/macros.h"
#include "core/memory.h"
#include "cpu/plan.h"
#include "cpu/tier.h"

FRNN_BEGIN

using Clock = std::chrono::steady_clock;
// In a short call nobody keeps a team waiting for so long who has a core.
constexpr std::chrono::microseconds kTimeSlice{500};

// Whether other programs lately took a core from a team, again and again. A short call is then done
// sooner by fewer threads than by one that is waited for; nothing else depends on their number.
class Crowd {
 public:
  static void Note() {
    const int64_t now = Now(), last = last_.exchange(now);
    if (now - last < kMemory) until_.store(now + kMemory);
  }
  static bool Here() {
    const int64_t until = until_.load(std::memory_order_relaxed);
    return until != 0 && Now() < until;
  }

 private:
  static constexpr int64_t kMemory = Clock::duration(std::chrono::milliseconds(100)).count();
  static int64_t Now() { return Clock::now().time_since_epoch().count(); }
  static inline std::atomic<int64_t> last_{0}, until_{0};
};

// How many steps a thread has finished, for the others to wait for.
class alignas(128) Flag {
 public:
  void Advance(uint32_t phases = 1) {
    // In one order with sleepers_: either we see a sleeper, or it sees the phase.
    phase_.fetch_add(phases);
    if (sleepers_.load()) Wake();
  }
  // Waits until `phase` is reached. Spins first, since a step takes microseconds; then sleeps. A
  // spin without end is fatal when there are more threads than cores, and a yield is not much
  // better: it gives a whole time slice to a program beside us, even to one of the lowest priority.
  void Await(uint32_t phase, int spins, bool short_call) {
    while (int32_t(phase_.load(std::memory_order_acquire) - phase) < 0) {
      if (spins-- > 0) {
        Pause();
      } else {
        const auto start = Clock::now();
        Sleep(phase);
        if (short_call && Clock::now() - start > kTimeSlice) Crowd::Note();
      }
    }
  }

 private:
  static void Pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    // About as long as a pause of x86 takes. A yield takes no time where cores have one thread, and
    // so many of them would be over before a step is.
    asm volatile("isb");
#endif
  }
#ifdef __linux__
  void Sleep(uint32_t phase) {
    sleepers_.fetch_add(1);
    const uint32_t seen = phase_.load();
    if (int32_t(seen - phase) < 0)
      syscall(SYS_futex, &phase_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
    sleepers_.fetch_sub(1);
  }
  void Wake() { syscall(SYS_futex, &phase_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0); }
#else
  void Sleep(uint32_t) { sched_yield(); }
  void Wake() {}
#endif
  std::atomic<uint32_t> phase_{0};
  std::atomic<uint32_t> sleepers_{0};
  static_assert(sizeof(phase_) == sizeof(uint32_t));
};
// Asked once: the answer takes a system call.
inline int Cores() {
  static const int cores = omp_get_num_procs();
  return cores;
}
// Of the second-level cache; as small as those of servers are where the system does not tell.
inline int64_t L2Bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 1 << 20;
}

class Team {
 public:
  // What its threads share.
  struct Shared {
    explicit Shared(int size) : flags(size) {}
    Vector<Flag> flags;
    std::atomic<bool> failed{false};
    std::exception_ptr error;  // of the first thread that failed
  };

  Team(int id, const cpu::Plan& plan, Shared* shared)
      : id(id), size(plan.threads), shared_(shared), spins_(plan.spins), is_short_(plan.is_short) {}
  const int id, size;

  // Every thread of the team has come here before any leaves. Throws where one failed instead.
  void Sync() {
    if (size == 1) return;
    ++phase_;
    shared_->flags[id].Advance();
    for (int other = 0; other < size; other++)
      if (other != id) shared_->flags[other].Await(phase_, spins_, is_short_);
    if (shared_->failed.load(std::memory_order_relaxed)) throw Left();
  }
  // From the handler of what a thread threw, which does no more: nobody waits for it from now on,
  // and all others end where they sync next.
  void Leave() {
    if (!shared_->failed.exchange(true)) shared_->error = std::current_exception();
    shared_->flags[id].Advance(1u << 30);
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
  struct Left {};

  Shared* shared_;
  const int spins_;
  const bool is_short_;
  uint32_t phase_ = 0;
};

// One copy of the body in the code, for both ways to run it.
template <class F>
FRNN_NOINLINE void RunBody(const F& body, Team& team) {
  body(team);
}

// How many of the wanted threads a call may plan for.
inline int TeamSize(int wanted) { return wanted <= 1 || omp_in_parallel() ? 1 : wanted; }

// Runs body(team) on exactly as many threads as planned, or not at all: false where OpenMP has
// fewer to give (a thread limit, dynamic adjustment), since a body has divided its memory by their
// number. What a thread throws is thrown here.
template <class F>
bool RunTeam(const cpu::Plan& plan, const F& body) {
  const int n = plan.threads;
  if (n == 1) {
    Team team(0, plan, nullptr);
    RunBody(body, team);
    return true;
  }
  Team::Shared shared(n);
  bool complete = true;
#pragma omp parallel num_threads(n)
  {
    if (omp_get_num_threads() == n) {
      Team team(omp_get_thread_num(), plan, &shared);
      try {
        RunBody(body, team);
      } catch (...) {
        team.Leave();
      }
    } else if (omp_get_thread_num() == 0) {
      complete = false;
    }
  }
  if (shared.error) std::rethrow_exception(shared.error);
  return complete;
}

FRNN_END
