// Products of the backward: c [n][columns] (+)= sum over gates q of a_q W_q, W [kGates * K, cols].
// As those of the forward, they know how their weights are packed and go back to vectors where
// tiles do not fit.
#pragma once
#include <algorithm>

#include "cpu/product/gemm.h"
#include "cpu/product/tiles.h"

FRNN_BEGIN

// The right operand on vectors, by tiles of columns: packed [gate][k][column], in place, or packed
// while it is used.
template <int kGates>
struct ColumnWeights {
  const void* w;
  Storage storage;
  int64_t K, cols;
  int64_t gate_rows;     // between the first rows of two gates: K, if they are all that w has
  cpu::Packing packing;  // kNone: but for a tile that reaches past the last column
  bool one_chain;        // as of GemmRows
  T* packed;
  int64_t first;  // the vector where `packed` begins

  static T* Take(Scratch& s, cpu::Packing packing, int64_t K, int64_t columns) {
    return s.Take<T>(packing == cpu::Packing::kEachUse ? 0 : kGates * K * columns);
  }

  // NV vectors of columns from v on.
  template <int NV>
  void Pack(int64_t v) const {
    if (v * N >= cols || IsInPlace(v, NV) || packing == cpu::Packing::kEachUse) return;
    for (int q = 0; q < kGates; q++)
      PackColumns<NV * N>(Gate(q), storage, K, cols, v * N, Packed(v) + q * K * NV * N);
  }
  template <int NV, class GateOf>
  void Multiply(int64_t v, int64_t n, const GateOf& gate, int64_t gate_stride, T* c, int64_t ldc,
                bool accumulate) const {
    if constexpr (kGates > 0) {
      if (!accumulate) return Store<NV>(v, n, gate, gate_stride, c, ldc);
      // What c has may be far larger than the products: it is added to their sum.
      constexpr int kWidth = NV * N;
      ForRowBlocks<cpu::kRowBlock>(n, [&](int rows, int64_t r) {
        alignas(kLine) T sums[cpu::kRowBlock * kWidth];
        const auto of_rows = [&](int q) { return gate(q) + r * gate_stride; };
        Store<NV>(v, rows, of_rows, gate_stride, sums, kWidth);
        for (int i = 0; i < rows; i++)
          for (int u = 0; u < kWidth; u += N) {
            T* to = c + (r + i) * ldc + u;
            store<V>(to, load<V>(to) + load<V>(sums + i * kWidth + u));
          }
      });
    }
  }

 private:
  template <int NV, class GateOf>
  void Store(int64_t v, int64_t n, const GateOf& gate, int64_t gate_stride, T* c,
             int64_t ldc) const {
    if (packing == cpu::Packing::kEachUse) {
      for (int q = 0; q < kGates; q++)
        GemmColumns<NV>(n, gate(q), gate_stride, Gate(q), storage, K, cols, v * N, c, ldc, q > 0,
                        one_chain);
      return;
    }
    const bool lies = IsInPlace(v, NV);
    const T* right = lies ? static_cast<const T*>(w) + v * N : Packed(v);
    const int64_t stride = lies ? cols : NV * N, rows = lies ? gate_rows : K;
    for (int q = 0; q < kGates; q++)
      GemmBlocks<NV>(n, gate(q), gate_stride, right + q * rows * stride, stride, K, c, ldc, q > 0,
                     one_chain);
  }
  const void* Gate(int q) const { return At(w, storage, q * gate_rows * cols); }
  bool IsInPlace(int64_t v, int vecs) const {
    return packing == cpu::Packing::kNone && (v + vecs) * N <= cols;
  }
  T* Packed(int64_t v) const { return packed + (v - first) * N * kGates * K; }
};

// d W_hh of a step, for the columns that a thread owns: the team shares d. On tiles the gates
// follow each other along the depth. One object a thread.
template <int kGates>
class StepGradProduct {
 public:
  // What the threads of a team share.
  struct Common {
    Storage storage;
    int64_t K, cols;      // of all of W, where it is dense
    int64_t own_columns;  // of a thread, at most
    // Of a block-diagonal W, [kGates * cols, cols / blocks]: K is what a block has of cols.
    int blocks = 1;
    cpu::Packing packing;
    bool one_chain;
    bool tiled;
    parts::Cut cut;
    StepOperand::Common left;

    fixed::ExponentSum* sizes;  // of the rows of W, as each thread measured its columns
    std::atomic<bool> misfit[2] = {{false}, {false}};  // of W, by direction

