// Products of float matrices on a tile unit for int8: the cut Cut::kFixed of cpu/bf16.h, which calls
// what is declared here.
//
// A row of the left operand (a column of the right one) is a fixed-point number of 24 bits per
// element: a_k = L n_k / kMost, where L is the largest |a_k| of the row and n_k = 2^16 p + 2^8 q + r
// of signed digits of eight bits. Of the nine products of digits of n and m the six of the highest
// three orders are summed, exactly, in integers:
//   c = L_a L_b / kMost^2 * 2^16 (2^16 sum p p' + 2^8 sum (p q' + q p') + sum (p r' + q q' + r p')).
// Digits are half as many bytes as three bfloat16, and their products take half as long. The error of a
// term is about 2^-24.5 L_a L_b, whatever the term: in a row whose elements are alike, as that of a sum of
// floats; of an element much smaller than its row's largest, fewer bits are left.
#pragma once
#include "cpu/bf16.h"

namespace frnn {
namespace fixed {

using bf16::Operand;
using bf16::Order;

bool Available();

// Each as in cpu/bf16.h. What is `measured` has out.largest already, for a row of which the caller packs
// a part only.
bool PackRows(const float* a, int64_t lda, int64_t rows, int64_t k0, int64_t k1, int64_t K,
              const Operand& out, bool measured);
bool PackLeftAcross(const float* a, int64_t lda, int64_t rows, int64_t K, const Operand& out);
bool PackRight(const float* b, int64_t ldb, Order order, int64_t columns, int64_t K,
               const Operand& out, bool measured);
void Multiply(const Operand& a, int64_t M, const Operand& b, int64_t N, float* c, int64_t ldc,
              bool accumulate, bool backwards);

// largest[r] = max |a| over elements [k0, k1) of row (or column) r, and over what it was before if
// `more`. NaN counts as more than inf.
void Measure(const float* a, int64_t lda, Order order, int64_t rows, int64_t k0, int64_t k1,
             float* largest, bool more);

// out[r] = the largest of `count` measurements of row r, `stride` apart.
void Largest(const float* measured, int64_t stride, int count, int64_t rows, float* out);

}  // namespace fixed
}  // namespace frnn
