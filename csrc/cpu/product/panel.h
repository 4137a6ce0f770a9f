// How the weights of a product lie for vectors, W [kGates * H, K] by panels of units: a panel is cut
// into bands, each as wide as a product may be at once, [band][k][gate][unit].
#pragma once
#include "cpu/product/gemm.h"

FRNN_BEGIN

// Vectors of units of a panel of a cell with so many gates: a tile has one or two vectors for few.
constexpr int PanelVecs(int gates) { return gates <= 2 ? 2 : 1; }

template <int kGates, int kPanelVecs>
struct Panel {
  static constexpr int kUnits = kPanelVecs * N;
  static constexpr int kWidth = kGates * kUnits;  // columns of a panel's product

  // f(first vector, vectors as a constant) for the bands.
  template <class F>
  FRNN_INLINE static void ForBands(const F& f) {
    ForBands(f, std::make_integer_sequence<int, (kGates * kPanelVecs + 3) / 4>());
  }
  static void Pack(const void* w, Storage storage, int64_t H, int64_t K, int64_t panel, T* packed) {
    ForBands([&](int first, int vecs) {
      for (int v = first; v < first + vecs; v++)
        PackTransposed(At(w, storage, v / kPanelVecs * H * K), storage,
                       panel * kUnits + v % kPanelVecs * N, H, K, K,
                       packed + first * N * K + (v - first) * N, vecs * N);
    });
  }

 private:
  template <class F, int... kBand>
  FRNN_INLINE static void ForBands(const F& f, std::integer_sequence<int, kBand...>) {
    constexpr int kVecs = kGates * kPanelVecs, kCount = sizeof...(kBand);
    (f(std::integral_constant<int, kVecs * kBand / kCount>(),
       std::integral_constant<int, kVecs*(kBand + 1) / kCount - kVecs * kBand / kCount>()),
     ...);
  }
};

FRNN_END