    int64_t PaddedK() const { return parts::DepthBlocks(K, cut) * parts::DepthOf(cut); }
    void Take(Scratch& s, int threads) {
      left.Take(s, threads);
      const bool fixed_point = tiled && cut == parts::Cut::kFixed;
      sizes = s.Take<fixed::ExponentSum>(fixed_point ? threads * kGates * PaddedK() : 0);
    }
  };

  void Take(Scratch& s, Common& shared) {
    common_ = &shared;
    if (!shared.tiled)
      weights_.packed = weights_.Take(s, shared.packing, shared.K, shared.own_columns);
    tiles_ = TakeTiles(s, shared.tiled, shared.own_columns, kGates * shared.PaddedK(), shared.cut);
    left_.Take(s, shared.left);
    balance_.Take(s, left_.tiles[0]);
  }
  // Begins a direction, for the columns [first, last), whole vectors.
  void Begin(Team& team, int dir, const void* w, int64_t first, int64_t last) {
    const Common& c = *common_;
    dir_ = dir;
    first_ = first;
    last_ = last;
    valid_ = std::min(last, c.cols) - first;
    weights_.w = w;
    weights_.storage = c.storage;
    weights_.K = c.K;
    weights_.cols = c.cols / c.blocks;
    weights_.gate_rows = c.K * c.blocks;
    weights_.packing = c.packing;
    weights_.one_chain = c.one_chain;
    is_packed_ = false;
    if constexpr (kTiles)
      if (c.tiled) PackTiles(team);
  }
  // The units [begin, end) of all gates for a step; a barrier follows.
  template <class GateOf>
  void Share(Team& team, int64_t step, int64_t n, int64_t begin, int64_t end, const GateOf& gate,
             int64_t stride) const {
    if constexpr (kTiles && kGates > 0)
      if (common_->tiled) left_.Share(team, step, n, begin, end, gate, stride);
  }
  // Of a step that this thread has shared: it is out of the range of tiles.
  void Refuse(int64_t step) const { left_.Refuse(step); }
  // In fixed point, the largest element of each row that was shared; else null.
  const float* Largest(int64_t step) const {
    return balance_.depth > 0 ? left_.tiles[step & 1].largest : nullptr;
  }
  // The own columns of c.
  template <class GateOf>
  void Multiply(int64_t step, int64_t n, const GateOf& gate, int64_t stride, T* c, int64_t ldc,
                bool accumulate) {
    if (valid_ <= 0) return;
    if constexpr (kTiles)
      if (common_->tiled && !common_->misfit[dir_].load(std::memory_order_relaxed) &&
          left_.Fits(step)) {
        parts::Multiply(left_.tiles[step & 1], n, tiles_, valid_, Floats(c + first_), ldc,
                        accumulate, step % 2);
        return;
      }
    EnsureVectors();
    ForTiles([&](const ColumnWeights<kGates>& weights, int64_t block, int64_t v, auto nv) {
      const auto of_block = [&](int q) { return gate(q) + block * weights.K; };
      if (v * N < weights.cols)
        weights.template Multiply<decltype(nv)::value>(
            v, n, of_block, stride, c + block * weights.cols + v * N, ldc, accumulate);
    });
  }

