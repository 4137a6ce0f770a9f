// One call of a stack of layers, for any device: arguments checked, and laid out for an engine. A
// template over the tensor T: torch's own, or what else has the few members used here
// (direct/tensor.h).
#pragma once
#include <algorithm>
#include <cstring>
#include <forward_list>
#include <optional>

#include "ops/packed.h"
#include "ops/tensor.h"
#include "stack/stack.h"

namespace frnn {

// What a device is:
//   struct Device {
//     using Kernels = ...;                       // derives from CellFacts
//     static constexpr const char* kName;        // "CPU"
//     static constexpr int kSavedLead;           // hs has kSavedLead * B rows before its own
//     static constexpr bool kHsInStorageType;    // or in the computing type, as saved is
//     static constexpr bool kPacks;              // weights once, for many calls
//     static bool Invariant();                   // what is asked for, see LayerParams::invariant
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

// What a call is about beside its tensors. Bit i of `present`: tensor i of the cell's list is among the
// weights, which are those of each layer and direction in turn. Behind them all is what is given for
// each step, to a cell that asks for it.
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
    p.blocks = shape.blocks;
    p.invariant = Device::Invariant();
    FRNN_CHECK(shape.norm >= 0 && shape.norm <= int64_t(Norm::kRms) && shape.norm_eps >= 0,
               "norm: expected 0, 1 or 2, and norm_eps from 0 on, got ", shape.norm, " and ",
               shape.norm_eps);
    p.norm = Norm(shape.norm);
    std::memcpy(&p.norm_eps, &shape.norm_eps, sizeof(p.norm_eps));
    if (kernels.given > 0 && count > 0) count--;
    TakeWeights(shape.present, weights, count);
    if (kernels.given > 0) TakeGiven(weights[count], x);
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
    FRNN_CHECK(
        p.zoneout == nullptr || !kernels.reads_new_h ||
            (p.zoneout_rows == p.rows && kernels.extra_states == 0),
        "zoneout: this cell's backward takes no single row for all steps, and none of a cell "
        "with more states than h");
    p.dh_n = arguments.Take("dh_n", dh_n, {runs(), StateRows(), p.Hout});
    if (kernels.extra_states > 0)
      p.dc_n = arguments.Take("dc_n", dc_n, {runs(), StateRows(), kernels.extra_states * p.H});
  }
  // Where the gradients of x, h0, c0, the weights and what is given go, in this order. To the last
  // is added.
  void** GradientSlot(int64_t i) {
    void** const first[] = {&p.dx, &p.dh0, &p.dc0};
    if (i < 3) return first[i];
    const auto each = int64_t(tensors.size());
    if (IsAddedTo(i)) return &p.dgiven;
    return &stack.gradients[(i - 3) / each][kernels.Slot(tensors[(i - 3) % each])];
  }
  bool IsAddedTo(int64_t i) const { return i == 3 + runs() * int64_t(tensors.size()); }
  // ---- weights that are packed once, for many calls ----

  // Bytes of an element: 2 or 1, see DirectionWeights, if that is wanted of floats.
  int64_t PackedElement(int64_t wanted) const {
    const bool fewer = wanted == 2 || wanted == 1;
    return fewer && computing() == ScalarType::Float ? wanted : BytesOf(computing());
  }
  int64_t PackedWords(int64_t element) const {
    int64_t bytes = PackedHeads();
    for (int64_t run = 0; run < runs(); run++) bytes += PackedBytes(run, element);
    return bytes / int64_t(sizeof(int64_t));
  }
  // Into so many words.
  void Pack(const T* weights, void* words, int64_t element) const {
    char* at = static_cast<char*>(words) + PackedHeads();
    for (int64_t run = 0; run < runs(); run++) {
      static_cast<PackedHead*>(words)[run] = PackedHeadOf(run, weights, element);
      LayerParams one = p;
      one.I = InputWidth(run);
      DirectionWeights w = stack.weights[run];
      w.packed = at, w.packed_bytes = element;
      kernels.pack(one, w);
      at += PackedBytes(run, element);
    }
  }
  // Has the engine use so many words, if they are of these weights as they are. Otherwise false.
  bool TakePacked(const void* packed, int64_t words, const T* weights) {
    if constexpr (Device::kPacks) {
      int64_t at = PackedHeads(), bytes = words * int64_t(sizeof(int64_t));
      if (bytes < at) return false;
      const char* data = static_cast<const char*>(packed);
      const auto* heads = reinterpret_cast<const PackedHead*>(data);
      const int64_t element = PackedElement(heads->element);
      for (int64_t run = 0; run < runs(); run++) {
        if (!heads[run].IsOf(PackedHeadOf(run, weights, element))) return false;
        at += PackedBytes(run, element);
      }
      if (at != bytes) return false;
      at = PackedHeads();
      for (int64_t run = 0; run < runs(); at += PackedBytes(run++, element)) {
        stack.weights[run].packed = data + at;
        stack.weights[run].packed_bytes = element;
      }
    }
    return Device::kPacks;
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

  int64_t InputWidth(int64_t run) const { return run < p.dirs ? p.I : stack.Width(); }
  int64_t PackedHeads() const { return RoundUp(runs() * int64_t(sizeof(PackedHead)), kPackedLine); }
  int64_t PackedBytes(int64_t run, int64_t element) const {
    const int64_t size = kernels.packed_size(InputWidth(run), p.H, p.Hout / p.blocks, element);
    return RoundUp(size + kPackedLine, kPackedLine);
  }
  PackedHead PackedHeadOf(int64_t run, const T* weights, int64_t element) const {
    PackedHead head{&kernels, element, int64_t(storage), InputWidth(run), p.H, p.Hout, p.blocks,
                    {},       {}};
    for (size_t k = 0; k < tensors.size() && tensors[k] < PackedHead::kWeights; k++) {
      const T& w = weights[run * int64_t(tensors.size()) + int64_t(k)];
      head.Put(tensors[k], w.is_contiguous() ? w.const_data_ptr() : nullptr, VersionOf(w));
    }
    return head;
  }

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
    constexpr int kOfNorm = DirectionWeights::kCount - DirectionWeights::kGains;
    const int known = kernels.tensors() + (p.norm == Norm::kNone ? 0 : kOfNorm);
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
    FRNN_CHECK(
        w_hr == nullptr || kernels.projectable,
        "w_hr: this cell reads h or the new h unit by unit, or has another output, and takes "
        "no projection");
    const T *g_ih = find(kernels.tensors() + kInput), *g_hh = find(kernels.tensors() + kRecurrent),
            *g = find(kernels.tensors() + kSum), *g_c = find(kernels.tensors() + kShown),
            *s_c = find(kernels.tensors() + kPlaces);
    FRNN_CHECK(g_hh == nullptr || (kernels.gates_h > 0 && kernels.operands == 0),
               "g_hh: this cell has no w_hh, or other operands of it than h");
    FRNN_CHECK(g == nullptr || (kernels.adds && g_ih == nullptr && g_hh == nullptr),
               "g: expected without g_ih and g_hh, of a cell that reads sums alone");
    FRNN_CHECK((g_c != nullptr) == (s_c != nullptr) && (g_c == nullptr || kernels.shows),
               "g_c, s_c: expected both or none, of a cell whose output shows a state");
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
      for (const int i : tensors)
        stack.weights[run][kernels.Slot(i)] = TakeWeight(i, *weights++, InputWidth(run));
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
        const int place = i - kernels.tensors();
        return arguments.Take(name, t,
                              {place < 0 || place >= kShown ? p.H
                               : place == kRecurrent        ? gates_h
                                                            : gates_x});
    }
  }

  void TakeGiven(const T& given, const T& x) {
    const int64_t width = kernels.given * p.H;
    p.given = p.ragged ? arguments.Take("given", given, {x.size(0), width})
                       : arguments.Take("given", given, {p.T, p.B, width});
  }
  void TakeStages(const Stages<T>& stages, const T& x) {
    FRNN_CHECK(
        p.blocks == 1 || (p.H == p.Hout && kernels.gates_h > 0 && p.H % (p.blocks * kAlign) == 0),
        "blocks: expected 1, or blocks of a multiple of ", kAlign, " units, got ", p.blocks, " of ",
        p.H, " units");
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

}  // namespace frnn
