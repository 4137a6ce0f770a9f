// What the backward makes of all steps once the last one is done: the gradients of states, parameters and
// what is given, and those of the input and the weights, each a large product over the whole sequence.
#pragma once
#include <algorithm>

#include "cpu/backward.h"
#include "cpu/sums.h"

FRNN_BEGIN

// dh0, dc0 and the gradients of biases and parameters, the own parts.
template <class C>
void Layer<C>::BackwardPass::StoreGrads(Thread& my) const {
  for (int64_t b = 0; b < p.B && p.dh0 && my.valid > 0 && !dh_in_place; b++)
    StoreRow(At(p.dh0, p.storage, (my.dir * p.B + b) * p.Hout + my.first), p.storage,
             dh + b * h_stride + my.first, my.valid);
  for (int64_t i = my.panels.begin; i < my.panels.end; i++) {
    const int64_t unit = i * kUnits, n = p.H - unit < kUnits ? p.H - unit : kUnits;
    const int64_t at = i - my.panels.begin;
    T sums[std::max(C::kD, C::kParams) * kUnits];
    Rounded(my.db + at * C::kD * kUnits, my.db_low + at * C::kD * kUnits, C::kD * kUnits, sums);
    for (int q = 0; q < C::kX && my.dw->b_ih; q++)
      StoreRow(At(my.dw->b_ih, p.storage, q * p.H + unit), p.storage, sums + C::kDx[q] * kUnits, n);
    for (int q = 0; q < C::kH && my.dw->b_hh; q++)
      StoreRow(At(my.dw->b_hh, p.storage, q * p.H + unit), p.storage, sums + C::kDh[q] * kUnits, n);
    Rounded(my.dparams + at * C::kParams * kUnits, my.dparams_low + at * C::kParams * kUnits,
            C::kParams * kUnits, sums);
    for (int k = 0; k < C::kParams; k++)
      if (my.dw->params[k])
        StoreRow(At(my.dw->params[k], p.storage, unit), p.storage, sums + k * kUnits, n);
    for (int64_t r = 0; r < p.B * kExtra && p.dc0; r++)
      StoreRow(At(p.dc0, p.storage, (my.dir * p.B * kExtra + r) * p.H + unit), p.storage,
               my.dc + ((i - my.panels.begin) * p.B * kExtra + r) * kUnits, n);
  }
}

// To those of what is given, the own units, are added those of this direction.
template <class C>
void Layer<C>::BackwardPass::AddGivenGrads(const Thread& my) const {
  alignas(kLine) T block[kUnits];
  for (int64_t r = 0; r < p.rows && p.dgiven; r++)
    for (int64_t i = my.panels.begin; i < my.panels.end; i++)
      for (int k = 0; k < C::kGiven; k++) {
        const int64_t unit = i * kUnits, n = std::min<int64_t>(p.H - unit, kUnits);
        void* sum = At(p.dgiven, p.storage, (r * C::kGiven + k) * p.H + unit);
        const T* own = d + r * d_stride + C::kDx[C::kX + k] * gate_stride + unit;
        LoadRow(sum, p.storage, block, n);
        for (int64_t u = 0; u < n; u++) block[u] += own[u];
        StoreRow(sum, p.storage, block, n);
      }
}

// The gradients of the own gains and shifts.
template <class C>
void Layer<C>::BackwardPass::StoreGains(const Thread& my) const {
  // [panel][gate][unit]
  const auto store_units = [&](const T* from, int gates, void* to) {
    for (int64_t i = my.panels.begin; i < my.panels.end && to; i++)
      for (int q = 0; q < gates; q++, from += kUnits)
        StoreRow(At(to, p.storage, q * p.H + i * kUnits), p.storage, from,
                 std::min<int64_t>(p.H - i * kUnits, kUnits));
  };
  store_units(my.x_norm.GainGrads(0), C::kX, my.dw->gains[kInput]);
  store_units(my.h_norm.GainGrads(0), C::kH, GainOfH(*my.dw));
  store_units(my.shown_norm.GainGrads(0), 1, my.dw->gains[kShown]);
  store_units(my.dshift, 1, my.dw->shift);
}

