// Products of matrices on vectors, and the order in memory that their right operands want: packed
// in tiles of columns [K][NV vectors]. The left operand is read as it lies (rows lda apart) or
// packed ([K][rows]). The order of summation depends on K alone, never on the number of threads, so
// results are the same for any. What c has already is added to the sum of all products. The products
// themselves (cpu/product/gemm_tile.h) are compiled once for each instruction set and computing type,
// not again for every cell.
#pragma once
#include <utility>

#include "cpu/convert.h"
#include "cpu/plan.h"

FRNN_BEGIN

constexpr int64_t kLine = 64;  // bytes of a line of memory
constexpr cpu::Vectors kVectors{kVectorBytes, kRegisters};
constexpr int kTileVecs = cpu::TileVecs(kVectors);
constexpr int kTileRows = cpu::TileRows(kVectors, kTileVecs);
// Row of a packed left operand: a power of two, so that it is copied as one vector.
constexpr int kPackedRow = kTileRows <= 4 ? 4 : 8;
// Rows of a left operand that pass together along rows of w as they lie, where there are so many.
constexpr int kDotRows = N >= 8 ? 4 : 1;

// ---- products, 1 <= NV <= 4 ----

// c[M][NV vectors] (+)= a[M][K] w[K][NV vectors], rows of w ldw apart. As much as w is called ahead
// from its end on, where the next right operand lies as a rule: a share by each tile, beginning
// behind those of the `before` rows that were multiplied with w in earlier calls. A row or two are
// summed in several chains, but for `one_chain`. w is of the computing type, or of bfloat16 (uint16_t).
template <int NV, class W>
FRNN_EXPORT void GemmRows(int64_t M, const T* a, int64_t lda, const W* w, int64_t ldw, int64_t K,
                          T* c, int64_t ldc, bool accumulate, bool one_chain, int64_t before = 0);
// c[rows][NV vectors] (+)= a^T b of a [K][rows], its rows lda apart, and a packed b [K][NV vectors],
// rows <= kTileRows, NV <= kTileVecs.
template <int NV>
FRNN_EXPORT void GemmPacked(int rows, const T* a, int64_t lda, const T* b, int64_t K, T* c,
                            int64_t ldc, bool accumulate);

// Rows of a times rows of w as they lie, for few rows of a, where packing w would cost more than
// the product itself.
// out[i] = sum_k a[k] * w[i * K + k], i < N, k < K / N * N.
FRNN_EXPORT void DotLine(const T* a, const T* w, int64_t K, T* out);
// out[r * ldo + i] = what DotLine gives for row r of a, r < kDotRows.
FRNN_EXPORT void DotBlock(const T* a, int64_t lda, const T* w, int64_t K, T* out, int64_t ldo);
// out[i] += the rest of it, K / N * N <= k < K, where K > N.
FRNN_EXPORT void AddLast(const T* a, const T* w, int64_t K, T* out);
// out[i] = sum_k a[k] * w[i * K + k], i < lanes, and zero for the other lanes.
FRNN_EXPORT void DotEach(const T* a, const T* w, int lanes, int64_t K, T* out);

// out[r * ldo + i] = sum_k a[r * lda + k] * w[i * K + k], r < M, i < lanes, and zero for the other
// lanes.
FRNN_INLINE void DotRows(int64_t M, const T* a, int64_t lda, const T* w, int lanes, int64_t K,
                         T* out, int64_t ldo) {
  if (lanes < N || K < N) {
    for (int64_t r = 0; r < M; r++) DotEach(a + r * lda, w, lanes, K, out + r * ldo);
    return;
  }
  int64_t r = 0;
  for (; kDotRows > 1 && M - r >= kDotRows; r += kDotRows)
    DotBlock(a + r * lda, lda, w, K, out + r * ldo, ldo);
  for (; r < M; r++) DotLine(a + r * lda, w, K, out + r * ldo);
  for (r = 0; r < M && K % N != 0; r++) AddLast(a + r * lda, w, K, out + r * ldo);
}

// ---- blocks ----

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

// `vecs` vectors cut into tiles of at most kTileVecs, as equal as can be: a tile of one vector has
// too few chains.
struct ColumnTiles {
  explicit ColumnTiles(int64_t vecs) : vecs(vecs), count((vecs + kTileVecs - 1) / kTileVecs) {}
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
      WithConstant<kTileVecs>(int(First(tile + 1) - v), [&](auto nv) { f(v, nv); });
    }
  }
};
// The same for the vectors [begin, end).
template <class F>
FRNN_INLINE void ForColumnTiles(int64_t begin, int64_t end, const F& f) {
  const ColumnTiles tiles(end > begin ? end - begin : 0);
  tiles.For(0, tiles.count, [&](int64_t v, auto nv) { f(begin + v, nv); });
}

// ---- packing ----

