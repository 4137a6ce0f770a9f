// Products of the forward: gates [n][gate][unit] = a W^T, W [kGates * H, K], for the panels of
// units that a thread owns. A product knows how its weights are packed (for vectors: not at all,
// once, before each use, or long ago; for tiles) and goes back to vectors by itself where tiles do
// not fit.
#pragma once
#include "cpu/product/bytes.h"
#include "cpu/product/panel.h"
#include "cpu/product/tiles.h"

FRNN_BEGIN

// Rows of a matrix in memory.
struct MatrixRows {
  const void* first;
  Storage storage;
  int64_t stride;

  const void* At(int64_t r) const { return frnn::At(first, storage, r * stride); }
  const T* Plain(int64_t r) const { return static_cast<const T*>(first) + r * stride; }
};

// Panels that were packed before the call: of the computing type; of bfloat16, whose elements are half
// as many bytes for the same products; or of bytes, for products of integers.
struct PackedPanels {
  const void* first;  // null: there are none
  int64_t element;    // its bytes

  PackedPanels From(int64_t bytes) const {
    return {first ? static_cast<const char*>(first) + bytes : nullptr, element};
  }
  bool IsBFloat16() const { return sizeof(T) == 4 && element == 2; }
  bool IsBytes() const { return sizeof(T) == 4 && element == 1; }
};

// The right operand, and what both kinds of products do with it. One object a thread.
template <int kGates, int kPanelVecs>
class PanelProduct {
  using Layout = Panel<kGates, kPanelVecs>;
  using ByteLayout = BytePanel<kGates, kPanelVecs>;

 public:
  static constexpr int kUnits = Layout::kUnits, kWidth = Layout::kWidth;

  // What the threads of a team share.
  struct Common {
    Storage storage;
    int64_t H, K;
    int64_t own_panels;  // of a thread, at most
    // Of a block-diagonal W, units of a block: each block has K columns of the left side.
    int64_t block_units = 0;
    cpu::Packing packing;
    // Of packed bytes, as many rows as there are of the left side at a time: it becomes bytes, too.
    int64_t byte_rows = 0;
    bool one_chain;  // as of GemmRows
    bool tiled;
    parts::Cut cut;
    bool paired;  // on tiles, two panels are one product: they are side by side in `gates`

    T* turned;                  // the rows of a step as columns: [kTurned of them][k][row]
    fixed::ExponentSum* sizes;  // of the columns of W, as each thread measured its rows
    // By direction, whether anything that all steps need is out of the range of tiles.
    std::atomic<bool> misfit[2] = {{false}, {false}};

    bool Turns() const { return packing == cpu::Packing::kTurned; }
    void Take(Scratch& s, int threads, int64_t batch) {
      turned = s.Take<T>(Turns() ? RoundUp(batch, kTurned) * K : 0);
      const bool fixed_point = tiled && cut == parts::Cut::kFixed;
      sizes = s.Take<fixed::ExponentSum>(
          fixed_point ? threads * parts::DepthBlocks(K, cut) * parts::DepthOf(cut) : 0);
    }
    // The own panels by groups of one or two.
    int64_t Group() const { return 1 + paired; }
    int64_t Groups(int64_t panels) const { return (panels + paired) >> paired; }
    // In gates [group][row][panel of the group][gate][unit], how far rows are apart, and where
    // panel `at` is where each group has so many rows.
    int64_t Stride() const { return Group() * kWidth; }
    int64_t Offset(int64_t at, int64_t rows) const {
      return GroupOf(at) * rows * Stride() + InGroup(at);
    }
    int64_t GroupOf(int64_t at) const { return at >> paired; }
    int64_t InGroup(int64_t at) const { return (at & paired) * kWidth; }
    // The first column of the left side that a panel is multiplied with.
    int64_t LeftColumn(int64_t panel) const {
      return block_units > 0 ? panel * kUnits / block_units * K : 0;
    }
    int64_t LeftColumns() const { return block_units > 0 ? H / block_units * K : K; }
  };

