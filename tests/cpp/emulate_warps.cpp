// What lanes of a warp do together: meetings, shuffles, products of matrices.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "emulate_reports.h"
#include "emulate_state.h"

namespace frnn::cuda::emulate {

int Lane() { return current->lane; }

void Meet(const char* where, unsigned mask, void* slot, FinishMeeting finish) {
  Thread* t = current;
  Warp& w = *t->warp;
  if (!(mask >> t->lane & 1)) Fail(Format("%s with a mask without the caller", where));
  if (mask & ~w.exist || mask & w.exited)
    Fail(Format("%s with a mask of lanes that do not exist or have exited", where));
  if (const unsigned others = w.meeting & mask) {
    const Thread& other = w.lanes[__builtin_ctz(others)];
    if (other.mask != mask || other.finish != finish ||
        (other.where != where && std::strcmp(other.where, where) != 0))
      Fail(Format("%s of mask %08x meets %s of mask %08x of lane %d", where, mask, other.where,
                  other.mask, other.lane));
  }
  w.meeting |= 1u << t->lane;
  t->mask = mask;
  t->slot = slot;
  t->finish = finish;
  if (mask & ~w.meeting) return Block(where);
  void* slots[32] = {};
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    Thread& other = w.lanes[__builtin_ctz(rest)];
    slots[other.lane] = other.slot;
    other.mask = 0;
  }
  finish(slots, mask);
  w.meeting &= ~mask;
  w.ready |= mask & ~(1u << t->lane);  // the warp is listed: it has its turn
  ++progress;
}

void SyncWarp(unsigned mask) {
  Meet("__syncwarp", mask, nullptr, [](void* const*, unsigned) {});
}

namespace {
struct ShuffleSlot {
  uint64_t value, result;
  int from;
};
}  // namespace

uint64_t Shuffle(const char* where, unsigned mask, uint64_t value, int from) {
  ShuffleSlot slot{value, ~uint64_t(0), from};  // a lane outside of the mask gives poison
  Meet(where, mask, &slot, [](void* const* slots, unsigned mask) {
    for (; mask; mask &= mask - 1) {
      auto* mine = static_cast<ShuffleSlot*>(slots[__builtin_ctz(mask)]);
      if (auto* other = static_cast<ShuffleSlot*>(slots[mine->from])) mine->result = other->value;
    }
  });
  return slot.result;
}

float HalfValue(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, size = uint32_t(bits & 0x7FFF) << 13;
  if ((bits & 0x7C00) == 0x7C00) return BitCast<float>(sign | 0x7F800000 | size);
  const float value = BitCast<float>(size) * 0x1p112f;  // the exponent's bias: 127 - 15
  return bits & 0x8000 ? -value : value;
}

uint16_t HalfBits(float x) {
  if (x != x) return 0x7FFF;
  const uint16_t sign = uint16_t(std::signbit(x) << 15);
  const float size = std::fabs(x);
  if (size >= 65520) return sign | 0x7C00;
  if (size == 0) return sign;  // to which frexp gives the exponent 0
  // In units of the last place of a half, 2^-24 for what is below 2^-14; nearbyint rounds to even.
  int exponent = 0;
  std::frexp(size, &exponent);
  exponent = std::max(exponent, -13);
  const int steps = int(std::nearbyint(std::ldexp(size, 11 - exponent)));
  return uint16_t(sign + ((exponent + 13) << 10) + steps);
}
}  // namespace frnn::cuda::emulate

namespace frnn::cuda {
using namespace emulate;

// ---- matrices ----

namespace {
struct MmaSlot {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};
float Low(uint32_t word, float (*value)(uint16_t)) { return value(uint16_t(word)); }
float High(uint32_t word, float (*value)(uint16_t)) { return value(uint16_t(word >> 16)); }

// d[16, 8] += a[16, K] b[K, 8]
template <int K>
void Multiply(void* const* slots, const float (&a)[16][K], const float (&b)[K][8]) {
  for (int lane = 0; lane < 32; lane++) {
    float* d = static_cast<MmaSlot*>(slots[lane])->d;
    for (int i = 0; i < 4; i++)
      for (int k = 0; k < K; k++) d[i] += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
  }
}

template <float (*kValue)(uint16_t)>
void FinishMma16(void* const* slots, unsigned) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const auto& s = *static_cast<MmaSlot*>(slots[lane]);
    const int r = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; i++) {
      float* two = &a[r + i % 2 * 8][q * 2 + i / 2 * 8];
      two[0] = Low(s.a[i], kValue);
      two[1] = High(s.a[i], kValue);
    }
    for (int i = 0; i < 2; i++) {
      b[q * 2 + i * 8][r] = Low(s.b[i], kValue);
      b[q * 2 + i * 8 + 1][r] = High(s.b[i], kValue);
    }
  }
  Multiply(slots, a, b);
}

void FinishMmaTf32(void* const* slots, unsigned) {
  const auto value = [](uint32_t bits) { return BitCast<float>(bits & ~0x1FFFu); };
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; lane++) {
    const auto& s = *static_cast<MmaSlot*>(slots[lane]);
    const int r = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; i++) a[r + i % 2 * 8][q + i / 2 * 4] = value(s.a[i]);
    for (int i = 0; i < 2; i++) b[q + i * 4][r] = value(s.b[i]);
  }
  Multiply(slots, a, b);
}

}  // namespace

void MmaBf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaSlot slot{d, a, {b0, b1}};
  Meet("MmaBf16", ~0u, &slot, FinishMma16<Bfloat16Value>);
}
void MmaF16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaSlot slot{d, a, {b0, b1}};
  Meet("MmaF16", ~0u, &slot, FinishMma16<HalfValue>);
}
void MmaTf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaSlot slot{d, a, {b0, b1}};
  Meet("MmaTf32", ~0u, &slot, FinishMmaTf32);
}
}  // namespace frnn::cuda
