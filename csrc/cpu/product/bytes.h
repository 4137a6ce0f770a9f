// Products of 8-bit integers: W was cut to them when it was packed, row by row, and the rows of the left
// side are before each product.
//
// A row of numbers is scale * n, each n an integer from -127 to 127, of the largest in magnitude scale =
// that / 127. Products of n are summed in 32 bits, exactly, where there are at most 65536 of them: the
// same for any instruction set, order and number of rows. Only then they become a float, times both
// scales. A row that is smaller than kLeast is zeros, and one with an infinity or NaN has the scale NaN.
//
// Packed, W [kGates * H, K] lies by panels and bands as for other types (cpu/product/panel.h), but with
// kDepth elements of a row together, which are multiplied at once: [band][k / kDepth][gate][unit][kDepth],
// zeros past K. Behind the bands of a panel are the scales of its rows and what their sums begin with.
#pragma once
#include <algorithm>

#include "core/memory.h"
#include "cpu/product/panel.h"
#include "cpu/product/tiles.h"

FRNN_BEGIN
namespace bytes {

constexpr int kDepth = 4;                 // elements of a lane of 32 bits
constexpr int kLanes = kVectorBytes / 4;  // units of a vector
constexpr float kMost = 127, kLeast = 1e-30f;

constexpr int64_t PaddedDepth(int64_t K) { return RoundUp(K, kDepth); }

// Rows as integers, each of PaddedDepth numbers, and their scales. What products add to the numbers of
// the left side, Shift(), is in them.
struct Rows {
  int8_t* numbers;
  float* scales;
  int64_t stride;
};
// 128 where the left side of the instruction has no sign: sums begin with what that adds to them.
FRNN_EXPORT int Shift();
// Of n rows a [n][K], lda apart.
FRNN_EXPORT void Quantise(const float* a, int64_t lda, int64_t n, int64_t K, int shift,
                          const Rows& out);

// c[M][NV vectors] = a[M][K] w^T of a band of NV vectors, with what is behind its panel.
template <int NV>
FRNN_EXPORT void Multiply(int64_t M, const Rows& a, const int8_t* w, int64_t K, const float* scales,
                          const int32_t* starts, float* c, int64_t ldc);

}  // namespace bytes

// A panel of W in bytes.
template <int kGates, int kPanelVecs>
struct BytePanel {
  using Layout = Panel<kGates, kPanelVecs>;
  static constexpr int kWidth = Layout::kWidth;

  static int64_t Size(int64_t K) {
    return (bytes::PaddedDepth(K) + int64_t(sizeof(float) + sizeof(int32_t))) * kWidth;
  }
  static float* Scales(const void* panel, int64_t K) {
    return reinterpret_cast<float*>(static_cast<char*>(const_cast<void*>(panel)) +
                                    bytes::PaddedDepth(K) * kWidth);
  }
  static int32_t* Starts(const void* panel, int64_t K) {
    return reinterpret_cast<int32_t*>(Scales(panel, K) + kWidth);
  }
  static int8_t* Band(const void* panel, int64_t K, int first) {
    return static_cast<int8_t*>(const_cast<void*>(panel)) + first * N * bytes::PaddedDepth(K);
  }

  static void Pack(const void* w, Storage storage, int64_t H, int64_t K, int64_t panel,
                   void* packed) {
    const int64_t depth = bytes::PaddedDepth(K);
    Vector<T> row(size_t(K), 0);
    Vector<int8_t> numbers(size_t(depth), 0);
    Layout::ForBands([&](int first, int vecs) {
      int8_t* const band = Band(packed, K, first);
      for (int i = first * N; i < (first + vecs) * N; i++) {
        const int64_t unit = panel * Layout::kUnits + i % Layout::kUnits;
        float& scale = Scales(packed, K)[i];
        scale = 0;
        std::fill(numbers.begin(), numbers.end(), int8_t(0));
        if (unit < H) {
          LoadRow(At(w, storage, (i / Layout::kUnits * H + unit) * K), storage, row.data(), K);
          bytes::Quantise(Floats(row.data()), K, 1, K, 0, {numbers.data(), &scale, depth});
        }
        int32_t sum = 0;
        for (int64_t k = 0; k < depth; k++) {
          sum += numbers[size_t(k)];
          band[(k / bytes::kDepth * vecs * N + i - first * N) * bytes::kDepth + k % bytes::kDepth] =
              numbers[size_t(k)];
        }
        Starts(packed, K)[i] = -bytes::Shift() * sum;
      }
    });
  }

  static void Multiply(int64_t rows, const bytes::Rows& a, const void* panel, int64_t K,
                       float* gates, int64_t stride) {
    Layout::ForBands([&](auto first, auto vecs) FRNN_INLINE_LAMBDA {
      constexpr int kFirst = decltype(first)::value * N;
      bytes::Multiply<decltype(vecs)::value>(rows, a, Band(panel, K, first), K,
                                             Scales(panel, K) + kFirst, Starts(panel, K) + kFirst,
                                             gates + kFirst, stride);
    });
  }
};

FRNN_END
