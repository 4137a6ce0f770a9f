// Register-tiled products over packed weights. The right operand is always packed in tiles [K][NV
// vectors], the left one is read as it lies (rows a_m apart) or packed ([K][rows]). The order of
// summation depends on K alone, never on the number of threads, so results are the same for any.
#pragma once
#include <utility>

#include "cpu/convert.h"

FRNN_BEGIN

template <class V>
constexpr int kRegisters = sizeof(V) == 64 ? 32 : 16;
// Rows of a tile of nv vectors whose accumulators fit in registers beside one row of the right operand
// and a broadcast value, or beside all broadcast values and one vector.
template <class V>
constexpr int RowsByRow(int nv) {
  return (kRegisters<V> - 1 - nv) / nv;
}
template <class V>
constexpr int TileRows(int nv) {
  const int by_row = RowsByRow<V>(nv), by_value = (kRegisters<V> - 1) / (nv + 1);
  const int rows = by_row > by_value ? by_row : by_value;
  return rows > 12 ? 12 : rows;
}
// The tile of products that have no gates to keep together: as square as registers allow, since of such
// a tile each multiply-add takes the fewest loads (of 4 x 3 vectors 7 for 12, of 6 x 2 they are 8).
template <class V>
constexpr int kTileVecs = sizeof(V) == 64 ? 4 : (sizeof(V) == 32 ? 3 : 2);
template <class V>
constexpr int kTileRows = TileRows<V>(kTileVecs<V>);
// Row of a packed left operand: a power of two, so that it is copied as one vector.
template <class V>
constexpr int kPackedRow = kTileRows<V> <= 4 ? 4 : 8;

// Products of one or two rows are summed in several chains, to hide the latency of the multiply-add. How
// many must not depend on nv up to kTileVecs: columns are cut into tiles by the number of threads, and
// results must not.
template <class V>
constexpr int Chains(int rows, int nv) {
  const int fits = (kRegisters<V> - 2) / (rows * (nv > kTileVecs<V> ? nv : kTileVecs<V>));
  const int wanted = rows == 1 ? 4 : (rows == 2 ? 2 : 1);
  return fits >= wanted ? wanted : (fits >= 2 && wanted >= 2 ? 2 : 1);
}

// A wide tile has few rows: products with it read their right operand many times over, and wait for the
// first of these reads where it comes from the third-level cache. Such a tile calls what comes next into
// the second-level cache beside its own work, a line of memory in so many steps along K: where the
// registers are full one in 24 cycles, which leaves buffers to the tile's own reads (one in 12 does not).
// Tall tiles have no registers left for it, and less need.
template <class V>
constexpr bool CallsAhead(int nv) {
  return TileRows<V>(nv) < 2 * nv;
}
constexpr int StepsOfLine(int rows, int nv) { return rows * nv > 12 ? 2 : 4; }
constexpr int64_t kLine = 64;

// c[m][v] (+)= sum_k a(m, k) * w[k * ldw + v], m < MR, v < NV vectors. a(m, k) is a[k * a_stride + m]
// if kPackedA, else a[m * a_stride + k]. Lines called ahead begin at `ahead` and are `stride` apart.
template <class V, int MR, int NV, bool kPackedA, int kChains = Chains<V>(MR, NV)>
FRNN_NOINLINE void GemmTile(const typename Lanes<V>::T* a, int64_t a_stride,
                            const typename Lanes<V>::T* w, int64_t ldw, int64_t K,
                            typename Lanes<V>::T* c, int64_t ldc, bool accumulate,
                            const char* ahead, int64_t stride) {
  constexpr int N = Lanes<V>::kSize;
  constexpr int kSteps = StepsOfLine(MR, NV);
  V acc[kChains][MR][NV];
  FRNN_UNROLL
  for (int u = 0; u < kChains; u++) {
    FRNN_UNROLL
    for (int m = 0; m < MR; m++) {
      FRNN_UNROLL
      for (int v = 0; v < NV; v++) acc[u][m][v] = V{};
    }
  }
  if (accumulate) {
    FRNN_UNROLL
    for (int m = 0; m < MR; m++) {
      FRNN_UNROLL
      for (int v = 0; v < NV; v++) acc[0][m][v] = load<V>(c + m * ldc + v * N);
    }
  }
  const auto left = [&](int m, int64_t k) FRNN_INLINE_LAMBDA {
    return splat<V>(kPackedA ? a[k * a_stride + m] : a[m * a_stride + k]);
  };
  const auto step = [&](int64_t k, V(&sum)[MR][NV]) FRNN_INLINE_LAMBDA {
    if constexpr (MR <= RowsByRow<V>(NV)) {
      V row[NV];
      FRNN_UNROLL
      for (int v = 0; v < NV; v++) {
        row[v] = load<V>(w + k * ldw + v * N);
        if constexpr (MR > 1 && kChains * MR * NV + NV + 2 <= kRegisters<V>)
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
        const V row = load<V>(w + k * ldw + v * N);
        FRNN_UNROLL
        for (int m = 0; m < MR; m++) sum[m][v] += value[m] * row;
      }
    }
  };
  int64_t k = 0;
  if constexpr (!kPackedA && CallsAhead<V>(NV) && kSteps % kChains == 0)
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
    for (; k < K; k++) step(k, acc[0]);
  FRNN_UNROLL
  for (int m = 0; m < MR; m++) {
    FRNN_UNROLL
    for (int v = 0; v < NV; v++) {
      V sum = acc[0][m][v];
      FRNN_UNROLL
      for (int u = 1; u < kChains; u++) sum += acc[u][m][v];
      store<V>(c + m * ldc + v * N, sum);
    }
  }
}

