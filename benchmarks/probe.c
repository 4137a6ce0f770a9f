// What the machine can do, apart from any library. Reads commands, answers each with one line:
//   pulse            fork and join of an OpenMP region, and a barrier of flags, in microseconds
//   fma32 | fma64    multiply-adds on registers, all threads, in GFLOP/s
//   read BYTES       streaming reads of BYTES by each thread from its own buffer, in GB/s of all
// Compiled by limits.py with -O3 -fopenmp -DTHREADS=n, for this machine or for less of it.
#include <omp.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define LINE 64

static double now(void) { return omp_get_wtime(); }
static double min(double a, double b) { return a < b ? a : b; }

// --- fork and barrier ----------------------------------------------------------------------------

typedef struct {
  _Alignas(LINE) atomic_int turn;
} Flag;
static Flag flags[THREADS];

static void pulse(void) {
  double fork = 1, barrier = 1;
  for (int repeat = 0; repeat < 5; repeat++) {
    enum { kRounds = 200 };
    double start = now();
    for (int i = 0; i < kRounds; i++) {
#pragma omp parallel num_threads(THREADS)
      __asm__ volatile("" ::: "memory");
    }
    fork = min(fork, (now() - start) / kRounds);

    for (int t = 0; t < THREADS; t++) atomic_store(&flags[t].turn, 0);
    double spent = 0;
#pragma omp parallel num_threads(THREADS)
    {
      const int me = omp_get_thread_num();
#pragma omp barrier
      const double begin = now();
      for (int i = 1; i <= kRounds; i++) {
        atomic_store_explicit(&flags[me].turn, i, memory_order_release);
        for (int t = 0; t < THREADS; t++)
          for (int spin = 0; atomic_load_explicit(&flags[t].turn, memory_order_acquire) < i;)
            if (++spin > 5000) sched_yield();  // on a busy machine the other may not be running
      }
      if (me == 0) spent = now() - begin;
    }
    barrier = min(barrier, spent / kRounds);
  }
  printf("%.4f %.4f\n", fork * 1e6, barrier * 1e6);
}

// --- multiply-add --------------------------------------------------------------------------------

// Whole registers, since the compiler drops a half that nobody reads; and enough chains in flight to
// hide the latency, few enough for all registers.
#if defined(__AVX512F__)
#define BYTES_PER_VECTOR 64
#define CHAINS 16
#elif defined(__AVX2__)
#define BYTES_PER_VECTOR 32
#define CHAINS 12
#else
#define BYTES_PER_VECTOR 16
#define CHAINS 12
#endif

#define FMA(NAME, TYPE)                                                                          \
  typedef TYPE NAME##_v __attribute__((vector_size(BYTES_PER_VECTOR)));                          \
  static double NAME(void) {                                                                     \
    const long kSteps = 2000000;                                                                 \
    const double flops = 2.0 * CHAINS * (BYTES_PER_VECTOR / sizeof(TYPE)) * kSteps * THREADS;    \
    double best = 0;                                                                             \
    volatile TYPE sink = 0;                                                                      \
    for (int repeat = 0; repeat < 5; repeat++) {                                                 \
      const double start = now();                                                                \
      _Pragma("omp parallel num_threads(THREADS)") {                                             \
        NAME##_v sum[CHAINS];                                                                    \
        const TYPE near_one = (TYPE)0.999 + sink;                                                \
        const NAME##_v a = near_one - (NAME##_v){0}, b = a;                                      \
        for (int c = 0; c < CHAINS; c++) sum[c] = a;                                             \
        for (long i = 0; i < kSteps; i++) {                                                      \
          _Pragma("GCC unroll 16") for (int c = 0; c < CHAINS; c++) { sum[c] = sum[c] * a + b; } \
        }                                                                                        \
        TYPE total = 0;                                                                          \
        for (int c = 0; c < CHAINS; c++) total += sum[c][0];                                     \
        if (total == 12345) sink = total; /* never: the loop must not be dropped */              \
      }                                                                                          \
      const double rate = flops / (now() - start);                                               \
      if (rate > best) best = rate;                                                              \
    }                                                                                            \
    return best;                                                                                 \
  }
FMA(fma32, float)
FMA(fma64, double)

// --- reading -------------------------------------------------------------------------------------

static double read_rate(size_t bytes) {
  typedef long vector __attribute__((vector_size(BYTES_PER_VECTOR), aligned(BYTES_PER_VECTOR)));
  enum { kAtOnce = 8 };
  const size_t step = kAtOnce * sizeof(vector);
  bytes = bytes / step * step;
  long passes = (64L << 20) / (long)bytes + 1;
  char* buffers[THREADS];
  const size_t huge = 2 << 20, room = (bytes + huge - 1) / huge * huge;
  double best = 0;
  static volatile long sink;
#pragma omp parallel num_threads(THREADS)
  {
    char* buffer = buffers[omp_get_thread_num()] = aligned_alloc(huge, room);
    if (buffer) {
      madvise(buffer, room, MADV_HUGEPAGE);
      memset(buffer, 1, bytes);
    }
  }
  for (int t = 0; t < THREADS; t++)
    if (!buffers[t]) return 0;
  for (int repeat = 0; repeat < 15; repeat++) {
    const double start = now();
#pragma omp parallel num_threads(THREADS)
    {
      const char* buffer = buffers[omp_get_thread_num()];
      vector sum[kAtOnce] = {0};
      for (long pass = 0; pass < passes; pass++) {
        for (size_t i = 0; i < bytes; i += step) {
#pragma GCC unroll 8
          for (int c = 0; c < kAtOnce; c++) sum[c] += ((const vector*)(buffer + i))[c];
        }
        __asm__ volatile("" ::: "memory");
      }
      long total = 0;
      for (int c = 0; c < kAtOnce; c++) total += sum[c][0];
      if (total == 12345) sink = total;
    }
    const double rate = (double)passes * (double)bytes * THREADS / (now() - start);
    if (rate > best) best = rate;
  }
  for (int t = 0; t < THREADS; t++) free(buffers[t]);
  return best;
}

int main(void) {
  char line[80];
  while (fgets(line, sizeof line, stdin)) {
    size_t bytes;
    if (!strcmp(line, "pulse\n"))
      pulse();
    else if (!strcmp(line, "fma32\n"))
      printf("%.2f\n", fma32() / 1e9);
    else if (!strcmp(line, "fma64\n"))
      printf("%.2f\n", fma64() / 1e9);
    else if (sscanf(line, "read %zu", &bytes) == 1)
      printf("%.2f\n", read_rate(bytes) / 1e9);
    else
      printf("?\n");
    fflush(stdout);
  }
  return 0;
}
