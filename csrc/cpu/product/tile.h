// One tile of a product, in registers.
#pragma once
#include "cpu/product/gemm.h"

FRNN_BEGIN

FRNN_INLINE V LoadWide(const T* w) { return load<V>(w); }
FRNN_INLINE V LoadWide(const uint16_t* w) {
  using Wide = Vec<uint32_t, sizeof(V) / 4>;
  Vec<uint16_t, sizeof(V) / 4> bits;
  memcpy(&bits, w, sizeof(bits));
  return bit_cast<V>(Wide(__builtin_convertvector(bits, Wide) << 16));
}

// sums[m][v] = sum_k a(m, k) * w[k * ldw + v], m < MR, v < NV vectors. a(m, k) is a[k * a_stride + m]
// if kPackedA, else a[m * a_stride + k]. Lines called ahead, if kAhead, begin at `ahead` and are
// `stride` apart.
template <int MR, int NV, bool kPackedA, int kChains, bool kAhead, class W>
FRNN_INLINE void TileSums(const T* a, int64_t a_stride, const W* w, int64_t ldw, int64_t K,
                          V (&sums)[MR][NV], const char* ahead = nullptr, int64_t stride = 0) {
  constexpr int kSteps = cpu::StepsOfLine(MR, NV);
  V acc[kChains][MR][NV];
  FRNN_UNROLL
  for (int u = 0; u < kChains; u++) {
    FRNN_UNROLL
    for (int m = 0; m < MR; m++) {
      FRNN_UNROLL
      for (int v = 0; v < NV; v++) acc[u][m][v] = V{};
    }
  }
  const auto left = [&](int m, int64_t k) FRNN_INLINE_LAMBDA {
    return splat<V>(kPackedA ? a[k * a_stride + m] : a[m * a_stride + k]);
  };
  const auto step = [&](int64_t k, V(&sum)[MR][NV]) FRNN_INLINE_LAMBDA {
    if constexpr (MR <= cpu::RowsByRow(kVectors, NV)) {
      V row[NV];
      FRNN_UNROLL
      for (int v = 0; v < NV; v++) {
        row[v] = LoadWide(w + k * ldw + v * N);
        if constexpr (MR > 1 && kChains * MR * NV + NV + 2 <= kRegisters)
          FRNN_KEEP_IN_REGISTER(row[v]);
      }
      FRNN_UNROLL
      for (int m = 0; m < MR; m++) {
        const V value = left(m, k);
        FRNN_UNROLL
        for (int v = 0; v < NV; v++) sum[m][v] += value * row[v];
      }
    } else {
      V value[MR];
      FRNN_UNROLL
      for (int m = 0; m < MR; m++) value[m] = left(m, k);
      FRNN_UNROLL
      for (int v = 0; v < NV; v++) {
        const V row = LoadWide(w + k * ldw + v * N);
        FRNN_UNROLL
        for (int m = 0; m < MR; m++) sum[m][v] += value[m] * row;
      }
    }
  };
  int64_t k = 0;
  if constexpr (kAhead && kSteps % kChains == 0)
    for (; k + kSteps <= K; k += kSteps, ahead += stride) {
      __builtin_prefetch(ahead, 0, 2);
      FRNN_UNROLL
      for (int u = 0; u < kSteps; u++) step(k + u, acc[u % kChains]);
    }
  // Unrolled: the loop's own instructions compete with the multiply-adds for ports (5 %).
#pragma GCC unroll 2
  for (; k + kChains <= K; k += kChains) {
    FRNN_UNROLL
    for (int u = 0; u < kChains; u++) step(k + u, acc[u]);
  }
  if constexpr (kChains > 1)
    for (int64_t left_over = K % kChains; left_over > 0; left_over--, k++) step(k, acc[0]);
  FRNN_UNROLL
  for (int m = 0; m < MR; m++) {
    FRNN_UNROLL
    for (int v = 0; v < NV; v++) {
      sums[m][v] = acc[0][m][v];
      FRNN_UNROLL
      for (int u = 1; u < kChains; u++) sums[m][v] += acc[u][m][v];
    }
  }
}

// c[m][v] (+)= these sums.
template <int MR, int NV, bool kPackedA, int kChains = cpu::Chains(kVectors, MR, NV), class W>
FRNN_NOINLINE void GemmTile(const T* a, int64_t a_stride, const W* w, int64_t ldw, int64_t K, T* c,
                            int64_t ldc, bool accumulate, const char* ahead, int64_t stride) {
  constexpr bool kAhead = !kPackedA && cpu::CallsAhead(kVectors, NV);
  V sums[MR][NV];
  TileSums<MR, NV, kPackedA, kChains, kAhead>(a, a_stride, w, ldw, K, sums, ahead, stride);
  FRNN_UNROLL
  for (int m = 0; m < MR; m++) {
    FRNN_UNROLL
    for (int v = 0; v < NV; v++) {
      if (accumulate) sums[m][v] += load<V>(c + m * ldc + v * N);
      store<V>(c + m * ldc + v * N, sums[m][v]);
    }
  }
}

FRNN_END
