// The CPU kernels of the operators whose schemas are in fused_rnn/ops.py: checks, output tensors,
// parameter structs. Written against libtorch's stable ABI, so one binary serves torch 2.10 and
// newer.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/params.h"
#include "core/scratch.h"

// Since torch 2.11; absent (null) in 2.10, which our stable ABI target still admits.
extern "C" __attribute__((weak)) AOTITorchError
torch_from_blob(void* data, int64_t dim, const int64_t* sizes, const int64_t* strides,
                int64_t offset, int32_t dtype, int32_t device_type, int32_t device_index,
                AtenTensorHandle* result, int32_t layout, const uint8_t* metadata,
                int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using frnn::CpuKernels;
using frnn::Storage;

constexpr int kWeights = 5;  // w_ih, w_hh, b_ih, b_hh, w_hr

Storage StorageOf(const Tensor& t, const char* name) {
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
      STD_TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16");
  }
}

std::string Shape(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::string s = "(";
  for (size_t i = 0; i < sizes.size(); i++) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + ")";
}

void CheckShape(const char* name, const Tensor& t, std::initializer_list<int64_t> expected) {
  const std::vector<int64_t> want(expected);
  bool same = t.dim() == int64_t(want.size());
  for (size_t i = 0; same && i < want.size(); i++) same = t.size(i) == want[i];
  STD_TORCH_CHECK(same, name, ": expected shape ", Shape({want.data(), want.size()}), ", got ",
                  Shape(t.sizes()));
}

const CpuKernels& Kernels(const std::string& cell, Storage storage) {
  const CpuKernels* k = frnn::FindCpuKernels(cell.c_str(), storage == Storage::kDouble);
  STD_TORCH_CHECK(k != nullptr, "cell: unknown cell '", cell, "'");
  return *k;
}