  void Take(Scratch& s, Common& shared) {
    common_ = &shared;
    if (!shared.tiled) packed_ = TakePacked(s);
    left_bytes_.stride = bytes::PaddedDepth(shared.LeftColumns());
    left_bytes_.numbers = s.Take<int8_t>(shared.byte_rows * left_bytes_.stride);
    left_bytes_.scales = s.Take<float>(shared.byte_rows);
    tiles_ = TakeTiles(s, shared.tiled, shared.own_panels * kWidth, shared.K, shared.cut);
    balance_.Take(s, tiles_);
  }

  // Bytes of a packed panel.
  static int64_t PackedSize(int64_t K, const PackedPanels& packed) {
    return packed.IsBytes() ? ByteLayout::Size(K) : K * kWidth * packed.element;
  }
  // All panels of w, one after the other: each thread of any team finds its own there.
  static void Pack(const void* w, Storage storage, int64_t H, int64_t K, int64_t panels,
                   const PackedPanels& packed) {
    const int64_t size = K * kWidth;
    Vector<T> rounded(packed.IsBFloat16() ? size : 0);
    for (int64_t panel = 0; panel < panels; panel++) {
      void* const at = const_cast<void*>(packed.From(panel * PackedSize(K, packed)).first);
      if constexpr (sizeof(T) == 4)
        if (packed.IsBytes()) {
          ByteLayout::Pack(w, storage, H, K, panel, at);
          continue;
        }
      T* const to = packed.IsBFloat16() ? rounded.data() : static_cast<T*>(at);
      Layout::Pack(w, storage, H, K, panel, to);
      if (packed.IsBFloat16()) StoreRow(at, Storage::kBFloat16, to, size);
    }
  }

  // gates of `rows` rows and a panel of w as it lies.
  FRNN_INLINE static void MultiplyUnpacked(int64_t rows, const T* a, int64_t lda, const T* w,
                                           int64_t H, int64_t K, int64_t panel, T* gates,
                                           int64_t stride) {
    for (int q = 0; q < kGates; q++)
      for (int j = 0; j < kPanelVecs; j++) {
        const int64_t unit = panel * kUnits + j * N, left = H - unit;
        DotRows(rows, a, lda, w + (q * H + unit) * K, int(left < 0 ? 0 : (left < N ? left : N)), K,
                gates + (q * kPanelVecs + j) * N, stride);
      }
  }

  int64_t count() const { return panels_.end - panels_.begin; }
  // The n rows of a step whose weights are read as they lie, by the whole team. A barrier follows.
  // Null: zeros.
  void Turn(const Team& team, int64_t n, const T* a, int64_t lda) const {
    const Common& c = *common_;
    if (!c.Turns()) return;
    const auto mine = team.Split(c.K, N);
    for (int64_t r = 0; r < n; r += N) {
      const int64_t first = r / kTurned * kTurned, width = TurnedVecs(n - first) * N;
      PackTransposed(a ? a + mine.begin : a, kPlain, r, a ? n : 0, mine.end - mine.begin, lda,
                     c.turned + first * c.K + mine.begin * width + r - first, width);
    }
  }
  // All that every step needs is in the range of tiles. After a barrier behind what packs it.
  bool FitsTiles() const {
    return kTiles && common_->tiled && !common_->misfit[dir_].load(std::memory_order_relaxed);
  }

 protected:
  // Begins a direction. The whole team packs for tiles what it will need; vectors wait for the
  // first use, or find w `packed`.
  void Begin(Team& team, Team::Range panels, int dir, const void* w, const PackedPanels& packed,
             std::initializer_list<parts::TiledOperand*> left) {
    panels_ = panels;
    dir_ = dir;
    w_ = w;
    is_packed_ = common_->packing != cpu::Packing::kOnce;
    given_ = packed.From(panels.begin * PackedSize(common_->K, packed));
    if constexpr (kTiles)
      if (common_->tiled) PackTiles(team, left);
  }

  void Refuse() const { common_->misfit[dir_].store(true, std::memory_order_relaxed); }

