// The operators whose schemas are in fused_rnn/ops.py, for any device: checks, output tensors,
// parameter structs. A device is a struct that finds kernels, makes large tensors and runs a layer
// (cpu.h, cuda.cpp). Written against libtorch's stable ABI, so one binary serves torch 2.10 and
// newer.
//
// The checks and structs are templates over the tensor T: torch's own, or what else has the few
// members used here (direct.cpp).
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <forward_list>
#include <memory>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/memory.h"
#include "stack/stack.h"

// Newer torch defines it, with the cause in the message.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace frnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// A string argument. torch's own conversion to std::string leaks it in releases up to 2.14.
class Text {
 public:
  explicit Text(StringHandle handle) : handle_(handle) {}
  const char* c_str() const {
    const char* text = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle_.get(), &text));
    return text;
  }

 private:
  struct Delete {
    void operator()(StringHandle handle) const { torch_delete_string(handle); }
  };
  std::unique_ptr<std::remove_pointer_t<StringHandle>, Delete> handle_;
};

// As torch's STD_TORCH_CHECK, but the message is for users and names no line of this file.
#define FRNN_CHECK(condition, ...)                 \
  do {                                             \
    if (!(condition)) ::frnn::Refuse(__VA_ARGS__); \
  } while (false)

template <class... Parts>
[[noreturn]] void Refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// As Python writes it.
inline const char* NameOf(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(dtype);
  }
}

template <class T>
Storage StorageOf(const T& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Storage::kFloat;
    case ScalarType::Double:
      return Storage::kDouble;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    case ScalarType::Half:
      return Storage::kHalf;
    default:
      Refuse(name, ": expected float32, float64, bfloat16 or float16, got ",
             NameOf(t.scalar_type()));
  }
}

inline std::string ShapeText(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::string s = "(";
  for (size_t i = 0; i < sizes.size(); i++) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + ")";
}

// A shape, in no memory of its own: a small call has a dozen of them.
class Dims {
 public:
  Dims(std::initializer_list<int64_t> sizes) : Dims(sizes.begin(), sizes.end()) {}
  template <class Iterator>
  Dims(Iterator begin, Iterator end) : count_(size_t(end - begin)) {
    FRNN_CHECK(count_ <= sizes_.size(), "too many dimensions");
    std::copy(begin, end, sizes_.begin());
  }
  size_t size() const { return count_; }
  const int64_t* data() const { return sizes_.data(); }
  const int64_t* begin() const { return data(); }
  const int64_t* end() const { return data() + count_; }
  int64_t& operator[](size_t i) { return sizes_[i]; }
  int64_t operator[](size_t i) const { return sizes_[i]; }

 private:
  std::array<int64_t, 4> sizes_;
  size_t count_;
};

template <class T, class Sizes>
bool SameShape(const T& t, const Sizes& expected) {
  const auto sizes = t.sizes();
  return std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end());
}

template <class T>
void CheckShape(const char* name, const T& t, std::initializer_list<int64_t> expected) {
  FRNN_CHECK(SameShape(t, expected), name, ": expected shape ",
             ShapeText({expected.begin(), expected.size()}), ", got ", ShapeText(t.sizes()));
}

inline int64_t BytesOf(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
      return 4;
    case ScalarType::Byte:
    case ScalarType::Bool:
      return 1;
    default:
      return 2;
  }
}
// Of a contiguous tensor. False where there are too many to count: an expanded input has any size.
inline bool CountBytes(const Dims& sizes, ScalarType dtype, int64_t& bytes) {
  bytes = BytesOf(dtype);
  for (const int64_t n : sizes)
    if (__builtin_mul_overflow(bytes, n, &bytes)) return false;
  return true;
}

// A storage may have been resized since its tensors were made, as FSDP does to save memory.
inline void CheckMemory(const char* name, const Tensor& t) {
  int64_t there = 0, end = 0;  // bytes; elements
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &there));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &end));
  end++;
  for (int64_t i = 0; i < t.dim(); i++) end += (t.size(i) - 1) * t.stride(i);
  const int64_t wanted = t.numel() > 0 ? end * int64_t(t.element_size()) : 0;
  FRNN_CHECK(wanted <= there, name, ": expected a storage of ", wanted, " bytes or more, got ",
             there);
}

