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
#include <forward_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/params.h"

// Newer torch defines it, with the cause in the message.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace frnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

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

constexpr int kWeights = 5;  // w_ih, w_hh, b_ih, b_hh, w_hr
constexpr int kGradients = 3 + 2 * kWeights;

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
      Refuse(name, ": expected float32, float64, bfloat16 or float16");
  }
}

inline std::string Shape(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
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
             Shape({expected.begin(), expected.size()}), ", got ", Shape(t.sizes()));
}

inline Tensor ContiguousCopy(const Tensor& t) { return torch::stable::contiguous(t); }

inline Tensor New(const Tensor& like, const Dims& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, dtype);
}

// What a device is:
//   struct Device {
//     using Kernels = ...;                       // derives from CellFacts
//     static constexpr const char* kName;        // "CPU"
//     static constexpr int kSavedLead;           // hs has kSavedLead * B rows before its own
//     static constexpr bool kHsInStorageType;    // or in the computing type, as saved is
//     static int32_t Index(const Tensor&);       // of its device, among those of this kind
//     static bool Owns(const Tensor&, int32_t index);
//     static const Kernels* Find(const char* cell, Storage);    // null: unknown
//     static int64_t HsStride(int64_t H, int64_t Hout), SavedUnits(int64_t H);
//     static Tensor NewLarge(const Tensor& like, sizes, dtype);
//     static Tensor Input(const Tensor& rows, bool ragged);     // as the engine can read it
//     static void Forward(const Kernels&, const LayerParams&, const Tensor& x, bool allow_tf32);
//     static void Backward(const Kernels&, const LayerGradParams&, const Tensor& x, bool allow_tf32);
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
    FRNN_CHECK(t.scalar_type() == dtype_, name, ": expected the dtype of x, got another one");
  }
  ScalarType dtype_;
  int32_t index_;
  std::forward_list<T> kept_;
};

// One call of a layer: arguments checked, and laid out for an engine.
template <class Device, class T>
struct Call {
  using Optional = std::optional<T>;

  Call(const char* cell, const T& x, const T& h0, const Optional& c0,
       const std::array<Optional, 2 * kWeights>& weights, const Optional& batch_sizes)
      : storage(StorageOf(x, "x")), kernels(Find(cell, storage)), arguments(x) {
    p.storage = storage;
    p.ragged = batch_sizes.has_value();
    FRNN_CHECK(x.dim() == (p.ragged ? 2 : 3), "x: expected ", p.ragged ? "[rows, I]" : "[T, B, I]",
               ", got shape ", Shape(x.sizes()));
    FRNN_CHECK(h0.dim() == 3, "h0: expected [directions, B, Hout], got shape ", Shape(h0.sizes()));
    p.dirs = int(h0.size(0));
    p.B = h0.size(1);
    p.Hout = h0.size(2);
    FRNN_CHECK(p.dirs == 1 || p.dirs == 2, "h0: expected 1 or 2 directions, got ", p.dirs);
    FRNN_CHECK(weights[0].has_value() && weights[1].has_value(),
               "weights: w_ih and w_hh are required");
    // Where Hout is H, the engines take h for what it is.
    const Optional& w_hr = weights[4];
    FRNN_CHECK(!w_hr.has_value() || (w_hr->dim() == 2 && w_hr->size(1) != p.Hout),
               "w_hr: expected [Hout, H] with Hout other than H, got shape ", Shape(w_hr->sizes()));
    p.H = w_hr.has_value() ? w_hr->size(1) : p.Hout;
    p.I = x.size(-1);
    Steps(x, batch_sizes);
    p.threads = int(torch::stable::get_num_threads());

    const T& rows = arguments.Input(x, p.ragged);
    p.x = rows.const_data_ptr();
    p.x_t_stride = p.ragged ? 0 : rows.stride(0);
    p.x_b_stride = rows.stride(p.ragged ? 0 : 1);
    p.h0 = arguments.Take("h0", h0, {p.dirs, p.B, p.Hout});
    FRNN_CHECK(c0.has_value() == (kernels.extra_states > 0),
               "c0: ", c0.has_value() ? "this cell has no c" : "this cell needs c");
    p.c0 = arguments.Take("c0", c0, {p.dirs, p.B, kernels.extra_states * p.H});
    FRNN_CHECK(!w_hr.has_value() || kernels.projectable,
               "w_hr: this cell reads h elementwise and takes no projection");
    for (int d = 0; d < p.dirs; d++) {
      const Optional* w = &weights[d * kWeights];
      for (int i = 0; i < kWeights; i++)
        FRNN_CHECK(w[i].has_value() == weights[i].has_value(),
                   "weights: both directions need the same ones");
      p.w[d].w_ih = arguments.Take("w_ih", w[0], {kernels.gates_x * p.H, p.I});
      p.w[d].w_hh = arguments.Take("w_hh", w[1], {kernels.gates_h * p.H, p.Hout});
      p.w[d].b_ih = arguments.Take("b_ih", w[2], {kernels.gates_x * p.H});
      p.w[d].b_hh = arguments.Take("b_hh", w[3], {kernels.gates_h * p.H});
      p.w[d].w_hr = arguments.Take("w_hr", w[4], {p.Hout, p.H});
    }
  }