  // The n rows of a product on vectors, before MultiplyPanel has them.
  FRNN_INLINE void TakeLeft(int64_t n, const T* a, int64_t lda) const {
    if constexpr (sizeof(T) == 4)
      if (given_.IsBytes() && count() > 0)
        bytes::Quantise(Floats(a), lda, n, common_->LeftColumns(), bytes::Shift(), left_bytes_);
  }
  // gates of `rows` rows and the own panel `at`; `before` as in GemmRows: the rows taken before these.
  FRNN_INLINE void MultiplyPanel(int64_t rows, const T* a, int64_t lda, int64_t at, T* gates,
                                 int64_t stride, int64_t before) const {
    const Common& c = *common_;
    const int64_t panel = panels_.begin + at;
    a += c.LeftColumn(panel);
    if (c.packing == cpu::Packing::kNone)
      return MultiplyUnpacked(rows, a, lda, static_cast<const T*>(w_), c.H, c.K, panel, gates,
                              stride);
    if (c.Turns()) return MultiplyTurned(rows, panel, gates, stride);
    const auto multiply = [&](const auto* packed) FRNN_INLINE_LAMBDA {
      Layout::ForBands([&](auto first, auto vecs) FRNN_INLINE_LAMBDA {
        GemmRows<decltype(vecs)::value>(rows, a, lda, packed + first * N * c.K, vecs * N, c.K,
                                        gates + first * N, stride, false, c.one_chain, before);
      });
    };
    if (c.packing == cpu::Packing::kGiven) {
      const PackedPanels panel_at = given_.From(at * PackedSize(c.K, given_));
      if constexpr (sizeof(T) == 4) {
        if (given_.IsBytes())
          return ByteLayout::Multiply(rows, LeftBytes(before, c.LeftColumn(panel)), panel_at.first,
                                      c.K, Floats(gates), stride);
        if (given_.IsBFloat16()) return multiply(static_cast<const uint16_t*>(panel_at.first));
      }
      return multiply(static_cast<const T*>(panel_at.first));
    }
    if (c.packing == cpu::Packing::kEachUse) {
      Layout::Pack(w_, c.storage, c.H, c.K, panel, packed_);
      return multiply(static_cast<const T*>(packed_));
    }
    multiply(static_cast<const T*>(packed_ + at * c.K * kWidth));
  }
  // All rows of a step: the gates come out as [unit][row], and are turned back.
  FRNN_NOINLINE void MultiplyTurned(int64_t n, int64_t panel, T* gates, int64_t stride) const {
    const Common& c = *common_;
    alignas(kLine) T columns[kUnits * kTurned];
    const int64_t unit = panel * kUnits, units = c.H - unit < kUnits ? c.H - unit : kUnits;
    for (int64_t r = 0; r < n; r += kTurned) {
      const int64_t rows = n - r < kTurned ? n - r : kTurned;
      WithConstant<cpu::kTurnedVecs>(TurnedVecs(rows), [&](auto nv) {
        constexpr int NV = decltype(nv)::value;
        for (int q = 0; q < kGates; q++) {
          GemmRows<NV>(units, static_cast<const T*>(w_) + (q * c.H + unit) * c.K, c.K,
                       c.turned + r * c.K, NV * N, c.K, columns, NV * N, false, false);
          for (int j = 0; j < kPanelVecs; j++)
            PackTransposed(columns, kPlain, j * N, units, rows, NV * N,
                           gates + r * stride + (q * kPanelVecs + j) * N, stride);
        }
      });
    }
  }
  FRNN_INLINE void EnsureVectors() {
    if (!is_packed_) PackVectors();
  }
  FRNN_NOINLINE void PackVectors() {
    if (packed_ == nullptr) spare_.Build([&](Scratch& s) { packed_ = TakePacked(s); });
    for (int64_t at = 0; at < count(); at++)
      Layout::Pack(w_, common_->storage, common_->H, common_->K, panels_.begin + at,
                   packed_ + at * common_->K * kWidth);
    is_packed_ = true;
  }

  // A product of rows on tiles, with the panels of group `g`.
  void MultiplyGroup(const parts::TiledOperand& left, int64_t rows, int64_t g, T* gates) const {
    const int64_t at = g * common_->Group();
    parts::Multiply(left, rows, tiles_.Row(at * kWidth), PanelsOf(g) * kWidth, Floats(gates),
                    common_->Stride(), false);
  }
  int64_t PanelsOf(int64_t g) const {
    const int64_t left = count() - g * common_->Group();
    return left < common_->Group() ? left : common_->Group();
  }

