// Operands of products on the matrix unit (cpu/parts.h, cpu/fixed.h): their memory, what fixed
// point has to measure first, and how a team shares the left operand of a step.
#pragma once
#include <atomic>
#include <initializer_list>

#include "core/scratch.h"
#include "cpu/convert.h"
#include "cpu/fixed.h"
#include "cpu/parts.h"
#include "cpu/threads.h"

FRNN_BEGIN

constexpr bool kTiles = parts::kCompiled && sizeof(V) == 64 && sizeof(T) == 4;

// Elements as the matrix unit takes them. Only called where kTiles says that they are floats.
FRNN_INLINE float* Floats(T* p) { return reinterpret_cast<float*>(p); }
FRNN_INLINE const float* Floats(const T* p) { return reinterpret_cast<const float*>(p); }

// Nothing where tiles are not used.
inline parts::TiledOperand TakeTiles(Scratch& s, bool tiled, int64_t rows, int64_t K,
                                     parts::Cut cut) {
  if (!tiled) return {nullptr, 0, parts::Cut::kThree, nullptr, nullptr};
  const int64_t depth = parts::DepthBlocks(K, cut);
  return {s.Take<parts::TileWord>(parts::TiledSize(rows, depth, cut)), depth, cut,
          s.Take<float>(cut == parts::Cut::kFixed ? RoundUp(rows, parts::kRows) : 0), nullptr};
}

// The factors that balance the two sides of a product in fixed point; nothing for other cuts.
struct Balance {
  int64_t depth;  // or 0
  float *factors, *inverse;

  void Take(Scratch& s, const parts::TiledOperand& tiles) {
    depth = tiles.cut == parts::Cut::kFixed ? tiles.PaddedDepth() : 0;
    factors = s.Take<float>(depth);
    inverse = s.Take<float>(depth);
  }
  // From the sizes of `gates` times K elements, which are apart in the depth.
  void Find(const fixed::ExponentSum* sizes, int count, int gates, int64_t K,
            std::initializer_list<parts::TiledOperand*> left, parts::TiledOperand& right) {
    if (depth == 0) return;
    for (int64_t at = 0; at < depth; at += depth / gates)
      fixed::Factors(sizes + at, depth, count, K, factors + at, inverse + at);
    for (parts::TiledOperand* a : left) a->factors = factors;
    right.factors = inverse;
  }
};

// The left operand of the product of a step: `gates` matrices [batch, K] side by side. Each thread
// has some columns of them and multiplies with all, so the team shares their tiles; those of a step
// and of the next are apart. Steps are numbered on over both directions.
class StepOperand {
 public:
  // What the threads of a team share.
  struct Common {
    bool tiled;
    int gates;
    int64_t batch, K;
    parts::Cut cut;
    parts::TiledOperand tiles[2];
    float* largest[2];  // [thread][row], what each measured in its columns
    // Of each parity, the last step with elements out of the range of tiles.
    std::atomic<int64_t> misfit[2] = {{-1}, {-1}};

    int64_t PaddedK() const { return parts::DepthBlocks(K, cut) * parts::DepthOf(cut); }
    void Take(Scratch& s, int threads) {
      const int64_t rows = tiled && cut == parts::Cut::kFixed ? RoundUp(batch, parts::kRows) : 0;
      for (int i = 0; i < 2; i++) {
        tiles[i] = TakeTiles(s, tiled, batch, gates * PaddedK(), cut);
        largest[i] = s.Take<float>(threads * rows);
      }
    }
  };

  void Take(Scratch& s, Common& shared) {
    common_ = &shared;
    for (int i = 0; i < 2; i++) {
      tiles[i] = shared.tiles[i];
      if (tiles[i].cut == parts::Cut::kFixed)
        tiles[i].largest = s.Take<float>(RoundUp(shared.batch, parts::kRows));
    }
  }

  // The columns [begin, end) of each gate for a step, n rows; the last thread's columns go on to
  // the padding. False if they are out of range.
  template <class GateOf>
  bool Share(Team& team, int64_t step, int64_t n, int64_t begin, int64_t end, const GateOf& gate,
             int64_t stride) const {
    const Common& c = *common_;
    const parts::TiledOperand& to = tiles[step & 1];
    const int64_t depth = parts::DepthBlocks(c.K, c.cut), valid = end < c.K ? end : c.K;
    const bool measured = c.cut == parts::Cut::kFixed;
    if (measured) {  // the largest element of whole rows
      const int64_t padded = RoundUp(n, parts::kRows);
      float* all = c.largest[step & 1];
      for (int q = 0; q < c.gates; q++)
        fixed::Measure(Floats(gate(q)), stride, parts::Order::kAlong, n, begin, valid,
                       to.Depth(q * depth).factors, all + team.id * padded, q > 0);
      team.Sync();
      fixed::Largest(all, padded, team.size, n, to.largest);
    }
    bool fits = true;
    for (int q = 0; q < c.gates; q++)
      fits &= parts::PackRows(gate(q), kPlain, stride, n, begin,
                              team.id + 1 == team.size ? c.PaddedK() : end, c.K,
                              to.Depth(q * depth), measured);
    return fits;
  }
  // Of a step that this thread has shared: the team multiplies on vectors.
  void Refuse(int64_t step) const {
    common_->misfit[step & 1].store(step, std::memory_order_relaxed);
  }
  // After a barrier behind Share.
  bool Fits(int64_t step) const {
    return common_->misfit[step & 1].load(std::memory_order_relaxed) != step;
  }

  parts::TiledOperand tiles[2];  // by the parity of the step, with what this thread knows of them

 private:
  Common* common_ = nullptr;
};

FRNN_END
