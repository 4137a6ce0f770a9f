// What a tensor of packed weights begins with: for each layer and direction, whose weights they are. A
// call that has other weights, or these after somebody wrote to them, does without.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "ops/tensor.h"

// How often a tensor was written to in place: at::TensorBase::_version of torch's C++, a member
// function as old as autograd. Weak: without it no packed weights are used.
extern "C" __attribute__((weak)) int64_t
frnn_torch_version(const void* tensor) __asm__("_ZNK2at10TensorBase8_versionEv");

namespace frnn {

// -1 if torch does not know, as of tensors made in inference mode. `tensor`: at::Tensor.
inline int64_t VersionOfTorchs(const void* tensor) {
  if (frnn_torch_version == nullptr) return -1;
  try {
    return frnn_torch_version(tensor);
  } catch (const std::exception&) {
    return -1;
  }
}
inline int64_t VersionOf(const Tensor& t) { return VersionOfTorchs(t.get()); }

struct PackedHead {
  static constexpr int kWeights = 2;  // w_ih and w_hh

  const void* kernels;  // those that packed them, for themselves
  int64_t element;      // its bytes
  int64_t storage, I, H, Hout, blocks;
  const void* weights[kWeights];
  int64_t versions[kWeights];

  // Null: of a tensor that nobody can know again.
  void Put(int i, const void* weight, int64_t version) {
    weights[i] = version < 0 ? nullptr : weight;
    versions[i] = weights[i] == nullptr ? -1 : version;
  }
  bool IsOf(const PackedHead& call) const {
    return call.versions[0] >= 0 && call.versions[1] >= 0 &&
           std::memcmp(this, &call, sizeof(call)) == 0;
  }
};
static_assert(std::has_unique_object_representations_v<PackedHead>);

// Heads and weights begin at whole lines of memory; tiles of products may read, and never use, as much
// past the end.
constexpr int64_t kPackedLine = 64;

}  // namespace frnn