  Common* common_ = nullptr;

 private:
  static constexpr int64_t kTurned = cpu::kTurnedVecs * N;
  bytes::Rows LeftBytes(int64_t row, int64_t column) const {
    return {left_bytes_.numbers + row * left_bytes_.stride + column, left_bytes_.scales + row,
            left_bytes_.stride};
  }
  // Vectors of so many rows, of one block.
  static int TurnedVecs(int64_t rows) { return int((rows < kTurned ? rows : kTurned) + N - 1) / N; }

  T* TakePacked(Scratch& s) const {
    const int64_t panels = common_->packing == cpu::Packing::kOnce      ? common_->own_panels
                           : common_->packing == cpu::Packing::kEachUse ? 1
                                                                        : 0;
    return s.Take<T>(panels * common_->K * kWidth);
  }
  void PackTiles(Team& team, std::initializer_list<parts::TiledOperand*> left) {
    const Common& c = *common_;
    if (balance_.depth > 0) {
      const int64_t unit = panels_.begin * kUnits, end = panels_.end * kUnits;
      for (int q = 0; q < kGates; q++)
        fixed::MeasureColumns(static_cast<const float*>(w_) + q * c.H * c.K, c.K, c.K, unit,
                              end < c.H ? end : c.H, c.sizes + team.id * balance_.depth, q > 0);
      team.Sync();
      balance_.Find(c.sizes, team.size, 1, c.K, left, tiles_);
    }
    bool fits = true;
    for (int64_t at = 0; at < count(); at++)
      for (int q = 0; q < kGates; q++)
        for (int j = 0; j < kPanelVecs; j++) {
          const int64_t unit = (panels_.begin + at) * kUnits + j * N, n = c.H - unit;
          fits &= parts::PackRight(At(w_, c.storage, (q * c.H + unit) * c.K), c.storage, c.K,
                                   parts::Order::kAlong, n < N ? n : N, c.K,
                                   tiles_.Row(at * kWidth + (q * kPanelVecs + j) * N));
        }
    if (!fits) Refuse();
  }

  const void* w_;
  Team::Range panels_;
  int dir_;
  T* packed_ = nullptr;  // for vectors
  PackedPanels given_;   // the same where they were packed before the call
  bytes::Rows left_bytes_;
  bool is_packed_;
  parts::TiledOperand tiles_;
  Balance balance_;
  Scratch spare_;  // of packed_, where tiles do not fit
};

// With rows that each thread packs for itself: x W_ih^T, many rows at a time.
template <int kGates, int kPanelVecs>
class InputProduct : public PanelProduct<kGates, kPanelVecs> {
  using Base = PanelProduct<kGates, kPanelVecs>;
  using Base::common_;

 public:
  using typename Base::Common;

  void Take(Scratch& s, Common& shared) {
    Base::Take(s, shared);
    left_ = TakeTiles(s, shared.tiled, cpu::kTiledInput, shared.K, shared.cut);
  }
  void Begin(Team& team, Team::Range panels, int dir, const void* w, const PackedPanels& packed) {
    Base::Begin(team, panels, dir, w, packed, {&left_});
  }
  // gates(panel): where the product of x with it begins; stage(): x in the computing type.
  template <class Gates, class Stage>
  void Multiply(MatrixRows x, int64_t n, const Gates& gates, const Stage& stage) {
    const bool tiled = Base::FitsTiles();
    const int64_t block = tiled ? cpu::kTiledInput : n, stride = common_->Stride();
    for (int64_t r = 0; r < n; r += block) {
      const int64_t rows = n - r < block ? n - r : block;
      if (tiled && MultiplyOnTiles(x, r, rows, gates)) continue;
      if (x.storage != kPlain) x = stage();
      Base::EnsureVectors();
      Base::TakeLeft(rows, x.Plain(r), x.stride);
      for (int64_t at = 0; at < Base::count(); at++)
        Base::MultiplyPanel(rows, x.Plain(r), x.stride, at, gates(at) + r * stride, stride, 0);
    }
  }

