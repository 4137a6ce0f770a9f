// A cell over a batch, pre-activations given: the fused gate math of the *Cell modules and of
// single steps.
#pragma once
#include "core/cell.h"
#include "cpu/convert.h"
#include "cpu/threads.h"

FRNN_BEGIN

template <class C, class V>
struct CellStep {
  using T = typename Lanes<V>::T;
  static constexpr int N = Lanes<V>::kSize;
  static constexpr int kExtra = C::kStates - 1;
  static_assert(CheckCell<C>());

  // Below this many units a second thread costs more than it brings.
  static constexpr int64_t kUnitsPerThread = 8192;

  static int Threads(const CellParams& p) {
    const int64_t useful = p.B * p.H / kUnitsPerThread;
    return int(useful < 1 ? 1 : (useful < p.threads ? useful : p.threads));
  }

  // K values per unit: vector i of row b of an array [B, K, H].
  template <int K>
  static FRNN_INLINE void Load(const void* p, Storage s, int64_t b, int64_t H, int64_t u, int n,
                               Pack<V, K>& out) {
    FRNN_UNROLL
    for (int q = 0; q < K; q++) {
      if (p == nullptr) {
        out[q] = V{};
      } else if (s == StorageOf<T>::kValue) {
        out[q] = load_n<V>(static_cast<const T*>(p) + (b * K + q) * H + u, n);
      } else {
        T lanes[N] = {};
        LoadRow<T>(At(p, s, (b * K + q) * H + u), s, lanes, n);
        out[q] = load<V>(lanes);
      }
    }
  }
  template <int K>
  static FRNN_INLINE void Store(void* p, Storage s, int64_t b, int64_t H, int64_t u, int n,
                                const V* v) {
    FRNN_UNROLL
    for (int q = 0; q < K; q++) {
      if (s == StorageOf<T>::kValue) {
        store_n<V>(static_cast<T*>(p) + (b * K + q) * H + u, v[q], n);
      } else {
        T lanes[N];
        store<V>(lanes, v[q]);
        StoreRow<T>(At(p, s, (b * K + q) * H + u), s, lanes, n);
      }
    }
  }

  template <class F>
  static void ForUnits(const CellParams& p, const F& f) {
    RunTeam(Threads(p), [&](Team& team) {
      const auto rows = team.Split(p.B);
      for (int64_t b = rows.begin; b < rows.end; b++)
        for (int64_t u = 0; u < p.H; u += N) f(b, u, int(p.H - u < N ? p.H - u : N));
    });
  }

  static void Forward(const CellParams& p) {
    ForUnits(p, [&](int64_t b, int64_t u, int n) {
      Pack<V, C::kX> x;
      Pack<V, C::kH> h;
      Pack<V, C::kStates> s, s_new;
      Pack<V, C::kSaved> saved;
      Load<C::kX>(p.gx, p.storage, b, p.H, u, n, x);
      Load<C::kH>(p.gh, p.storage, b, p.H, u, n, h);
      LoadStates(p.h, p.c, p.storage, b, p.H, u, n, s);
      C::forward(x, h, s, s_new, saved);
      Store<1>(p.h_new, p.storage, b, p.H, u, n, s_new.v);
      if constexpr (kExtra > 0) Store<kExtra>(p.c_new, p.storage, b, p.H, u, n, s_new.v + 1);
      if (p.saved) Store<C::kSaved>(p.saved, StorageOf<T>::kValue, b, p.H, u, n, saved.v);
    });
  }

  static void Backward(const CellParams& p) {
    ForUnits(p, [&](int64_t b, int64_t u, int n) {
      Pack<V, C::kSaved> saved;
      Pack<V, C::kStates> s, ds_new, ds;
      Pack<V, C::kD> d;
      Load<C::kSaved>(p.saved, StorageOf<T>::kValue, b, p.H, u, n, saved);
      LoadStates(p.h, p.c, p.storage, b, p.H, u, n, s);
      LoadStates(p.dh_new, p.dc_new, p.storage, b, p.H, u, n, ds_new);
      C::backward(saved, s, ds_new, d, ds);
      FRNN_UNROLL
      for (int q = 0; q < C::kX; q++)
        Store<1>(p.dgx, p.storage, b * C::kX + q, p.H, u, n, &d[C::kDx[q]]);
      FRNN_UNROLL
      for (int q = 0; q < C::kH; q++)
        Store<1>(p.dgh, p.storage, b * C::kH + q, p.H, u, n, &d[C::kDh[q]]);
      Store<1>(p.dh, p.storage, b, p.H, u, n, ds.v);
      if constexpr (kExtra > 0) Store<kExtra>(p.dc, p.storage, b, p.H, u, n, ds.v + 1);
    });
  }

 private:
  static FRNN_INLINE void LoadStates(const void* h, const void* c, Storage storage, int64_t b,
                                     int64_t H, int64_t u, int n, Pack<V, C::kStates>& s) {
    Pack<V, 1> first;
    Load<1>(h, storage, b, H, u, n, first);
    s[0] = first[0];
    if constexpr (kExtra > 0) {
      Pack<V, kExtra> rest;
      Load<kExtra>(c, storage, b, H, u, n, rest);
      FRNN_UNROLL
      for (int e = 0; e < kExtra; e++) s[1 + e] = rest[e];
    }
  }
};

FRNN_END
