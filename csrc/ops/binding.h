// The operators whose schemas are in fused_rnn/ops/schemas.py, for any device: output tensors, and
// what of a call torch's dispatcher sees. A device is a struct that finds kernels, makes large tensors
// and runs a layer (cpu.h, cuda.cpp).
#pragma once
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#include "ops/call.h"

namespace frnn {

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

// What fakes need to know of a cell and of a tape.
extern "C" {
struct frnn_cell_t {
  int gates_x, gates_h, extra_states, tape, given, operands, reads_h, reads_new_h;
  int block_units;        // a block of a block-diagonal W_hh has a multiple of so many
  int shows;              // its output shows a state, which can be normalised on the way
  int adds, projectable;  // see CellFacts
};
struct frnn_tape_t {
  int64_t units, hs_row, hs_lead;  // padded units; a row of hs; blocks of B rows before its own
  bool hs_as_x;                    // its dtype is that of x, or the computing one
};
}

// What the schemas of all operators end with, see fused_rnn/ops/schemas.py.
// clang-format off
#define FRNN_INPUTS \
  const Text &cell, const Tensor &x, const Optional &h0, const Optional &c0, \
  const std::vector<Tensor> &weights, const Optional &masks, const Optional &batch_sizes, \
  const Optional &reset, const Optional &zoneout, const Optional &h_mask, int64_t layers, \
  int64_t directions, int64_t present, int64_t blocks, int64_t norm, double norm_eps, \
  bool every_state, bool allow_tf32, const Optional &packed
#define FRNN_INPUTS_LIST \
  {cell, x, h0, c0, weights, masks, batch_sizes, reset, zoneout, h_mask, layers, directions, \
   present, blocks, norm, norm_eps, every_state, allow_tf32, packed}
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
    const Optional& packed;
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
          masks(call.TakeMasks(in.masks, in.x)) {
      if (in.packed.has_value() && Device::Owns(*in.packed, call.arguments.index()) &&
          in.packed->scalar_type() == ScalarType::Long && in.packed->is_contiguous())
        call.TakePacked(in.packed->const_data_ptr(), in.packed->numel(), in.weights.data());
    }

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
  // The weights as later calls take them, whose x may have other rows. Empty if the device has none.
  static Tensor Pack(FRNN_INPUTS, int64_t element) {
    Work w(FRNN_INPUTS_LIST);
    if constexpr (Device::kPacks) {
      const int64_t bytes = w.call.PackedElement(element);
      Tensor words = Device::NewLarge(x, {w.call.PackedWords(bytes)}, ScalarType::Long);
      w.call.Pack(weights.data(), words.mutable_data_ptr(), bytes);
      return words;
    }
    return New(x, {int64_t(0)}, ScalarType::Long);
  }

  // Gradients of x, h0 and c0, then of the weights and of what is given. `needs` lists those that are
  // wanted, numbered in this order; the others are empty. Without a tape, hs and saved are.
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
      if (wanted && (nothing || call.IsAddedTo(i) || (i == 0 && call.SkipsRowsOf(x))))
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
  for (Storage s : {Storage::kFloat, Storage::kDouble, Storage::kBFloat16, Storage::kHalf})
    if (const CellFacts* found = Device::Find(cell, s)) return found;
  return nullptr;
}
template <class Device>
bool FindFacts(const char* cell, frnn::frnn_cell_t* facts) {
  const CellFacts* found = FindAny<Device>(cell);
  if (found == nullptr) return false;
  *facts = {found->gates_x, found->gates_h,  found->extra_states, found->tape,
            found->given,   found->operands, found->reads_h,      found->reads_new_h,
            kAlign,         found->shows,    found->adds,         found->projectable};
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

// Registers the operators for one dispatch key, and exports the facts that fused_rnn/ops/library.py needs,
// without a detour through the dispatcher.
#define FRNN_REGISTER(Device, KEY)                                                                 \
  STABLE_TORCH_LIBRARY_IMPL(fused_rnn, KEY, m) {                                                   \
    m.impl("recurrent_infer", &frnn::Boxed<TORCH_BOX(&frnn::Operators<Device>::Infer)>);           \
    m.impl("recurrent", &frnn::Boxed<TORCH_BOX(&frnn::Operators<Device>::Train)>);                 \
    m.impl("recurrent_recomputed", &frnn::Boxed<TORCH_BOX(&frnn::Operators<Device>::Recomputed)>); \
    m.impl("recurrent_backward", &frnn::Boxed<TORCH_BOX(&frnn::Operators<Device>::Backward)>);     \
    m.impl("recurrent_pack", &frnn::Boxed<TORCH_BOX(&frnn::Operators<Device>::Pack)>);             \
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
