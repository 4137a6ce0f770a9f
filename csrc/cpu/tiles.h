// How a team shares the operands of products on tiles (cpu/parts.h, cpu/fixed.h): their memory, and what
// fixed point has to measure first.
#pragma once
#include <initializer_list>
#include <vector>

#include "core/scratch.h"
#include "cpu/fixed.h"
#include "cpu/parts.h"
#include "cpu/threads.h"

FRNN_BEGIN

// Nothing where tiles are not used.
inline parts::Operand TakeTiles(Scratch& s, bool tiled, int64_t rows, int64_t K, parts::Cut cut) {
  if (!tiled) return {nullptr, 0, parts::Cut::kThree, nullptr, nullptr};
  const int64_t depth = parts::DepthBlocks(K, cut);
  return {s.Take<parts::Part>(parts::Size(rows, depth, cut)), depth, cut,
          s.Take<float>(cut == parts::Cut::kFixed ? RoundUp(rows, parts::kRows) : 0), nullptr};
}

// The tiles of a step's left operand, by the parity of the step, which the threads share. In fixed
// point each has what the team measured (ShareLargest) for itself; `measured` is for what each did.
template <class Own>
void TakeStepTiles(Scratch& s, bool tiled, int64_t batch, int64_t K, parts::Cut cut,
                   std::vector<Own>& own, parts::Operand (Own::*tiles)[2], float* (&measured)[2]) {
  for (int parity = 0; parity < 2; parity++) {
    const parts::Operand shared = TakeTiles(s, tiled, batch, K, cut);
    const int64_t rows = shared.cut == parts::Cut::kFixed ? RoundUp(batch, parts::kRows) : 0;
    measured[parity] = s.Take<float>(int64_t(own.size()) * rows);
    for (Own& to : own) {
      parts::Operand& mine = (to.*tiles)[parity];
      mine = shared;
      if (rows > 0) mine.largest = s.Take<float>(rows);
    }
  }
}

// The factors that balance the two sides of a product in fixed point; nothing for other cuts.
struct Balance {
  int64_t depth;  // or 0
  float *factors, *inverse;

  void Take(Scratch& s, const parts::Operand& tiles) {
    depth = tiles.cut == parts::Cut::kFixed ? tiles.PaddedDepth() : 0;
    factors = s.Take<float>(depth);
    inverse = s.Take<float>(depth);
  }
  // From the sizes of `gates` times K elements, which are apart in the depth.
  void Find(const fixed::Size* sizes, int count, int gates, int64_t K,
            std::initializer_list<parts::Operand*> left,
            std::initializer_list<parts::Operand*> right) {
    if (depth == 0) return;
    for (int64_t at = 0; at < depth; at += depth / gates)
      fixed::Factors(sizes + at, depth, count, K, factors + at, inverse + at);
    for (parts::Operand* a : left) a->factors = factors;
    for (parts::Operand* b : right) b->factors = inverse;
  }
};

// Fixed point needs the largest element of n whole rows, of which each thread has some columns:
// measure(largest) looks at those. False for other cuts, which need none.
template <class F>
bool ShareLargest(Team& team, const parts::Operand& to, float* largest, int64_t n,
                  const F& measure) {
  if (to.cut != parts::Cut::kFixed) return false;
  const int64_t stride = RoundUp(n, parts::kRows);
  measure(largest + team.id * stride);
  team.Sync();
  fixed::Largest(largest, stride, team.size, n, to.largest);
  return true;
}

FRNN_END