 private:
  // False if one of the rows is out of the range of tiles.
  template <class Gates>
  bool MultiplyOnTiles(const MatrixRows& x, int64_t r, int64_t rows, const Gates& gates) const {
    if constexpr (kTiles) {
      if (!parts::PackRows(x.At(r), x.storage, x.stride, rows, 0, left_.PaddedDepth(), common_->K,
                           left_))
        return false;
      for (int64_t i = 0, groups = common_->Groups(Base::count()); i < groups; i++) {
        // There and back, see parts::Multiply.
        const int64_t g = r / cpu::kTiledInput % 2 ? groups - 1 - i : i;
        Base::MultiplyGroup(left_, rows, g, gates(g * common_->Group()) + r * common_->Stride());
      }
    }
    return kTiles;
  }

  parts::TiledOperand left_;
};

// With rows that the team shares in every step: h W_hh^T.
template <int kGates, int kPanelVecs>
class StepProduct : public PanelProduct<kGates, kPanelVecs> {
  using Base = PanelProduct<kGates, kPanelVecs>;
  using Base::common_;

 public:
  struct Common : Base::Common {
    StepOperand::Common left;
  };

  void Take(Scratch& s, Common& shared) {
    Base::Take(s, shared);
    left_.Take(s, shared.left);
  }
  void Begin(Team& team, Team::Range panels, int dir, const void* w, const PackedPanels& packed) {
    Base::Begin(team, panels, dir, w, packed, {&left_.tiles[0], &left_.tiles[1]});
  }
  // The columns [begin, end) of n rows of h for a step, by each thread; a barrier follows.
  void Share(Team& team, int64_t step, int64_t n, int64_t begin, int64_t end, const T* h,
             int64_t stride) const {
    if constexpr (kTiles && kGates > 0)
      if (common_->tiled && !ShareTiles(team, step, n, begin, end, h, stride)) left_.Refuse(step);
  }
  // The same before the first step; for the second one too, since rows of a ragged batch join
  // later.
  void ShareFirst(Team& team, int64_t step, int64_t n, int64_t begin, int64_t end, const T* h,
                  int64_t stride) const {
    if constexpr (kTiles && kGates > 0)
      for (int i = 0; i < 2 && common_->tiled; i++)
        if (!ShareTiles(team, step + i, n, begin, end, h, stride)) Base::Refuse();
  }
  // gates of the own panels, of one group at a time and one block of rows after the other:
  // gates(group, first row) is where they go, use(panel, first row, rows) what follows.
  template <class Gates, class Use>
  FRNN_INLINE void Multiply(int64_t step, int64_t n, const T* h, int64_t ldh, const Gates& gates,
                            const Use& use) {
    if constexpr (kTiles && kGates > 0)
      if (Base::FitsTiles() && left_.Fits(step)) {
        for (int64_t i = 0, groups = common_->Groups(Base::count()); i < groups; i++) {
          const int64_t g = step % 2 ? groups - 1 - i : i;
          for (int64_t r = 0; r < n; r += cpu::kRowBlock) {
            const int64_t rows = n - r < cpu::kRowBlock ? n - r : cpu::kRowBlock;
            Base::MultiplyGroup(left_.tiles[step & 1].Row(r), rows, g, gates(g, r));
            for (int64_t j = 0; j < Base::PanelsOf(g); j++)
              use(g * common_->Group() + j, r, int(rows));
          }
        }
        return;
      }
    if constexpr (kGates > 0) {
      Base::EnsureVectors();
      Base::TakeLeft(n, h, ldh);
    }
    for (int64_t at = 0; at < Base::count(); at++)
      ForRowBlocks<cpu::kRowBlock>(n, [&](int rows, int64_t r) FRNN_INLINE_LAMBDA {
        if constexpr (kGates > 0)
          Base::MultiplyPanel(rows, h + r * ldh, ldh, at,
                              gates(common_->GroupOf(at), r) + common_->InGroup(at),
                              common_->Stride(), r);
        use(at, r, rows);
      });
  }

 private:
  bool ShareTiles(Team& team, int64_t step, int64_t n, int64_t begin, int64_t end, const T* h,
                  int64_t stride) const {
    return left_.Share(team, step, n, begin, end, [&](int) { return h; }, stride);
  }

  StepOperand left_;
};

FRNN_END