// make(shape) returns a new tensor of torch's. What torch says of a failure does not come through its C
// functions: it is said again, in the words that callers look for.
template <class F>
Tensor Allocated(const Tensor& like, const Dims& sizes, ScalarType dtype, const F& make) {
  try {
    return make(torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()));
  } catch (const std::exception&) {
    int64_t bytes = 0;
    if (!CountBytes(sizes, dtype, bytes)) throw;
    if (like.is_cpu()) throw OutOfMemory(size_t(bytes));
    Refuse("CUDA out of memory. Tried to allocate ", bytes, " bytes");
  }
}
inline Tensor New(const Tensor& like, const Dims& sizes, ScalarType dtype) {
  return Allocated(like, sizes, dtype,
                   [&](auto shape) { return torch::stable::new_empty(like, shape, dtype); });
}
inline Tensor NewZeros(const Tensor& like, const Dims& sizes, ScalarType dtype) {
  return Allocated(like, sizes, dtype,
                   [&](auto shape) { return torch::stable::new_zeros(like, shape, dtype); });
}
inline Tensor ContiguousCopy(const Tensor& t) {
  return Allocated(t, {t.sizes().begin(), t.sizes().end()}, t.scalar_type(),
                   [&](auto) { return torch::stable::contiguous(t); });
}

// What a device is:
//   struct Device {
//     using Kernels = ...;                       // derives from CellFacts
//     static constexpr const char* kName;        // "CPU"
//     static constexpr int kSavedLead;           // hs has kSavedLead * B rows before its own
//     static constexpr bool kHsInStorageType;    // or in the computing type, as saved is
//     static constexpr bool kHasStages, kHasBlocks, kHasNorm;  // kernels for Stages, Shape::blocks and
//                                                              // Shape::norm
//     static int32_t Index(const Tensor&);       // of its device, among those of this kind
//     static bool Owns(const Tensor&, int32_t index);
//     static const Kernels* Find(const char* cell, Storage);    // null: unknown
//     static int64_t HsStride(int64_t H, int64_t Hout), SavedUnits(int64_t H);
//     static Tensor NewLarge(const Tensor& like, sizes, dtype);
//     static Tensor Input(const Tensor& rows, bool ragged);     // as the engine can read it
//     static void Forward(const Kernels&, const LayerParams&, const Tensor& x, bool allow_tf32);
//     static void Backward(const Kernels&, const LayerGradParams&, const Tensor& x, bool allow_tf32);
//     static void Scale(const Kernels&, void* data, const void* mask, int64_t n, Storage, const Tensor& x);
//   };

// Tensor arguments as the engines read them. Copies that this takes live as long as the call.
template <class Device, class T>
class Arguments {
 public:
  explicit Arguments(const T& x) : dtype_(x.scalar_type()), index_(Device::Index(x)) {}
  const void* Take(const char* name, const std::optional<T>& t,
                   std::initializer_list<int64_t> shape) {
    if (!t.has_value()) return nullptr;
    CheckType(name, *t);
    CheckShape(name, *t, shape);
    return Contiguous(*t).const_data_ptr();
  }
  // Rows may lie anywhere, elements of a row must be adjacent.
  const T& Rows(const char* name, const T& t) {
    CheckType(name, t);
    return t.size(-1) <= 1 || t.stride(t.dim() - 1) == 1 ? t : Kept(ContiguousCopy(t));
  }
  const T& Input(const T& x, bool ragged) { return Kept(Device::Input(Rows("x", x), ragged)); }
  const T& Contiguous(const T& t) { return t.is_contiguous() ? t : Kept(ContiguousCopy(t)); }
  ScalarType dtype() const { return dtype_; }
  int32_t index() const { return index_; }

 private:
  const T& Kept(T&& copy) { return kept_.emplace_front(std::move(copy)); }
  const T& Kept(const T& there) { return there; }
  void CheckType(const char* name, const T& t) const {
    FRNN_CHECK(Device::Owns(t, index_), name, ": expected a ", Device::kName,
               " tensor, on the device of x");
    FRNN_CHECK(t.scalar_type() == dtype_, name, ": expected ", NameOf(dtype_), ", as x is, got ",
               NameOf(t.scalar_type()));
    CheckMemory(name, t);
  }
  ScalarType dtype_;
  int32_t index_;
  std::forward_list<T, Allocator<T>> kept_;
};

// What fakes need to know of a cell and of a tape.
extern "C" {
struct frnn_cell_t {
  int gates_x, gates_h, extra_states, tape, reads_h, reads_new_h;
  int has_stages;   // whether there are kernels for Stages
  int block_units;  // a block of a block-diagonal W_hh has a multiple of so many; 0: there are none
  int has_norm;     // whether there are kernels for Shape::norm
};
struct frnn_tape_t {
  int64_t units, hs_row, hs_lead;  // padded units; a row of hs; blocks of B rows before its own
  bool hs_as_x;                    // its dtype is that of x, or the computing one
};
}

