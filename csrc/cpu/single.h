// The forward of a single sequence, see Layer::LoopOf.
#pragma once
#include "cpu/forward.h"

FRNN_BEGIN

// Of an operand in the computing type, from number `at` on.
inline const T* Numbers(const void* operand, int64_t at = 0) {
  return operand == nullptr ? nullptr : static_cast<const T*>(operand) + at;
}

// One step, as in decoding: there is next to nothing around its products, since what other passes set
// up takes longer than the products of a small layer. The gate math is that of any step, to the bit.
template <class C>
void Layer<C>::ForwardPass::OneStep(const LayerParams& p) {
  if constexpr (C::kH > 0 && C::kOperands == 0 && C::kGiven == 0) {
    alignas(kLine) T gates_x[C::kX * kUnits], b_ih[C::kX * kUnits];
    alignas(kLine) T gates_h[C::kH * kUnits], b_hh[C::kH * kUnits];
    alignas(kLine) T params[C::kParams * kUnits + N], c[kExtra * kUnits + N];
    alignas(kLine) T h[kUnits], h_new[kUnits];
    StepRows s{};
    s.gates_x = gates_x, s.gates_h = gates_h;
    s.b_ih = b_ih, s.b_hh = b_hh, s.params = params;
    s.h = h, s.h_new = h_new, s.c = c;
    s.round = p.storage;

    const DirectionWeights& w = p.w[0];
    for (int64_t panel = 0; panel < Panels(p); panel++) {
      ProductX::MultiplyUnpacked(1, Numbers(p.x), p.I, Numbers(w.w_ih), p.H, p.I, panel, gates_x,
                                 0);
      ProductH::MultiplyUnpacked(1, Numbers(p.h0), p.H, Numbers(w.w_hh), p.H, p.H, panel, gates_h,
                                 0);
      const int64_t unit = panel * kUnits, units = p.H - unit < kUnits ? p.H - unit : kUnits;
      // dst[row][unit], of rows of H numbers; null: zeros.
      const auto read = [&](const void* rows, int count, T* dst) {
        for (int i = 0; i < count; i++)
          LoadPadded<kUnits>(Numbers(rows, i * p.H + unit), kPlain, rows ? units : 0,
                             dst + i * kUnits);
      };
      read(w.b_ih, C::kX, b_ih);
      read(w.b_hh, C::kH, b_hh);
      for (int k = 0; k < C::kParams; k++) read(w.params[k], 1, params + k * kUnits);
      read(p.h0, 1, h);
      read(p.c0, kExtra, c);
      s.y = p.y == p.h_n ? nullptr : static_cast<T*>(p.y) + unit;
      s.units = units;
      GateMath<0>(s, 0, 1);
      memcpy(static_cast<T*>(p.h_n) + unit, h_new, units * sizeof(T));
      for (int e = 0; e < kExtra; e++)
        memcpy(static_cast<T*>(p.c_n) + e * p.H + unit, c + e * kUnits, units * sizeof(T));
    }
  }
}

// Steps of packed weights: cpu/steps.h, in memory of this call.
template <class C>
void Layer<C>::ForwardStream(const LayerParams& p) {
  if constexpr (C::kH > 0) {
    using Stream = Steps<C, int64_t, int64_t>;
    const int64_t padded = Stream::Padded(p.H);
    const DirectionWeights& w = p.w[0];
    Stream stream{};
    const bool packs = !IsPackedPlainly(w);
    T *packed, *b_ih, *b_hh, *params;
    Scratch scratch;
    scratch.Build([&](Scratch& s) {
      packed = s.Take<T>(packs ? Stream::PackedSize(p.I, p.H) : 0);
      b_ih = s.Take<T>(C::kX * padded);
      b_hh = s.Take<T>(C::kH * padded);
      params = s.Take<T>(C::kParams * padded);
      for (T*& h : stream.h) h = s.Take<T>(padded);
      stream.c = s.Take<T>(kExtra * padded);
      stream.operands = s.Take<T>(Stream::OperandsSize(p.H));
      stream.gates_x = s.Take<T>(Stream::GatesSize(p.I, p.H));
    });
    stream.inputs = p.I, stream.units = p.H;
    stream.packed = packs ? packed : static_cast<const T*>(w.packed);
    stream.b_ih = b_ih, stream.b_hh = b_hh, stream.params = params;
    if (packs) Stream::Pack(Numbers(w.w_ih), Numbers(w.w_hh), p.I, p.H, packed);
    for (int q = 0; q < C::kX; q++)
      Stream::PackUnits(Numbers(w.b_ih, q * p.H), q, C::kX, p.H, b_ih);
    for (int q = 0; q < C::kH; q++)
      Stream::PackUnits(Numbers(w.b_hh, q * p.H), q, C::kH, p.H, b_hh);
    for (int k = 0; k < C::kParams; k++)
      Stream::PackUnits(Numbers(w.params[k]), k, C::kParams, p.H, params);
    Stream::PackUnits(Numbers(p.h0), 0, 1, p.H, stream.h[0]);
    for (int e = 0; e < kExtra; e++)
      Stream::PackUnits(Numbers(p.c0, e * p.H), 0, 1, p.H, stream.c + e * padded);

    const T* const x = static_cast<const T*>(p.x);
    T* const y = static_cast<T*>(p.y);
    for (int64_t t = 0; t < p.T; t += kMostSteps) {
      const int64_t n = p.T - t < kMostSteps ? p.T - t : kMostSteps;
      stream.Run(x + t * p.x_t_stride, p.x_t_stride, n, y + t * p.H, p.H);
    }
    memcpy(p.h_n, stream.h[0], p.H * sizeof(T));
    for (int e = 0; e < kExtra; e++)
      memcpy(static_cast<T*>(p.c_n) + e * p.H, stream.c + e * padded, p.H * sizeof(T));
  }
}

FRNN_END
