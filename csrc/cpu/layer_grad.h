// The backward of cpu/layer.h, which includes this file.
#pragma once
#include <algorithm>

#include "cpu/layer.h"

FRNN_BEGIN

// dw[gates * H, cols] = sum over rows r of d[r]^T b[r], in blocks of rows. The team packs the right side
// of a block together; each thread owns rows of dw and packs its left side group by group. Within a
// group the sum runs in steps that keep a right tile in the first-level cache, and dw in the second.
template <class V>
class WeightGrad {
 public:
  using T = typename Lanes<V>::T;
  static constexpr int N = Lanes<V>::kSize;
  static constexpr int kWidth = kTileVecs<V> * N, kRows = kTileRows<V>;
  static constexpr int64_t kBlock = 512, kDepth = 128, kGroup = 16 * kRows;
  static constexpr int64_t kTileGroup = 12;  // blocks of rows of dw

  int64_t gates, H;   // rows of dw: gate q, unit u, at q * H + u
  const int* column;  // gate q's gradients start at column[q] * gate_stride of d
  int64_t gate_stride;
  const T* d;  // [rows, ..], d_stride apart
  int64_t d_stride;
  int64_t rows, cols;
  T *pack_a, *pack_b;  // this thread's; the team's
  // With tiles: the same, and the last block whose right side is out of range, as the number of its
  // first row (counted on over all directions).
  bf16::Operand tiles_a, tiles_b;
  // In fixed point, how large the gradients of each row are, and this thread's factors of a block.
  const float* sizes;
  float *factors, *inverse;
  std::atomic<int64_t>* misfit;
  int64_t number;
  T* sum;    // [gates * H, cols] in the computing type where dw is stored in 16 bits
  void* dw;  // null: not wanted
  Storage storage;

  static int64_t Block(int64_t rows) { return rows < kBlock ? rows : kBlock; }
  static int64_t PackASize(int64_t rows) { return kGroup / kRows * kPackedRow * Block(rows); }
  static int64_t PackBSize(int64_t rows, int64_t cols) {
    return RoundUp(cols, kWidth) * Block(rows);
  }
  // load(r0, n, col, width, dst): rows r0 .. r0 + n of the right operand, columns col .. col + width,
  // into dst [n][kWidth].
  template <class F>
  void Run(Team& team, const F& load) const {
    if (!dw) return;
    for (int64_t r0 = 0; r0 < rows; r0 += Block(rows)) RunBlock(team, load, r0);
    Store(team);
  }