// What a call is about beside its tensors. Bit i of `present`: tensor i of the cell's list is among the
// weights, which are those of each layer and direction in turn.
struct Shape {
  const char* cell;
  int64_t layers, directions, present;
  int64_t blocks = 1;
  int64_t norm = 0;
  double norm_eps = 0;
  bool every_state = false;
};

// What happens to the states between two steps, see LayerParams.
template <class T>
struct Stages {
  std::optional<T> reset, zoneout, h_mask;
};

// One call of a stack of layers: arguments checked, and laid out for an engine.
template <class Device, class T>
struct Call {
  using Optional = std::optional<T>;

  Call(const Call&) = delete;
  Call(const Shape& shape, const T& x, const Optional& h0, const Optional& c0, const T* weights,
       size_t count, const Optional& batch_sizes, const Stages<T>& stages = {})
      : storage(StorageOf(x, "x")), kernels(Find(shape.cell, storage)), arguments(x) {
    p.storage = storage;
    p.ragged = batch_sizes.has_value();
    FRNN_CHECK(x.dim() == (p.ragged ? 2 : 3), "x: expected ", p.ragged ? "[rows, I]" : "[T, B, I]",
               ", got shape ", ShapeText(x.sizes()));
    FRNN_CHECK(shape.directions == 1 || shape.directions == 2, "directions: expected 1 or 2, got ",
               shape.directions);
    FRNN_CHECK(shape.layers >= 1 && shape.layers < 1 << 16, "layers: expected at least 1, got ",
               shape.layers);
    stack.layers = int(shape.layers);
    stack.extra_states = kernels.extra_states;
    p.dirs = int(shape.directions);
    p.I = x.size(-1);
    Steps(x, batch_sizes);
    p.threads = int(torch::stable::get_num_threads());

    const T& rows = arguments.Input(x, p.ragged);
    p.x = rows.const_data_ptr();
    p.x_t_stride = p.ragged ? 0 : rows.stride(0);
    p.x_b_stride = rows.stride(p.ragged ? 0 : 1);
    p.every_state = shape.every_state;
    FRNN_CHECK(shape.blocks >= 1 && shape.blocks < 1 << 16, "blocks: expected at least 1, got ",
               shape.blocks);
    p.blocks = int(shape.blocks);
    FRNN_CHECK(shape.norm == 0 || Device::kHasNorm, "norm: no kernels for ", Device::kName);
    FRNN_CHECK(shape.norm >= 0 && shape.norm <= int64_t(Norm::kRms) && shape.norm_eps >= 0,
               "norm: expected 0, 1 or 2, and norm_eps from 0 on, got ", shape.norm, " and ",
               shape.norm_eps);
    p.norm = Norm(shape.norm);
    std::memcpy(&p.norm_eps, &shape.norm_eps, sizeof(p.norm_eps));
    TakeWeights(shape.present, weights, count);
    TakeStages(stages, x);
    const int64_t runs = stack.layers * p.dirs;
    p.h0 = arguments.Take("h0", h0, {runs, p.B, p.Hout});
    FRNN_CHECK(!c0.has_value() || kernels.extra_states > 0, "c0: this cell has no c");
    p.c0 = arguments.Take("c0", c0, {runs, p.B, kernels.extra_states * p.H});
  }

  ScalarType computing() const {
    return storage == Storage::kDouble ? ScalarType::Double : ScalarType::Float;
  }
  int64_t runs() const { return int64_t(stack.layers) * p.dirs; }
  Dims YShape() const {
    return p.ragged ? Dims{p.rows, stack.Width()} : Dims{p.T, p.B, stack.Width()};
  }
  Dims BetweenShape() const { return {stack.BetweenParts(), p.rows, stack.Width()}; }
  int64_t StateRows() const { return p.every_state ? p.rows : p.B; }
  Dims HShape() const { return {runs(), StateRows(), p.Hout}; }
  Dims CShape() const { return {runs(), StateRows(), kernels.extra_states * p.H}; }
  // The tape of so many layers: hs [layers * dirs, rows, ..], saved [layers * dirs, rows, tape, ..], see
  // LayerParams.
  Dims HsShape(int64_t layers) const {
    return {layers * p.dirs, Device::kSavedLead * p.B + p.rows, Device::HsStride(p.H, p.Hout)};
  }
  ScalarType HsType() const { return Device::kHsInStorageType ? arguments.dtype() : computing(); }
  Dims SavedShape(int64_t layers) const {
    return {layers * p.dirs, p.rows, kernels.tape + kernels.NormTape(stack.weights[0]),
            Device::SavedUnits(p.H)};
  }

