// Kernels of matrices beside the gate math: between types and orders, of states that no gate math gives,
// and sums over rows.
#pragma once
#include "cuda/kernels.cuh"

namespace frnn {
namespace cuda {

// sum += of, [rows, columns].
template <class T>
__global__ void AddTo(int64_t rows, int64_t columns, T* sum, const T* of) {
  ForEach(rows, columns, [&](int64_t row, int64_t column) {
    const int64_t i = row * columns + column;
    sum[i] = Narrow<T>(Widen(sum[i]) + Widen(of[i]));
  });
}

// to = from, between storage and computing types; zero without a source, and in rows that are reset.
template <class To, class From>
__global__ void Convert(int64_t rows, int64_t columns, Rows<To> to, Rows<const From> from,
                        const uint8_t* reset) {
  ForEach(rows, columns, [&](int64_t row, int64_t column) {
    const bool there = from && !(reset != nullptr && reset[row]);
    to(row, column) = Narrow<To>(there ? Wide<To>(Widen(from(row, column))) : Wide<To>(0));
  });
}

// data[i] *= by[i], rows of `width` at a time.
template <class T>
__global__ void ScaleBy(int64_t n, int64_t width, T* data, const T* by) {
  ForEach((n + width - 1) / width, width, [&](int64_t row, int64_t column) {
    const int64_t i = row * width + column;
    if (i < n) data[i] = Narrow<T>(Widen(data[i]) * Widen(by[i]));
  });
}

// h that no gate math gives, but a projection, or h_0 (null: zeros), to where the next step reads it and
// to the last states.
template <class T>
__global__ void Publish(int64_t rows, int64_t width, Rows<const T> h,
                        const __grid_constant__ Onward<T> to) {
  ForEach(rows, width, [&](int64_t row, int64_t u) {
    to.template Put<true>(row, u, h ? h(row, u) : Narrow<T>(0));
  });
}

// Gradient of an h that no gate math gives: of a projection, rounded as an operand of products, or of
// h_0. What has been passed back through a mask is used up.
template <class T>
__global__ void SumGradients(int64_t rows, int64_t width, Rows<T> sum,
                             const __grid_constant__ Carried<T> from, Rows<const T> dy,
                             Rows<const T> h_prev, const __grid_constant__ HMask<T> mask) {
  ForEach(rows, width, [&](int64_t row, int64_t u) {
    sum(row, u) = Narrow<T>(from.template H<true>(row, u) + (dy ? Widen(dy(row, u)) : Wide<T>(0)));
    if (!mask) return;
    from.dh(row, u) = 0;
    mask.Keep(row, u, h_prev(row, u));
  });
}

// W_hh [gates, blocks, units of a block, width] with all gates of a block together; or anything else
// whose first two dimensions change places.
template <class T>
__global__ void SwapFirst(int64_t first, int64_t second, int64_t rest, const T* from, T* to) {
  ForEach(first * second, rest, [&](int64_t row, int64_t i) {
    to[(row % second * first + row / second) * rest + i] = from[row * rest + i];
  });
}
// The whole matrix [rows, H] of a block-diagonal one, which has blocks of `width` columns.
template <class T>
__global__ void WholeMatrix(int64_t rows, int64_t H, int64_t width, const T* from, T* to) {
  ForEach(rows, H, [&](int64_t row, int64_t k) {
    const int64_t column = k - row % H / width * width;
    to[row * H + k] = column >= 0 && column < width ? from[row * width + column] : Narrow<T>(0);
  });
}

// Sums over rows in a fixed order: each of `parts` blocks of rows by one thread, then the parts. Of
// products, where there is something to multiply by.
template <class T>
__global__ void ColumnSumParts(int64_t rows, int64_t columns, int64_t parts, Rows<const T> of,
                               Rows<const Wide<T>> times, Wide<T>* partial) {  // [parts, columns]
  const int64_t length = (rows + parts - 1) / parts;
  ForEach(parts, columns, [&](int64_t part, int64_t column) {
    const int64_t begin = part * length, end = begin + length < rows ? begin + length : rows;
    Wide<T> sum = 0;
    for (int64_t row = begin; row < end; row++)
      sum += times ? Widen(of(row, column)) * times(row, column) : Widen(of(row, column));
    partial[part * columns + column] = sum;
  });
}
template <class T>
__global__ void ColumnSum(int64_t columns, int64_t parts, const Wide<T>* partial, T* sum) {
  ForEach(1, columns, [&](int64_t, int64_t column) {
    Wide<T> total = 0;
    for (int64_t part = 0; part < parts; part++) total += partial[part * columns + column];
    sum[column] = Narrow<T>(total);
  });
}

}  // namespace cuda
}  // namespace frnn