 private:
  // f(weights, block, first vector in the block, number of them) for tiles of the own columns.
  template <class F>
  FRNN_INLINE void ForTiles(const F& f) const {
    const Common& c = *common_;
    const int64_t width = weights_.cols;
    ColumnWeights<kGates> weights = weights_;
    for (int block = 0; block < c.blocks; block++) {
      const int64_t start = block * width;
      const int64_t begin = std::max(first_, start);
      const int64_t end = c.blocks == 1 ? last_ : std::min(last_, start + width);
      if (begin >= end) continue;
      weights.w = At(weights_.w, c.storage, start * width);
      weights.first = (first_ - start) / N;
      ForColumnTiles((begin - start) / N, (end - start) / N,
                     [&](int64_t v, auto nv) { f(weights, block, v, nv); });
    }
  }
  FRNN_INLINE void EnsureVectors() {
    if (!is_packed_) PackVectors();
  }
  FRNN_NOINLINE void PackVectors() {
    if (weights_.packed == nullptr)
      spare_.Build([&](Scratch& s) {
        weights_.packed = weights_.Take(s, common_->packing, common_->K, common_->own_columns);
      });
    ForTiles([](const ColumnWeights<kGates>& weights, int64_t, int64_t v, auto nv) {
      weights.template Pack<decltype(nv)::value>(v);
    });
    is_packed_ = true;
  }
  void PackTiles(Team& team) {
    const Common& c = *common_;
    const int64_t depth = parts::DepthBlocks(c.K, c.cut);
    const auto gate = [&](int q) { return At(weights_.w, c.storage, q * c.K * c.cols + first_); };
    const bool measured = balance_.depth > 0;
    if (measured) {
      for (int q = 0; q < kGates; q++)
        fixed::MeasureRows(static_cast<const float*>(gate(q)), c.cols, c.K, 0, valid_,
                           c.sizes + team.id * balance_.depth + q * c.PaddedK());
      team.Sync();
      balance_.Find(c.sizes, team.size, kGates, c.K, {&left_.tiles[0], &left_.tiles[1]}, tiles_);
    }
    if (valid_ <= 0) return;
    for (int q = 0; q < kGates && measured; q++)
      fixed::Measure(static_cast<const float*>(gate(q)), c.cols, parts::Order::kAcross, valid_, 0,
                     c.K, tiles_.Depth(q * depth).factors, tiles_.largest, q > 0);
    bool fits = true;
    for (int q = 0; q < kGates; q++)
      fits &= parts::PackRight(gate(q), c.storage, c.cols, parts::Order::kAcross, valid_, c.K,
                               tiles_.Depth(q * depth), measured);
    if (!fits) common_->misfit[dir_].store(true, std::memory_order_relaxed);
  }

  Common* common_ = nullptr;
  int dir_;
  int64_t first_, last_, valid_;
  ColumnWeights<kGates> weights_{};
  bool is_packed_;
  parts::TiledOperand tiles_;
  StepOperand left_;
  Balance balance_;
  Scratch spare_;  // of the packed weights, where tiles do not fit
};

// d W_ih of many rows: the team shares W, and each thread packs its rows of d. On tiles the gates
// are summed one by one, so that an operand stays in the second-level cache. One object a thread.
template <int kGates>
class InputGradProduct {
 public:
  // What the threads of a team share.
  struct Common {
    explicit Common(int64_t cols) : cols(cols), tiles_of_columns((cols + N - 1) / N) {}

    Storage storage;
    int64_t K;
    const int64_t cols;
    const ColumnTiles tiles_of_columns;
    int64_t rows;  // at a time, at most
    cpu::Packing packing;
    bool one_chain;
    bool tiled;
    parts::Cut cut, d_cut;

    T* packed = nullptr;
    Scratch spare;  // of `packed`, where tiles do not fit
    parts::TiledOperand tiles[kGates];
    fixed::ExponentSum* sizes[kGates];  // of the rows of W, as each thread measured its columns
    std::atomic<bool> misfit[2] = {{false}, {false}};  // of W, by direction

    int64_t PaddedK() const { return parts::DepthBlocks(K, cut) * parts::DepthOf(cut); }
    T* TakePacked(Scratch& s) const {
      return ColumnWeights<kGates>::Take(s, packing, K, tiles_of_columns.vecs * N);
    }
    void Take(Scratch& s, int threads) {
      if (!tiled) packed = TakePacked(s);
      const bool fixed_point = tiled && d_cut == parts::Cut::kFixed;
      for (int q = 0; q < kGates; q++) {
        tiles[q] = TakeTiles(s, tiled, tiles_of_columns.vecs * N, K, cut);
        sizes[q] = s.Take<fixed::ExponentSum>(fixed_point ? threads * PaddedK() : 0);
      }
    }
  };