  void PutTape(void* hs, void* saved, bool of_all_layers) {
    p.hs = hs, p.saved = saved;
    stack.keeps_tape = of_all_layers;
    stack.hs_bytes = Bytes(HsShape(1), HsType());
    stack.saved_bytes = Bytes(SavedShape(1), computing());
  }

  // Dropout between layers: [layers - 1, rows of x, directions * Hout] of zeros and 1 / (1 - p).
  const void* TakeMasks(const Optional& masks, const T& x) {
    if (!masks.has_value()) return nullptr;
    const int64_t width = stack.Width(), between = stack.layers - 1;
    if (p.ragged) return arguments.Take("masks", masks, {between, x.size(0), width});
    return arguments.Take("masks", masks, {between, p.T, p.B, width});
  }
  // What the forward left to the backward. Without a tape, which is empty then, layers run again.
  void TakeForward(const Optional& between, const T& hs, const T& saved) {
    stack.keeps_between = true;
    if (stack.layers > 1) {
      FRNN_CHECK(between.has_value(), "between: not what the forward returned");
      stack.between = Left("between", *between, BetweenShape(), arguments.dtype());
    }
    if (hs.dim() > 1)
      PutTape(Left("hs", hs, HsShape(stack.layers), HsType()),
              Left("saved", saved, SavedShape(stack.layers), computing()), true);
  }
  // The same of a step without hs (IsOwnTape), which has of the others what its cell reads.
  void TakeStep(const Optional& h_n, const Optional& saved) {
    FRNN_CHECK(IsOwnTape(p) && stack.layers == 1 && h_n.has_value() == kernels.reads_new_h &&
                   saved.has_value() == (kernels.tape > 0),
               "hs: not what the forward returned");
    p.h_n = const_cast<void*>(arguments.Take("h_n", h_n, {runs(), p.B, p.Hout}));
    PutTape(nullptr,
            saved.has_value() ? Left("saved", *saved, SavedShape(1), computing()) : nullptr, true);
  }
  void TakeGradients(const Optional& dy, const Optional& dh_n, const Optional& dc_n) {
    stack.gradients.resize(size_t(runs()));
    if (dy.has_value()) {
      if (p.ragged)
        CheckShape("dy", *dy, {p.rows, stack.Width()});
      else
        CheckShape("dy", *dy, {p.T, p.B, stack.Width()});
      const T& rows = arguments.Rows("dy", *dy);
      p.dy = rows.const_data_ptr();
      p.dy_t_stride = p.ragged ? 0 : rows.stride(0);
      p.dy_b_stride = rows.stride(p.ragged ? 0 : 1);
    }
    FRNN_CHECK(p.zoneout == nullptr || p.zoneout_rows == p.rows || !kernels.reads_new_h,
               "zoneout: this cell's backward takes no single row for all steps");
    p.dh_n = arguments.Take("dh_n", dh_n, {runs(), StateRows(), p.Hout});
    if (kernels.extra_states > 0)
      p.dc_n = arguments.Take("dc_n", dc_n, {runs(), StateRows(), kernels.extra_states * p.H});
  }
  // Where the gradients of x, h0, c0 and the weights go, in this order.
  void** GradientSlot(int64_t i) {
    void** const first[] = {&p.dx, &p.dh0, &p.dc0};
    if (i < 3) return first[i];
    const auto each = int64_t(tensors.size());
    return &stack.gradients[(i - 3) / each][kernels.Slot(tensors[(i - 3) % each])];
  }
  // Whether the engine leaves rows of dx alone, which must then be zero.
  bool SkipsRowsOf(const T& x) const { return p.ragged && x.size(0) > p.rows; }

  Storage storage;
  const typename Device::Kernels& kernels;
  Arguments<Device, T> arguments;
  Stack stack;
  LayerGradParams& p = stack.all;
  Vector<int> tensors;  // those of the cell's list that are there

 private:
  Vector<int64_t> steps_;  // p.batch_sizes, then p.offsets

  static const typename Device::Kernels& Find(const char* cell, Storage storage) {
    const auto* kernels = Device::Find(cell, storage);
    FRNN_CHECK(kernels != nullptr, "cell: unknown cell '", cell, "'");
    return *kernels;
  }
  static size_t Bytes(const Dims& sizes, ScalarType dtype) {
    size_t bytes = size_t(BytesOf(dtype));
    for (const int64_t n : sizes) bytes *= size_t(n);
    return bytes;
  }