// One butterfly of a transpose. Lane i of the result comes from a where bit kStride of i is clear,
// else from b; `kUpper` takes the other half of each.
template <int kStride, bool kUpper, int... I>
FRNN_INLINE V Exchange(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int N = sizeof...(I);
#ifdef __clang__
  return __builtin_shufflevector(
      a, b,
      (kUpper ? ((I & kStride) ? N + I : I + kStride) : ((I & kStride) ? N + I - kStride : I))...);
#else
  const Bits index = {
      (kUpper ? ((I & kStride) ? N + I : I + kStride) : ((I & kStride) ? N + I - kStride : I))...};
  return __builtin_shuffle(a, b, index);
#endif
}

// In place: v[i][j] <-> v[j][i].
template <int kStride = 1>
FRNN_INLINE void Transpose(V (&v)[N]) {
  using Sequence = std::make_integer_sequence<int, N>;
  if constexpr (kStride < N) {
    FRNN_UNROLL
    for (int i = 0; i < N; i++) {
      if (i & kStride) continue;
      const V lower = Exchange<kStride, false>(v[i], v[i + kStride], Sequence());
      const V upper = Exchange<kStride, true>(v[i], v[i + kStride], Sequence());
      v[i] = lower;
      v[i + kStride] = upper;
    }
    Transpose<kStride * 2>(v);
  }
}

// v[0][i] = the sum of the lanes of v[i]; the others are lost.
template <int kStride = 1>
FRNN_INLINE void SumLanes(V (&v)[N]) {
  using Sequence = std::make_integer_sequence<int, N>;
  if constexpr (kStride < N) {
    FRNN_UNROLL
    for (int i = 0; i < N; i += 2 * kStride)
      v[i] = Exchange<kStride, false>(v[i], v[i + kStride], Sequence()) +
             Exchange<kStride, true>(v[i], v[i + kStride], Sequence());
    SumLanes<kStride * 2>(v);
  }
}

// n <= N elements of a row in any storage type, the rest zero.
FRNN_INLINE V LoadVec(const void* row, Storage s, int64_t i, int n) {
  if (s == kPlain) return load_n(static_cast<const T*>(row) + i, n);
  T lanes[N] = {};
  LoadRow(At(row, s, i), s, lanes, n);
  return load<V>(lanes);
}

// dst[k * k_stride + lane] = w[(row0 + lane)][k], lane < N: one vector of units, K columns, rows of w
// ldw apart. Rows at and past `rows` are zero.
FRNN_NOINLINE inline void PackTransposed(const void* w, Storage s, int64_t row0, int64_t rows,
                                         int64_t K, int64_t ldw, T* dst, int64_t k_stride) {
  // Whole lines of memory: rows may be a power of two apart, and then few of them stay in the
  // cache.
  constexpr int kVecs = sizeof(V) < kLine ? kLine / sizeof(V) : 1;
  int64_t k = 0;
  if (s == kPlain && row0 + N <= rows)
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
      block[lane] = row0 + lane < rows ? LoadVec(w, s, (row0 + lane) * ldw + k, n) : V{};
    Transpose(block);
    for (int i = 0; i < n; i++) store<V>(dst + (k + i) * k_stride, block[i]);
  }
}

// dst[k][0 .. kWidth) = w[k][col .. col + kWidth), zero past `cols`; w has rows of `cols`.
template <int kWidth>
void PackColumns(const void* w, Storage s, int64_t K, int64_t cols, int64_t col, T* dst) {
  for (int64_t k = 0; k < K; k++)
    LoadPadded<kWidth>(At(w, s, k * cols + col), s, cols - col, dst + k * kWidth);
}

// c[M][NV vectors] (+)= a[M][K] w[K][NV vectors], a sum of sums of kSumDepth products: rows of w ldw
// apart.
template <int NV>
void GemmBlocks(int64_t M, const T* a, int64_t lda, const T* w, int64_t ldw, int64_t K, T* c,
                int64_t ldc, bool accumulate, bool one_chain) {
  for (int64_t k = 0; k < K; k += cpu::kSumDepth)
    GemmRows<NV>(M, a + k, lda, w + k * ldw, ldw, K - k < cpu::kSumDepth ? K - k : cpu::kSumDepth,
                 c, ldc, accumulate || k > 0, one_chain);
}
// The same with the columns from col on of a w that is used once: packed by so many rows.
template <int NV>
void GemmColumns(int64_t M, const T* a, int64_t lda, const void* w, Storage s, int64_t K,
                 int64_t cols, int64_t col, T* c, int64_t ldc, bool accumulate, bool one_chain) {
  alignas(kLine) T packed[cpu::kSumDepth * NV * N];
  for (int64_t k = 0; k < K; k += cpu::kSumDepth) {
    const int64_t depth = K - k < cpu::kSumDepth ? K - k : cpu::kSumDepth;
    PackColumns<NV * N>(At(w, s, k * cols), s, depth, cols, col, packed);
    GemmRows<NV>(M, a + k, lda, packed, NV * N, depth, c, ldc, accumulate || k > 0, one_chain);
  }
}

FRNN_END