  ScalarType computing() const {
    return storage == Storage::kDouble ? ScalarType::Double : ScalarType::Float;
  }
  Dims YShape() const {
    const int64_t width = p.dirs * p.Hout;
    return p.ragged ? Dims{p.rows, width} : Dims{p.T, p.B, width};
  }
  Dims HShape() const { return {p.dirs, p.B, p.Hout}; }
  Dims CShape() const { return {p.dirs, p.B, kernels.extra_states * p.H}; }
  // hs: [dirs, rows, ..] and saved: [dirs, rows, kSaved + kExtra, ..], see LayerParams.
  Dims HsShape() const {
    return {p.dirs, Device::kSavedLead * p.B + p.rows, Device::HsStride(p.H, p.Hout)};
  }
  ScalarType HsType() const { return Device::kHsInStorageType ? arguments.dtype() : computing(); }
  Dims SavedShape() const {
    return {p.dirs, p.rows, kernels.tape, Device::SavedUnits(p.H)};
  }

  // What the backward reads beside: the gradients that come in, and what the forward saved.
  void TakeGradients(const Optional& dy, const Optional& dh_n, const Optional& dc_n, const T& hs,
                     const T& saved) {
    p.hs = Saved("hs", hs, HsShape(), HsType());
    p.saved = Saved("saved", saved, SavedShape(), computing());
    if (dy.has_value()) {
      if (p.ragged)
        CheckShape("dy", *dy, {p.rows, p.dirs * p.Hout});
      else
        CheckShape("dy", *dy, {p.T, p.B, p.dirs * p.Hout});
      const T& rows = arguments.Rows("dy", *dy);
      p.dy = rows.const_data_ptr();
      p.dy_t_stride = p.ragged ? 0 : rows.stride(0);
      p.dy_b_stride = rows.stride(p.ragged ? 0 : 1);
    }
    p.dh_n = arguments.Take("dh_n", dh_n, {p.dirs, p.B, p.Hout});
    if (kernels.extra_states > 0)
      p.dc_n = arguments.Take("dc_n", dc_n, {p.dirs, p.B, kernels.extra_states * p.H});
  }
  // Where the gradients of x, h0, c0 and the ten weights go, in this order.
  std::array<void**, kGradients> GradientSlots() {
    std::array<void**, kGradients> slots = {&p.dx, &p.dh0, &p.dc0};
    size_t i = 3;
    for (DirectionGrads& g : p.dw)
      for (void** slot : {&g.w_ih, &g.w_hh, &g.b_ih, &g.b_hh, &g.w_hr}) slots[i++] = slot;
    return slots;
  }
  // Whether the engine leaves rows of dx alone, which must then be zero.
  bool SkipsRowsOf(const T& x) const { return p.ragged && x.size(0) > p.rows; }

  Storage storage;
  const typename Device::Kernels& kernels;
  Arguments<Device, T> arguments;
  LayerGradParams p{};

 private:
  std::vector<int64_t> steps_;  // p.batch_sizes, then p.offsets

