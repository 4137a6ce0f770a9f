// dW of the backward: one large product over all rows of a sequence.
#pragma once
#include <atomic>

#include "cpu/product/gemm.h"
#include "cpu/product/tiles.h"

FRNN_BEGIN

// The left side: the gate gradients of a whole sequence, and what a thread packs of a block of
// them.
struct Gradients {
  static constexpr int64_t kGroup = cpu::GradGroup(kTileRows);  // rows of dw at a time

  const T* d;                   // [rows][gate][unit]
  int64_t stride, gate_stride;  // between rows, and between gates
  int64_t rows, H;
  const float* sizes;  // in fixed point, the largest d of each row
  T* packed;
  T* sums;  // of a block, for the rows of dw and a tile of columns
  parts::TiledOperand tiles;
  Balance balance;  // in fixed point, of a block

  static int64_t Block(int64_t rows) { return rows < cpu::kGradRows ? rows : cpu::kGradRows; }
  void Take(Scratch& s, int64_t rows, bool tiled, parts::Cut cut) {
    packed = s.Take<T>(kGroup / kTileRows * kPackedRow * Block(rows));
    sums = s.Take<T>(kGroup * kTileVecs * N);
    tiles = TakeTiles(s, tiled, cpu::kTileGroup * parts::kRows, Block(rows), cut);
    balance.Take(s, tiles);
  }
};

// dw[gates * H, cols] = sum over rows r of d[r]^T b[r], in blocks of rows. The team packs the right
// side of a block together; each thread owns rows of dw and packs its left side group by group.
// Within a group the sum runs in steps that keep a right tile in the first-level cache. Sums of
// kSumDepth products make those of blocks, which make dw.
class WeightGrad {
 public:
  Gradients left;
  int gates;          // rows of dw: gate q, unit u, at q * H + u
  const int* column;  // gate q's gradients are gate column[q] of d
  int64_t cols;
  T* packed;  // a block of the right side, for vectors and for tiles
  parts::TiledOperand tiles;
  // With tiles, the last block whose right side is out of range, as the number of its first row,
  // which is counted on from `first_row` in each direction.
  std::atomic<int64_t>* misfit;
  int64_t first_row;
  T* sum;    // [gates * H, cols] in the computing type where dw is stored in 16 bits
  void* dw;  // null: not wanted
  Storage storage;

  static int64_t PackedSize(int64_t rows, int64_t cols) {
    return RoundUp(cols, N) * Gradients::Block(rows);
  }
  // load(r0, n, col, nv, dst): rows r0 .. r0 + n of the right operand, nv vectors (a constant) of
  // columns from col on, into dst [n][nv vectors].
  template <class F>
  void Run(Team& team, const F& load) const {
    if (!dw) return;
    for (int64_t r0 = 0; r0 < left.rows; r0 += Block()) RunBlock(team, load, r0);
    Store(team);
  }

  // Two products on tiles. The gradients that they share, out of `gradients`, are packed once; d is
  // known to be in the range of tiles. Where a right side is not, vectors do the block.
  template <class F, class G>
  static void RunTiles(Team& team, int gradients, const WeightGrad& x, const F& load_x,
                       const WeightGrad& h, const G& load_h) {
    if constexpr (kTiles) {
      const int64_t blocks = parts::Blocks(x.left.H);
      // Blocks of rows of dw are split over the team, weighed by what is done with them: one
      // packing, and products that take about three times as long.
      const auto weight_of = [&](int q) {
        const int64_t uses = x.Uses(q) + h.Uses(q);
        return uses > 0 ? 1 + 3 * uses : 0;
      };
      int64_t total = 0;
      for (int q = 0; q < gradients; q++) total += weight_of(q) * blocks;
      const int64_t low = total * team.id / team.size, high = total * (team.id + 1) / team.size;
      for (int64_t r0 = 0; r0 < x.left.rows; r0 += x.Block()) {
        const int64_t n = x.Length(r0);
        if (x.left.tiles.cut == parts::Cut::kFixed)
          fixed::Factors(x.left.sizes + r0, n, x.left.balance.factors, x.left.balance.inverse);
        x.PackRight(team, load_x, r0);
        h.PackRight(team, load_h, r0);
        team.Sync();
        const bool x_fits = x.Fits(r0), h_fits = h.Fits(r0);
        parts::TiledOperand of_d = OfDepth(x.left.tiles, n);
        of_d.factors = x.left.balance.inverse;
        int64_t before = 0;  // weight of the gradients so far
        bool back = false;
        for (int q = 0; q < gradients; q++) {
          const int64_t weight = weight_of(q);
          if (weight == 0) continue;
          const auto first_from = [&](int64_t bound) {
            const int64_t block = (bound - before + weight - 1) / weight;
            return bound <= before ? 0 : (block < blocks ? block : blocks);
          };
          const int64_t begin = first_from(low), end = first_from(high);
          before += weight * blocks;
          for (int64_t m = begin; m < end; m += cpu::kTileGroup) {
            const int64_t unit = m * parts::kRows,
                          last = (end - m < cpu::kTileGroup ? end : m + cpu::kTileGroup) *
                                 parts::kRows;
            const int64_t units = (last < x.left.H ? last : x.left.H) - unit;
            const T* first = x.left.d + r0 * x.left.stride + q * x.left.gate_stride + unit;
            parts::PackLeftAcross(Floats(first), x.left.stride, units, n, of_d);
            // There and back, see parts::Multiply.
            if (x_fits && !back) x.MultiplyTiles(of_d, q, unit, units, r0, back);
            if (h_fits) h.MultiplyTiles(of_d, q, unit, units, r0, back);
            if (x_fits && back) x.MultiplyTiles(of_d, q, unit, units, r0, back);
            back = !back;
          }
        }
        team.Sync();
        if (!x_fits) x.RunBlock(team, load_x, r0);
        if (!h_fits) h.RunBlock(team, load_h, r0);
      }
      x.Store(team);
      h.Store(team);
    }
  }