  // The sizes that weights have, and each where the engine reads it.
  void TakeWeights(int64_t present, const T* weights, size_t count) {
    const int known = kernels.tensors() + (p.norm == Norm::kNone ? 0 : kPlaces);
    tensors.reserve(size_t(known));
    for (int i = 0; i < known; i++)
      if (present >> i & 1) tensors.push_back(i);
    FRNN_CHECK(present >> known == 0 && count == size_t(runs()) * tensors.size(),
               "weights: expected ", tensors.size(), " for each of ", runs(),
               " layers and directions, got ", count);
    const auto find = [&](int tensor) -> const T* {
      for (size_t k = 0; k < tensors.size(); k++)
        if (tensors[k] == tensor) return &weights[k];
      return nullptr;
    };
    const T *w_ih = find(0), *w_hh = find(1), *w_hr = find(4);
    FRNN_CHECK(w_ih != nullptr && (w_hh != nullptr) == (kernels.gates_h > 0),
               kernels.gates_h > 0 ? "weights: w_ih and w_hh are required"
                                   : "weights: w_ih is required, and there is no w_hh");
    for (int i = DirectionWeights::kNamed; i < kernels.tensors(); i++)
      FRNN_CHECK(find(i) != nullptr, "weights: ", kernels.TensorName(i), " is required");
    FRNN_CHECK(w_hr == nullptr || kernels.projectable,
               "w_hr: this cell reads h elementwise and takes no projection");
    const T *g_ih = find(kernels.tensors() + kInput), *g_hh = find(kernels.tensors() + kRecurrent),
            *g = find(kernels.tensors() + kSum);
    FRNN_CHECK(g_hh == nullptr || kernels.gates_h > 0, "g_hh: this cell has no w_hh");
    FRNN_CHECK(g == nullptr || (kernels.adds && g_ih == nullptr && g_hh == nullptr),
               "g: expected without g_ih and g_hh, of a cell that reads sums alone");
    const T& sized = w_hh != nullptr ? *w_hh : *w_ih;
    FRNN_CHECK(sized.dim() == 2, w_hh != nullptr ? "w_hh" : "w_ih",
               ": expected 2 dimensions, got shape ", ShapeText(sized.sizes()));
    p.Hout = w_hh != nullptr ? w_hh->size(1) * p.blocks : w_ih->size(0) / kernels.gates_x;
    // Where Hout is H, the engines take h for what it is.
    FRNN_CHECK(w_hr == nullptr || (w_hr->dim() == 2 && w_hr->size(1) != p.Hout),
               "w_hr: expected [Hout, H] with Hout other than H, got shape ",
               ShapeText(w_hr->sizes()));
    p.H = w_hr != nullptr ? w_hr->size(1) : p.Hout;

    stack.weights.resize(size_t(runs()));
    for (int64_t run = 0; run < runs(); run++) {
      const int64_t width = run < p.dirs ? p.I : stack.Width();
      for (const int i : tensors)
        stack.weights[run][kernels.Slot(i)] = TakeWeight(i, *weights++, width);
    }
  }
  const void* TakeWeight(int i, const T& t, int64_t width) {
    const char* name = kernels.TensorName(i);
    const int64_t gates_x = kernels.gates_x * p.H, gates_h = kernels.gates_h * p.H;
    switch (i) {
      case 0:
        return arguments.Take(name, t, {gates_x, width});
      case 1:
        return arguments.Take(name, t, {gates_h, p.Hout / p.blocks});
      case 2:
        return arguments.Take(name, t, {gates_x});
      case 3:
        return arguments.Take(name, t, {gates_h});
      case 4:
        return arguments.Take(name, t, {p.Hout, p.H});
      default:
        if (i < kernels.tensors()) return arguments.Take(name, t, {p.H});
        return arguments.Take(name, t, {i == kernels.tensors() + kRecurrent ? gates_h : gates_x});
    }
  }

  void TakeStages(const Stages<T>& stages, const T& x) {
    FRNN_CHECK(Device::kHasStages || (!stages.reset.has_value() && !stages.zoneout.has_value() &&
                                      !stages.h_mask.has_value() && !p.every_state),
               "reset, zoneout, h_mask, every_state: no kernels for ", Device::kName);
    FRNN_CHECK(p.blocks == 1 || (Device::kHasBlocks && p.H == p.Hout && kernels.gates_h > 0 &&
                                 p.H % (p.blocks * kAlign) == 0),
               "blocks: expected 1, or blocks of a multiple of ", kAlign, " units, got ", p.blocks,
               " of ", p.H, " units");
    if (stages.reset.has_value()) p.reset = TakeResets(*stages.reset, x);
    if (stages.zoneout.has_value()) {
      FRNN_CHECK(p.H == p.Hout, "zoneout: expected no projection");
      FRNN_CHECK(stages.zoneout->dim() == 3, "zoneout: expected 3 dimensions, got shape ",
                 ShapeText(stages.zoneout->sizes()));
      p.zoneout_rows = stages.zoneout->size(1) == 1 ? 1 : p.rows;
      p.zoneout = arguments.Take("zoneout", stages.zoneout,
                                 {runs(), p.zoneout_rows, (1 + kernels.extra_states) * p.H});
    }
    p.h_mask = arguments.Take("h_mask", stages.h_mask, {runs(), p.B, p.Hout});
  }
  const uint8_t* TakeResets(const T& reset, const T& x) {
    FRNN_CHECK(reset.scalar_type() == ScalarType::Bool && Device::Owns(reset, arguments.index()),
               "reset: expected a bool tensor on the device of x, got ",
               NameOf(reset.scalar_type()));
    if (p.ragged)
      CheckShape("reset", reset, {x.size(0)});
    else
      CheckShape("reset", reset, {p.T, p.B});
    CheckMemory("reset", reset);
    return static_cast<const uint8_t*>(arguments.Contiguous(reset).const_data_ptr());
  }