  static const typename Device::Kernels& Find(const char* cell, Storage storage) {
    const auto* kernels = Device::Find(cell, storage);
    FRNN_CHECK(kernels != nullptr, "cell: unknown cell '", cell, "'");
    return *kernels;
  }

  void* Saved(const char* name, const T& t, const Dims& shape, ScalarType dtype) {
    FRNN_CHECK(SameShape(t, shape) && t.scalar_type() == dtype && t.is_contiguous() &&
                   Device::Owns(t, arguments.index()),
               name, ": not what the forward returned");
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
      const T& contiguous = arguments.Contiguous(*batch_sizes);
      const int64_t* data = static_cast<const int64_t*>(contiguous.const_data_ptr());
      std::copy(data, data + p.T, sizes);
    } else {
      FRNN_CHECK(x.size(1) == p.B, "h0: expected batch ", x.size(1), ", got ", p.B);
      std::fill(sizes, offsets, p.B);
    }
    for (int64_t t = 0; t < p.T; t++) {
      FRNN_CHECK(sizes[t] <= (t == 0 ? p.B : sizes[t - 1]) && (sizes[t] > 0 || !p.ragged),
                 "batch_sizes: expected positive, not increasing, at most B = ", p.B);
      offsets[t + 1] = offsets[t] + sizes[t];
    }
    FRNN_CHECK(!p.ragged || sizes[0] == p.B, "h0: expected batch ", sizes[0], ", got ", p.B);
    p.rows = offsets[p.T];
    // Data past the last step is ignored, as in torch.nn.
    FRNN_CHECK(!p.ragged || x.size(0) >= p.rows, "x: expected at least ", p.rows, " rows, got ",
               x.size(0));
    p.batch_sizes = sizes;
    p.offsets = offsets;
  }
};

// clang-format off
#define FRNN_WEIGHT_ARGUMENTS \
  const Tensor& w_ih, const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh, const Optional& w_hr, \
  const Optional& w_ih_r, const Optional& w_hh_r, const Optional& b_ih_r, const Optional& b_hh_r, const Optional& w_hr_r
#define FRNN_WEIGHT_LIST {w_ih, w_hh, b_ih, b_hh, w_hr, w_ih_r, w_hh_r, b_ih_r, b_hh_r, w_hr_r}
// clang-format on

template <size_t... I>
auto ToTuple(const std::vector<Tensor>& v, std::index_sequence<I...>) {
  return std::make_tuple(v[I]...);
}