Tensor Contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
// Rows may lie anywhere, elements of a row must be adjacent.
Tensor RowContiguous(const Tensor& t) {
  return t.size(-1) <= 1 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

// A tensor argument as the engines read it, kept alive for the call.
class Arguments {
 public:
  explicit Arguments(ScalarType dtype) : dtype_(dtype) {}
  const void* Take(const char* name, const Optional& t, std::initializer_list<int64_t> shape) {
    if (!t.has_value()) return nullptr;
    CheckType(name, *t);
    CheckShape(name, *t, shape);
    kept_.push_back(Contiguous(*t));
    return kept_.back().const_data_ptr();
  }
  Tensor Rows(const char* name, const Tensor& t) {
    CheckType(name, t);
    kept_.push_back(RowContiguous(t));
    return kept_.back();
  }

 private:
  void CheckType(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
    STD_TORCH_CHECK(t.scalar_type() == dtype_, name, ": expected the dtype of x, got another one");
  }
  ScalarType dtype_;
  std::vector<Tensor> kept_;
};

struct Layer {
  Layer(const std::string& cell, const Tensor& x, const Tensor& h0, const Optional& c0,
        const std::array<Optional, 2 * kWeights>& weights, const Optional& batch_sizes)
      : storage(StorageOf(x, "x")), kernels(Kernels(cell, storage)), arguments(x.scalar_type()) {
    p.storage = storage;
    p.ragged = batch_sizes.has_value();
    STD_TORCH_CHECK(x.dim() == (p.ragged ? 2 : 3), "x: expected ",
                    p.ragged ? "[rows, I]" : "[T, B, I]", ", got shape ", Shape(x.sizes()));
    STD_TORCH_CHECK(h0.dim() == 3, "h0: expected [directions, B, Hout], got shape ",
                    Shape(h0.sizes()));
    p.dirs = int(h0.size(0));
    p.B = h0.size(1);
    p.Hout = h0.size(2);
    STD_TORCH_CHECK(p.dirs == 1 || p.dirs == 2, "h0: expected 1 or 2 directions, got ", p.dirs);
    STD_TORCH_CHECK(weights[0].has_value() && weights[1].has_value(),
                    "weights: w_ih and w_hh are required");
    p.H = weights[1]->size(0) / kernels.gates_h;
    p.I = x.size(-1);
    Steps(x, batch_sizes);
    p.threads = int(torch::stable::get_num_threads());

    const Tensor rows = arguments.Rows("x", x);
    p.x = rows.const_data_ptr();
    p.x_t_stride = p.ragged ? 0 : rows.stride(0);
    p.x_b_stride = rows.stride(p.ragged ? 0 : 1);
    p.h0 = arguments.Take("h0", h0, {p.dirs, p.B, p.Hout});
    STD_TORCH_CHECK(c0.has_value() == (kernels.extra_states > 0),
                    "c0: ", c0.has_value() ? "this cell has no c" : "this cell needs c");
    p.c0 = arguments.Take("c0", c0, {p.dirs, p.B, kernels.extra_states * p.H});
    STD_TORCH_CHECK(weights[4].has_value() == (p.H != p.Hout),
                    "w_hr: needed exactly when the width of h0 is not H");
    STD_TORCH_CHECK(!weights[4].has_value() || !kernels.uses_h,
                    "w_hr: this cell reads h elementwise and takes no projection");
    for (int d = 0; d < p.dirs; d++) {
      const Optional* w = &weights[d * kWeights];
      for (int i = 0; i < kWeights; i++)
        STD_TORCH_CHECK(w[i].has_value() == weights[i].has_value(),
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
  // Values per unit and row that the backward needs beside h.
  int64_t tape() const { return kernels.saved + kernels.extra_states; }

  Storage storage;
  const CpuKernels& kernels;
  Arguments arguments;
  frnn::LayerGradParams p{};
  std::vector<int64_t> sizes, offsets;

 private:
  void Steps(const Tensor& x, const Optional& batch_sizes) {
    if (p.ragged) {
      STD_TORCH_CHECK(batch_sizes->dim() == 1 && batch_sizes->is_cpu() &&
                          batch_sizes->scalar_type() == ScalarType::Long,
                      "batch_sizes: expected a 1-D int64 CPU tensor");
      const Tensor contiguous = Contiguous(*batch_sizes);
      const int64_t* data = static_cast<const int64_t*>(contiguous.const_data_ptr());
      sizes.assign(data, data + contiguous.numel());
      p.T = int64_t(sizes.size());
    } else {
      p.T = x.size(0);
      STD_TORCH_CHECK(x.size(1) == p.B, "h0: expected batch ", x.size(1), ", got ", p.B);
      sizes.assign(p.T, p.B);
    }
    STD_TORCH_CHECK(p.T > 0, "Expected sequence length to be larger than 0 in RNN");
    offsets.assign(1, 0);
    for (int64_t t = 0; t < p.T; t++) {
      STD_TORCH_CHECK(sizes[t] <= (t == 0 ? p.B : sizes[t - 1]) && (sizes[t] > 0 || !p.ragged),
                      "batch_sizes: expected positive, not increasing, at most B = ", p.B);
      offsets.push_back(offsets.back() + sizes[t]);
    }
    STD_TORCH_CHECK(!p.ragged || sizes[0] == p.B, "h0: expected batch ", sizes[0], ", got ", p.B);
    p.rows = offsets.back();
    // Data past the last step is ignored, as in torch.nn.
    STD_TORCH_CHECK(!p.ragged || x.size(0) >= p.rows, "x: expected at least ", p.rows,
                    " rows, got ", x.size(0));
    p.batch_sizes = sizes.data();
    p.offsets = offsets.data();
  }
};

Tensor New(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, dtype);
}

// Large tensors come from the engine's own pool: tens of megabytes that come and go at every training
// step would be fresh pages from the allocator, and faulting them in took a fifth of a GRU's step.
Tensor NewPooled(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t count = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = count;
    count *= sizes[i];
  }
  const bool half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  const int64_t bytes = count * (dtype == ScalarType::Double ? 8 : (half ? 2 : 4));
  if (torch_from_blob == nullptr || bytes < frnn::kPooledBytes) return New(like, sizes, dtype);
  size_t capacity = 0;
  void* data = frnn::AcquireScratch(bytes, &capacity);
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(
      data, int64_t(sizes.size()), sizes.data(), strides.data(), 0, type,
      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void* block, void* context) { frnn::ReleaseScratch(block, size_t(context)); },
      reinterpret_cast<void*>(capacity)));
  return Tensor(handle);
}

