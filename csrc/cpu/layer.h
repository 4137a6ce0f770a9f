// The CPU engine: one recurrent layer over a whole sequence, for any cell.
//
// Units are cut into panels of a few vectors; a thread owns a range of panels for the whole
// sequence, so its slice of the weights stays in its own cache. Weights are packed per panel as
// [k][gate][unit]: a tile of a product holds all gates of its units, and the gate math runs on it
// while it is in the first-level cache.
//
// Forward, per chunk of time steps: gates_x = x W_ih^T for the thread's own units (no
// barrier), then per step gates_h = h W_hh^T, gate math, one barrier.
// Few rows in all (a decoding step) are not worth packing weights for: they read W as it lies.
// Where the processor multiplies bfloat16, products come from cpu/bf16.h: those of 16-bit types, and
// on a tile unit those of float with many rows, in fixed point (cpu/fixed.h) where they are deep. It
// refuses operands with elements out of its range, which then go through the vectors as elsewhere.
// Backward, per step: gate gradients of the own units, one barrier, dh += d W_hh for the own units.
// Then dX, dW and db of the whole sequence as large products.
#pragma once
#include <initializer_list>
#include <vector>

#include "core/cell.h"
#include "core/scratch.h"
#include "cpu/bf16.h"
#include "cpu/fixed.h"
#include "cpu/gemm.h"
#include "cpu/threads.h"

FRNN_BEGIN

template <class C, class V>
class Layer {
 public:
  static void Forward(const LayerParams& p);
  static void Backward(const LayerGradParams& p);

 private:
  using T = typename Lanes<V>::T;
  static constexpr int N = Lanes<V>::kSize;
  static constexpr int kPanelVecs = C::kH <= 2 ? 2 : 1;
  static constexpr int kUnits = kPanelVecs * N;  // units of a panel
  static constexpr int kXVecs =
      C::kX * kPanelVecs;  // vectors of a tile of gates_x: [gate][panel vector]
  static constexpr int kHVecs = C::kH * kPanelVecs;
  static constexpr int kExtra = C::kStates - 1;
  static constexpr int kTape =
      C::kSaved + kExtra;  // per unit and row: what the cell saved, then c_{t-1}
  static constexpr int kTileWidth = kTileVecs<V> * N;
  static constexpr int64_t kChunkRows = 128;  // rows of gates_x computed ahead
  // What a thread could do while a team of two waits at a barrier, and while a team starts.
  static constexpr int64_t kMacsPerBarrier = 4096, kMacsPerTeam = 200000;
  static constexpr int64_t kMacsOfShortCall = 100000000;  // a few milliseconds, see Crowd
  // The backward of so few rows in all reads weights as they lie, at a stride that caches do not like
  // twice.
  static constexpr int64_t kUnpackedGradRows = 12;
  static constexpr bool kTiles = bf16::kCompiled && sizeof(V) == 64 && sizeof(T) == 4;
  static constexpr int64_t kTiledChunk = 512;  // longer: W_ih and W_hh evict each other
  static constexpr int64_t kTiledInput = 128;  // rows of x that are packed at a time
  static constexpr int64_t kRowBlock = 64;     // rows of gates_h that wait for the gate math
  // Panels of one product on tiles: an even number of tiles wide.
  static constexpr int kTiledGroup = kXVecs % 2 || kHVecs % 2 ? 2 : 1;
  static constexpr Storage kOwn = StorageOf<T>::kValue;
  static_assert(CheckCell<C>());
  static_assert(kAlign % kUnits == 0, "buffers are padded to whole panels");

