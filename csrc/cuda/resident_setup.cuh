// Small kernels before those that run all steps (resident.cuh, scan.cuh): they write what these read.
#pragma once
#include "cuda/kernels.cuh"
#include "cuda/resident_block.cuh"

namespace frnn {
namespace cuda {

// Numbers that a launch carries, so that a graph keeps them.
struct OffsetsPart {
  static constexpr int kSize = 448;
  int64_t values[kSize];
};
static __global__ void StoreOffsets(const __grid_constant__ OffsetsPart part, int count,
                                    int64_t* to) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) to[i] = part.values[i];
}

// hs of the row in which each sequence starts = h0, or zero where it is reset before step 0. Backwards
// in time that is its last one. And `left` likewise, as a mask leaves it.
template <class T>
__global__ void StartStates(ResidentSteps n, bool backwards, const T* h0, const uint8_t* reset,
                            T* hs, const T* mask, T* left) {
  ForEach(n.B, n.H, [&](int64_t b, int64_t unit) {
    int64_t start = 0, end = backwards ? n.T : 1;  // b runs at `start`, and no more at `end`
    while (end - start > 1) {
      const int64_t middle = (start + end) / 2;
      (b < RowsOf(n, middle).running ? start : end) = middle;
    }
    T h = h0 && !(reset && reset[b]) ? h0[b * n.H + unit] : Narrow<T>(0);
    if (Widen(h) != Widen(h)) h = Narrow<T>(__int_as_float(0x7FFFFFFF));  // a NaN, not kUnwritten
    const int64_t place = (RowsOf(n, start).first + b) * n.H + unit;
    hs[place] = h;
    if (mask) left[place] = Masked<T>(h, mask[b * n.H + unit]);
  });
}

// left [rows, H] = hs as a mask [B, H] leaves it.
template <class T>
__global__ void MaskStates(ResidentSteps n, const T* hs, const T* mask, T* left) {
  ForEach(n.T * n.B, n.H, [&](int64_t i, int64_t unit) {
    const int64_t b = i % n.B;
    const TimeRows rows = RowsOf(n, i / n.B);
    if (b >= rows.running) return;
    const int64_t place = (rows.first + b) * n.H + unit;
    left[place] = Masked<T>(hs[place], mask[b * n.H + unit]);
  });
}

// cuts [T, B]: whether the states of a row go on from a step as zeros, by `reset` of rows.
static __global__ void FindCuts(ResidentSteps n, int64_t start, int64_t way, const uint8_t* reset,
                                uint8_t* cuts) {
  ForEach(n.T, n.B, [&](int64_t s, int64_t b) {
    const int64_t time = start + s * way;  // of the step; flags are those of the later time
    const TimeRows rows = RowsOf(n, way > 0 ? time + 1 : time);
    const bool goes_on = s + 1 < n.T && b < rows.running;
    cuts[s * n.B + b] = goes_on && reset[rows.first + b];
  });
}

// to [columns, rows] = from^T, in squares of 32 by 32.
template <class T>
__global__ void Transpose(int64_t rows, int64_t columns, const T* from, T* to) {
  FRNN_SHARED(square, T[32][33]);
  const int64_t row = int64_t(blockIdx.y) * 32, column = int64_t(blockIdx.x) * 32;
  for (int i = threadIdx.y; i < 32; i += blockDim.y)
    if (row + i < rows && column + threadIdx.x < columns)
      square[i][threadIdx.x] = from[(row + i) * columns + column + threadIdx.x];
  __syncthreads();
  for (int i = threadIdx.y; i < 32; i += blockDim.y)
    if (column + i < columns && row + threadIdx.x < rows)
      to[(column + i) * rows + row + threadIdx.x] = square[threadIdx.x][i];
}

}  // namespace cuda
}  // namespace frnn