// Calls f(std::integral_constant<int, n>) for a run-time 1 <= n <= Max.
template <int Max, class F>
FRNN_INLINE void WithConstant(int n, const F& f) {
  if constexpr (Max == 1) {
    f(std::integral_constant<int, 1>());
  } else {
    if (n == Max)
      f(std::integral_constant<int, Max>());
    else
      WithConstant<Max - 1>(n, f);
  }
}

// Cuts M rows into balanced blocks of at most Max (32 rows at 6: 6 6 5 5 5 5) and calls f(rows,
// first row).
template <int Max, class F>
FRNN_INLINE void ForRowBlocks(int64_t M, const F& f) {
  const int64_t blocks = (M + Max - 1) / Max;
  int64_t r = 0;
  for (int64_t i = 0; i < blocks; i++) {
    const int rows = int(M / blocks + (i < M % blocks));
    f(rows, r);
    r += rows;
  }
}

// c[M][NV vectors] (+)= a[M][K] w[K][NV vectors], rows of w ldw apart. As much as w is called ahead from
// its end on, where the next right operand lies as a rule: a share by each tile, beginning behind those
// of the `before` rows that were multiplied with w in earlier calls.
template <class V, int NV>
void GemmRows(int64_t M, const typename Lanes<V>::T* a, int64_t lda, const typename Lanes<V>::T* w,
              int64_t ldw, int64_t K, typename Lanes<V>::T* c, int64_t ldc, bool accumulate,
              int64_t before = 0) {
  constexpr int kRows = TileRows<V>(NV);
  const int64_t bytes = K * ldw * sizeof(*w), share = K / StepsOfLine(kRows, NV) * kLine;
  ForRowBlocks<kRows>(M, [&](int rows, int64_t r) {
    const int64_t called = (before + r) * share / kRows;
    const bool more = CallsAhead<V>(NV) && called < bytes;  // else a line of w again, which is near
    const char* ahead = reinterpret_cast<const char*>(w) + (more ? bytes + called : 0);
    const auto tile = [&](auto mr, auto chains) {
      GemmTile<V, decltype(mr)::value, NV, false, decltype(chains)::value>(
          a + r * lda, lda, w, ldw, K, c + r * ldc, ldc, accumulate, ahead, more ? kLine : 0);
    };
    WithConstant<kRows>(rows, [&](auto mr) {
      constexpr int MR = decltype(mr)::value, kChains = Chains<V>(MR, NV);
      // Two of more rows: in tiles of another width they would be among three or more.
      if (MR == 2 && M > 2)
        tile(mr, std::integral_constant<int, MR == 2 ? 1 : kChains>());
      else
        tile(mr, std::integral_constant<int, kChains>());
    });
  });
}

// c[rows][NV vectors] (+)= a^T b of a [K][rows], its rows lda apart, and a packed b [K][NV vectors], rows
// <= kTileRows, NV <= kTileVecs.
template <class V, int NV>
void GemmPacked(int rows, const typename Lanes<V>::T* a, int64_t lda, const typename Lanes<V>::T* b,
                int64_t K, typename Lanes<V>::T* c, int64_t ldc, bool accumulate) {
  if constexpr (NV <= kTileVecs<V>)
    WithConstant<kTileRows<V>>(rows, [&](auto mr) {
      GemmTile<V, decltype(mr)::value, NV, true>(a, lda, b, NV * Lanes<V>::kSize, K, c, ldc,
                                                 accumulate, nullptr, 0);
    });
}