  static int64_t Panels(const LayerParams& p) { return (p.H + kUnits - 1) / kUnits; }
  static int64_t Macs(const LayerParams& p) { return p.rows * C::kH * p.H * (p.Hout + p.I); }
  static bool IsShort(const LayerParams& p) { return Macs(p) < kMacsOfShortCall; }
  // As many as do a step sooner than one fewer would: each adds to what all wait for at the barrier.
  static int Threads(const LayerParams& p) {
    const int64_t most = p.threads < Panels(p) ? p.threads : Panels(p);
    const int64_t macs = Macs(p) < kMacsPerTeam ? 0 : p.B * C::kH * p.H * p.Hout;
    int64_t n = 1;
    while (n < most && n * (n + 1) * kMacsPerBarrier <= macs) n++;
    if (n > 1 && IsShort(p) && Crowd::Here()) n--;
    return TeamSize(int(n));
  }
  // A bfloat16 is its own part, and half as many bytes. Splitting weights into more parts is worth it
  // from so many rows per step, and in all, on; fixed point is fewer bytes than floats are, so that wide
  // layers stream faster for any batch.
  static bool Tiled(const LayerParams& p) {
    if constexpr (kTiles) {
      if (p.storage == Storage::kBFloat16) return bf16::Available(p.storage);
      int64_t batch = p.storage == Storage::kHalf ? 8 : (p.H >= 256 ? 16 : 24);
      if (bf16::CutOf(p.storage, p.Hout) == bf16::Cut::kFixed)
        batch = p.H >= 1024 ? 1 : (p.H >= 512 ? 4 : (p.H >= 256 ? 8 : 12));
      return p.B >= batch && p.rows >= 256 && bf16::Available(p.storage);
    }
    return false;
  }
  // Nothing where tiles are not used.
  static bf16::Operand TakeTiles(Scratch& s, bool tiled, int64_t rows, int64_t K, bf16::Cut cut) {
    if (!tiled) return {nullptr, 0, bf16::Cut::kThree, nullptr, nullptr};
    const int64_t depth = bf16::DepthBlocks(K, cut);
    return {s.Take<bf16::Part>(bf16::Size(rows, depth, cut)), depth, cut,
            s.Take<float>(cut == bf16::Cut::kFixed ? RoundUp(rows, bf16::kRows) : 0), nullptr};
  }
  // The tiles of a step's left operand, by the parity of the step, which the threads share. In fixed
  // point each has what the team measured (ShareLargest) for itself; `measured` is for what each did.
  template <class Own>
  static void TakeStepTiles(Scratch& s, bool tiled, int64_t batch, int64_t K, bf16::Cut cut,
                            std::vector<Own>& own, bf16::Operand (Own::*tiles)[2],
                            float* (&measured)[2]) {
    for (int parity = 0; parity < 2; parity++) {
      const bf16::Operand shared = TakeTiles(s, tiled, batch, K, cut);
      const int64_t rows = shared.cut == bf16::Cut::kFixed ? RoundUp(batch, bf16::kRows) : 0;
      measured[parity] = s.Take<float>(int64_t(own.size()) * rows);
      for (Own& to : own) {
        bf16::Operand& mine = (to.*tiles)[parity];
        mine = shared;
        if (rows > 0) mine.largest = s.Take<float>(rows);
      }
    }
  }
  // The factors that balance the two sides of a product in fixed point; nothing for other cuts.
  struct Balance {
    int64_t depth;  // or 0
    float *factors, *inverse;

    void Take(Scratch& s, const bf16::Operand& tiles) {
      depth = tiles.cut == bf16::Cut::kFixed ? tiles.PaddedDepth() : 0;
      factors = s.Take<float>(depth);
      inverse = s.Take<float>(depth);
    }
    // From the sizes of `gates` times K elements, which are apart in the depth.
    void Find(const fixed::Size* sizes, int count, int gates, int64_t K,
              std::initializer_list<bf16::Operand*> left,
              std::initializer_list<bf16::Operand*> right) {
      if (depth == 0) return;
      for (int64_t at = 0; at < depth; at += depth / gates)
        fixed::Factors(sizes + at, depth, count, K, factors + at, inverse + at);
      for (bf16::Operand* a : left) a->factors = factors;
      for (bf16::Operand* b : right) b->factors = inverse;
    }
  };
  // Fixed point needs the largest element of n whole rows, of which each thread has some columns:
  // measure(largest) looks at those. False for other cuts, which need none.
  template <class F>
  static bool ShareLargest(Team& team, const bf16::Operand& to, float* largest, int64_t n,
                           const F& measure) {
    if (to.cut != bf16::Cut::kFixed) return false;
    const int64_t stride = RoundUp(n, bf16::kRows);
    measure(largest + team.id * stride);
    team.Sync();
    fixed::Largest(largest, stride, team.size, n, to.largest);
    return true;
  }
  static bool Projected(const LayerParams& p) { return p.w[0].w_hr != nullptr; }
  // Packing W is one pass over it and makes its rows columns, so that a product needs no sums over
  // lanes. So few rows, in all or of a step, do not repay that (some Hout / 8 steps of one row do); long
  // rows of W have fewer such sums, and in vectors of a whole line they stream as fast as panels do.
  static bool UnpackedX(const LayerParams& p) {
    return p.storage == kOwn && p.rows <= (p.I >= 256 ? 16 : 12);
  }
  static bool UnpackedH(const LayerParams& p) {
    if (p.storage != kOwn) return false;
    if (p.rows <= 16) return true;
    if (p.Hout % N != 0) return false;
    if (p.B == 1) return p.T <= p.Hout / 8 || (sizeof(V) == 64 && p.Hout >= 512);
    return p.B == 2 && p.T <= 32 && p.Hout >= 512;
  }
  static bool UnpackedGrad(const LayerParams& p) {
    return p.storage == kOwn && p.rows <= kUnpackedGradRows;
  }

  // The rows of x, as the engine may read them: `stride` apart and in the computing type (direct), or
  // to be staged first. Tiles are packed from any type.
  struct Input {
    explicit Input(const LayerParams& p) {
      one_stride = p.ragged || p.B == 1 || p.T == 1 || p.x_t_stride == p.B * p.x_b_stride;
      stride = !p.ragged && p.B == 1 ? p.x_t_stride : p.x_b_stride;
      direct = one_stride && p.storage == kOwn;
    }
    static const void* Row(const LayerParams& p, int64_t t, int64_t b) {
      return At(p.x, p.storage,
                p.ragged ? (p.offsets[t] + b) * p.x_b_stride : t * p.x_t_stride + b * p.x_b_stride);
    }
    int64_t stride;
    bool one_stride, direct;
  };

