#include "cpu/plan.h"

#include <numeric>

namespace frnn {
namespace cpu {
namespace {

using parts::Cut;
using parts::MatrixUnit;

int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t Most(int64_t a, int64_t b) { return a > b ? a : b; }

// In the computing type, which vectors can read as it lies.
bool IsPlain(const Problem& p) {
  return p.storage == (p.scalar_bytes == 4 ? Storage::kFloat : Storage::kDouble);
}

// In the time that multiply-adds of floats take: of bytes a vector has four times as many.
int64_t Macs(const Problem& p) {
  return p.rows * p.H * (p.gates_h * p.Hout + p.gates_x * p.I) / (p.bytes ? 4 : 1);
}

bool IsShort(const Problem& p) {
  constexpr int64_t kMacsOfShortCall = 100000000;  // a few milliseconds
  return Macs(p) < kMacsOfShortCall;
}

// As many as do a step sooner than one fewer would: each adds to what all wait for at the barrier.
// Without a recurrent product nobody waits before the end. `products`: of each weight.
int Threads(const Problem& p, const Machine& m, int products) {
  // What a thread could do while a team of two waits at a barrier, and while a team starts: of
  // narrow vectors less.
  constexpr int64_t kMacsPerBarrier = 4096, kMacsPerTeamAndByte = 3125;
  const int64_t most = Least(Least(p.threads, kMaxThreads), p.panels);
  const int64_t macs = Macs(p), of_step = p.B * p.gates_h * p.H * p.Hout / (p.bytes ? 4 : 1);
  const int64_t at_once = p.gates_h > 0 ? of_step : macs;
  const int64_t shared = products * macs < kMacsPerTeamAndByte * p.vector_bytes ? 0 : at_once;
  int64_t n = 1;
  while (n < most && n * (n + 1) * kMacsPerBarrier <= shared) n++;
  if (n > 1 && m.crowded && IsShort(p)) n--;
  return int(n);
}

// A bfloat16 is its own part, and half as many bytes. Splitting weights into more parts is worth it
// from so many rows per step, and in all, on; fixed point is fewer bytes than floats are, so that
// wide layers stream faster for any batch.
bool IsTiled(const Problem& p, const Machine& m) {
  if (p.vector_bytes != 64 || p.scalar_bytes != 4) return false;
  if (p.in_blocks || p.operands || p.bytes) return false;
  // Vectors multiply two bfloat16 in the time of one float, which six products per float do not
  // repay.
  const bool available = m.unit >= MatrixUnit::kTiles ||
                         (m.unit == MatrixUnit::kVectors && p.storage == Storage::kBFloat16);
  if (!available || p.storage == Storage::kBFloat16) return available;
  int64_t batch = p.storage == Storage::kHalf ? 8 : (p.H >= 256 ? 16 : 24);
  if (CutOf(m.unit, p.storage, p.Hout) == Cut::kFixed)
    batch = p.H >= 1024 ? 1 : (p.H >= 512 ? 4 : (p.H >= 256 ? 8 : 12));
  return p.B >= batch && p.rows >= 256;
}

Plan PlanOfBoth(const Problem& p, const Machine& m, int products) {
  Plan plan;
  plan.threads = Threads(p, m, products);
  // A step takes microseconds. Without a core for each thread, what is waited for may need ours.
  plan.spins = plan.threads > m.cores ? 0 : 2000;
  plan.is_short = IsShort(p);
  plan.tiled = !p.invariant && IsTiled(p, m);
  plan.one_chain = p.invariant;
  return plan;
}

// So few rows, in all or of a step, do not repay packing (some Hout / 8 steps of one row do); long
// rows of W have fewer sums over lanes, and in vectors of a whole line they stream as fast as
// panels do.
bool ReadsInputWeights(const Problem& p) {
  return IsPlain(p) && !p.invariant && p.rows <= (p.I >= 256 ? 16 : 12);
}
bool ReadsRecurrentWeights(const Problem& p) {
  if (!IsPlain(p) || p.invariant) return false;
  if (p.rows <= 16) return true;
  if (p.Hout % (p.vector_bytes / p.scalar_bytes) != 0) return false;
  if (p.B == 1) return p.T <= p.Hout / 8 || (p.vector_bytes == 64 && p.Hout >= 512);
  return p.B == 2 && p.T <= 32 && p.Hout >= 512;
}

// Of one step whose rows are fewer than those of W, and leave few lanes empty.
bool TurnsRows(const Problem& p, int gates) {
  const int64_t empty = RoundUp(p.B, p.vector_bytes / p.scalar_bytes) - p.B;
  return IsPlain(p) && !p.invariant && p.T == 1 && p.B <= kRowBlock && 2 * p.B <= gates * p.H &&
         8 * empty <= p.B;
}

// So few rows in all read w [K, cols] as it lies, at a stride that caches do not like twice. Those of
// one step do if w stays in the second-level cache, for which its lines must not be in the same
// places of all pages; else they use once what is packed.
Packing PackingOfColumns(const Problem& p, const Machine& m, int64_t K, int64_t cols,
                         bool one_step) {
  constexpr int64_t kPage = 4096;
  const int64_t alike = std::gcd(cols * p.scalar_bytes, kPage);
  const bool stays = K * alike * (128 / p.vector_bytes) <= m.l2_bytes;
  if (IsPlain(p) && (p.rows <= 12 || (one_step && stays))) return Packing::kNone;
  return one_step && p.rows > 12 ? Packing::kEachUse : Packing::kOnce;
}

}  // namespace

Cut CutOf(MatrixUnit unit, Storage s, int64_t K) {
  if (s != Storage::kFloat) return s == Storage::kBFloat16 ? Cut::kOne : Cut::kTwo;
  return K >= kFixedDepth && unit == MatrixUnit::kFixedTiles ? Cut::kFixed : Cut::kThree;
}
Cut CutBeside(MatrixUnit unit, Storage s, int64_t K) {
  return s == Storage::kFloat ? CutOf(unit, s, K) : Cut::kTwo;
}

// Weights that are packed already are read so in every shape: even a single row, whose products with W
// as it lies take as many loads, saves the sums over lanes, and wide panels are in huge pages. One
// thread of a Zen 5, cells of 1, 3 and 4 gates, 64 to 1024 units, geometric means of the time without
// by the time with: one step 1.10 (of 1 row), 1.27 (2), 1.20 (16), 1.09 (64), and sequences of one row
// 1.15 (30 steps) and 1.05 (100).
ForwardPlan PlanForward(const Problem& p, const Machine& m) {
  ForwardPlan plan{};
  static_cast<Plan&>(plan) = PlanOfBoth(p, m, 1);
  // Rows of gates_x in the second-level cache; on tiles more: W_ih and W_hh evict each other.
  const int64_t ahead = plan.tiled ? 512 : 128;
  plan.gates_rows = Least(p.rows, Most(p.B, ahead));
  // One chunk needs each panel of W_ih once.
  const bool one_chunk = !plan.tiled && p.rows <= plan.gates_rows;
  plan.w_ih = p.packed                  ? Packing::kGiven
              : ReadsInputWeights(p)    ? Packing::kNone
              : TurnsRows(p, p.gates_x) ? Packing::kTurned
              : one_chunk               ? Packing::kEachUse
                                        : Packing::kOnce;
  const bool turns = TurnsRows(p, p.gates_h) && !p.h_changes && !p.in_blocks;
  plan.w_hh = p.packed                   ? Packing::kGiven
              : ReadsRecurrentWeights(p) ? Packing::kNone
              : turns                    ? Packing::kTurned
                                         : Packing::kOnce;
  const bool odd = p.gates_x * p.panel_vecs % 2 || p.gates_h * p.panel_vecs % 2;
  plan.paired = plan.tiled && odd;
  plan.x_cut = CutOf(m.unit, p.storage, p.I);
  plan.h_cut = CutOf(m.unit, p.storage, p.Hout);
  return plan;
}

BackwardPlan PlanBackward(const Problem& p, const Machine& m) {
  BackwardPlan plan{};
  static_cast<Plan&>(plan) = PlanOfBoth(p, m, 2);
  const bool one_step = p.T == 1 && p.rows <= kOneStepRows && !plan.tiled;
  plan.w_ih = PackingOfColumns(p, m, p.H, p.I, one_step);
  plan.w_hh = PackingOfColumns(p, m, p.H, p.Hout, one_step);
  plan.dx_rows = one_step ? p.rows : (p.rows < 768 ? 48 : 96) * (plan.tiled ? 2 : 1);
  plan.cut = CutOf(m.unit, p.storage, p.H);
  plan.d_cut = CutBeside(m.unit, p.storage, p.H);
  // dW in fixed point is balanced by what was measured of d for dh.
  plan.grad_cut = plan.cut;
  if (plan.cut == Cut::kFixed)
    plan.grad_cut =
        p.gates_h > 0 && !p.norm ? CutOf(m.unit, p.storage, Least(p.rows, kGradRows)) : Cut::kThree;
  plan.d_grad_cut = plan.grad_cut == plan.cut ? plan.d_cut : plan.grad_cut;
  return plan;
}

}  // namespace cpu
}  // namespace frnn