// One butterfly of a transpose. Lane i of the result comes from a where bit kStride of i is clear,
// else from b; `kUpper` takes the other half of each.
template <class V, int kStride, bool kUpper, int... I>
FRNN_INLINE V Exchange(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int N = sizeof...(I);
#ifdef __clang__
  return __builtin_shufflevector(
      a, b,
      (kUpper ? ((I & kStride) ? N + I : I + kStride) : ((I & kStride) ? N + I - kStride : I))...);
#else
  const typename Lanes<V>::I index = {
      (kUpper ? ((I & kStride) ? N + I : I + kStride) : ((I & kStride) ? N + I - kStride : I))...};
  return __builtin_shuffle(a, b, index);
#endif
}

// In place: v[i][j] <-> v[j][i].
template <class V, int kStride = 1>
FRNN_INLINE void Transpose(V (&v)[Lanes<V>::kSize]) {
  constexpr int N = Lanes<V>::kSize;
  using Sequence = std::make_integer_sequence<int, N>;
  if constexpr (kStride < N) {
    FRNN_UNROLL
    for (int i = 0; i < N; i++) {
      if (i & kStride) continue;
      const V lower = Exchange<V, kStride, false>(v[i], v[i + kStride], Sequence());
      const V upper = Exchange<V, kStride, true>(v[i], v[i + kStride], Sequence());
      v[i] = lower;
      v[i + kStride] = upper;
    }
    Transpose<V, kStride * 2>(v);
  }
}

// v[0][i] = the sum of the lanes of v[i]; the others are lost.
template <class V, int kStride = 1>
FRNN_INLINE void SumLanes(V (&v)[Lanes<V>::kSize]) {
  constexpr int N = Lanes<V>::kSize;
  using Sequence = std::make_integer_sequence<int, N>;
  if constexpr (kStride < N) {
    FRNN_UNROLL
    for (int i = 0; i < N; i += 2 * kStride)
      v[i] = Exchange<V, kStride, false>(v[i], v[i + kStride], Sequence()) +
             Exchange<V, kStride, true>(v[i], v[i + kStride], Sequence());
    SumLanes<V, kStride * 2>(v);
  }
}

// ---- rows of a times rows of w as they lie ----
//
// For few rows of a, where packing w would cost more than the product itself. Functions of their own:
// inlined, the longer ones make the way to DotLine a fifth slower.

// out[i] = sum_k a[k] * w[i * K + k], i < kSize, k < K / kSize * kSize. All rows of w pass at a time; in
// vectors of 64 bytes four, which caches stream faster than sixteen. Several chains hide the latency.
template <class V>
FRNN_NOINLINE void DotLine(const typename Lanes<V>::T* a, const typename Lanes<V>::T* w, int64_t K,
                           typename Lanes<V>::T* out) {
  constexpr int N = Lanes<V>::kSize, kLines = sizeof(V) == 64 && N > 4 ? 4 : N;
  constexpr int kChains = kLines < kRegisters<V> / 2 ? kRegisters<V> / 2 / kLines : 1;
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

// Rows of a that pass together where there are so many.
template <class V>
constexpr int kDotRows = Lanes<V>::kSize >= 8 ? 4 : 1;
// out[r * ldo + i] = what DotLine gives for row r of a, r < kDotRows.
template <class V>
FRNN_NOINLINE void DotBlock(const typename Lanes<V>::T* a, int64_t lda,
                            const typename Lanes<V>::T* w, int64_t K, typename Lanes<V>::T* out,
                            int64_t ldo) {
  constexpr int N = Lanes<V>::kSize, kRows = kDotRows<V>, kAtOnce = N / kRows;
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
    typename Lanes<V>::T sums[N];
    store<V>(sums, acc[0]);
    FRNN_UNROLL
    for (int r = 0; r < kRows; r++)
      memcpy(out + r * ldo + first, sums + r * kAtOnce, kAtOnce * sizeof(sums[0]));
  }
}

