// Kernels of cells that other libraries bring, from when these are loaded on and for good.
#pragma once
#include <atomic>
#include <string>

#include "core/params.h"

namespace frnn {

template <class Kernels>
class AddedCells {
 public:
  const Kernels* Find(const char* cell, Storage storage) const {
    for (const Entry* e = first_.load(std::memory_order_acquire); e; e = e->next)
      if (e->storage == storage && e->cell == cell) return e->kernels;
    return nullptr;
  }
  void Add(const char* cell, Storage storage, const Kernels& kernels) {
    auto* e = new Entry{cell, storage, &kernels, first_.load()};
    while (!first_.compare_exchange_weak(e->next, e)) {
    }
  }

 private:
  struct Entry {
    std::string cell;
    Storage storage;
    const Kernels* kernels;
    Entry* next;
  };
  std::atomic<Entry*> first_{nullptr};
};

}  // namespace frnn