 private:
  int64_t Block() const { return Gradients::Block(left.rows); }
  bool IsDirect() const { return storage == kPlain; }
  T* Result() const { return IsDirect() ? static_cast<T*>(dw) : sum; }
  ColumnTiles Columns() const { return ColumnTiles((cols + N - 1) / N); }
  int64_t Length(int64_t r0) const {
    return left.rows - r0 < Block() ? left.rows - r0 : Block();  // of the block from r0 on
  }
  void Store(Team& team) const {
    if (!dw || IsDirect()) return;
    const auto my_rows = team.Split(gates * left.H);
    for (int64_t m = my_rows.begin; m < my_rows.end; m++)
      StoreRow(At(dw, storage, m * cols), storage, sum + m * cols, cols);
  }

  // The products in which gradient q is (all gradients are).
  int64_t Uses(int q) const {
    int64_t uses = 0;
    for (int gate = 0; gate < gates && dw; gate++) uses += column[gate] == q;
    return uses;
  }

  static parts::TiledOperand OfDepth(parts::TiledOperand operand, int64_t K) {
    operand.depth_blocks = parts::DepthBlocks(K, operand.cut);
    return operand;
  }
  parts::TiledOperand Right(int64_t r0) const {
    parts::TiledOperand right = OfDepth(tiles, Length(r0));
    right.factors = left.balance.factors;
    return right;
  }
  template <class F>
  void PackRight(Team& team, const F& load, int64_t r0) const {
    if (!dw) return;
    static_assert(kTileVecs * N <= Gradients::kGroup / kTileRows * kPackedRow,
                  "a tile of columns fits in left.packed");
    const int64_t n = Length(r0);
    const auto mine = team.Split(Columns().count);
    Columns().For(mine.begin, mine.end, [&](int64_t v, auto nv) {
      constexpr int kWidth = decltype(nv)::value * N;
      load(r0, n, v * N, nv, left.packed);
      if (!parts::PackRight(left.packed, kPlain, kWidth, parts::Order::kAcross, kWidth, n,
                            Right(r0).Row(v * N)))
        misfit->store(first_row + r0, std::memory_order_relaxed);
    });
  }
  bool Fits(int64_t r0) const {
    return dw && misfit->load(std::memory_order_relaxed) != first_row + r0;
  }
  void MultiplyTiles(const parts::TiledOperand& of_d, int q, int64_t unit, int64_t units,
                     int64_t r0, bool backwards) const {
    for (int gate = 0; gate < gates; gate++)
      if (column[gate] == q)
        parts::Multiply(of_d, units, Right(r0), cols,
                        Floats(Result() + (gate * left.H + unit) * cols), cols, r0 > 0, backwards);
  }

  // The block of rows from r0 on, by vectors.
  template <class F>
  void RunBlock(Team& team, const F& load, int64_t r0) const {
    if (!dw) return;
    const int64_t block = Block(), n = Length(r0);
    const ColumnTiles columns = Columns();
    const auto mine = team.Split(columns.count);
    columns.For(mine.begin, mine.end,
                [&](int64_t v, auto nv) { load(r0, n, v * N, nv, packed + v * N * block); });
    team.Sync();
    const auto my_rows = team.Split(gates * left.H, kTileRows);
    for (int64_t m0 = my_rows.begin; m0 < my_rows.end; m0 += Gradients::kGroup) {
      const int64_t m1 =
          my_rows.end - m0 < Gradients::kGroup ? my_rows.end : m0 + Gradients::kGroup;
      Left of_d[Gradients::kGroup / kTileRows];
      PackLeft(m0, m1, r0, n, of_d);
      columns.For(0, columns.count, [&](int64_t v, auto nv) {
        constexpr int NV = decltype(nv)::value, kWidth = NV * N;
        const int64_t width = cols - v * N < kWidth ? cols - v * N : kWidth;
        T* const out = Result() + m0 * cols + v * N;
        // In place the first block's; the sum of each further block is added as a whole.
        const bool in_place = r0 == 0 && width == kWidth;
        T* const sums = in_place ? out : left.sums;
        const int64_t stride = in_place ? cols : kWidth;
        for (int64_t k = 0; k < n; k += cpu::kSumDepth) {
          const int64_t depth = n - k < cpu::kSumDepth ? n - k : cpu::kSumDepth;
          const bool stores = !in_place && k + depth == n;
          for (int64_t m = m0; m < m1; m += kTileRows) {
            const int rows = int(m1 - m < kTileRows ? m1 - m : kTileRows);
            const Left a = of_d[(m - m0) / kTileRows].From(k);
            T *const sum_of = sums + (m - m0) * stride, *const to = out + (m - m0) * cols;
            if (stores) CallSums(to, rows, width);
            GemmPacked<NV>(rows, a.first, a.stride, packed + v * N * block + k * kWidth, depth,
                           sum_of, stride, k > 0);
            if (stores) StoreSums<kWidth>(sum_of, rows, to, width, r0 > 0);
          }
        }
      });
    }
    team.Sync();
  }