  // Two products on tiles. The gradients that they share, out of `gradients`, are packed once; d is
  // known to be in the range of tiles. Where a right side is not, vectors do the block.
  template <class F, class G>
  static void RunTiles(Team& team, int gradients, const WeightGrad& x, const F& load_x,
                       const WeightGrad& h, const G& load_h) {
    if constexpr (bf16::kCompiled && sizeof(V) == 64 && sizeof(T) == 4) {
      const int64_t blocks = bf16::Blocks(x.H);
      // Blocks of rows of dw are split over the team, weighed by what is done with them: one packing,
      // and products that take about three times as long.
      const auto weight_of = [&](int q) {
        const int64_t uses = x.Uses(q) + h.Uses(q);
        return uses > 0 ? 1 + 3 * uses : 0;
      };
      int64_t total = 0;
      for (int q = 0; q < gradients; q++) total += weight_of(q) * blocks;
      const int64_t low = total * team.id / team.size, high = total * (team.id + 1) / team.size;
      for (int64_t r0 = 0; r0 < x.rows; r0 += Block(x.rows)) {
        const int64_t n = x.Length(r0);
        if (x.tiles_a.cut == bf16::Cut::kFixed)
          fixed::Factors(x.sizes + r0, n, x.factors, x.inverse);
        x.PackRight(team, load_x, r0);
        h.PackRight(team, load_h, r0);
        team.Sync();
        const bool x_fits = x.Fits(r0), h_fits = h.Fits(r0);
        bf16::Operand left = OfDepth(x.tiles_a, n);
        left.factors = x.inverse;
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
          for (int64_t m = begin; m < end; m += kTileGroup) {
            const int64_t unit = m * bf16::kRows,
                          last = (end - m < kTileGroup ? end : m + kTileGroup) * bf16::kRows;
            const int64_t units = (last < x.H ? last : x.H) - unit;
            bf16::PackLeftAcross(x.d + r0 * x.d_stride + q * x.gate_stride + unit, x.d_stride,
                                 units, n, left);
            // There and back, see bf16::Multiply.
            if (x_fits && !back) x.MultiplyTiles(left, q, unit, units, r0, back);
            if (h_fits) h.MultiplyTiles(left, q, unit, units, r0, back);
            if (x_fits && back) x.MultiplyTiles(left, q, unit, units, r0, back);
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
  bool Own() const { return storage == StorageOf<T>::kValue; }
  T* Result() const { return Own() ? static_cast<T*>(dw) : sum; }
  int64_t Length(int64_t r0) const {
    return rows - r0 < Block(rows) ? rows - r0 : Block(rows);  // of the block from r0 on
  }
  void Store(Team& team) const {
    if (!dw || Own()) return;
    const auto my_rows = team.Split(gates * H);
    for (int64_t m = my_rows.begin; m < my_rows.end; m++)
      StoreRow<T>(At(dw, storage, m * cols), storage, sum + m * cols, cols);
  }

  // The products in which gradient q is (all gradients are).
  int64_t Uses(int q) const {
    int64_t uses = 0;
    for (int gate = 0; gate < gates && dw; gate++) uses += column[gate] == q;
    return uses;
  }

  static bf16::Operand OfDepth(bf16::Operand tiles, int64_t K) {
    tiles.depth_blocks = bf16::DepthBlocks(K, tiles.cut);
    return tiles;
  }
  bf16::Operand Right(int64_t r0) const {
    bf16::Operand right = OfDepth(tiles_b, Length(r0));
    right.factors = factors;
    return right;
  }
  template <class F>
  void PackRight(Team& team, const F& load, int64_t r0) const {
    if (!dw) return;
    static_assert(kWidth <= kGroup / kRows * kPackedRow, "a tile of columns fits in pack_a");
    const int64_t n = Length(r0);
    const auto my_tiles = team.Split((cols + kWidth - 1) / kWidth);
    for (int64_t tile = my_tiles.begin; tile < my_tiles.end; tile++) {
      const int64_t col = tile * kWidth, width = cols - col < kWidth ? cols - col : kWidth;
      load(r0, n, col, width, pack_a);
      if (!bf16::PackRight(pack_a, StorageOf<T>::kValue, kWidth, bf16::Order::kAcross, kWidth, n,
                           Right(r0).Row(col)))
        misfit->store(number + r0, std::memory_order_relaxed);
    }
  }
  bool Fits(int64_t r0) const {
    return dw && misfit->load(std::memory_order_relaxed) != number + r0;
  }
  void MultiplyTiles(const bf16::Operand& left, int q, int64_t unit, int64_t units, int64_t r0,
                     bool backwards) const {
    for (int gate = 0; gate < gates; gate++)
      if (column[gate] == q)
        bf16::Multiply(left, units, Right(r0), cols, Result() + (gate * H + unit) * cols, cols,
                       r0 > 0, backwards);
  }

  // The block of rows from r0 on, by vectors.
  template <class F>
  void RunBlock(Team& team, const F& load, int64_t r0) const {
    if (!dw) return;
    const int64_t block = Block(rows), n = Length(r0), tiles = (cols + kWidth - 1) / kWidth;
    const auto my_tiles = team.Split(tiles);
    for (int64_t tile = my_tiles.begin; tile < my_tiles.end; tile++) {
      const int64_t col = tile * kWidth, width = cols - col < kWidth ? cols - col : kWidth;
      load(r0, n, col, width, pack_b + tile * kWidth * block);
    }
    team.Sync();
    const auto my_rows = team.Split(gates * H, kRows);
    for (int64_t m0 = my_rows.begin; m0 < my_rows.end; m0 += kGroup) {
      const int64_t m1 = my_rows.end - m0 < kGroup ? my_rows.end : m0 + kGroup;
      PackLeft(m0, m1, r0, n);
      for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t k = 0; k < n; k += kDepth)
          for (int64_t m = m0; m < m1; m += kRows)
            Tile(Result(), m, int(m1 - m < kRows ? m1 - m : kRows), tile,
                 pack_a + ((m - m0) / kRows * block + k) * kPackedRow,
                 pack_b + (tile * block + k) * kWidth, n - k < kDepth ? n - k : kDepth, r0 + k > 0);
    }
    team.Sync();
  }

  void Tile(T* c, int64_t m, int count, int64_t tile, const T* a, const T* b, int64_t depth,
            bool accumulate) const {
    const int64_t col = tile * kWidth, width = cols - col < kWidth ? cols - col : kWidth;
    T* out = c + m * cols + col;
    if (width == kWidth) {
      GemmPacked<V>(count, a, b, depth, out, cols, accumulate);
      return;
    }
    T edge[kRows * kWidth];
    GemmPacked<V>(count, a, b, depth, edge, kWidth, false);
    for (int i = 0; i < count; i++)
      for (int64_t j = 0; j < width; j++) {
        T& value = out[i * cols + j];
        value = accumulate ? value + edge[i * kWidth + j] : edge[i * kWidth + j];
      }
  }

  // pack_a: [block of kRows gate rows][row][kPackedRow]
  void PackLeft(int64_t m0, int64_t m1, int64_t r0, int64_t n) const {
    for (int64_t m = m0; m < m1; m += kRows) {
      const int64_t count = m1 - m < kRows ? m1 - m : kRows;
      T* dst = pack_a + (m - m0) / kRows * kPackedRow * Block(rows);
      const T* src = d + r0 * d_stride;
      const int64_t first = Column(m);
      if (m / H == (m + count - 1) / H) {  // columns of one gate are adjacent, and rows of d padded
        for (int64_t r = 0; r < n; r++)
          memcpy(dst + r * kPackedRow, src + r * d_stride + first, kPackedRow * sizeof(T));
      } else {
        for (int i = 0; i < count; i++)
          for (int64_t r = 0; r < n; r++)
            dst[r * kPackedRow + i] = src[r * d_stride + Column(m + i)];
      }
    }
  }
  int64_t Column(int64_t row) const { return column[row / H] * gate_stride + row % H; }
};

// The right operand of a product: a tile of columns of w, as it lies in memory or packed.
template <class T>
struct Columns {
  const T* w;
  int64_t stride;
};

// Columns col .. col + width of w [K, cols]. Unpacked they are read in place, unless they reach past
// the last column.
template <class T>
bool ReadInPlace(bool unpacked, int64_t cols, int64_t col, int64_t width) {
  return unpacked && col + width <= cols;
}
template <class T>
Columns<T> RightOperand(bool unpacked, const void* w, int64_t cols, int64_t col, int64_t width,
                        const T* packed) {
  if (ReadInPlace<T>(unpacked, cols, col, width)) return {static_cast<const T*>(w) + col, cols};
  return {packed, width};
}

// dst [n][width of a tile] from one row of memory, zero past n columns.
template <class T>
FRNN_INLINE void LoadTileRow(const void* row, Storage s, int64_t n, int64_t width, T* dst) {
  LoadRow<T>(row, s, dst, n);
  for (int64_t i = n; i < width; i++) dst[i] = 0;
}

// Whether magnitudes, as bits, are at most those of `limit`; inf and NaN are not.
template <class I>
FRNN_INLINE bool Below(const I& magnitudes, float limit) {
  bool below = true;
  for (size_t i = 0; i < sizeof(I) / sizeof(int32_t); i++)
    below &= magnitudes[i] <= bit_cast<int32_t>(limit);
  return below;
}

template <class C, class V>
void Layer<C, V>::Backward(const LayerGradParams& p) {
  static constexpr int kIdentity[1] = {0};
  const int threads = Threads(p);
  const bool projected = Projected(p), unpacked = UnpackedGrad(p), tiled = Tiled(p);
  const int64_t panels = Panels(p), own_panels = (panels + threads - 1) / threads;
  const int64_t hout_vecs = (p.Hout + N - 1) / N, own_vecs = (hout_vecs + threads - 1) / threads;
  const int64_t own_columns = projected ? own_vecs * N : own_panels * kUnits;
  const int64_t h_stride = RowStride(p.Hout), full_stride = RowStride(p.H),
                hs_stride = HsStride(p.H, p.Hout);
  const int64_t gate_stride = Padded(p.H), d_stride = C::kD * gate_stride + 16;
  const int64_t x_tiles = (p.I + kTileWidth - 1) / kTileWidth;
  // Rows of dX at a time, whole blocks of them to a thread.
  const int64_t x_rows = (p.rows < 768 ? 48 : 96) * (tiled ? 2 : 1);
  const bool narrow = p.storage != kOwn;
  const int64_t widest = p.I > p.H ? p.I : p.H;  // of the right operands: x, h, h_full
  const bool stage_dy = p.dy != nullptr && narrow;
  // As operands of tiles, the gates of dh = d W_hh follow each other along the depth; those of dX are
  // summed one by one, so that an operand stays in the second-level cache.
  const bf16::Cut cut = bf16::CutOf(p.storage, p.H), d_cut = bf16::CutBeside(p.storage, p.H);
  const int64_t gate_depth = bf16::DepthBlocks(p.H, cut);
  const int64_t padded_gate = gate_depth * bf16::DepthOf(cut);
  const int64_t grad_depth = WeightGrad<V>::Block(p.rows);
  // dW in fixed point is balanced by what was measured of d for dh.
  const bf16::Cut grad_cut = cut == bf16::Cut::kFixed ? bf16::CutOf(p.storage, grad_depth) : cut;
  const bf16::Cut d_grad_cut = grad_cut == bf16::Cut::kFixed ? grad_cut : d_cut;

  struct Own {
    T *w_hh, *w_hr, *dc, *dy, *db, *dx, *dx_rows, *pack_a;
    bf16::Operand w_hh_tiles, dx_tiles, tiles_a;
    bf16::Operand d_tiles[2];  // d of a step
    Balance d_balance, dx_balance[C::kX], dw_balance;
  };
  std::vector<Own> own(threads);
  T *d = nullptr, *dh = nullptr, *dh_seq = nullptr, *dh_full = nullptr, *w_ih = nullptr,
    *pack_b = nullptr, *sum_ih = nullptr, *sum_hh = nullptr, *dx_sum = nullptr;
  // W_ih by gates; the right sides of dW, x and h.
  bf16::Operand w_ih_tiles[C::kX] = {}, x_right = {}, h_right = {};
  float *d_largest[2] = {nullptr, nullptr}, *d_sizes = nullptr;
  fixed::Size *w_hh_sizes = nullptr, *w_ih_sizes[C::kX] = {};
  // Out of the range of tiles: the weights, any d, d of the last step of each parity, a block of dW.
  std::atomic<bool> fit_w_hh{tiled}, fit_w_ih{tiled}, fit_d{tiled};
  std::atomic<int64_t> misfit_d[2] = {{-1}, {-1}}, misfit_block[2] = {{-1}, {-1}};
  const auto take_w_hh = [&](Scratch& s) { return s.Take<T>(C::kH * p.H * own_columns); };
  const auto take_w_ih = [&](Scratch& s) {
    return s.Take<T>(p.dx ? C::kX * p.H * x_tiles * kTileWidth : 0);
  };
  const auto take_tiles = [&](Scratch& s, int64_t rows, int64_t K, bf16::Cut cut) {
    return TakeTiles(s, tiled, rows, K, cut);
  };
  Scratch scratch, spare_w_ih;
  std::vector<Scratch> spare(threads);  // spare: for vectors where tiles do not fit
  scratch.Build([&](Scratch& s) {
    for (int i = 0; i < threads; i++) {
      if (!tiled) own[i].w_hh = take_w_hh(s);
      own[i].w_hr = s.Take<T>(projected ? p.Hout * own_panels * kUnits : 0);
      own[i].dc = s.Take<T>(own_panels * p.B * kExtra * kUnits);
      own[i].dy = s.Take<T>(stage_dy ? p.B * own_columns : 0);
      own[i].db = s.Take<T>(own_panels * C::kD * kUnits);
      own[i].dx = s.Take<T>(p.dx ? x_rows * kTileWidth : 0);
      own[i].pack_a = s.Take<T>(WeightGrad<V>::PackASize(p.rows));
      own[i].w_hh_tiles = take_tiles(s, own_columns, C::kH * padded_gate, cut);
      own[i].dx_tiles = take_tiles(s, p.dx ? x_rows : 0, p.H, d_cut);
      own[i].dx_rows = s.Take<T>(tiled && narrow && p.dx ? x_rows * p.I : 0);
      own[i].tiles_a =
          take_tiles(s, WeightGrad<V>::kTileGroup * bf16::kRows, grad_depth, d_grad_cut);
      own[i].dw_balance.Take(s, own[i].tiles_a);
      for (Balance& balance : own[i].dx_balance) balance.Take(s, own[i].dx_tiles);
    }
    TakeStepTiles(s, tiled, p.B, C::kH * padded_gate, d_cut, own, &Own::d_tiles, d_largest);
    for (Own& to : own) to.d_balance.Take(s, to.d_tiles[0]);
    w_hh_sizes = s.Take<fixed::Size>(threads * own[0].d_balance.depth);
    for (fixed::Size*& sizes : w_ih_sizes)
      sizes = s.Take<fixed::Size>(threads * own[0].dx_balance[0].depth);
    d_sizes = s.Take<float>(own[0].d_balance.depth > 0 ? p.rows : 0);
    for (bf16::Operand& tiles : w_ih_tiles)
      tiles = take_tiles(s, p.dx ? x_tiles * kTileWidth : 0, p.H, cut);
    x_right = take_tiles(s, RoundUp(p.I, kTileWidth), grad_depth, grad_cut);
    h_right = take_tiles(s, RoundUp(p.Hout, kTileWidth), grad_depth, grad_cut);
    d = s.Take<T>(p.rows * d_stride);
    dh = s.Take<T>(p.B * h_stride);
    dh_seq = s.Take<T>(projected ? p.rows * h_stride : 0);
    dh_full = s.Take<T>(projected ? p.B * full_stride : 0);
    if (!tiled) w_ih = take_w_ih(s);
    pack_b = s.Take<T>(WeightGrad<V>::PackBSize(p.rows, widest));
    sum_ih = s.Take<T>(narrow ? C::kX * p.H * p.I : 0);
    sum_hh = s.Take<T>(narrow ? C::kH * p.H * p.Hout : 0);  // and W_hr's
    dx_sum = s.Take<T>(narrow && p.dx && p.dirs == 2 ? p.rows * p.I : 0);
  });

  const bool done = RunTeam(threads, IsShort(p), [&](Team& team) {
    Own& my = own[team.id];
    const auto mine = team.Split(panels);
    const auto columns = team.Split(hout_vecs);
    // Columns of dh that this thread sums, in vectors and in units.
    const int64_t first_vec = projected ? columns.begin : mine.begin * kPanelVecs,
                  last_vec = projected ? columns.end : mine.end * kPanelVecs;
    const int64_t first = first_vec * N, last = last_vec * N;
    const int64_t valid = (last < p.Hout ? last : p.Hout) - first;
    const bf16::Session session(tiled);

    for (int dir = 0; dir < p.dirs; dir++) {
      const DirectionWeights& w = p.w[dir];
      const DirectionGrads& dw = p.dw[dir];
      const T* hs = static_cast<const T*>(p.hs) + dir * (p.B + p.rows) * hs_stride;

      // W_hh as the right operand of dh = d W_hh: per gate [H][own columns].
      bool packed = false;
      const auto pack = [&] {
        if (packed) return;
        if (tiled && my.w_hh == nullptr)
          spare[team.id].Build([&](Scratch& s) { my.w_hh = take_w_hh(s); });
        ForColumnTiles<V>(first_vec, last_vec, [&](int64_t v, auto nv) {
          constexpr int NV = decltype(nv)::value;
          T* dst = my.w_hh + (v - first_vec) * N * C::kH * p.H;
          if (v * N < p.Hout && !ReadInPlace<T>(unpacked, p.Hout, v * N, NV * N))
            PackColumns<T>(w.w_hh, p.storage, C::kH * p.H, p.Hout, v * N, NV * N, dst);
        });
        packed = true;
      };
      if constexpr (kTiles)
        if (tiled) {
          const auto gate = [&](int q) { return At(w.w_hh, p.storage, q * p.H * p.Hout + first); };
          const bool measured = cut == bf16::Cut::kFixed;
          for (int q = 0; q < C::kH && measured; q++)
            fixed::MeasureRows(static_cast<const float*>(gate(q)), p.Hout, p.H, 0, valid,
                               w_hh_sizes + team.id * my.d_balance.depth + q * padded_gate);
          if (measured) team.Sync();
          my.d_balance.Find(w_hh_sizes, team.size, C::kH, p.H, {&my.d_tiles[0], &my.d_tiles[1]},
                            {&my.w_hh_tiles});
          for (int q = 0; q < C::kH && measured && valid > 0; q++)
            fixed::Measure(static_cast<const float*>(gate(q)), p.Hout, bf16::Order::kAcross, valid,
                           0, p.H, my.w_hh_tiles.Depth(q * gate_depth).factors,
                           my.w_hh_tiles.largest, q > 0);
          for (int q = 0; q < C::kH && valid > 0; q++)
            if (!bf16::PackRight(gate(q), p.storage, p.Hout, bf16::Order::kAcross, valid, p.H,
                                 my.w_hh_tiles.Depth(q * gate_depth), measured))
              fit_w_hh.store(false, std::memory_order_relaxed);
        }
      if (projected)
        ForColumnTiles<V>(mine.begin * kPanelVecs, mine.end * kPanelVecs, [&](int64_t v, auto nv) {
          constexpr int NV = decltype(nv)::value;
          T* dst = my.w_hr + (v - mine.begin * kPanelVecs) * N * p.Hout;
          if (v * N < p.H) PackColumns<T>(w.w_hr, p.storage, p.Hout, p.H, v * N, NV * N, dst);
        });
      for (int64_t i = 0; i < (mine.end - mine.begin) * C::kD * kUnits; i++) my.db[i] = 0;
      for (int64_t i = mine.begin; i < mine.end; i++)
        for (int64_t r = 0; r < p.B * kExtra; r++) {
          const int64_t unit = i * kUnits,
                        n = p.dc_n == nullptr ? 0 : (p.H - unit < kUnits ? p.H - unit : kUnits);
          T* dc = my.dc + ((i - mine.begin) * p.B * kExtra + r) * kUnits;
          if (n > 0)
            LoadRow<T>(At(p.dc_n, p.storage, (dir * p.B * kExtra + r) * p.H + unit), p.storage, dc,
                       n);
          for (int64_t u = n; u < kUnits; u++) dc[u] = 0;
        }
      CopyState(p, p.dh_n, dir, first, last, dh, h_stride);

      for (int64_t step = 0; step < p.T; step++) {
        const int64_t t = dir == 0 ? p.T - 1 - step : step;
        const int64_t n = p.batch_sizes[t], row = p.offsets[t];
        // dy of this step: rows dy_stride apart from this thread's first column on.
        const T* dy = nullptr;
        int64_t dy_stride = 0;
        if (p.dy && valid > 0) {
          const auto source = [&](int64_t b) {
            const int64_t at =
                p.ragged ? (row + b) * p.dy_b_stride : t * p.dy_t_stride + b * p.dy_b_stride;
            return At(p.dy, p.storage, at + dir * p.Hout + first);
          };
          dy = static_cast<const T*>(source(0));
          dy_stride = p.dy_b_stride;
          if (stage_dy) {
            for (int64_t b = 0; b < n; b++)
              LoadRow<T>(source(b), p.storage, my.dy + b * own_columns, valid);
            dy = my.dy;
            dy_stride = own_columns;
          }
        }

        if (projected) {
          for (int64_t b = 0; b < n; b++) {
            T* out = dh_seq + (row + b) * h_stride + first;
            const T* in = dh + b * h_stride + first;
            for (int64_t u = 0; u < valid; u++)
              out[u] = in[u] + (dy ? dy[b * dy_stride + u] : T(0));
          }
          team.Sync();
          ForColumnTiles<V>(mine.begin * kPanelVecs, mine.end * kPanelVecs,
                            [&](int64_t v, auto nv) {
                              constexpr int NV = decltype(nv)::value;
                              GemmRows<V, NV>(n, dh_seq + row * h_stride, h_stride,
                                              my.w_hr + (v - mine.begin * kPanelVecs) * N * p.Hout,
                                              NV * N, p.Hout, dh_full + v * N, full_stride, false);
                            });
        }

        typename Lanes<V>::I largest{};  // of |d|, as bits
        for (int64_t i = mine.begin; i < mine.end; i++) {
          const int64_t unit = i * kUnits;
          const T* tape = Tape(p, dir, t, i);
          T* db = my.db + (i - mine.begin) * C::kD * kUnits;
          T* dc_panel = my.dc + (i - mine.begin) * p.B * kExtra * kUnits;
          FRNN_UNROLL
          for (int j = 0; j < kPanelVecs; j++) {
            const int64_t left = p.H - unit - j * N;
            const int lanes = int(left < 0 ? 0 : (left < N ? left : N));
            V bias[C::kD];
            FRNN_UNROLL
            for (int q = 0; q < C::kD; q++) bias[q] = V{};
            for (int64_t b = 0; b < n; b++) {
              Pack<V, C::kSaved> saved;
              Pack<V, C::kStates> state, dstate_new, dstate;
              Pack<V, C::kD> grad;
              const T* tape_b = tape + b * kTape * kUnits + j * N;
              FRNN_UNROLL
              for (int q = 0; q < C::kSaved; q++) saved[q] = load<V>(tape_b + q * kUnits);
              T* dh_b = dh + b * h_stride + unit + j * N;
              if (projected) {
                dstate_new[0] = load<V>(dh_full + b * full_stride + unit + j * N);
              } else {
                dstate_new[0] = load<V>(dh_b);
                if (dy)
                  dstate_new[0] += load_n<V>(dy + b * dy_stride + unit - first + j * N, lanes);
              }
              state[0] = C::kUsesH
                             ? load<V>(hs + PreviousRow(p, dir, t, b) * hs_stride + unit + j * N)
                             : V{};
              T* dc = dc_panel + b * kExtra * kUnits + j * N;
              FRNN_UNROLL
              for (int e = 0; e < kExtra; e++) {
                state[1 + e] = load<V>(tape_b + (C::kSaved + e) * kUnits);
                dstate_new[1 + e] = load<V>(dc + e * kUnits);
              }

              const V h_new =
                  C::kUsesNewH ? load<V>(hs + (p.B + row + b) * hs_stride + unit + j * N) : V{};
              C::backward(saved, state, h_new, dstate_new, grad, dstate);

              T* d_b = d + (row + b) * d_stride + unit + j * N;
              FRNN_UNROLL
              for (int q = 0; q < C::kD; q++) {
                store<V>(d_b + q * gate_stride, grad[q]);
                bias[q] += grad[q];
                if constexpr (kTiles) {
                  const auto magnitude = bit_cast<typename Lanes<V>::I>(grad[q]) & 0x7fffffff;
                  largest = magnitude > largest ? magnitude : largest;
                }
              }
              if (!projected) store<V>(dh_b, dstate[0]);
              FRNN_UNROLL
              for (int e = 0; e < kExtra; e++) store<V>(dc + e * kUnits, dstate[1 + e]);
            }
            FRNN_UNROLL
            for (int q = 0; q < C::kD; q++)
              store<V>(db + q * kUnits + j * N, load<V>(db + q * kUnits + j * N) + bias[q]);
          }
        }
        const bool go_on = step + 1 < p.T || p.dh0;
        // d of the own units as tiles, for the whole team.
        const int64_t step_number = dir * p.T + step;
        if constexpr (kTiles)
          if (tiled) {
            const bf16::Operand& to = my.d_tiles[step & 1];
            const auto gate = [&](int q) { return d + row * d_stride + C::kDh[q] * gate_stride; };
            const int64_t begin = mine.begin * kUnits, end = mine.end * kUnits;
            const bool measured =
                ShareLargest(team, to, d_largest[step & 1], n, [&](float* largest) {
                  for (int q = 0; q < C::kH; q++)
                    fixed::Measure(gate(q), d_stride, bf16::Order::kAlong, n, begin,
                                   end < p.H ? end : p.H, to.Depth(q * gate_depth).factors, largest,
                                   q > 0);
                });
            if (measured && team.id == 0) memcpy(d_sizes + row, to.largest, n * sizeof(float));
            for (int q = 0; q < C::kH; q++)
              bf16::PackRows(gate(q), kOwn, d_stride, n, begin,
                             team.id + 1 == team.size ? padded_gate : end, p.H,
                             to.Depth(q * gate_depth), measured);
            if (!Below(largest, bf16::kLargest)) {
              misfit_d[step & 1].store(step_number, std::memory_order_relaxed);
              fit_d.store(false, std::memory_order_relaxed);
            }
          }
        team.Sync();
        const bool step_tiles = tiled && fit_w_hh.load(std::memory_order_relaxed) &&
                                misfit_d[step & 1].load(std::memory_order_relaxed) != step_number;
        if constexpr (kTiles)
          if (step_tiles && go_on && valid > 0)
            bf16::Multiply(my.d_tiles[step & 1], n, my.w_hh_tiles, valid, dh + first, h_stride,
                           !projected, step % 2);
        if (!step_tiles) pack();
        if (go_on && !step_tiles)
          ForColumnTiles<V>(first_vec, last_vec, [&](int64_t v, auto nv) {
            constexpr int NV = decltype(nv)::value;
            if (v * N >= p.Hout) return;
            const auto right = RightOperand<T>(unpacked, w.w_hh, p.Hout, v * N, NV * N,
                                               my.w_hh + (v - first_vec) * N * C::kH * p.H);
            for (int q = 0; q < C::kH; q++)
              GemmRows<V, NV>(n, d + row * d_stride + C::kDh[q] * gate_stride, d_stride,
                              right.w + q * p.H * right.stride, right.stride, p.H, dh + v * N,
                              h_stride, q > 0 || !projected);
          });
      }
      team.Sync();

      for (int64_t b = 0; b < p.B; b++) {
        if (p.dh0 && valid > 0)
          StoreRow<T>(At(p.dh0, p.storage, (dir * p.B + b) * p.Hout + first), p.storage,
                      dh + b * h_stride + first, valid);
      }
      for (int64_t i = mine.begin; i < mine.end; i++) {
        const int64_t unit = i * kUnits, n = p.H - unit < kUnits ? p.H - unit : kUnits;
        const T* db = my.db + (i - mine.begin) * C::kD * kUnits;
        for (int q = 0; q < C::kX && dw.b_ih; q++)
          StoreRow<T>(At(dw.b_ih, p.storage, q * p.H + unit), p.storage, db + C::kDx[q] * kUnits,
                      n);
        for (int q = 0; q < C::kH && dw.b_hh; q++)
          StoreRow<T>(At(dw.b_hh, p.storage, q * p.H + unit), p.storage, db + C::kDh[q] * kUnits,
                      n);
        for (int64_t r = 0; r < p.B * kExtra && p.dc0; r++)
          StoreRow<T>(At(p.dc0, p.storage, (dir * p.B * kExtra + r) * p.H + unit), p.storage,
                      my.dc + ((i - mine.begin) * p.B * kExtra + r) * kUnits, n);
      }

      if (p.dx) {
        // dX = d W_ih. Rows are split over the team, which shares the packed weights; where there are
        // few, columns are.
        const bool by_columns = p.rows <= x_rows;
        const auto my_tiles = team.Split(x_tiles);
        bf16::Operand w_ih_right[C::kX];  // with this thread's factors
        std::copy(w_ih_tiles, w_ih_tiles + C::kX, w_ih_right);
        bool tiles_fit = tiled && fit_d.load(std::memory_order_relaxed);
        if constexpr (kTiles)
          if (tiles_fit) {
            const int64_t col = my_tiles.begin * kTileWidth, end = my_tiles.end * kTileWidth;
            for (int q = 0; q < C::kX && cut == bf16::Cut::kFixed; q++)
              fixed::MeasureRows(static_cast<const float*>(w.w_ih) + q * p.H * p.I, p.I, p.H, col,
                                 end < p.I ? end : p.I,
                                 w_ih_sizes[q] + team.id * my.dx_balance[q].depth);
            if (cut == bf16::Cut::kFixed) team.Sync();
            for (int q = 0; q < C::kX; q++)
              my.dx_balance[q].Find(w_ih_sizes[q], team.size, 1, p.H, {}, {&w_ih_right[q]});
            for (int64_t tile = my_tiles.begin; tile < my_tiles.end; tile++)
              for (int q = 0; q < C::kX; q++) {
                const int64_t col = tile * kTileWidth;
                if (!bf16::PackRight(At(w.w_ih, p.storage, q * p.H * p.I + col), p.storage, p.I,
                                     bf16::Order::kAcross,
                                     p.I - col < kTileWidth ? p.I - col : kTileWidth, p.H,
                                     w_ih_right[q].Row(col)))
                  fit_w_ih.store(false, std::memory_order_relaxed);
              }
            team.Sync();
            tiles_fit = fit_w_ih.load(std::memory_order_relaxed);
          }
        if (tiled && !tiles_fit) {
          if (team.id == 0 && w_ih == nullptr)
            spare_w_ih.Build([&](Scratch& s) { w_ih = take_w_ih(s); });
          team.Sync();
        }
        for (int64_t tile = my_tiles.begin; tile < my_tiles.end && !tiles_fit; tile++)
          if (!ReadInPlace<T>(unpacked, p.I, tile * kTileWidth, kTileWidth))
            PackColumns<T>(w.w_ih, p.storage, C::kX * p.H, p.I, tile * kTileWidth, kTileWidth,
                           w_ih + tile * kTileWidth * C::kX * p.H);
        if (!by_columns && !tiles_fit) team.Sync();
        const auto rows = by_columns ? Team::Range{0, p.rows} : team.Split(p.rows, x_rows);
        const auto tiles = by_columns ? my_tiles : Team::Range{0, x_tiles};
        for (int64_t r0 = rows.begin; r0 < rows.end; r0 += x_rows) {
          const int64_t n = rows.end - r0 < x_rows ? rows.end - r0 : x_rows;
          if constexpr (kTiles)
            if (tiles_fit) {
              const int64_t col = tiles.begin * kTileWidth, end = tiles.end * kTileWidth;
              const int64_t width = (p.I < end ? p.I : end) - col;
              T* out = narrow ? my.dx_rows : static_cast<T*>(p.dx) + r0 * p.I;
              for (int q = 0; q < C::kX && width > 0; q++) {
                my.dx_tiles.factors = my.dx_balance[q].factors;
                bf16::PackRows(d + r0 * d_stride + C::kDx[q] * gate_stride, kOwn, d_stride, n, 0,
                               padded_gate, p.H, my.dx_tiles);
                bf16::Multiply(my.dx_tiles, n, w_ih_right[q].Row(col), width, out + col, p.I,
                               q > 0 || (dir == 1 && !narrow));
              }
              for (int64_t r = 0; r < n && narrow && width > 0; r++) {
                T *row = out + r * p.I + col, *total = dx_sum + (r0 + r) * p.I + col;
                for (int64_t i = 0; i < width && dir == 1; i++) row[i] += total[i];
                if (dir + 1 < p.dirs)
                  memcpy(total, row, width * sizeof(T));
                else
                  StoreRow<T>(At(p.dx, p.storage, (r0 + r) * p.I + col), p.storage, row, width);
              }
              continue;
            }
          for (int64_t tile = tiles.begin; tile < tiles.end; tile++) {
            const int64_t col = tile * kTileWidth,
                          width = p.I - col < kTileWidth ? p.I - col : kTileWidth;
            const auto right = RightOperand<T>(unpacked, w.w_ih, p.I, col, kTileWidth,
                                               w_ih + tile * kTileWidth * C::kX * p.H);
            for (int q = 0; q < C::kX; q++)
              GemmRows<V, kTileVecs<V>>(n, d + r0 * d_stride + C::kDx[q] * gate_stride, d_stride,
                                        right.w + q * p.H * right.stride, right.stride, p.H, my.dx,
                                        kTileWidth, q > 0);
            for (int64_t r = 0; r < n; r++) {
              T* out = my.dx + r * kTileWidth;
              const int64_t at = (r0 + r) * p.I + col;
              T* total = narrow ? dx_sum : static_cast<T*>(p.dx);
              if (dir == 1)
                for (int64_t i = 0; i < width; i++) out[i] += total[at + i];
              if (narrow && dir + 1 < p.dirs)
                memcpy(dx_sum + at, out, width * sizeof(T));
              else
                StoreRow<T>(At(p.dx, p.storage, at), p.storage, out, width);
            }
          }
        }
      }

      WeightGrad<V> x_grad;
      x_grad.gates = C::kX;
      x_grad.H = p.H;
      x_grad.column = C::kDx;
      x_grad.gate_stride = gate_stride;
      x_grad.d = d;
      x_grad.d_stride = d_stride;
      x_grad.rows = p.rows;
      x_grad.cols = p.I;
      x_grad.pack_a = my.pack_a;
      x_grad.pack_b = pack_b;
      x_grad.tiles_a = my.tiles_a;
      x_grad.tiles_b = x_right;
      x_grad.sizes = d_sizes;
      x_grad.factors = my.dw_balance.factors;
      x_grad.inverse = my.dw_balance.inverse;
      x_grad.misfit = &misfit_block[0];
      x_grad.number = dir * p.rows;
      x_grad.sum = sum_ih;
      x_grad.dw = dw.w_ih;
      x_grad.storage = p.storage;
      const auto load_x = [&](int64_t r0, int64_t n, int64_t col, int64_t width, T* dst) {
        RowCursor cursor(p, r0);
        for (int64_t r = 0; r < n; r++, cursor.Next())
          LoadTileRow<T>(At(Input::Row(p, cursor.t, cursor.b), p.storage, col), p.storage, width,
                         kTileWidth, dst + r * kTileWidth);
      };
      WeightGrad<V> h_grad = x_grad;
      h_grad.gates = C::kH;
      h_grad.column = C::kDh;
      h_grad.cols = p.Hout;
      h_grad.tiles_b = h_right;
      h_grad.misfit = &misfit_block[1];
      h_grad.sum = sum_hh;
      h_grad.dw = dw.w_hh;
      const auto load_h = [&](int64_t r0, int64_t n, int64_t col, int64_t width, T* dst) {
        RowCursor cursor(p, r0);
        for (int64_t r = 0; r < n; r++, cursor.Next())
          LoadTileRow<T>(hs + PreviousRow(p, dir, cursor.t, cursor.b) * hs_stride + col, kOwn,
                         width, kTileWidth, dst + r * kTileWidth);
      };
      if (tiled && fit_d.load(std::memory_order_relaxed)) {
        WeightGrad<V>::RunTiles(team, C::kD, x_grad, load_x, h_grad, load_h);
      } else {
        x_grad.Run(team, load_x);
        h_grad.Run(team, load_h);
      }
      if (projected) {
        WeightGrad<V> projection_grad = h_grad;
        projection_grad.gates = 1;
        projection_grad.H = p.Hout;
        projection_grad.column = kIdentity;
        projection_grad.d = dh_seq;
        projection_grad.d_stride = h_stride;
        projection_grad.cols = p.H;
        projection_grad.dw = dw.w_hr;
        projection_grad.Run(team, [&](int64_t r0, int64_t n, int64_t col, int64_t width, T* dst) {
          for (int64_t r = 0; r < n; r++)
            LoadTileRow<T>(hs + (p.B + r0 + r) * hs_stride + h_stride + col, kOwn, width,
                           kTileWidth, dst + r * kTileWidth);
        });
      }
      team.Sync();
    }
  });
  if (!done) {
    LayerGradParams alone = p;
    alone.threads = 1;
    Backward(alone);
  }
}

FRNN_END
