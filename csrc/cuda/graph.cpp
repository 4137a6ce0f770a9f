#include "cuda/graph.h"

#include <algorithm>

namespace frnn {
namespace cuda {
namespace {

struct Captured {
  runtime::Owned<runtime::Graph> graph;
  size_t nodes = 0;
};

// The work as a graph. Throws if it cannot be one.
Captured Capture(runtime::Stream stream, const std::function<void(runtime::Stream)>& work) {
  runtime::BeginCapture(stream);
  runtime::Owned<runtime::Drawing> drawing;
  try {
    work(stream);
  } catch (...) {
    try {  // which ends the capture in any case
      drawing.reset(runtime::EndCapture(stream));
    } catch (const runtime::Error&) {
    }
    throw;
  }
  drawing.reset(runtime::EndCapture(stream));
  Captured captured;
  captured.nodes = runtime::Nodes(drawing.get());
  if (captured.nodes * GraphCache::kNodeBytes <= GraphCache::kBytes)
    captured.graph.reset(runtime::Instantiate(drawing.get()));
  return captured;
}

}  // namespace

bool GraphCache::SeenBefore(size_t hash) {
  if (std::find(seen_.begin(), seen_.end(), hash) != seen_.end()) return true;
  if (seen_.size() < kSeen)
    seen_.push_back(hash);
  else
    seen_[next_++ % kSeen] = hash;
  return false;
}

GraphCache::Entry* GraphCache::Find(size_t hash, const std::string& key) {
  for (auto entry = entries_.begin(); entry != entries_.end(); ++entry)
    if (entry->hash == hash && entry->key == key) {
      entries_.splice(entries_.begin(), entries_, entry);
      return &*entry;
    }
  return nullptr;
}

GraphCache::Entry* GraphCache::Add(size_t hash, const std::string& key, runtime::Stream capture,
                                   const std::function<void(runtime::Stream)>& work) {
  Captured captured;
  try {
    captured = Capture(capture, work);
  } catch (const std::exception&) {
    // The work is run outside of a graph, where the same error, if it is one, comes again.
  }
  const size_t bytes = key.size() + (captured.graph ? captured.nodes * kNodeBytes : 0);
  entries_.push_front({hash, key, bytes, std::move(captured.graph)});
  bytes_ += bytes;
  while (entries_.size() > kGraphs || (bytes_ > kBytes && entries_.size() > 1)) {
    bytes_ -= entries_.back().bytes;
    entries_.pop_back();
  }
  return &entries_.front();
}

void GraphCache::Run(const std::string& key, runtime::Stream stream, runtime::Stream capture,
                     const std::function<void(runtime::Stream)>& work) {
  if (runtime::IsCapturing(stream)) return work(stream);
  const size_t hash = std::hash<std::string>()(key);
  Entry* entry = Find(hash, key);
  if (entry == nullptr) {
    if (!SeenBefore(hash)) return work(stream);
    entry = Add(hash, key, capture, work);
  }
  if (!entry->graph) return work(stream);
  try {
    runtime::Launch(entry->graph.get(), stream);
  } catch (const runtime::Error&) {  // for lack of memory, say
    entry->graph.reset();
    work(stream);
  }
}

}  // namespace cuda
}  // namespace frnn