// out[i] += the rest of it, K / kSize * kSize <= k < K, where K > kSize.
template <class V>
FRNN_NOINLINE void AddLast(const typename Lanes<V>::T* a, const typename Lanes<V>::T* w, int64_t K,
                           typename Lanes<V>::T* out) {
  constexpr int N = Lanes<V>::kSize;
  using T = typename Lanes<V>::T;
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

// out[i] = sum_k a[k] * w[i * K + k], i < lanes, and zero for the other lanes.
template <class V>
FRNN_NOINLINE void DotEach(const typename Lanes<V>::T* a, const typename Lanes<V>::T* w, int lanes,
                           int64_t K, typename Lanes<V>::T* out) {
  for (int i = 0; i < Lanes<V>::kSize; i++) {
    typename Lanes<V>::T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < (i < lanes ? K : 0); k++) sum += w[i * K + k] * a[k];
    out[i] = sum;
  }
}

// out[r * ldo + i] = sum_k a[r * lda + k] * w[i * K + k], r < M, i < lanes, and zero for the other lanes.
template <class V>
FRNN_INLINE void DotRows(int64_t M, const typename Lanes<V>::T* a, int64_t lda,
                         const typename Lanes<V>::T* w, int lanes, int64_t K,
                         typename Lanes<V>::T* out, int64_t ldo) {
  constexpr int N = Lanes<V>::kSize;
  if (lanes < N || K < N) {
    for (int64_t r = 0; r < M; r++) DotEach<V>(a + r * lda, w, lanes, K, out + r * ldo);
    return;
  }
  int64_t r = 0;
  for (; kDotRows<V> > 1 && M - r >= kDotRows<V>; r += kDotRows<V>)
    DotBlock<V>(a + r * lda, lda, w, K, out + r * ldo, ldo);
  for (; r < M; r++) DotLine<V>(a + r * lda, w, K, out + r * ldo);
  for (r = 0; r < M && K % N != 0; r++) AddLast<V>(a + r * lda, w, K, out + r * ldo);
}

// Compiled once for each instruction set and scalar type (cpu/gemm.cpp.in), not again for every
// cell.
using OwnVec = Vec<FRNN_SCALAR, kVectorBytes / sizeof(FRNN_SCALAR)>;
#ifndef FRNN_DEFINE_GEMM
#define FRNN_DEFINE_GEMM extern
#endif
#define FRNN_GEMM(NV)                                                                        \
  FRNN_DEFINE_GEMM template void GemmRows<OwnVec, NV>(int64_t, const FRNN_SCALAR*, int64_t,  \
                                                      const FRNN_SCALAR*, int64_t, int64_t,  \
                                                      FRNN_SCALAR*, int64_t, bool, int64_t); \
  FRNN_DEFINE_GEMM template void GemmPacked<OwnVec, NV>(                                     \
      int, const FRNN_SCALAR*, int64_t, const FRNN_SCALAR*, int64_t, FRNN_SCALAR*, int64_t, bool);
FRNN_GEMM(1)
FRNN_GEMM(2)
FRNN_GEMM(3)
FRNN_GEMM(4)
FRNN_DEFINE_GEMM template void DotLine<OwnVec>(const FRNN_SCALAR*, const FRNN_SCALAR*, int64_t,
                                               FRNN_SCALAR*);
FRNN_DEFINE_GEMM template void DotBlock<OwnVec>(const FRNN_SCALAR*, int64_t, const FRNN_SCALAR*,
                                                int64_t, FRNN_SCALAR*, int64_t);
FRNN_DEFINE_GEMM template void AddLast<OwnVec>(const FRNN_SCALAR*, const FRNN_SCALAR*, int64_t,
                                               FRNN_SCALAR*);
FRNN_DEFINE_GEMM template void DotEach<OwnVec>(const FRNN_SCALAR*, const FRNN_SCALAR*, int, int64_t,
                                               FRNN_SCALAR*);
#undef FRNN_GEMM

// `vecs` vectors cut into tiles of at most kTileVecs, as equal as can be: a tile of one vector has too
// few chains.
template <class V>
struct ColumnTiles {
  explicit ColumnTiles(int64_t vecs)
      : vecs(vecs), count((vecs + kTileVecs<V> - 1) / kTileVecs<V>) {}
  const int64_t vecs, count;
  // The first vector of a tile; of tile `count`, the end.
  int64_t First(int64_t tile) const {
    if (count == 0) return 0;
    const int64_t wider = vecs % count;
    return tile * (vecs / count) + (tile < wider ? tile : wider);
  }
  // f(first vector, vectors as a constant), for tiles [begin, end).
  template <class F>
  void For(int64_t begin, int64_t end, const F& f) const {
    for (int64_t tile = begin; tile < end; tile++) {
      const int64_t v = First(tile);
      WithConstant<kTileVecs<V>>(int(First(tile + 1) - v), [&](auto nv) { f(v, nv); });
    }
  }
};
// The same for the vectors [begin, end).
template <class V, class F>
FRNN_INLINE void ForColumnTiles(int64_t begin, int64_t end, const F& f) {
  const ColumnTiles<V> tiles(end > begin ? end - begin : 0);
  tiles.For(0, tiles.count, [&](int64_t v, auto nv) { f(begin + v, nv); });
}