  // Walks the rows r = offsets[t] + b in order.
  struct RowCursor {
    RowCursor(const LayerParams& p, int64_t row) : p(p), t(0) {
      if (!p.ragged) {
        t = row / p.B;
        b = row % p.B;
      } else {
        while (p.offsets[t + 1] <= row) t++;
        b = row - p.offsets[t];
      }
    }
    void Next() {
      if (++b == p.batch_sizes[t]) {
        b = 0;
        t++;
      }
    }
    const LayerParams& p;
    int64_t t, b;
  };

  // Where h_{t-1} (h_{t+1} of a reversed direction) of row (t, b) lies in hs: row b holds h0, row B
  // + r holds h of row r.
  static int64_t PreviousRow(const LayerParams& p, int dir, int64_t t, int64_t b) {
    if (dir == 0) return t == 0 ? b : p.B + p.offsets[t - 1] + b;
    return t + 1 < p.T && b < p.batch_sizes[t + 1] ? p.B + p.offsets[t + 1] + b : b;
  }
  static T* Tape(const LayerParams& p, int dir, int64_t t, int64_t panel) {
    T* base = static_cast<T*>(p.saved) + dir * p.rows * kTape * Padded(p.H);
    return base + (p.offsets[t] * Panels(p) + panel * p.batch_sizes[t]) * kTape * kUnits;
  }

  // w [gates * H, K] -> [k][gate][unit] for one panel.
  static void PackGates(const void* w, Storage s, int gates, int64_t H, int64_t K, int64_t panel,
                        T* dst) {
    for (int q = 0; q < gates; q++)
      for (int j = 0; j < kPanelVecs; j++) {
        const int64_t unit = panel * kUnits + j * N;
        PackTransposed<V>(At(w, s, q * H * K), s, unit, H, K, dst + (q * kPanelVecs + j) * N,
                          gates * kUnits);
      }
  }
  // The same as right operands of tiles.
  static bool PackGateTiles(const void* w, Storage s, int gates, int64_t H, int64_t K,
                            int64_t panel, const bf16::Operand& out) {
    bool fits = true;
    if constexpr (kTiles)
      for (int q = 0; q < gates; q++)
        for (int j = 0; j < kPanelVecs; j++) {
          const int64_t unit = panel * kUnits + j * N, n = H - unit < N ? H - unit : N;
          fits &= bf16::PackRight(At(w, s, (q * H + unit) * K), s, K, bf16::Order::kAlong, n, K,
                                  out.Row((q * kPanelVecs + j) * N));
        }
    return fits;
  }
  static void PackBias(const void* b, Storage s, int gates, int64_t H, int64_t panel, T* dst) {
    for (int q = 0; q < gates; q++) {
      const int64_t unit = panel * kUnits, n = H - unit < kUnits ? H - unit : kUnits;
      if (b && s == kOwn && n == kUnits)  // a size that the compiler knows: no call
        memcpy(dst + q * kUnits, At(b, s, q * H + unit), kUnits * sizeof(T));
      else if (b)
        LoadRow<T>(At(b, s, q * H + unit), s, dst + q * kUnits, n);
      for (int64_t i = b ? n : 0; i < kUnits; i++) dst[q * kUnits + i] = 0;
    }
  }

  // gates [n][gate][unit] of one panel, rows `stride` apart, = a w^T, w packed for the panel or
  // (unpacked) whole; `before` as in GemmRows.
  template <int kGates>
  static void Product(const LayerParams& p, bool unpacked, int64_t n, const T* a, int64_t lda,
                      const void* w, const T* packed, int64_t K, int64_t panel, T* gates,
                      int64_t stride, int64_t before) {
    if (!unpacked) {
      GemmRows<V, kGates * kPanelVecs>(n, a, lda, packed, kGates * kUnits, K, gates, stride, false,
                                       before);
      return;
    }
    for (int q = 0; q < kGates; q++)
      for (int j = 0; j < kPanelVecs; j++) {
        const int64_t unit = panel * kUnits + j * N;
        T* out = gates + (q * kPanelVecs + j) * N;
        if (unit < p.H)
          DotRows<V>(n, a, lda, static_cast<const T*>(w) + q * p.H * K, unit, p.H, K, out, stride);
        else
          for (int64_t r = 0; r < n; r++) store<V>(out + r * stride, V{});
      }
  }