  void* Left(const char* name, const T& t, const Dims& shape, ScalarType dtype) {
    FRNN_CHECK(SameShape(t, shape) && t.scalar_type() == dtype && t.is_contiguous() &&
                   Device::Owns(t, arguments.index()),
               name, ": not what the forward returned");
    CheckMemory(name, t);
    return t.data_ptr();
  }

  void Steps(const T& x, const Optional& batch_sizes) {
    p.T = p.ragged ? batch_sizes->numel() : x.size(0);
    FRNN_CHECK(p.T > 0, "Expected sequence length to be larger than 0 in RNN");
    FRNN_CHECK(p.T < int64_t(1) << 48, "x: too many steps: ", p.T);
    steps_.resize(2 * p.T + 1);
    int64_t *sizes = steps_.data(), *offsets = sizes + p.T;
    if (p.ragged) {
      FRNN_CHECK(batch_sizes->dim() == 1 && batch_sizes->is_cpu() &&
                     batch_sizes->scalar_type() == ScalarType::Long,
                 "batch_sizes: expected a 1-D int64 CPU tensor");
      CheckMemory("batch_sizes", *batch_sizes);
      const T& contiguous = arguments.Contiguous(*batch_sizes);
      const int64_t* data = static_cast<const int64_t*>(contiguous.const_data_ptr());
      std::copy(data, data + p.T, sizes);
      p.B = sizes[0];
    } else {
      p.B = x.size(1);
      std::fill(sizes, offsets, p.B);
    }
    for (int64_t t = 0; t < p.T; t++) {
      FRNN_CHECK(sizes[t] <= (t == 0 ? p.B : sizes[t - 1]) && (sizes[t] > 0 || !p.ragged),
                 "batch_sizes: expected positive, not increasing, got ", sizes[t], " at step ", t);
      offsets[t + 1] = offsets[t] + sizes[t];
    }
    p.rows = offsets[p.T];
    // Data past the last step is ignored, as in torch.nn.
    FRNN_CHECK(!p.ragged || x.size(0) >= p.rows, "x: expected at least ", p.rows, " rows, got ",
               x.size(0));
    p.batch_sizes = sizes;
    p.offsets = offsets;
  }
};

// What the schemas of all operators end with, see fused_rnn/ops.py.
// clang-format off
#define FRNN_INPUTS \
  const Text &cell, const Tensor &x, const Optional &h0, const Optional &c0, \
  const std::vector<Tensor> &weights, const Optional &masks, const Optional &batch_sizes, \
  const Optional &reset, const Optional &zoneout, const Optional &h_mask, int64_t layers, \
  int64_t directions, int64_t present, int64_t blocks, int64_t norm, double norm_eps, \
  bool every_state, bool allow_tf32
#define FRNN_INPUTS_LIST \
  {cell, x, h0, c0, weights, masks, batch_sizes, reset, zoneout, h_mask, layers, directions, \
   present, blocks, norm, norm_eps, every_state, allow_tf32}
// clang-format on

template <class Device>
struct Operators {
  struct Inputs {
    const Text& cell;
    const Tensor& x;
    const Optional &h0, &c0;
    const std::vector<Tensor>& weights;
    const Optional &masks, &batch_sizes, &reset, &zoneout, &h_mask;
    int64_t layers, directions, present, blocks, norm;
    double norm_eps;
    bool every_state, allow_tf32;
  };
  enum class Keeps { kNothing, kBetween, kAll };

  // A call, and the memory that it works in.
  struct Work {
    explicit Work(const Inputs& in)
        : in(in),
          call({in.cell.c_str(), in.layers, in.directions, in.present, in.blocks, in.norm,
                in.norm_eps, in.every_state},
               in.x, in.h0, in.c0, in.weights.data(), in.weights.size(), in.batch_sizes,
               {in.reset, in.zoneout, in.h_mask}),
          masks(call.TakeMasks(in.masks, in.x)) {}

