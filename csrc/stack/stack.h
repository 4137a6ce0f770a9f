// A stack of layers over one sequence, for any engine: each layer reads the outputs of the one below
// it. This is the one place that knows which part of the states, weights and buffers is whose. No
// torch, no engine.
#pragma once
#include <cstddef>

#include "core/memory.h"
#include "core/params.h"

namespace frnn {

// `all` has the sizes of a layer, what goes into the first one and comes out of the last, and what has
// a part for each layer and direction, whole: states [layers * dirs, ..] and their gradients.
struct Stack {
  LayerGradParams all{};
  int layers = 0, extra_states = 0;
  Vector<DirectionWeights> weights;  // [layers * dirs]
  Vector<DirectionGrads> gradients;  // likewise
  // [layers - 1, rows, dirs * Hout]: what a layer gives to the next. Where no backward follows, two
  // parts in turn do.
  void* between = nullptr;
  bool keeps_between = false;
  // all.hs and all.saved: the tape of all layers, of so many bytes for each; or each layer writes its
  // own over that of the one before.
  bool keeps_tape = false;
  size_t hs_bytes = 0, saved_bytes = 0;
  // Of the backward: two parts like those of `between`, for the gradients of these; and one for what a
  // layer that runs again has as its output.
  void *grad_between[2] = {nullptr, nullptr}, *outputs_again = nullptr;

  int64_t Width() const { return all.dirs * all.Hout; }
  int64_t BetweenParts() const { return keeps_between || layers < 3 ? layers - 1 : 2; }
  size_t BetweenBytes() const { return size_t(all.rows * Width() * StorageSize(all.storage)); }
  void* Between(int layer) const {
    return static_cast<char*>(between) + size_t(layer % BetweenParts()) * BetweenBytes();
  }

  // run(LayerParams) runs a layer. passed(data, i): the outputs of layer i lie in data.
  template <class Run, class Passed>
  void Forward(const Run& run, const Passed& passed) const {
    for (int i = 0; i < layers; i++) {
      const LayerParams p = Layer(i);
      run(p);
      if (i + 1 < layers) passed(p.y, i);
    }
  }

  // run(LayerGradParams) runs the backward of a layer; without a tape `run_again`, its forward, comes
  // before. passed(data, i): the gradients of the outputs of layer i lie in data.
  template <class RunAgain, class Run, class Passed>
  void Backward(const RunAgain& run_again, const Run& run, const Passed& passed) const {
    const int lowest = LowestWanted();
    for (int i = layers - 1; i >= lowest; i--) {
      const LayerGradParams p = GradientsOf(i, i > lowest);
      if (!keeps_tape) {
        LayerParams again = p;
        again.y = outputs_again;
        run_again(again);
      }
      run(p);
      if (i > lowest) passed(p.dx, i - 1);
    }
  }

 private:
  // Part i of what has one for each layer, of so many elements; null stays null.
  template <class P>
  P* Part(P* whole, int i, int64_t elements) const {
    using Byte = std::conditional_t<std::is_const_v<P>, const char, char>;
    return whole == nullptr ? nullptr
                            : static_cast<Byte*>(whole) + i * elements * StorageSize(all.storage);
  }
  int64_t HElements() const { return all.dirs * all.B * all.Hout; }
  int64_t CElements() const { return all.dirs * all.B * extra_states * all.H; }
  // Of what comes out of a layer: last states, or those after every step.
  int64_t StateRows() const { return all.dirs * (all.every_state ? all.rows : all.B); }
  int64_t HNElements() const { return StateRows() * all.Hout; }
  int64_t CNElements() const { return StateRows() * extra_states * all.H; }

  LayerParams Layer(int i) const {
    LayerParams p = all;
    if (i > 0) {
      p.x = Between(i - 1);
      p.I = p.x_b_stride = Width();
      p.x_t_stride = p.ragged ? 0 : p.B * Width();
    }
    if (i + 1 < layers) p.y = Between(i);
    p.h0 = Part(all.h0, i, HElements()), p.h_n = Part(all.h_n, i, HNElements());
    p.c0 = Part(all.c0, i, CElements()), p.c_n = Part(all.c_n, i, CNElements());
    p.h_mask = Part(all.h_mask, i, HElements());
    p.zoneout = Part(all.zoneout, i, all.dirs * all.zoneout_rows * (1 + extra_states) * all.H);
    if (keeps_tape) {
      p.hs = static_cast<char*>(all.hs) + i * hs_bytes;
      p.saved = static_cast<char*>(all.saved) + i * saved_bytes;
    }
    for (int d = 0; d < p.dirs; d++) p.w[d] = weights[i * p.dirs + d];
    return p;
  }

  LayerGradParams GradientsOf(int i, bool wants_dx) const {
    LayerGradParams p = all;
    static_cast<LayerParams&>(p) = Layer(i);
    if (i + 1 < layers) {
      p.dy = grad_between[i & 1];
      p.dy_b_stride = Width();
      p.dy_t_stride = p.ragged ? 0 : p.B * Width();
    }
    if (i > 0) p.dx = wants_dx ? grad_between[(i - 1) & 1] : nullptr;
    p.dh_n = Part(all.dh_n, i, HNElements()), p.dh0 = Part(all.dh0, i, HElements());
    p.dc_n = Part(all.dc_n, i, CNElements()), p.dc0 = Part(all.dc0, i, CElements());
    for (int d = 0; d < p.dirs; d++) p.dw[d] = gradients[i * p.dirs + d];
    return p;
  }

  // The first layer of which a gradient is wanted.
  int LowestWanted() const {
    if (all.dx || all.dgiven || all.dh0 || all.dc0) return 0;
    for (int i = 0; i < int(gradients.size()); i++)
      for (int k = 0; k < DirectionGrads::kCount; k++)
        if (gradients[i][k]) return i / all.dirs;
    return layers;
  }
};

}  // namespace frnn