  struct StepRows {
    const T* gates_x;  // [n, kX, units], without bias, rows gates_x_stride apart
    const T* gates_h;  // [n, kH, units], without bias, rows gates_h_stride apart
    int64_t gates_x_stride, gates_h_stride;
    const T* b_ih;  // [kX, units]
    const T* b_hh;  // [kH, units]
    const T* h;     // h_{t-1} of the panel, rows h_stride apart
    T* h_new;       // rows h_stride apart (h_full, rows full_stride apart, with a projection)
    int64_t h_stride, h_new_stride;
    T* c;     // [n, kExtra, units], replaced
    T* tape;  // [n, kTape, units] or null
    T* y;     // rows y_stride apart, or null
    int64_t y_stride;
    int64_t units;  // valid units from the panel's first one on
    Storage round;  // h is rounded to this
  };
  static void GateMath(const StepRows& s, int64_t first, int rows);
  static void CopyState(const LayerParams& p, const void* src, int dir, int64_t first, int64_t last,
                        T* dst, int64_t stride);
};

// The pointwise part of a step, for one panel and the rows from `first` on.
template <class C, class V>
void Layer<C, V>::GateMath(const StepRows& s, int64_t first, int rows) {
  for (int64_t m = first; m < first + rows; m++) {
    FRNN_UNROLL
    for (int j = 0; j < kPanelVecs; j++) {
      Pack<V, C::kX> x;
      Pack<V, C::kH> h;
      Pack<V, C::kStates> state, state_new;
      Pack<V, C::kSaved> saved;
      FRNN_UNROLL
      for (int q = 0; q < C::kX; q++)
        x[q] = load<V>(s.gates_x + m * s.gates_x_stride + (q * kPanelVecs + j) * N) +
               load<V>(s.b_ih + (q * kPanelVecs + j) * N);
      FRNN_UNROLL
      for (int q = 0; q < C::kH; q++)
        h[q] = load<V>(s.gates_h + (m - first) * s.gates_h_stride + (q * kPanelVecs + j) * N) +
               load<V>(s.b_hh + (q * kPanelVecs + j) * N);
      state[0] = C::kUsesH ? load<V>(s.h + m * s.h_stride + j * N) : V{};
      T* c = s.c + m * kExtra * kUnits + j * N;
      FRNN_UNROLL
      for (int e = 0; e < kExtra; e++) state[1 + e] = load<V>(c + e * kUnits);

      C::forward(x, h, state, state_new, saved);

      const V h_new = RoundToStorage(state_new[0], s.round);
      store<V>(s.h_new + m * s.h_new_stride + j * N, h_new);
      if (s.y) {
        const int64_t left = s.units - j * N;
        if (left > 0) store_n<V>(s.y + m * s.y_stride + j * N, h_new, int(left < N ? left : N));
      }
      FRNN_UNROLL
      for (int e = 0; e < kExtra; e++) store<V>(c + e * kUnits, state_new[1 + e]);
      if (s.tape) {
        T* tape = s.tape + m * kTape * kUnits + j * N;
        FRNN_UNROLL
        for (int q = 0; q < C::kSaved; q++) store<V>(tape + q * kUnits, saved[q]);
        FRNN_UNROLL
        for (int e = 0; e < kExtra; e++) store<V>(tape + (C::kSaved + e) * kUnits, state[1 + e]);
      }
    }
  }
}

// dst[b][first .. last) = src[dir][b][first .. last) for all b, zero where src is null or past
// Hout.
template <class C, class V>
void Layer<C, V>::CopyState(const LayerParams& p, const void* src, int dir, int64_t first,
                            int64_t last, T* dst, int64_t stride) {
  const int64_t n = src == nullptr || first >= p.Hout ? 0 : (last < p.Hout ? last : p.Hout) - first;
  for (int64_t b = 0; b < p.B; b++) {
    if (n > 0)
      LoadRow<T>(At(src, p.storage, (dir * p.B + b) * p.Hout + first), p.storage,
                 dst + b * stride + first, n);
    for (int64_t u = first + n; u < last; u++) dst[b * stride + u] = 0;
  }
}

