// Calls replayed from CUDA graphs.
#pragma once
#include <functional>
#include <list>
#include <string>
#include <vector>

#include "cuda/runtime.h"

namespace frnn {
namespace cuda {

// The graphs of one thread on one device. What comes for the second time is captured, and replayed
// from then on; what never comes again leaves nothing but a number.
class FRNN_EXPORT GraphCache {
 public:
  // Runs work(stream), as the next thing in `stream`. Two calls with equal keys must do the same work
  // on the same memory: sizes, pointers and streams belong into a key. To capture, work is given
  // `capture` in the place of `stream`, which may be the default one and cannot be captured; what
  // cannot be captured at all is run as it is. While the caller itself captures `stream`, work just
  // becomes part of that.
  void Run(const std::string& key, runtime::Stream stream, runtime::Stream capture,
           const std::function<void(runtime::Stream)>& work);

  size_t graphs() const { return entries_.size(); }
  size_t bytes() const { return bytes_; }

  // At most so many are kept, of so many bytes, as far as these can be told. What a node takes, on
  // the host and on the card, is not documented.
  static constexpr size_t kGraphs = 64, kBytes = size_t{256} << 20, kNodeBytes = 4096;

 private:
  struct Entry {
    size_t hash;
    std::string key;
    size_t bytes;
    runtime::Owned<runtime::Graph> graph;  // null if it could not be captured
  };
  static constexpr size_t kSeen = 256;

  bool SeenBefore(size_t hash);
  Entry* Find(size_t hash, const std::string& key);
  Entry* Add(size_t hash, const std::string& key, runtime::Stream capture,
             const std::function<void(runtime::Stream)>& work);

  std::list<Entry> entries_;  // most recently used first
  size_t bytes_ = 0;
  std::vector<size_t> seen_;  // hashes of keys that came once, the last kSeen
  size_t next_ = 0;           // the one to overwrite
};

}  // namespace cuda
}  // namespace frnn