    void NewOutputs() {
      y = Device::NewLarge(in.x, call.YShape(), in.x.scalar_type());
      h_n = New(in.x, call.HShape(), in.x.scalar_type());
      c_n = New(in.x, call.CShape(), in.x.scalar_type());
      call.p.y = y.mutable_data_ptr();
      call.p.h_n = h_n.mutable_data_ptr();
      call.p.c_n = c_n.mutable_data_ptr();
    }
    void NewBetween(bool kept) {
      call.stack.keeps_between = kept;
      between = Device::NewLarge(in.x, call.BetweenShape(), in.x.scalar_type());
      call.stack.between = between.mutable_data_ptr();
    }
    void NewTape(bool of_all_layers) {
      const int64_t layers = of_all_layers ? call.stack.layers : 1;
      hs = Device::NewLarge(in.x, call.HsShape(layers), call.HsType());
      saved = Device::NewLarge(in.x, call.SavedShape(layers), call.computing());
      call.PutTape(hs.mutable_data_ptr(), saved.mutable_data_ptr(), of_all_layers);
    }
    // What the stack calls: a layer's forward and backward, and what dropout does between two layers.
    auto Forward() const {
      return
          [this](const LayerParams& p) { Device::Forward(call.kernels, p, in.x, in.allow_tf32); };
    }
    auto Backward() const {
      return [this](const LayerGradParams& p) {
        Device::Backward(call.kernels, p, in.x, in.allow_tf32);
      };
    }
    auto Dropout() const {
      return [this](void* data, int layer) {
        const size_t bytes = size_t(in.x.numel() / std::max<int64_t>(1, in.x.size(-1))) *
                             size_t(call.stack.Width() * StorageSize(call.storage));
        if (masks != nullptr)
          Device::Scale(call.kernels, data, static_cast<const char*>(masks) + layer * bytes,
                        call.p.rows * call.stack.Width(), call.storage, in.x);
      };
    }

    const Inputs in;
    Call<Device, Tensor> call;
    const void* masks;
    Tensor y, h_n, c_n, between, hs, saved;
  };

  static void Forward(Work& work, Keeps keeps) {
    work.NewOutputs();
    work.NewBetween(keeps != Keeps::kNothing);
    if (keeps != Keeps::kNothing) work.NewTape(keeps == Keeps::kAll);
    if (work.call.p.rows > 0) work.call.stack.Forward(work.Forward(), work.Dropout());
  }
  static std::tuple<Tensor, Tensor, Tensor> Infer(FRNN_INPUTS) {
    Work w(FRNN_INPUTS_LIST);
    Forward(w, Keeps::kNothing);
    return {w.y, w.h_n, w.c_n};
  }
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> Train(FRNN_INPUTS) {
    Work w(FRNN_INPUTS_LIST);
    Forward(w, Keeps::kAll);
    return {w.y, w.h_n, w.c_n, w.between, w.hs, w.saved};
  }
  // Not Infer, whose way may differ: the gradients must be those of what was returned.
  static std::tuple<Tensor, Tensor, Tensor, Tensor> Recomputed(FRNN_INPUTS) {
    Work w(FRNN_INPUTS_LIST);
    Forward(w, Keeps::kBetween);
    return {w.y, w.h_n, w.c_n, w.between};
  }

  // Gradients of x, h0 and c0, then of the weights. `needs` lists those that are wanted, numbered in
  // this order; the others are empty. Without a tape, hs and saved are.
  static std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> Backward(
      const Optional& dy, const Optional& dh_n, const Optional& dc_n, const Tensor& between,
      const Tensor& hs, const Tensor& saved, const std::vector<int64_t>& needs, FRNN_INPUTS) {
    Work work(FRNN_INPUTS_LIST);
    auto& call = work.call;
    call.TakeForward(between, hs, saved);
    call.TakeGradients(dy, dh_n, dc_n);
    const bool nothing = call.p.rows == 0;
    const ScalarType dtype = x.scalar_type();
    std::vector<Tensor> gradients;
    for (int64_t i = 0; i < 3 + int64_t(weights.size()); i++) {
      const Optional like = i == 0 ? x : i == 1 ? h0 : i == 2 ? c0 : weights[i - 3];
      const bool wanted = like.has_value() && Contains(needs, i);
      const Dims shape =
          wanted ? Dims(like->sizes().begin(), like->sizes().end()) : Dims({int64_t(0)});
      if (wanted && (nothing || (i == 0 && call.SkipsRowsOf(x))))
        gradients.push_back(NewZeros(x, shape, dtype));
      else if (i == 0)  // dx goes on to what was before and is gone; those of weights stay
        gradients.push_back(Device::NewLarge(x, shape, dtype));
      else
        gradients.push_back(New(x, shape, dtype));
      if (gradients.back().numel() > 0) *call.GradientSlot(i) = gradients.back().mutable_data_ptr();
    }
    if (!nothing) {
      Tensor passed[2];
      for (int i = 0; i < std::min(2, call.stack.layers - 1); i++) {
        passed[i] = Device::NewLarge(x, call.YShape(), x.scalar_type());
        call.stack.grad_between[i] = passed[i].mutable_data_ptr();
      }
      if (!call.stack.keeps_tape) {
        work.NewTape(false);
        work.NewOutputs();
        call.stack.outputs_again = call.p.y;
      }
      call.stack.Backward(work.Forward(), work.Backward(), work.Dropout());
    }
    return {gradients[0], gradients[1], gradients[2], {gradients.begin() + 3, gradients.end()}};
  }