template <class C, class V>
void Layer<C, V>::Forward(const LayerParams& p) {
  const int threads = Threads(p);
  const bool projected = Projected(p), tiled = Tiled(p);
  const bool unpacked_x = UnpackedX(p), unpacked_h = UnpackedH(p);
  const Input input(p);
  const int64_t panels = Panels(p), own_panels = (panels + threads - 1) / threads;
  const int64_t hout_vecs = (p.Hout + N - 1) / N, own_vecs = (hout_vecs + threads - 1) / threads;
  const int64_t chunk_rows = tiled ? kTiledChunk : kChunkRows;
  // gates_x of a thread is [groups of panels][rows][panel of the group][gate][unit].
  const int64_t group = tiled ? kTiledGroup : 1, own_groups = (own_panels + group - 1) / group;
  const int64_t gates_x_stride = group * C::kX * kUnits, gates_h_stride = group * C::kH * kUnits;
  const int64_t capacity = p.rows < chunk_rows ? p.rows : (p.B > chunk_rows ? p.B : chunk_rows);
  // One chunk needs each panel of W_ih once: it is packed just before, and never leaves the cache.
  const bool one_chunk = !tiled && p.rows <= capacity;
  const int64_t x_stride = RowStride(p.I), h_stride = RowStride(p.Hout),
                full_stride = RowStride(p.H);
  // While every step has all rows, hs itself is where h goes; a ragged batch needs the h of
  // finished rows beside it.
  const bool in_place = p.hs != nullptr && !p.ragged;
  const int64_t hs_stride = HsStride(p.H, p.Hout);
  const bool direct_y = p.storage == kOwn && !projected;
  // One step of few rows reads all in place: nobody waits for what another thread writes.
  const bool in_one =
      p.T == 1 && p.hs == nullptr && direct_y && unpacked_x && unpacked_h && p.Hout % kUnits == 0;

  struct Own {
    T *w_ih, *w_hh, *b_ih, *b_hh, *w_hr, *gates_x, *gates_h, *c, *x;
    bf16::Operand w_ih_tiles, w_hh_tiles, x_tiles;
    bf16::Operand h_tiles[2];  // h before a step
    Balance x_balance, h_balance;
  };
  std::vector<Own> own(threads);
  float* h_largest[2] = {nullptr, nullptr};
  fixed::Size *w_ih_sizes = nullptr, *w_hh_sizes = nullptr;
  // Whether weights and h0 are in the range of tiles, and the last step of each parity whose h is
  // not (counted on over both directions).
  std::atomic<bool> fit{tiled};
  std::atomic<int64_t> misfit_h[2] = {{-1}, {-1}};
  T* h_buffer[2] = {nullptr, nullptr};
  T* full_buffer = nullptr;
  const auto take_weights = [&](Scratch& s, Own& to) {
    to.w_ih = s.Take<T>(unpacked_x ? 0 : (one_chunk ? 1 : own_panels) * p.I * C::kX * kUnits);
    to.w_hh = s.Take<T>(unpacked_h ? 0 : own_panels * p.Hout * C::kH * kUnits);
  };
  const auto take_tiles = [&](Scratch& s, int64_t rows, int64_t K) {
    return TakeTiles(s, tiled, rows, K, bf16::CutOf(p.storage, K));
  };
  Scratch scratch;
  std::vector<Scratch> spare(threads);  // the weights as vectors, where tiles do not fit
  scratch.Build([&](Scratch& s) {
    for (int i = 0; i < threads; i++) {
      if (!tiled) take_weights(s, own[i]);
      own[i].b_ih = s.Take<T>(own_panels * C::kX * kUnits);
      own[i].b_hh = s.Take<T>(own_panels * C::kH * kUnits);
      own[i].w_hr = s.Take<T>(projected ? own_vecs * N * p.H : 0);
      own[i].gates_x = s.Take<T>(own_groups * capacity * gates_x_stride);
      own[i].gates_h = s.Take<T>(kRowBlock * gates_h_stride);
      own[i].c = s.Take<T>(own_panels * p.B * kExtra * kUnits);
      own[i].x = s.Take<T>(input.direct ? 0 : capacity * x_stride);
      own[i].w_ih_tiles = take_tiles(s, own_panels * kXVecs * N, p.I);
      own[i].w_hh_tiles = take_tiles(s, own_panels * kHVecs * N, p.Hout);
      own[i].x_tiles = take_tiles(s, kTiledInput, p.I);
      own[i].x_balance.Take(s, own[i].x_tiles);
    }
    TakeStepTiles(s, tiled, p.B, p.Hout, bf16::CutOf(p.storage, p.Hout), own, &Own::h_tiles,
                  h_largest);
    for (Own& to : own) to.h_balance.Take(s, to.h_tiles[0]);
    w_ih_sizes = s.Take<fixed::Size>(threads * own[0].x_balance.depth);
    w_hh_sizes = s.Take<fixed::Size>(threads * own[0].h_balance.depth);
    if (!in_place)
      for (T*& buffer : h_buffer) buffer = s.Take<T>(p.B * h_stride);
    if (projected && p.hs == nullptr) full_buffer = s.Take<T>(p.B * full_stride);
  });

  const bool done = RunTeam(threads, IsShort(p), [&](Team& team) {
    Own& my = own[team.id];
    const auto mine = team.Split(panels);        // panels
    const auto columns = team.Split(hout_vecs);  // vectors of the projection's output
    const int64_t first = projected ? columns.begin * N
                                    : mine.begin * kUnits;  // columns of h that this thread writes
    const int64_t last = projected ? columns.end * N : mine.end * kUnits;
    const int64_t valid = (last < p.Hout ? last : p.Hout) - first;
    const bf16::Session session(tiled);
    // h of n rows as the tiles of a step: the columns of this thread.
    const auto share_h = [&](const T* h, int64_t ldh, int64_t n, int dir, int64_t step) {
      bool fits = true;
      if constexpr (kTiles) {
        const bf16::Operand& to = my.h_tiles[step & 1];
        const bool measured = ShareLargest(team, to, h_largest[step & 1], n, [&](float* largest) {
          fixed::Measure(h, ldh, bf16::Order::kAlong, n, first, first + valid, to.factors, largest,
                         false);
        });
        fits = bf16::PackRows(h, kOwn, ldh, n, first,
                              team.id + 1 == team.size ? to.PaddedDepth() : last, p.Hout, to,
                              measured);
      }
      if (!fits) misfit_h[step & 1].store(dir * p.T + step, std::memory_order_relaxed);
      return fits;
    };

    const auto gates_x = [&](int64_t own_panel) {
      return my.gates_x + own_panel / group * capacity * gates_x_stride +
             own_panel % group * C::kX * kUnits;
    };
    const int64_t count = mine.end - mine.begin, groups = (count + group - 1) / group;

    for (int dir = 0; dir < p.dirs; dir++) {
      const DirectionWeights& w = p.w[dir];
      bool packed = unpacked_x && unpacked_h;  // w_ih and w_hh, for vectors
      const auto pack = [&] {
        if (packed) return;
        if (tiled && my.w_ih == nullptr)
          spare[team.id].Build([&](Scratch& s) { take_weights(s, my); });
        for (int64_t i = mine.begin; i < mine.end; i++) {
          const int64_t at = i - mine.begin;
          if (!unpacked_x && !one_chunk)
            PackGates(w.w_ih, p.storage, C::kX, p.H, p.I, i, my.w_ih + at * p.I * C::kX * kUnits);
          if (!unpacked_h)
            PackGates(w.w_hh, p.storage, C::kH, p.H, p.Hout, i,
                      my.w_hh + at * p.Hout * C::kH * kUnits);
        }
        packed = true;
      };
      if constexpr (kTiles)
        if (tiled) {
          const int64_t unit = mine.begin * kUnits, end = mine.end * kUnits;
          const auto measure = [&](const void* w, int gates, const Balance& balance, int64_t K,
                                   fixed::Size* sizes) {
            for (int q = 0; q < gates && balance.depth > 0; q++)
              fixed::MeasureColumns(static_cast<const float*>(w) + q * p.H * K, K, K, unit,
                                    end < p.H ? end : p.H, sizes + team.id * balance.depth, q > 0);
          };
          measure(w.w_ih, C::kX, my.x_balance, p.I, w_ih_sizes);
          measure(w.w_hh, C::kH, my.h_balance, p.Hout, w_hh_sizes);
          team.Sync();
          my.x_balance.Find(w_ih_sizes, team.size, 1, p.I, {&my.x_tiles}, {&my.w_ih_tiles});
          my.h_balance.Find(w_hh_sizes, team.size, 1, p.Hout, {&my.h_tiles[0], &my.h_tiles[1]},
                            {&my.w_hh_tiles});
        }
      T* hs = p.hs ? static_cast<T*>(p.hs) + dir * (p.B + p.rows) * hs_stride : nullptr;
      for (int64_t i = mine.begin; i < mine.end; i++) {
        const int64_t at = i - mine.begin;
        if (tiled && !(PackGateTiles(w.w_ih, p.storage, C::kX, p.H, p.I, i,
                                     my.w_ih_tiles.Row(at * kXVecs * N)) &
                       PackGateTiles(w.w_hh, p.storage, C::kH, p.H, p.Hout, i,
                                     my.w_hh_tiles.Row(at * kHVecs * N))))
          fit.store(false, std::memory_order_relaxed);
        PackBias(w.b_ih, p.storage, C::kX, p.H, i, my.b_ih + at * C::kX * kUnits);
        PackBias(w.b_hh, p.storage, C::kH, p.H, i, my.b_hh + at * C::kH * kUnits);
        T* c = my.c + at * p.B * kExtra * kUnits;
        for (int64_t r = 0; r < p.B * kExtra; r++) {
          const int64_t unit = i * kUnits, n = p.H - unit < kUnits ? p.H - unit : kUnits;
          LoadRow<T>(At(p.c0, p.storage, (dir * p.B * kExtra + r) * p.H + unit), p.storage,
                     c + r * kUnits, n);
          for (int64_t u = n; u < kUnits; u++) c[r * kUnits + u] = 0;
        }
      }
      if (projected)
        ForColumnTiles<V>(columns.begin, columns.end, [&](int64_t v, auto nv) {
          constexpr int NV = decltype(nv)::value;
          for (int j = 0; j < NV; j++)
            PackTransposed<V>(w.w_hr, p.storage, (v + j) * N, p.Hout, p.H,
                              my.w_hr + (v - columns.begin) * N * p.H + j * N, NV * N);
        });
      // h0, its padding, and the padding that nobody writes later: the saved tensors hold no
      // uninitialised value.
      const int64_t last_padded = team.id + 1 == team.size ? h_stride : last;
      if (hs) {
        CopyState(p, p.h0, dir, first, last_padded, hs, hs_stride);
        if (team.id + 1 == team.size) {
          for (int64_t r = 0; r < p.rows; r++)
            for (int64_t u = last; u < h_stride; u++) hs[(p.B + r) * hs_stride + u] = 0;
          for (int64_t r = 0; r < p.B + p.rows && projected; r++)
            for (int64_t u = r < p.B ? 0 : panels * kUnits; u < full_stride; u++)
              hs[r * hs_stride + h_stride + u] = 0;
          T* tape = static_cast<T*>(p.saved) + dir * p.rows * kTape * Padded(p.H);
          for (int64_t i = p.rows * kTape * panels * kUnits; i < p.rows * kTape * Padded(p.H); i++)
            tape[i] = 0;
        }
      }
      if (!in_place && !in_one)
        for (T* buffer : h_buffer) CopyState(p, p.h0, dir, first, last_padded, buffer, h_stride);
      const T* h_first = hs ? hs : h_buffer[0];
      // In both: with the reversed direction of a ragged batch, rows join later.
      for (int64_t i = 0; i < 2 && tiled; i++)
        if (!share_h(h_first, hs ? hs_stride : h_stride, p.B, dir, i)) fit.store(false);
      if (!in_one) team.Sync();
      const bool tiles = fit.load(std::memory_order_relaxed);
      if (!tiles) pack();

      int64_t step = 0;
      for (int64_t begin = 0, end = 0; step < p.T;) {
        // The next chunk [begin, end) of time steps, in the direction's order.
        if (dir == 0) {
          begin = end;
          end = begin + 1;
          while (end < p.T && p.offsets[end + 1] - p.offsets[begin] <= capacity) end++;
        } else {
          end = step == 0 ? p.T : begin;
          begin = end - 1;
          while (begin > 0 && p.offsets[end] - p.offsets[begin - 1] <= capacity) begin--;
        }
        const int64_t chunk_row = p.offsets[begin], chunk = p.offsets[end] - chunk_row;
        const void* x = Input::Row(p, begin, 0);
        Storage x_storage = p.storage;
        int64_t ldx = input.stride;
        const auto stage = [&] {
          RowCursor cursor(p, chunk_row);
          for (int64_t r = 0; r < chunk; r++, cursor.Next())
            LoadRow<T>(Input::Row(p, cursor.t, cursor.b), p.storage, my.x + r * x_stride, p.I);
          x = my.x;
          x_storage = kOwn;
          ldx = x_stride;
        };
        if (!input.direct && !(tiles && input.one_stride)) stage();
        const int64_t block = tiles ? kTiledInput : chunk;
        for (int64_t r = 0; r < chunk; r += block) {
          const int64_t n = chunk - r < block ? chunk - r : block;
          bool x_tiles = false;
          if constexpr (kTiles)
            x_tiles = tiles && bf16::PackRows(At(x, x_storage, r * ldx), x_storage, ldx, n, 0,
                                              my.x_tiles.PaddedDepth(), p.I, my.x_tiles);
          if (!x_tiles) pack();
          if (!x_tiles && x_storage != kOwn) stage();
          for (int64_t i = 0; i < count && !x_tiles; i++) {
            T* panel = my.w_ih + (one_chunk ? 0 : i) * p.I * C::kX * kUnits;
            if (one_chunk && !unpacked_x)
              PackGates(w.w_ih, p.storage, C::kX, p.H, p.I, mine.begin + i, panel);
            Product<C::kX>(p, unpacked_x, n, static_cast<const T*>(x) + r * ldx, ldx, w.w_ih, panel,
                           p.I, mine.begin + i, gates_x(i) + r * gates_x_stride, gates_x_stride, 0);
          }
          if constexpr (kTiles)
            for (int64_t g = 0; g < groups && x_tiles; g++) {
              const int64_t i = group * (r / block % 2 ? groups - 1 - g : g);
              bf16::Multiply(my.x_tiles, n, my.w_ih_tiles.Row(i * kXVecs * N),
                             (count - i < group ? count - i : group) * kXVecs * N,
                             gates_x(i) + r * gates_x_stride, gates_x_stride, false);
            }
        }

        for (int64_t k = 0; k < end - begin; k++, step++) {
          const int64_t t = dir == 0 ? begin + k : end - 1 - k;
          const int64_t n = p.batch_sizes[t], row = p.offsets[t];
          const int64_t ldh = in_place ? hs_stride : (in_one ? p.Hout : h_stride);
          const T* h = in_place ? hs + PreviousRow(p, dir, t, 0) * hs_stride
                       : in_one ? static_cast<const T*>(p.h0) + dir * p.B * p.Hout
                                : h_buffer[step & 1];
          T* h_new = in_place ? hs + (p.B + row) * hs_stride : h_buffer[(step + 1) & 1];
          T* full =
              !projected ? nullptr : (hs ? hs + (p.B + row) * hs_stride + h_stride : full_buffer);
          const int64_t ld_full = hs ? hs_stride : full_stride;
          T* y = static_cast<T*>(At(p.y, p.storage, row * p.dirs * p.Hout + dir * p.Hout));
          const bool step_tiles =
              tiles && misfit_h[step & 1].load(std::memory_order_relaxed) != dir * p.T + step;
          if (!step_tiles) pack();

          const auto step_rows = [&](int64_t at) {
            const int64_t i = mine.begin + at, unit = i * kUnits;
            StepRows s;
            s.gates_x = gates_x(at) + (row - chunk_row) * gates_x_stride;
            s.gates_h = my.gates_h + at % group * C::kH * kUnits;
            s.gates_x_stride = gates_x_stride;
            s.gates_h_stride = gates_h_stride;
            s.b_ih = my.b_ih + at * C::kX * kUnits;
            s.b_hh = my.b_hh + at * C::kH * kUnits;
            s.h = h + unit;
            s.h_stride = ldh;
            s.h_new = projected ? full + unit : h_new + unit;
            s.h_new_stride = projected ? ld_full : ldh;
            s.c = my.c + at * p.B * kExtra * kUnits;
            s.tape = p.hs && kTape > 0 ? Tape(p, dir, t, i) : nullptr;
            s.y = direct_y ? y + unit : nullptr;
            s.y_stride = p.dirs * p.Hout;
            s.units = p.H - unit;
            s.round = projected ? kOwn : p.storage;
            return s;
          };
          // Block by block, so that what the gate math stores drains while the next product runs.
          if constexpr (kTiles)
            for (int64_t g = 0; g < groups && step_tiles; g++) {
              const int64_t at = group * (step % 2 ? groups - 1 - g : g);
              for (int64_t r = 0; r < n; r += kRowBlock) {
                const int64_t rows = n - r < kRowBlock ? n - r : kRowBlock;
                const int64_t panels_now = count - at < group ? count - at : group;
                bf16::Multiply(my.h_tiles[step & 1].Row(r), rows,
                               my.w_hh_tiles.Row(at * kHVecs * N), panels_now * kHVecs * N,
                               my.gates_h, gates_h_stride, false);
                for (int64_t j = 0; j < panels_now; j++) GateMath(step_rows(at + j), r, int(rows));
              }
            }
          for (int64_t at = 0; at < count && !step_tiles; at++) {
            const StepRows s = step_rows(at);
            ForRowBlocks<kRowBlock>(n, [&](int rows, int64_t r) {
              Product<C::kH>(p, unpacked_h, rows, h + r * ldh, ldh, w.w_hh,
                             my.w_hh + at * p.Hout * C::kH * kUnits, p.Hout, mine.begin + at,
                             my.gates_h + at % group * C::kH * kUnits, gates_h_stride, r);
              GateMath(s, r, rows);
            });
          }
          if (projected) {
            team.Sync();
            ForColumnTiles<V>(columns.begin, columns.end, [&](int64_t v, auto nv) {
              constexpr int NV = decltype(nv)::value;
              T* out = h_new + v * N;
              GemmRows<V, NV>(n, full, ld_full, my.w_hr + (v - columns.begin) * N * p.H, NV * N,
                              p.H, out, ldh, false);
              for (int64_t r = 0; r < n && p.storage != kOwn; r++)
                for (int j = 0; j < NV; j++)
                  store<V>(out + r * ldh + j * N,
                           RoundToStorage(load<V>(out + r * ldh + j * N), p.storage));
            });
          }
          if (tiles && step + 1 < p.T) share_h(h_new, ldh, n, dir, step + 1);
          if (valid > 0) {
            const int64_t done =
                dir == 0 ? (t + 1 < p.T ? p.batch_sizes[t + 1] : 0) : (t == 0 ? 0 : n);
            for (int64_t r = 0; r < n; r++) {
              const T* row_h = h_new + r * ldh + first;
              if (!direct_y)
                StoreRow<T>(At(p.y, p.storage, ((row + r) * p.dirs + dir) * p.Hout + first),
                            p.storage, row_h, valid);
              if (hs && !in_place)
                memcpy(hs + (p.B + row + r) * hs_stride + first, row_h, (last - first) * sizeof(T));
              if (r >= done)
                StoreRow<T>(At(p.h_n, p.storage, (dir * p.B + r) * p.Hout + first), p.storage,
                            row_h, valid);
            }
          }
          if (!in_one) team.Sync();
        }
      }
      for (int64_t i = mine.begin; i < mine.end; i++)
        for (int64_t r = 0; r < p.B * kExtra; r++) {
          const int64_t unit = i * kUnits, n = p.H - unit < kUnits ? p.H - unit : kUnits;
          StoreRow<T>(At(p.c_n, p.storage, (dir * p.B * kExtra + r) * p.H + unit), p.storage,
                      my.c + ((i - mine.begin) * p.B * kExtra + r) * kUnits, n);
        }
    }
  });
  if (!done) {
    LayerParams alone = p;
    alone.threads = 1;
    Forward(alone);
  }
}

FRNN_END

#include "cpu/layer_grad.h"