// dX = d W_ih, to which the second direction adds. Rows are split over the team; where there are
// few, columns are.
template <class C>
void Layer<C>::BackwardPass::InputGrad(Team& team, Thread& my) const {
  const bool by_columns = p.rows <= plan.dx_rows;
  my.dx_product.Begin(team, my.dir, my.w->w_ih, FitsTiles(my), by_columns);
  const int64_t count = x_common.tiles_of_columns.count;
  const auto rows = by_columns ? Team::Range{0, p.rows} : team.Split(p.rows, plan.dx_rows);
  const auto tiles = by_columns ? team.Split(count) : Team::Range{0, count};
  for (int64_t r = rows.begin; r < rows.end; r += plan.dx_rows) {
    const int64_t n = std::min(rows.end - r, plan.dx_rows);
    my.dx_product.Multiply(
        n, tiles, [&](int q) { return Gate(x_grads, q, r); }, x_grads.stride,
        narrow ? nullptr : static_cast<T*>(p.dx) + r * p.I, my.dir == 1,
        [&](T* dx, int64_t stride, int64_t col, int64_t width) {
          StoreInputGrad(my.dir, r, n, dx, stride, col, width);
        });
  }
}

// Columns [col, col + width) of n rows of dX from `row` on, which are overwritten by the sum with
// those of the first direction.
template <class C>
void Layer<C>::BackwardPass::StoreInputGrad(int dir, int64_t row, int64_t n, T* rows,
                                            int64_t stride, int64_t col, int64_t width) const {
  const T* sum = narrow ? dx_sum : static_cast<T*>(p.dx);
  for (int64_t r = 0; r < n; r++) {
    T* out = rows + r * stride;
    const int64_t at = (row + r) * p.I + col;
    for (int64_t i = 0; i < width && dir == 1; i++) out[i] += sum[at + i];
    if (narrow && dir + 1 < p.dirs)
      memcpy(dx_sum + at, out, width * sizeof(T));
    else
      StoreRow(At(p.dx, p.storage, at), p.storage, out, width);
  }
}

// dW_hh of a product, where load(first row, rows, first column, ..) brings its operand. Of a
// block-diagonal W_hh one gate and block after the other: a block of d with its columns of h.
template <class C>
template <class F>
void Layer<C>::BackwardPass::RecurrentWeightGrad(Team& team, const WeightGrad& grad,
                                                 const F& load) const {
  if (p.blocks <= 1) return grad.Run(team, load);
  const int64_t width = BlockWidth(p);
  for (int q = 0; q < grad.gates && grad.dw; q++)
    for (int64_t block = 0; block < p.blocks; block++) {
      const int64_t first = block * width;
      WeightGrad block_grad = grad;
      block_grad.gates = 1;
      block_grad.column = grad.column + q;
      block_grad.left.d = grad.left.d + first;
      block_grad.left.H = block_grad.cols = width;
      block_grad.dw = At(grad.dw, p.storage, (q * p.H + first) * width);
      block_grad.Run(team, [&](int64_t r0, int64_t n, int64_t col, auto nv, T* dst) {
        load(r0, n, first + col, nv, dst);
      });
    }
}