// Runs the forward; with `save`, hs and saved hold what the backward needs.
std::tuple<Tensor, Tensor, Tensor> Forward(Layer& layer, const Tensor& x, bool save, Tensor* hs,
                                           Tensor* saved) {
  auto& p = layer.p;
  const ScalarType dtype = x.scalar_type();
  Tensor y = p.ragged ? NewPooled(x, {p.rows, p.dirs * p.Hout}, dtype)
                      : NewPooled(x, {p.T, p.B, p.dirs * p.Hout}, dtype);
  Tensor h_n = New(x, {p.dirs, p.B, p.Hout}, dtype);
  Tensor c_n = New(x, {p.dirs, p.B, layer.kernels.extra_states * p.H}, dtype);
  if (save) {
    *hs = NewPooled(x, {p.dirs, p.B + p.rows, frnn::HsStride(p.H, p.Hout)}, layer.computing());
    *saved = NewPooled(x, {p.dirs, p.rows, layer.tape(), frnn::Padded(p.H)}, layer.computing());
    p.hs = hs->mutable_data_ptr();
    p.saved = saved->mutable_data_ptr();
  }
  p.y = y.mutable_data_ptr();
  p.h_n = h_n.mutable_data_ptr();
  p.c_n = c_n.mutable_data_ptr();
  if (p.rows > 0) layer.kernels.layer_fwd(p);
  return {y, h_n, c_n};
}

// clang-format off
#define WEIGHT_ARGUMENTS \
  const Tensor& w_ih, const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh, const Optional& w_hr, \
  const Optional& w_ih_r, const Optional& w_hh_r, const Optional& b_ih_r, const Optional& b_hh_r, const Optional& w_hr_r
#define WEIGHT_LIST {w_ih, w_hh, b_ih, b_hh, w_hr, w_ih_r, w_hh_r, b_ih_r, b_hh_r, w_hr_r}
// clang-format on

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> LayerTrain(std::string cell, const Tensor& x,
                                                              const Tensor& h0, const Optional& c0,
                                                              WEIGHT_ARGUMENTS,
                                                              const Optional& batch_sizes) {
  Layer layer(cell, x, h0, c0, WEIGHT_LIST, batch_sizes);
  Tensor hs, saved;
  auto [y, h_n, c_n] = Forward(layer, x, true, &hs, &saved);
  return {y, h_n, c_n, hs, saved};
}

std::tuple<Tensor, Tensor, Tensor> LayerInfer(std::string cell, const Tensor& x, const Tensor& h0,
                                              const Optional& c0, WEIGHT_ARGUMENTS,
                                              const Optional& batch_sizes) {
  Layer layer(cell, x, h0, c0, WEIGHT_LIST, batch_sizes);
  return Forward(layer, x, false, nullptr, nullptr);
}

template <size_t... I>
auto ToTuple(const std::vector<Tensor>& v, std::index_sequence<I...>) {
  return std::make_tuple(v[I]...);
}