  void Take(Scratch& s, Common& shared) {
    common_ = &shared;
    c_ = s.Take<T>(shared.rows * kTileVecs * N);
    whole_rows_ =
        s.Take<T>(shared.tiled && shared.storage != kPlain ? shared.rows * shared.cols : 0);
    left_ = TakeTiles(s, shared.tiled, shared.rows, shared.K, shared.d_cut);
    for (Balance& balance : balance_) balance.Take(s, left_);
  }
  // Begins a direction. Threads go on with the columns that they have packed, or else with all
  // (`own_columns`).
  void Begin(Team& team, int dir, const void* w, bool d_fits, bool own_columns) {
    const Common& c = *common_;
    weights_.w = w;
    weights_.storage = c.storage;
    weights_.K = weights_.gate_rows = c.K;
    weights_.cols = c.cols;
    weights_.packing = c.packing;
    weights_.one_chain = c.one_chain;
    weights_.first = 0;
    on_tiles_ = kTiles && c.tiled && d_fits && PackTiles(team, dir);
    if (on_tiles_) return;
    PackVectors(team);
    if (!own_columns) team.Sync();
  }
  // n rows, some tiles of columns: store(c, ldc, first column, columns) for each part of them that
  // is done, or straight to `direct`, where there is one, on tiles and without what is there already.
  template <class GateOf, class Store>
  void Multiply(int64_t n, const Team::Range& tiles, const GateOf& gate, int64_t stride, T* direct,
                bool accumulate, const Store& store) {
    const Common& c = *common_;
    if (on_tiles_) {
      const int64_t col = c.tiles_of_columns.First(tiles.begin) * N;
      const int64_t width = std::min(c.cols, c.tiles_of_columns.First(tiles.end) * N) - col;
      if (width <= 0) return;
      T* out = direct ? direct : whole_rows_;
      if constexpr (kTiles)
        for (int q = 0; q < kGates; q++) {
          left_.factors = balance_[q].factors;
          parts::PackRows(gate(q), kPlain, stride, n, 0, c.PaddedK(), c.K, left_);
          parts::Multiply(left_, n, right_[q].Row(col), width, Floats(out + col), c.cols,
                          q > 0 || (direct && accumulate));
        }
      if (!direct) store(out + col, c.cols, col, width);
      return;
    }
    c.tiles_of_columns.For(tiles.begin, tiles.end, [&](int64_t v, auto nv) {
      constexpr int NV = decltype(nv)::value;
      const int64_t col = v * N;
      if (direct && !accumulate && col + NV * N <= c.cols) {
        weights_.template Multiply<NV>(v, n, gate, stride, direct + col, c.cols, false);
        return;
      }
      weights_.template Multiply<NV>(v, n, gate, stride, c_, NV * N, false);
      store(c_, NV * N, col, std::min<int64_t>(c.cols - col, NV * N));
    });
  }

 private:
  // False if an element is out of the range of tiles.
  bool PackTiles(Team& team, int dir) {
    if constexpr (kTiles) {
      Common& c = *common_;
      const auto mine = team.Split(c.tiles_of_columns.count);
      const int64_t first = c.tiles_of_columns.First(mine.begin) * N;
      const int64_t end = std::min(c.tiles_of_columns.First(mine.end) * N, c.cols);
      std::copy(c.tiles, c.tiles + kGates, right_);
      if (balance_[0].depth > 0) {
        for (int q = 0; q < kGates; q++)
          fixed::MeasureRows(static_cast<const float*>(weights_.w) + q * c.K * c.cols, c.cols, c.K,
                             first, end, c.sizes[q] + team.id * balance_[q].depth);
        team.Sync();
        for (int q = 0; q < kGates; q++)
          balance_[q].Find(c.sizes[q], team.size, 1, c.K, {}, right_[q]);
      }
      c.tiles_of_columns.For(mine.begin, mine.end, [&](int64_t v, auto nv) {
        const int64_t col = v * N;
        const int64_t width = std::min<int64_t>(c.cols - col, decltype(nv)::value * N);
        for (int q = 0; q < kGates; q++)
          if (!parts::PackRight(At(weights_.w, c.storage, q * c.K * c.cols + col), c.storage,
                                c.cols, parts::Order::kAcross, width, c.K, right_[q].Row(col)))
            c.misfit[dir].store(true, std::memory_order_relaxed);
      });
      team.Sync();
      return !c.misfit[dir].load(std::memory_order_relaxed);
    }
    return false;
  }
  void PackVectors(Team& team) {
    Common& c = *common_;
    if (c.tiled) {
      if (team.id == 0 && c.packed == nullptr)
        c.spare.Build([&](Scratch& s) { c.packed = c.TakePacked(s); });
      team.Sync();
    }
    weights_.packed = c.packed;
    const auto mine = team.Split(c.tiles_of_columns.count);
    c.tiles_of_columns.For(mine.begin, mine.end, [&](int64_t v, auto nv) {
      weights_.template Pack<decltype(nv)::value>(v);
    });
  }

  Common* common_ = nullptr;
  ColumnWeights<kGates> weights_{};
  bool on_tiles_;
  parts::TiledOperand right_[kGates], left_;  // W's tiles with this thread's factors; rows of d
  Balance balance_[kGates];
  T *c_, *whole_rows_;
};

FRNN_END