// dW_ih = d^T x, dW_hh = d^T h_{t-1}, dW_hr = (dh + dy)^T h_full.
template <class C>
void Layer<C>::BackwardPass::WeightGrads(Team& team, Thread& my) {
  Gradients& gradients = my.gradients;
  gradients.d = x_grads.d;
  gradients.stride = x_grads.stride;
  gradients.gate_stride = gate_stride;
  gradients.rows = p.rows;
  gradients.H = p.H;
  gradients.sizes = d_sizes;
  WeightGrad x_grad;
  x_grad.left = gradients;
  x_grad.gates = C::kX;
  x_grad.column = x_grads.column;
  x_grad.cols = p.I;
  x_grad.packed = grad_right;
  x_grad.tiles = x_right;
  x_grad.misfit = &misfit_block[0];
  x_grad.first_row = my.dir * p.rows;
  x_grad.sum = sum_ih;
  x_grad.dw = my.dw->w_ih;
  x_grad.storage = p.storage;
  const auto load_x = [&](int64_t r0, int64_t n, int64_t col, auto nv, T* dst) {
    constexpr int kWidth = decltype(nv)::value * N;
    RowCursor cursor(p, r0);
    for (int64_t r = 0; r < n; r++, cursor.Next())
      LoadPadded<kWidth>(At(Input::Row(p, cursor.t, cursor.b), p.storage, col), p.storage,
                         p.I - col, dst + r * kWidth);
  };
  WeightGrad h_grad = x_grad;
  h_grad.left.d = h_grads.d;
  h_grad.left.stride = h_grads.stride;
  h_grad.gates = Products<C>::Gates(0);
  h_grad.column = h_grads.column;
  h_grad.cols = p.Hout;
  h_grad.tiles = h_right;
  h_grad.misfit = &misfit_block[1];
  h_grad.sum = sum_hh;
  h_grad.dw = my.dw->w_hh;
  const auto load_h = [&](int64_t r0, int64_t n, int64_t col, auto nv, T* dst) {
    constexpr int kWidth = decltype(nv)::value * N;
    RowCursor cursor(p, r0);
    for (int64_t r = 0; r < n; r++, cursor.Next()) {
      T* row = dst + r * kWidth;
      if (IsReset(my, cursor.t, cursor.b)) {
        std::fill_n(row, kWidth, T(0));
        continue;
      }
      LoadPadded<kWidth>(my.hs + PreviousRow(p, my.dir, cursor.t, cursor.b) * hs_stride + col,
                         kPlain, p.Hout - col, row);
      for (int64_t u = 0; u < kWidth && mask; u += N)
        store<V>(row + u, Masked(row + u, mask + cursor.b * h_stride + col + u, p.storage));
    }
  };
  if (FitsTiles(my) && x_grads.d == h_grads.d) {
    WeightGrad::RunTiles(team, kMostGrads, x_grad, load_x, h_grad, load_h);
  } else if (FitsTiles(my)) {
    WeightGrad no_grad = x_grad;
    no_grad.dw = nullptr;
    WeightGrad::RunTiles(team, kMostGrads, x_grad, load_x, no_grad, load_x);
    WeightGrad::RunTiles(team, kMostGrads, h_grad, load_h, no_grad, load_h);
  } else {
    x_grad.Run(team, load_x);
    if (Products<C>::Gates(0) > 0) RecurrentWeightGrad(team, h_grad, load_h);
    ForOperands([&](auto k) {
      WeightGrad grad = h_grad;
      grad.gates = Products<C>::Gates(k);
      grad.column = h_grads.column + Products<C>::First(k);
      grad.dw = RowsOfProduct(p, k, my.dw->w_hh);
      RecurrentWeightGrad(team, grad, [&](int64_t r0, int64_t n, int64_t col, auto nv, T* dst) {
        constexpr int kWidth = decltype(nv)::value * N;
        RowCursor cursor(p, r0);
        for (int64_t r = 0; r < n; r++, cursor.Next())
          for (int64_t u = col; u < col + kWidth; u += N, dst += N) {
            if (u >= p.H) {
              store<V>(dst, V{});
              continue;
            }
            const T* tape = TapeOf(p, my.dir, cursor.t, u / kUnits) +
                            (cursor.b * kTape + k - 1) * kUnits + u % kUnits;
            store<V>(dst, mask ? Masked(tape, mask + cursor.b * h_stride + u, p.storage)
                               : load<V>(tape));
          }
      });
    });
  }
  if (projected) {
    WeightGrad projection_grad = h_grad;
    projection_grad.gates = 1;
    projection_grad.left.H = p.Hout;
    projection_grad.column = kInOrder;
    projection_grad.left.d = dh_seq;
    projection_grad.left.stride = h_stride;
    projection_grad.cols = p.H;
    projection_grad.dw = my.dw->w_hr;
    projection_grad.Run(team, [&](int64_t r0, int64_t n, int64_t col, auto nv, T* dst) {
      constexpr int kWidth = decltype(nv)::value * N;
      for (int64_t r = 0; r < n; r++)
        LoadPadded<kWidth>(my.hs + (p.B + r0 + r) * hs_stride + h_stride + col, kPlain, p.H - col,
                           dst + r * kWidth);
    });
  }
}

FRNN_END
