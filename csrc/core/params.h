// What crosses from the bindings to an engine: plain sizes, strides in elements, pointers. No
// torch, no CUDA runtime.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/macros.h"

namespace frnn {

// Type of the tensors in memory. float16 and bfloat16 are computed in float: products are
// accumulated in float, c stays in float, h is rounded once per step.
enum class Storage : int { kFloat, kDouble, kBFloat16, kHalf };
constexpr int64_t StorageSize(Storage s) {  // bytes of an element
  return s == Storage::kDouble ? 8 : (s == Storage::kFloat ? 4 : 2);
}

constexpr int64_t RoundUp(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Buffers that the forward leaves to the backward have sizes that depend on no vector width.
constexpr int kAlign = 32;  // units are padded to this
constexpr int64_t Padded(int64_t units) { return RoundUp(units, kAlign); }  // [.., Padded(H)]
constexpr int64_t RowStride(int64_t units) {
  return RoundUp(units, kAlign) + 16;
}  // + 16: no 4 KB aliasing

// The tensors of one direction of a layer, or their gradients: in the order of the names that
// TensorName gives them, by which they are known everywhere.
constexpr int kMaxParams = 16, kMaxGates = 16;
// What can be normalised, row by row: x W_ih^T, h W_hh^T, or their sum, each before its bias is added;
// and the state that the output shows, which is shifted afterwards.
enum Place { kInput, kRecurrent, kSum, kShown, kPlaces };
template <class P>
struct DirectionTensors {
  static constexpr int kNamed = 5, kGains = kNamed + kMaxParams, kShift = kGains + kPlaces,
                       kCount = kShift + 1;

  P w_ih;                // [kX H, I]
  P w_hh;                // [kH H, Hout / blocks], null if kH = 0
  P b_ih;                // [kX H] or null
  P b_hh;                // [kH H] or null
  P w_hr;                // [Hout, H] or null: h = w_hr h_full
  P params[kMaxParams];  // [H] each, as many as the cell has
  P gains[kPlaces];      // [kX H], [kH H], [kX H] and [H]: null where nothing is normalised
  P shift;               // [H], beside gains[kShown]

  const P& operator[](int i) const {
    const P* const named[] = {&w_ih, &w_hh, &b_ih, &b_hh, &w_hr};
    return i < kNamed   ? *named[i]
           : i < kGains ? params[i - kNamed]
           : i < kShift ? gains[i - kGains]
                        : shift;
  }
  P& operator[](int i) { return const_cast<P&>(static_cast<const DirectionTensors&>(*this)[i]); }
};
struct DirectionWeights : DirectionTensors<const void*> {
  const void* packed;  // what CpuKernels::pack made of w_ih and w_hh; null: nothing
  // Of an element: those of the computing type; 2, a bfloat16; 1, an integer times what its row has.
  int64_t packed_bytes;
};
using DirectionGrads = DirectionTensors<void*>;  // null: not wanted

// What is subtracted and divided by in each row: mean and standard deviation, or nothing and the root of
// the mean of squares.
enum class Norm : int64_t { kNone, kLayer, kRms };

// One layer over one sequence. Rows are the valid (t, b) pairs, time-major: row offsets[t] + b, b <
// batch_sizes[t]. No padding between members: engines compare calls byte by byte.
struct LayerParams {
  Storage storage;
  int dirs;         // 1 or 2; direction 1 runs backwards in time
  int threads;      // at most this many
  int ragged;       // 0 or 1
  int every_state;  // 0 or 1: h_n and c_n have the states after every step, `rows` for B
  int invariant;    // 0 or 1: what is computed of a sequence has the same bits in any batch
  int64_t T, B, I, H, Hout, rows;
  int64_t blocks;              // W_hh is block-diagonal, of so many blocks of whole kAlign units
  const int64_t* batch_sizes;  // [T], decreasing
  const int64_t* offsets;      // [T + 1]
  // x_t[b] = x + t * x_t_stride + b * x_b_stride; ragged: row r = x + r * x_b_stride
  const void* x;
  int64_t x_t_stride, x_b_stride;
  const void* given;  // [rows, kGiven, H], of all layers and directions
  const void* h0;     // [dirs, B, Hout], null: zeros
  const void* c0;     // [dirs, B, kStates - 1, H], null: zeros
  DirectionWeights w[2];
  // What happens to the states between two steps; each may be null.
  const uint8_t* reset;  // [rows]: before this step (for direction 1: after it) they become zeros
  const void* zoneout;   // [dirs, zoneout_rows, kStates H]: of h and then c, the part that stays
  int64_t zoneout_rows;  // as many as there are, or one for all
  const void* h_mask;    // [dirs, B, Hout]: multiplies h where it goes into W_hh
  Norm norm;             // of the places that have gains
  int64_t norm_eps;      // added to what the root is taken of: a double, as bits
  void* y;               // [rows, dirs * Hout]
  void* h_n;             // [dirs, B, Hout]
  void* c_n;             // [dirs, B, kStates - 1, H] or null
  // For the backward; null when nothing is to be saved. Their contents are the engine's own; shapes
  // on the CPU (in the computing type):
  // hs is null, too, for a step whose h0 and h_n serve in its place (IsOwnTape).
  void* hs;     // [dirs, B + rows, hs_stride]: h0, then h_t; with w_hr also h_full behind h
  void* saved;  // [dirs, rows, tape + norm_tape, Padded(H)]
};
constexpr int64_t HsStride(int64_t H, int64_t Hout) {
  return RowStride(Hout) + (H == Hout ? 0 : RowStride(H));
}

struct LayerGradParams : LayerParams {
  const void* dy;  // null: zero. Strides as for x.
  int64_t dy_t_stride, dy_b_stride;
  const void* dh_n;  // [dirs, B, Hout] or null
  const void* dc_n;  // [dirs, B, kStates - 1, H] or null
  void* dx;          // [rows, I], null: not wanted
  void* dgiven;      // [rows, kGiven, H], to which is added; null: not wanted
  void* dh0;         // [dirs, B, Hout], always written
  void* dc0;         // [dirs, B, kStates - 1, H], written when kStates > 1
  DirectionGrads dw[2];
};
static_assert(std::has_unique_object_representations_v<LayerGradParams>);

// Whether x W_ih^T is normalised by itself, and h W_hh^T, or with it their sum.
inline bool NormOfX(const LayerParams& p) { return p.w[0].gains[kInput] != nullptr; }
inline bool NormOfSum(const LayerParams& p) { return p.w[0].gains[kSum] != nullptr; }
inline bool NormOfH(const LayerParams& p) {
  return p.w[0].gains[kRecurrent] != nullptr || NormOfSum(p);
}
// The gains of what NormOfH is about, or their gradients.
template <class P>
P GainOfH(const DirectionTensors<P>& w) {
  return w.gains[kSum] ? w.gains[kSum] : w.gains[kRecurrent];
}
inline double NormEps(const LayerParams& p) {
  double eps;
  std::memcpy(&eps, &p.norm_eps, sizeof(eps));
  return eps;
}

// Whether the CPU's backward can do without hs: given a single step, whose rows of h are as it reads
// them, in h0 and h_n.
constexpr bool IsOwnTape(const LayerParams& p) {
  return p.T == 1 && !p.every_state && !p.reset && !p.h_mask && !p.ragged && p.h0 != nullptr &&
         StorageSize(p.storage) >= 4 && p.H == p.Hout && p.H % kAlign == 0;
}

// What a binding must know of a cell.
struct CellFacts {
  int gates_x, gates_h;
  int extra_states;  // beside h
  int tape;          // values of a unit that a row keeps for the backward
  int params;
  int given;     // values of a unit that the caller gives for each step
  int operands;  // of W_hh, beside h
  bool projectable;
  bool reads_h;      // elementwise
  bool reads_new_h;  // in the backward
  bool adds;         // reads x_q and h_q by nothing but their sum
  bool shows;        // its output shows a state, see core/cell.h
  const char* const* param_names;

  // Values of a unit that a row keeps besides, of what is normalised: all gates, and one more.
  int64_t NormTape(const DirectionWeights& w) const {
    return (w.gains[kInput] ? gates_x + 1 : 0) +
           (w.gains[kRecurrent] || w.gains[kSum] ? gates_h + 1 : 0) + (w.gains[kShown] ? 2 : 0);
  }
  int tensors() const { return DirectionWeights::kNamed + params; }
  // Bits of the tensors that a layer has.
  int64_t Present(bool biases, bool projection) const {
    return 1 | int64_t(gates_h > 0) << 1 | int64_t(biases) << 2 |
           int64_t(biases && gates_h > 0) << 3 | int64_t(projection) << 4 |
           ((int64_t(1) << params) - 1) << DirectionWeights::kNamed;
  }
  // Of the list of a cell: its tensors, and behind them the gains and the shift.
  int Slot(int i) const { return i < tensors() ? i : DirectionWeights::kGains + i - tensors(); }
  const char* TensorName(int i) const {
    constexpr const char* kNames[] = {"w_ih", "w_hh", "b_ih", "b_hh", "w_hr"};
    constexpr const char* kNormNames[] = {"g_ih", "g_hh", "g", "g_c", "s_c"};
    if (i >= tensors()) return kNormNames[i - tensors()];
    return i < DirectionWeights::kNamed ? kNames[i] : param_names[i - DirectionWeights::kNamed];
  }
};

// An engine instance: one cell, one computing type, one instruction set.
struct CpuKernels : CellFacts {
  void (*layer_fwd)(const LayerParams&);
  void (*layer_bwd)(const LayerGradParams&);
  void (*scale)(void* data, const void* by, int64_t n, Storage);  // data[i] *= by[i]
  // W_ih and W_hh of a direction in the order in which vectors multiply with them, for any number of
  // threads: how many bytes, which go to w.packed.
  int64_t (*packed_size)(int64_t I, int64_t H, int64_t K, int64_t element);  // W_hh has K columns
  void (*pack)(const LayerParams&, const DirectionWeights& w);
};

// A card, as far as plans depend on it.
struct CudaDevice {
  int multiprocessors;
  int major;  // of the compute capability
  int64_t l2_bytes;
  int64_t shared_bytes;       // of a block, at most
  int64_t product_bytes = 0;  // of memory that products in a stream may use, a multiple of 256
  bool together = true;       // whether blocks of a kernel may wait for each other
};

// What a binding lends to an engine for one call on a card.
struct CudaCall {
  int device;       // the current one
  void* stream;     // the caller's own
  bool allow_tf32;  // round float32 operands of products to TF32
  void* binding;
  // Memory for as long as the call takes.
  void* (*workspace)(void* binding, int64_t bytes);
};

// An engine instance: one cell, one type in memory.
struct CudaKernels : CellFacts {
  void (*layer_fwd)(const LayerParams&, const CudaCall&);
  void (*layer_bwd)(const LayerGradParams&, const CudaCall&);
  void (*scale)(void* data, const void* by, int64_t n, const CudaCall&);  // data[i] *= by[i]
};

// The instance for a cell's name and storage, or null for an unknown name.
const CudaKernels* FindCudaKernels(const char* cell, Storage storage);
// Has it find a cell that another library brings, from now on and for good.
FRNN_EXPORT void AddCudaKernels(const char* cell, Storage storage, const CudaKernels& kernels);

// The same on this machine, which computes 16-bit types in float.
const CpuKernels* FindCpuKernels(const char* cell, Storage storage);
const char* CpuCapability();
// Likewise; compiled for the instruction set of this machine.
FRNN_EXPORT void AddCpuKernels(const char* cell, Storage computing, const CpuKernels& kernels);

}  // namespace frnn