// Bit i of `needs` asks for output i; the others are empty.
auto LayerBackward(std::string cell, const Optional& dy, const Optional& dh_n, const Optional& dc_n,
                   const Tensor& x, const Tensor& h0, const Optional& c0, WEIGHT_ARGUMENTS,
                   const Optional& batch_sizes, const Tensor& hs, const Tensor& saved,
                   int64_t needs) {
  const std::array<Optional, 2 * kWeights> weights = WEIGHT_LIST;
  Layer layer(cell, x, h0, c0, weights, batch_sizes);
  auto& p = layer.p;
  CheckShape("hs", hs, {p.dirs, p.B + p.rows, frnn::HsStride(p.H, p.Hout)});
  CheckShape("saved", saved, {p.dirs, p.rows, layer.tape(), frnn::Padded(p.H)});
  STD_TORCH_CHECK(hs.scalar_type() == layer.computing() && hs.is_contiguous(),
                  "hs: not what the forward returned");
  STD_TORCH_CHECK(saved.scalar_type() == layer.computing() && saved.is_contiguous(),
                  "saved: not what the forward returned");
  p.hs = hs.data_ptr();
  p.saved = saved.data_ptr();
  if (dy.has_value()) {
    if (p.ragged)
      CheckShape("dy", *dy, {p.rows, p.dirs * p.Hout});
    else
      CheckShape("dy", *dy, {p.T, p.B, p.dirs * p.Hout});
    const Tensor rows = layer.arguments.Rows("dy", *dy);
    p.dy = rows.const_data_ptr();
    p.dy_t_stride = p.ragged ? 0 : rows.stride(0);
    p.dy_b_stride = rows.stride(p.ragged ? 0 : 1);
  }
  p.dh_n = layer.arguments.Take("dh_n", dh_n, {p.dirs, p.B, p.Hout});
  p.dc_n = layer.kernels.extra_states
               ? layer.arguments.Take("dc_n", dc_n, {p.dirs, p.B, layer.kernels.extra_states * p.H})
               : nullptr;

  std::vector<Tensor> grads;
  const auto add = [&](const Optional& like, bool zero) -> void* {
    const bool wanted = like.has_value() && (needs >> grads.size() & 1);
    const std::array<int64_t, 1> none = {0};
    if (!wanted)
      grads.push_back(torch::stable::new_empty(x, {none.data(), 1}));
    else if (zero)
      grads.push_back(torch::stable::new_zeros(*like, like->sizes()));
    else if (grads
                 .empty())  // dx goes on to the layer before and is gone; gradients of weights stay
      grads.push_back(NewPooled(x, {x.sizes().begin(), x.sizes().end()}, x.scalar_type()));
    else
      grads.push_back(torch::stable::new_empty(*like, like->sizes()));
    return wanted ? grads.back().mutable_data_ptr() : nullptr;
  };
  const bool nothing = p.rows == 0;
  p.dx = add(x, nothing || (p.ragged && x.size(0) > p.rows));
  p.dh0 = add(h0, nothing);
  p.dc0 = add(c0, nothing);
  for (int d = 0; d < 2; d++) {
    const Optional* w = &weights[d * kWeights];
    p.dw[d].w_ih = add(w[0], nothing);
    p.dw[d].w_hh = add(w[1], nothing);
    p.dw[d].b_ih = add(w[2], nothing);
    p.dw[d].b_hh = add(w[3], nothing);
    p.dw[d].w_hr = add(w[4], nothing);
  }
  if (!nothing) layer.kernels.layer_bwd(p);
  return ToTuple(grads, std::make_index_sequence<3 + 2 * kWeights>());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) {
  m.impl("layer", TORCH_BOX(&LayerTrain));
  m.impl("layer_infer", TORCH_BOX(&LayerInfer));
  m.impl("layer_backward", TORCH_BOX(&LayerBackward));
}

// Facts for the fakes (fused_rnn/ops.py), without a detour through the dispatcher.
extern "C" {
__attribute__((visibility("default"))) const char* frnn_cpu_capability() {
  return frnn::CpuCapability();
}
// 0: saved values per unit, 1: extra states; -1 for an unknown cell.
__attribute__((visibility("default"))) int frnn_cell_fact(const char* cell, int fact) {
  const CpuKernels* k = frnn::FindCpuKernels(cell, 0);
  return k == nullptr ? -1 : (fact == 0 ? k->saved : k->extra_states);
}
// Row strides of the saved tensors: 0: units padded, 1: a row of hs.
__attribute__((visibility("default"))) int64_t frnn_saved_stride(int64_t H, int64_t Hout,
                                                                 int which) {
  return which == 0 ? frnn::Padded(H) : frnn::HsStride(H, Hout);
}
}
