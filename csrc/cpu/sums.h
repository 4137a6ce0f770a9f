// Sums over all steps of a sequence, kept in two parts: one rounding error for each step would be more
// than torch.nn has, which sums a whole batch at once.
#pragma once
#include "cpu/convert.h"

FRNN_BEGIN

// sum + low += x, for a vector of each: `low` gets what rounding takes from the sum (Knuth, The Art of
// Computer Programming 2, 4.2.2, theorem B).
FRNN_INLINE void AddExactly(T* sum, T* low, V x) {
  const V before = load<V>(sum), after = before + x, added = after - before;
  store<V>(sum, after);
  store<V>(low, load<V>(low) + ((before - (after - added)) + (x - added)));
}
// out[i] = sum[i] + low[i], i < n. A sum that is infinite leaves NaN in `low`.
FRNN_INLINE void Rounded(const T* sum, const T* low, int64_t n, T* out) {
  for (int64_t i = 0; i < n; i++) out[i] = low[i] == low[i] ? sum[i] + low[i] : sum[i];
}

FRNN_END
