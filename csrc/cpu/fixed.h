// Products of float matrices on a tile unit for int8: the cut Cut::kFixed of cpu/parts.h, which calls
// what is declared here.
//
// A row of the left operand (a column of the right one) is a fixed-point number of 24 bits per
// element: a_k = L n_k / kMost, where L is the largest |a_k| of the row and n_k = 2^16 p + 2^8 q + r
// of signed digits of eight bits. Of the nine products of digits of n and m the six of the highest
// three orders are summed, exactly, in integers:
//   c = L_a L_b / kMost^2 * 2^16 (2^16 sum p p' + 2^8 sum (p q' + q p') + sum (p r' + q q' + r p')).
// Digits are half as many bytes as three bfloat16, and their products take half as long.
//
// The error of a term is about 2^-24.5 L_a L_b, whatever the term: as small as that of a sum of floats
// where the elements of a row are alike, but too large where a few k outweigh all others in a and
// weigh little in b (features and weights of unlike scale). So both sides are balanced first:
//   sum_k a_k b_k = sum_k (a_k f_k) (b_k / f_k), with a power of two f_k that makes one side's
// elements of about the same size for all k (Factors). What counts is then the product, as in a sum of
// floats.
#pragma once
#include "cpu/parts.h"

namespace frnn {
namespace fixed {

using parts::Order;
using parts::TiledOperand;

// Each as in cpu/parts.h. An element times its factor may be larger than parts::kLargest: the answer is
// false, and the tiles are as good as any if it is finite. What is `measured` has out.largest already,
// for a row of which the caller packs a part only.
FRNN_EXPORT bool PackRows(const float* a, int64_t lda, int64_t rows, int64_t k0, int64_t k1,
                          int64_t K, const TiledOperand& out, bool measured);
FRNN_EXPORT bool PackLeftAcross(const float* a, int64_t lda, int64_t rows, int64_t K,
                                const TiledOperand& out);
FRNN_EXPORT bool PackRight(const float* b, int64_t ldb, Order order, int64_t columns, int64_t K,
                           const TiledOperand& out, bool measured);
FRNN_EXPORT void Multiply(const TiledOperand& a, int64_t M, const TiledOperand& b, int64_t N,
                          float* c, int64_t ldc, bool accumulate, bool backwards);

// largest[r] = max_k |a_k factors_k| over elements [k0, k1) of row (or column) r, and over what it was
// before if `more`. NaN counts as more than inf.
FRNN_EXPORT void Measure(const float* a, int64_t lda, Order order, int64_t rows, int64_t k0,
                         int64_t k1, const float* factors, float* largest, bool more);
// out[r] = the largest of `count` measurements of row r, `stride` apart.
FRNN_EXPORT void Largest(const float* measured, int64_t stride, int count, int64_t rows,
                         float* out);

// The size of the elements k of a matrix: the sum of the exponents of those that are not zero, and their
// number. Sums of integers, so that the order in which threads add theirs does not matter.
struct ExponentSum {
  int32_t exponents, count;
};
// sizes[k] = that of elements [begin, end) of each of K rows of w, added to what it was if `more`.
FRNN_EXPORT void MeasureRows(const float* w, int64_t ldw, int64_t K, int64_t begin, int64_t end,
                             ExponentSum* sizes);
// The same of K columns, over rows [begin, end).
FRNN_EXPORT void MeasureColumns(const float* w, int64_t ldw, int64_t K, int64_t begin, int64_t end,
                                ExponentSum* sizes, bool more);
// factors[k] = about the geometric mean of the elements k that `count` threads measured, their sizes
// `stride` apart, relative to that of all elements; a power of two. inverse[k] = 1 / factors[k].
FRNN_EXPORT void Factors(const ExponentSum* sizes, int64_t stride, int count, int64_t K,
                         float* factors, float* inverse);
// The same where the elements k are as large as means[k] >= 0.
FRNN_EXPORT void Factors(const float* means, int64_t K, float* factors, float* inverse);

}  // namespace fixed
}  // namespace frnn
