// What crosses from the bindings to an engine: plain sizes, strides in elements, pointers. No
// torch, no CUDA runtime.
#pragma once
#include <cstdint>

namespace frnn {

// Type of the tensors in memory. float16 and bfloat16 are computed in float: products are
// accumulated in float, c stays in float, h is rounded once per step.
enum class Storage : int { kFloat, kDouble, kBFloat16, kHalf };

constexpr int64_t RoundUp(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Buffers that the forward leaves to the backward have sizes that depend on no vector width.
constexpr int kAlign = 32;  // units are padded to this
constexpr int64_t Padded(int64_t units) { return RoundUp(units, kAlign); }  // [.., Padded(H)]
constexpr int64_t RowStride(int64_t units) {
  return RoundUp(units, kAlign) + 16;
}  // + 16: no 4 KB aliasing

struct DirectionWeights {
  const void* w_ih;  // [kX H, I]
  const void* w_hh;  // [kH H, Hout]
  const void* b_ih;  // [kX H] or null
  const void* b_hh;  // [kH H] or null
  const void* w_hr;  // [Hout, H] or null: h = w_hr h_full
};

// One layer over one sequence. Rows are the valid (t, b) pairs, time-major: row offsets[t] + b, b <
// batch_sizes[t].
struct LayerParams {
  Storage storage;
  int64_t T, B, I, H, Hout, rows;
  int dirs;                    // 1 or 2; direction 1 runs backwards in time
  int threads;                 // at most this many
  const int64_t* batch_sizes;  // [T], decreasing
  const int64_t* offsets;      // [T + 1]
  // x_t[b] = x + t * x_t_stride + b * x_b_stride; ragged: row r = x + r * x_b_stride
  const void* x;
  int64_t x_t_stride, x_b_stride;
  const void* h0;  // [dirs, B, Hout]
  const void* c0;  // [dirs, B, kStates - 1, H] or null
  DirectionWeights w[2];
  void* y;    // [rows, dirs * Hout]
  void* h_n;  // [dirs, B, Hout]
  void* c_n;  // [dirs, B, kStates - 1, H] or null
  // For the backward, in the computing type; null when nothing is to be saved.
  void* hs;     // [dirs, B + rows, hs_stride]: h0, then h_t; with w_hr also h_full behind h
  void* saved;  // [dirs, rows, kSaved + kStates - 1, Padded(H)], in the engine's own order
  bool ragged;
};
constexpr int64_t HsStride(int64_t H, int64_t Hout) {
  return RowStride(Hout) + (H == Hout ? 0 : RowStride(H));
}

struct DirectionGrads {
  void *w_ih, *w_hh, *b_ih, *b_hh, *w_hr;  // null: not wanted
};

struct LayerGradParams : LayerParams {
  const void* dy;  // null: zero. Strides as for x.
  int64_t dy_t_stride, dy_b_stride;
  const void* dh_n;  // [dirs, B, Hout] or null
  const void* dc_n;  // [dirs, B, kStates - 1, H] or null
  void* dx;          // [rows, I], null: not wanted
  void* dh0;         // [dirs, B, Hout], always written
  void* dc0;         // [dirs, B, kStates - 1, H], written when kStates > 1
  DirectionGrads dw[2];
};

// What a binding must know of a cell.
struct CellFacts {
  int gates_x, gates_h, extra_states, saved;
  bool uses_h;  // elementwise, so that h can not be projected
};

// An engine instance: one cell, one computing type, one instruction set.
struct CpuKernels : CellFacts {
  void (*layer_fwd)(const LayerParams&);
  void (*layer_bwd)(const LayerGradParams&);
};

// The instance for a cell's name and computing type (0 float, 1 double) on this machine, or null
// for an unknown name.
const CpuKernels* FindCpuKernels(const char* cell, int is_double);
const char* CpuCapability();

}  // namespace frnn