  // Ahead of StoreSums, while the last products run: rows of dw are far apart and in no cache near by.
  // Inline: a call of a function that does nothing but this, gcc leaves out.
  FRNN_INLINE void CallSums(const T* out, int rows, int64_t width) const {
    for (int i = 0; i < rows; i++, out += cols)
      for (int64_t u = 0; u < width; u += kLine / int64_t(sizeof(T)))
        __builtin_prefetch(out + u, 1);
  }
  // `width` columns of up to kTileRows rows of dw, from `out` on, (+)= those of sums [rows][kWidth].
  template <int kWidth>
  void StoreSums(const T* sums, int rows, T* out, int64_t width, bool accumulate) const {
    if (rows == kTileRows && width == kWidth) return StoreTile<kWidth>(sums, out, accumulate);
    for (int i = 0; i < rows; i++, sums += kWidth, out += cols)
      for (int64_t u = 0; u < width; u += N) {
        const int lanes = width - u < N ? int(width - u) : N;
        V value = load<V>(sums + u);
        if (accumulate) value += load_n(out + u, lanes);
        store_n(out + u, value, lanes);
      }
  }
  // All is read before anything is written: where rows are 2 KB apart, a row has the last twelve bits of
  // its addresses in common with the next but one, and its reads would wait for the writes of that.
  template <int kWidth>
  FRNN_INLINE void StoreTile(const T* sums, T* out, bool accumulate) const {
    constexpr int NV = kWidth / N;
    V values[kTileRows][NV];
    FRNN_UNROLL
    for (int i = 0; i < kTileRows; i++) {
      FRNN_UNROLL
      for (int j = 0; j < NV; j++) values[i][j] = load<V>(sums + i * kWidth + j * N);
    }
    FRNN_UNROLL
    for (int i = 0; i < kTileRows && accumulate; i++) {
      FRNN_UNROLL
      for (int j = 0; j < NV; j++) values[i][j] += load<V>(out + i * cols + j * N);
    }
    FRNN_UNROLL
    for (int i = 0; i < kTileRows; i++) {
      FRNN_UNROLL
      for (int j = 0; j < NV; j++) store<V>(out + i * cols + j * N, values[i][j]);
    }
  }

  // kTileRows gate rows of d, packed or not: row r of d is at r * stride.
  struct Left {
    const T* first;
    int64_t stride;
    Left From(int64_t row) const { return {first + row * stride, stride}; }
  };

  // The gate rows m0 .. m1. left.packed: [block of kTileRows gate rows][row][kPackedRow]
  void PackLeft(int64_t m0, int64_t m1, int64_t r0, int64_t n, Left* of_d) const {
    for (int64_t m = m0; m < m1; m += kTileRows) {
      const int64_t count = m1 - m < kTileRows ? m1 - m : kTileRows;
      T* dst = left.packed + (m - m0) / kTileRows * kPackedRow * Block();
      const T* src = left.d + r0 * left.stride;
      const int64_t first = Column(m);
      // Columns of one gate are adjacent, and rows of d padded.
      const bool one_gate = m / left.H == (m + count - 1) / left.H;
      Left& to = of_d[(m - m0) / kTileRows] = {dst, kPackedRow};
      if (one_gate && n <= cpu::kGradRowsInPlace) {
        to = {src + first, left.stride};
      } else if (one_gate) {
        for (int64_t r = 0; r < n; r++)
          memcpy(dst + r * kPackedRow, src + r * left.stride + first, kPackedRow * sizeof(T));
      } else {
        for (int i = 0; i < count; i++)
          for (int64_t r = 0; r < n; r++)
            dst[r * kPackedRow + i] = src[r * left.stride + Column(m + i)];
      }
    }
  }
  int64_t Column(int64_t row) const {
    return column[row / left.H] * left.gate_stride + row % left.H;
  }
};

FRNN_END
