// The products of cpu/product/gemm.h, in tiles of registers.
#pragma once
#include "cpu/product/tile.h"

FRNN_BEGIN

template <int NV, class W>
void GemmRows(int64_t M, const T* a, int64_t lda, const W* w, int64_t ldw, int64_t K, T* c,
              int64_t ldc, bool accumulate, bool one_chain, int64_t before) {
  constexpr int kRows = cpu::TileRows(kVectors, NV);
  const int64_t bytes = K * ldw * sizeof(*w), share = K / cpu::StepsOfLine(kRows, NV) * kLine;
  ForRowBlocks<kRows>(M, [&](int rows, int64_t r) {
    const int64_t called = (before + r) * share / kRows;
    const bool more =
        cpu::CallsAhead(kVectors, NV) && called < bytes;  // else a line of w again, which is near
    const char* ahead = reinterpret_cast<const char*>(w) + (more ? bytes + called : 0);
    const auto tile = [&](auto mr, auto chains) {
      GemmTile<decltype(mr)::value, NV, false, decltype(chains)::value>(
          a + r * lda, lda, w, ldw, K, c + r * ldc, ldc, accumulate, ahead, more ? kLine : 0);
    };
    WithConstant<kRows>(rows, [&](auto mr) {
      constexpr int MR = decltype(mr)::value, kChains = cpu::Chains(kVectors, MR, NV);
      // Two of more rows: in tiles of another width they would be among three or more.
      if (kChains > 1 && (one_chain || (MR == 2 && M > 2)))
        tile(mr, std::integral_constant<int, 1>());
      else
        tile(mr, std::integral_constant<int, kChains>());
    });
  });
}

template <int NV>
void GemmPacked(int rows, const T* a, int64_t lda, const T* b, int64_t K, T* c, int64_t ldc,
                bool accumulate) {
  if constexpr (NV <= kTileVecs)
    WithConstant<kTileRows>(rows, [&](auto mr) {
      GemmTile<decltype(mr)::value, NV, true>(a, lda, b, NV * N, K, c, ldc, accumulate, nullptr, 0);
    });
}

#define FRNN_ROWS(NV, W)                                                                          \
  template void GemmRows<NV>(int64_t, const T*, int64_t, const W*, int64_t, int64_t, T*, int64_t, \
                             bool, bool, int64_t);
#define FRNN_ROWS_OF(W) FRNN_ROWS(1, W) FRNN_ROWS(2, W) FRNN_ROWS(3, W) FRNN_ROWS(4, W)
FRNN_ROWS_OF(T)
FRNN_ROWS_OF(uint16_t)
#undef FRNN_ROWS_OF
#undef FRNN_ROWS
template void GemmPacked<1>(int, const T*, int64_t, const T*, int64_t, T*, int64_t, bool);
template void GemmPacked<2>(int, const T*, int64_t, const T*, int64_t, T*, int64_t, bool);
template void GemmPacked<3>(int, const T*, int64_t, const T*, int64_t, T*, int64_t, bool);
template void GemmPacked<4>(int, const T*, int64_t, const T*, int64_t, T*, int64_t, bool);

// ---- rows of a times rows of w as they lie ----
//
// Functions of their own: inlined, the longer ones make the way to DotLine a fifth slower.

// All rows of w pass at a time; in vectors of 64 bytes four, which caches stream faster than
// sixteen. Several chains hide the latency.
FRNN_NOINLINE void DotLine(const T* a, const T* w, int64_t K, T* out) {
  constexpr int kLines = sizeof(V) == 64 && N > 4 ? 4 : N;
  constexpr int kChains = kLines < kRegisters / 2 ? kRegisters / 2 / kLines : 1;
  V sums[N];
  FRNN_UNROLL
  for (int first = 0; first < N; first += kLines) {
    const auto* w_first = w + first * K;
    V acc[kChains][kLines];
    FRNN_UNROLL
    for (int u = 0; u < kChains; u++) {
      FRNN_UNROLL
      for (int i = 0; i < kLines; i++) acc[u][i] = V{};
    }
    const auto step = [&](int64_t k, V(&sum)[kLines]) FRNN_INLINE_LAMBDA {
      const V x = load<V>(a + k);
      FRNN_UNROLL
      for (int i = 0; i < kLines; i++) sum[i] += load<V>(w_first + i * K + k) * x;
    };
    int64_t k = 0;
    for (; k + kChains * N <= K; k += kChains * N) {
      FRNN_UNROLL
      for (int u = 0; u < kChains; u++) step(k + u * N, acc[u]);
    }
    if constexpr (kChains > 1)
      for (; k + N <= K; k += N) step(k, acc[0]);
    FRNN_UNROLL
    for (int i = 0; i < kLines; i++) {
      sums[first + i] = acc[0][i];
      FRNN_UNROLL
      for (int u = 1; u < kChains; u++) sums[first + i] += acc[u][i];
    }
  }
  SumLanes(sums);
  store<V>(out, sums[0]);
}

FRNN_NOINLINE void DotBlock(const T* a, int64_t lda, const T* w, int64_t K, T* out, int64_t ldo) {
  constexpr int kRows = kDotRows, kAtOnce = N / kRows;
  for (int first = 0; first < N; first += kAtOnce) {
    const auto* w_first = w + first * K;
    V acc[N];
    FRNN_UNROLL
    for (int i = 0; i < N; i++) acc[i] = V{};
    for (int64_t k = 0; k + N <= K; k += N) {
      V x[kRows];
      FRNN_UNROLL
      for (int r = 0; r < kRows; r++) x[r] = load<V>(a + r * lda + k);
      FRNN_UNROLL
      for (int i = 0; i < kAtOnce; i++) {
        const V value = load<V>(w_first + i * K + k);
        FRNN_UNROLL
        for (int r = 0; r < kRows; r++) acc[r * kAtOnce + i] += value * x[r];
      }
    }
    SumLanes(acc);
    T sums[N];
    store<V>(sums, acc[0]);
    FRNN_UNROLL
    for (int r = 0; r < kRows; r++)
      memcpy(out + r * ldo + first, sums + r * kAtOnce, kAtOnce * sizeof(sums[0]));
  }
}

FRNN_NOINLINE void AddLast(const T* a, const T* w, int64_t K, T* out) {
  // The last vector overlaps with the one before it: of both sides only what is new counts.
  T lanes[N];
  for (int i = 0; i < N; i++) lanes[i] = T(i >= N - K % N);
  const V is_new = load<V>(lanes), zero{};
  const V x = is_new != zero ? load<V>(a + K - N) : zero;
  V sums[N];
  FRNN_UNROLL
  for (int i = 0; i < N; i++) sums[i] = (is_new != zero ? load<V>(w + i * K + K - N) : zero) * x;
  SumLanes(sums);
  store<V>(out, load<V>(out) + sums[0]);
}

FRNN_NOINLINE void DotEach(const T* a, const T* w, int lanes, int64_t K, T* out) {
  for (int i = 0; i < N; i++) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < (i < lanes ? K : 0); k++) sum += w[i * K + k] * a[k];
    out[i] = sum;
  }
}

FRNN_END