// ---- packing ----

// n <= kSize elements of a row in any storage type, the rest zero.
template <class V>
FRNN_INLINE V LoadVec(const void* row, Storage s, int64_t i, int n) {
  using T = typename Lanes<V>::T;
  if (s == StorageOf<T>::kValue) return load_n<V>(static_cast<const T*>(row) + i, n);
  T lanes[Lanes<V>::kSize] = {};
  LoadRow<T>(At(row, s, i), s, lanes, n);
  return load<V>(lanes);
}

// dst[k * k_stride + lane] = w[(row0 + lane)][k], lane < N: one vector of units, K columns of rows ldw
// apart. Rows at and past `rows` are zero.
template <class V>
FRNN_NOINLINE void PackTransposed(const void* w, Storage s, int64_t row0, int64_t rows, int64_t K,
                                  int64_t ldw, typename Lanes<V>::T* dst, int64_t k_stride) {
  using T = typename Lanes<V>::T;
  constexpr int N = Lanes<V>::kSize;
  // Whole lines of memory: rows may be a power of two apart, and then few of them stay in the cache.
  constexpr int kVecs = sizeof(V) < kLine ? kLine / sizeof(V) : 1;
  int64_t k = 0;
  if (s == StorageOf<T>::kValue && row0 + N <= rows)
    for (const T* first = static_cast<const T*>(w) + row0 * ldw; k + kVecs * N <= K;
         k += kVecs * N) {
      V block[kVecs][N];
      FRNN_UNROLL
      for (int lane = 0; lane < N; lane++) {
        FRNN_UNROLL
        for (int j = 0; j < kVecs; j++) block[j][lane] = load<V>(first + lane * ldw + k + j * N);
      }
      FRNN_UNROLL
      for (int j = 0; j < kVecs; j++) {
        Transpose(block[j]);
        FRNN_UNROLL
        for (int i = 0; i < N; i++) store<V>(dst + (k + j * N + i) * k_stride, block[j][i]);
      }
    }
  for (; k < K; k += N) {
    const int n = int(K - k < N ? K - k : N);
    V block[N];
    for (int lane = 0; lane < N; lane++)
      block[lane] = row0 + lane < rows ? LoadVec<V>(w, s, (row0 + lane) * ldw + k, n) : V{};
    Transpose(block);
    for (int i = 0; i < n; i++) store<V>(dst + (k + i) * k_stride, block[i]);
  }
}

// dst[k][0 .. kWidth) = w[k][col .. col + kWidth), zero past `cols`; w has rows of `cols`.
template <int kWidth, class T>
void PackColumns(const void* w, Storage s, int64_t K, int64_t cols, int64_t col, T* dst) {
  for (int64_t k = 0; k < K; k++)
    LoadPadded<kWidth>(At(w, s, k * cols + col), s, cols - col, dst + k * kWidth);
}

// c[M][NV vectors] (+)= a[M][K] w[K][col .. col + NV vectors), for one use of w: so many of its rows are
// packed at a time as stay in the first-level cache. What is summed in which order is as with all of them
// packed, M > 2.
constexpr int64_t kColumnDepth = 64;
template <class V, int NV>
void GemmColumns(int64_t M, const typename Lanes<V>::T* a, int64_t lda, const void* w, Storage s,
                 int64_t K, int64_t cols, int64_t col, typename Lanes<V>::T* c, int64_t ldc,
                 bool accumulate) {
  constexpr int kWidth = NV * Lanes<V>::kSize;
  alignas(kLine) typename Lanes<V>::T packed[kColumnDepth * kWidth];
  for (int64_t k = 0; k < K; k += kColumnDepth) {
    const int64_t depth = K - k < kColumnDepth ? K - k : kColumnDepth;
    PackColumns<kWidth>(At(w, s, k * cols), s, depth, cols, col, packed);
    GemmRows<V, NV>(M, a + k, lda, packed, kWidth, depth, c, ldc, accumulate || k > 0);
  }
}

FRNN_END
