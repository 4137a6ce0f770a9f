// What the operators need of tensors, torch's own or others with the same few members: shapes, types,
// checks of both, and new tensors. Written against libtorch's stable ABI, so one binary serves torch
// 2.10 and newer.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "core/memory.h"
#include "core/params.h"

// Newer torch defines it, with the cause in the message.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace frnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// As torch's STD_TORCH_CHECK, but the message is for users and names no line of this file.
#define FRNN_CHECK(condition, ...)                 \
  do {                                             \
    if (!(condition)) ::frnn::Refuse(__VA_ARGS__); \
  } while (false)

template <class... Parts>
[[noreturn]] void Refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// As Python writes it.
inline const char* NameOf(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(dtype);
  }
}

template <class T>
Storage StorageOf(const T& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Storage::kFloat;
    case ScalarType::Double:
      return Storage::kDouble;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    case ScalarType::Half:
      return Storage::kHalf;
    default:
      Refuse(name, ": expected float32, float64, bfloat16 or float16, got ",
             NameOf(t.scalar_type()));
  }
}

inline std::string ShapeText(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::string s = "(";
  for (size_t i = 0; i < sizes.size(); i++) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + ")";
}

// A shape, in no memory of its own: a small call has a dozen of them.
class Dims {
 public:
  Dims(std::initializer_list<int64_t> sizes) : Dims(sizes.begin(), sizes.end()) {}
  template <class Iterator>
  Dims(Iterator begin, Iterator end) : count_(size_t(end - begin)) {
    FRNN_CHECK(count_ <= sizes_.size(), "too many dimensions");
    std::copy(begin, end, sizes_.begin());
  }
  size_t size() const { return count_; }
  const int64_t* data() const { return sizes_.data(); }
  const int64_t* begin() const { return data(); }
  const int64_t* end() const { return data() + count_; }
  int64_t& operator[](size_t i) { return sizes_[i]; }
  int64_t operator[](size_t i) const { return sizes_[i]; }

 private:
  std::array<int64_t, 4> sizes_;
  size_t count_;
};

template <class T, class Sizes>
bool SameShape(const T& t, const Sizes& expected) {
  const auto sizes = t.sizes();
  return std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end());
}

template <class T>
void CheckShape(const char* name, const T& t, std::initializer_list<int64_t> expected) {
  FRNN_CHECK(SameShape(t, expected), name, ": expected shape ",
             ShapeText({expected.begin(), expected.size()}), ", got ", ShapeText(t.sizes()));
}

inline int64_t BytesOf(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
      return 4;
    case ScalarType::Byte:
    case ScalarType::Bool:
      return 1;
    default:
      return 2;
  }
}
// Of a contiguous tensor. False where there are too many to count: an expanded input has any size.
inline bool CountBytes(const Dims& sizes, ScalarType dtype, int64_t& bytes) {
  bytes = BytesOf(dtype);
  for (const int64_t n : sizes)
    if (__builtin_mul_overflow(bytes, n, &bytes)) return false;
  return true;
}

// A storage may have been resized since its tensors were made, as FSDP does to save memory.
inline void CheckMemory(const char* name, const Tensor& t) {
  int64_t there = 0, end = 0;  // bytes; elements
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &there));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &end));
  end++;
  for (int64_t i = 0; i < t.dim(); i++) end += (t.size(i) - 1) * t.stride(i);
  const int64_t wanted = t.numel() > 0 ? end * int64_t(t.element_size()) : 0;
  FRNN_CHECK(wanted <= there, name, ": expected a storage of ", wanted, " bytes or more, got ",
             there);
}

// make(shape) returns a new tensor of torch's. What torch says of a failure does not come through its C
// functions: it is said again, in the words that callers look for.
template <class F>
Tensor Allocated(const Tensor& like, const Dims& sizes, ScalarType dtype, const F& make) {
  try {
    return make(torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()));
  } catch (const std::exception&) {
    int64_t bytes = 0;
    if (!CountBytes(sizes, dtype, bytes)) throw;
    if (like.is_cpu()) throw OutOfMemory(size_t(bytes));
    Refuse("CUDA out of memory. Tried to allocate ", bytes, " bytes");
  }
}
inline Tensor New(const Tensor& like, const Dims& sizes, ScalarType dtype) {
  return Allocated(like, sizes, dtype,
                   [&](auto shape) { return torch::stable::new_empty(like, shape, dtype); });
}
inline Tensor NewZeros(const Tensor& like, const Dims& sizes, ScalarType dtype) {
  return Allocated(like, sizes, dtype,
                   [&](auto shape) { return torch::stable::new_zeros(like, shape, dtype); });
}
inline Tensor ContiguousCopy(const Tensor& t) {
  return Allocated(t, {t.sizes().begin(), t.sizes().end()}, t.scalar_type(),
                   [&](auto) { return torch::stable::contiguous(t); });
}

}  // namespace frnn