template <class Device>
struct Operators {
  // Runs the forward; with hs and saved they hold what the backward needs.
  static std::tuple<Tensor, Tensor, Tensor> Forward(Call<Device, Tensor>& call, const Tensor& x,
                                                    bool allow_tf32, Tensor* hs, Tensor* saved) {
    auto& p = call.p;
    const ScalarType dtype = x.scalar_type();
    Tensor y = Device::NewLarge(x, call.YShape(), dtype);
    Tensor h_n = New(x, call.HShape(), dtype);
    Tensor c_n = New(x, call.CShape(), dtype);
    if (hs != nullptr) {
      *hs = Device::NewLarge(x, call.HsShape(), call.HsType());
      *saved = Device::NewLarge(x, call.SavedShape(), call.computing());
      p.hs = hs->mutable_data_ptr();
      p.saved = saved->mutable_data_ptr();
    }
    p.y = y.mutable_data_ptr();
    p.h_n = h_n.mutable_data_ptr();
    p.c_n = c_n.mutable_data_ptr();
    if (p.rows > 0) Device::Forward(call.kernels, p, x, allow_tf32);
    return {y, h_n, c_n};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> Layer(
      std::string cell, const Tensor& x, const Tensor& h0, const Optional& c0,
      FRNN_WEIGHT_ARGUMENTS, const Optional& batch_sizes, bool allow_tf32) {
    Call<Device, Tensor> call(cell.c_str(), x, h0, c0, FRNN_WEIGHT_LIST, batch_sizes);
    Tensor hs, saved;
    auto [y, h_n, c_n] = Forward(call, x, allow_tf32, &hs, &saved);
    return {y, h_n, c_n, hs, saved};
  }

  static std::tuple<Tensor, Tensor, Tensor> LayerInfer(std::string cell, const Tensor& x,
                                                       const Tensor& h0, const Optional& c0,
                                                       FRNN_WEIGHT_ARGUMENTS,
                                                       const Optional& batch_sizes,
                                                       bool allow_tf32) {
    Call<Device, Tensor> call(cell.c_str(), x, h0, c0, FRNN_WEIGHT_LIST, batch_sizes);
    return Forward(call, x, allow_tf32, nullptr, nullptr);
  }

  // Bit i of `needs` asks for output i; the others are empty.
  static auto LayerBackward(std::string cell, const Optional& dy, const Optional& dh_n,
                            const Optional& dc_n, const Tensor& x, const Tensor& h0,
                            const Optional& c0, FRNN_WEIGHT_ARGUMENTS, const Optional& batch_sizes,
                            const Tensor& hs, const Tensor& saved, int64_t needs, bool allow_tf32) {
    const std::array<Optional, 2 * kWeights> weights = FRNN_WEIGHT_LIST;
    Call<Device, Tensor> call(cell.c_str(), x, h0, c0, weights, batch_sizes);
    auto& p = call.p;
    call.TakeGradients(dy, dh_n, dc_n, hs, saved);

    const bool nothing = p.rows == 0;
    const auto slots = call.GradientSlots();
    std::vector<Tensor> grads;
    for (int i = 0; i < kGradients; i++) {
      const Optional like = i == 0 ? x : i == 1 ? h0 : i == 2 ? c0 : weights[i - 3];
      const bool wanted = like.has_value() && (needs >> i & 1);
      if (!wanted)
        grads.push_back(New(x, {0}, x.scalar_type()));
      else if (nothing || (i == 0 && call.SkipsRowsOf(x)))
        grads.push_back(torch::stable::new_zeros(*like, like->sizes()));
      else if (i == 0)  // dx goes on to the layer before and is gone; those of weights stay
        grads.push_back(Device::NewLarge(x, {x.sizes().begin(), x.sizes().end()}, x.scalar_type()));
      else
        grads.push_back(torch::stable::new_empty(*like, like->sizes()));
      *slots[i] = wanted ? grads.back().mutable_data_ptr() : nullptr;
    }
    if (!nothing) Device::Backward(call.kernels, p, x, allow_tf32);
    return ToTuple(grads, std::make_index_sequence<kGradients>());
  }
};

}  // namespace frnn

// Registers the three operators for one dispatch key, and exports the facts that the fakes of
// fused_rnn/ops.py need, without a detour through the dispatcher.
//   frnn_cell_fact(cell, i): 0: values of a unit on the tape, 1: extra states; -1 for an unknown cell
//   frnn_saved_fact(H, Hout, i): 0: units padded, 1: a row of hs, 2: leading blocks of B rows in hs,
//                                3: whether hs has the dtype of x
#define FRNN_REGISTER(Device, KEY)                                                         \
  STABLE_TORCH_LIBRARY_IMPL(fused_rnn, KEY, m) {                                           \
    m.impl("layer", TORCH_BOX(&frnn::Operators<Device>::Layer));                           \
    m.impl("layer_infer", TORCH_BOX(&frnn::Operators<Device>::LayerInfer));                \
    m.impl("layer_backward", TORCH_BOX(&frnn::Operators<Device>::LayerBackward));          \
  }                                                                                        \
  extern "C" __attribute__((visibility("default"))) int frnn_cell_fact(const char* cell,   \
                                                                       int fact) {         \
    const auto* kernels = Device::Find(cell, frnn::Storage::kFloat);                       \
    return kernels == nullptr ? -1 : (fact == 0 ? kernels->tape : kernels->extra_states);  \
  }                                                                                        \
  extern "C" __attribute__((visibility("default"))) int64_t frnn_saved_fact(               \
      int64_t H, int64_t Hout, int fact) {                                                 \
    if (fact == 2) return Device::kSavedLead;                                              \
    if (fact == 3) return Device::kHsInStorageType;                                        \
    return fact == 0 ? Device::SavedUnits(H) : Device::HsStride(H, Hout);                  \
  }