 private:
  static bool Contains(const std::vector<int64_t>& list, int64_t i) {
    return std::find(list.begin(), list.end(), i) != list.end();
  }
};

// A cell as one of its instances knows it: not every type may have one.
template <class Device>
const CellFacts* FindAny(const char* cell) {
  const CellFacts* found = Device::Find(cell, Storage::kFloat);
  return found != nullptr ? found : Device::Find(cell, Storage::kDouble);
}
template <class Device>
bool FindFacts(const char* cell, frnn::frnn_cell_t* facts) {
  const CellFacts* found = FindAny<Device>(cell);
  if (found == nullptr) return false;
  *facts = {
      found->gates_x,  found->gates_h,     found->extra_states, found->tape,
      found->reads_h,  found->reads_new_h, Device::kHasStages,  Device::kHasBlocks ? kAlign : 0,
      Device::kHasNorm};
  return true;
}
template <class Device>
const char* FindTensor(const char* cell, int i) {
  const CellFacts* found = FindAny<Device>(cell);
  return found != nullptr && i < found->tensors() ? found->TensorName(i) : nullptr;
}

// What torch calls: an operator as its headers box it, which they do in memory of their own.
using BoxedOperator = void(StableIValue* stack, uint64_t inputs, uint64_t outputs);
template <BoxedOperator* boxed>
void Boxed(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  try {
    boxed(stack, inputs, outputs);
  } catch (const std::bad_alloc&) {
    throw OutOfMemory();
  }
}

}  // namespace frnn

template <>
struct torch::stable::detail::ToImpl<frnn::Text> {
  static frnn::Text call(StableIValue value, uint64_t, bool) {
    return frnn::Text(to<StringHandle>(value));
  }
};

// Registers the operators for one dispatch key, and exports the facts that fused_rnn/ops.py needs,
// without a detour through the dispatcher.
#define FRNN_REGISTER(Device, KEY)                                                                 \
  STABLE_TORCH_LIBRARY_IMPL(fused_rnn, KEY, m) {                                                   \
    m.impl("recurrent_infer", &frnn::Boxed<TORCH_BOX(&frnn::Operators<Device>::Infer)>);           \
    m.impl("recurrent", &frnn::Boxed<TORCH_BOX(&frnn::Operators<Device>::Train)>);                 \
    m.impl("recurrent_recomputed", &frnn::Boxed<TORCH_BOX(&frnn::Operators<Device>::Recomputed)>); \
    m.impl("recurrent_backward", &frnn::Boxed<TORCH_BOX(&frnn::Operators<Device>::Backward)>);     \
  }                                                                                                \
  extern "C" {                                                                                     \
  /* Writes what is known of a cell; false if it is unknown. */                                    \
  __attribute__((visibility("default"))) bool frnn_cell(const char* cell,                          \
                                                        frnn::frnn_cell_t* facts) {                \
    return frnn::FindFacts<Device>(cell, facts);                                                   \
  }                                                                                                \
  /* Name i of the tensors of a cell, null behind the last one. */                                 \
  __attribute__((visibility("default"))) const char* frnn_tensor(const char* cell, int i) {        \
    return frnn::FindTensor<Device>(cell, i);                                                      \
  }                                                                                                \
  /* The shape of a tape, see Call. */                                                             \
  __attribute__((visibility("default"))) frnn::frnn_tape_t frnn_tape(int64_t H, int64_t Hout) {    \
    return {Device::SavedUnits(H), Device::HsStride(H, Hout), Device::kSavedLead,                  \
            Device::kHsInStorageType};                                                             \
  }                                                                                                \
  }
