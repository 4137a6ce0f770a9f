// What the fake runtime was told and has seen, for tests.
#pragma once
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "cuda/runtime.h"

namespace frnn {
namespace cuda {
namespace fake {

struct State {
  // Of the call from now on with this number, counted from 1, an Error is made; 0: of none.
  int fail_at = 0;
  int calls = 0;                      // that can fail, in all
  std::map<std::string, int> counts;  // of these, by name; and launches that need more than others
  std::vector<std::string> log;       // the first of their names
  std::vector<std::string> faults;    // what was done that must not be done
  std::map<std::string, int> live;    // what was made and is not freed, by kind
  int64_t blocks_at_once = -1;  // what the card says; -1: as many as there are multiprocessors
  int64_t room = -1;            // and how many it takes
  unsigned cluster = 16, taken_cluster = 16;  // the largest: what the card says, and what it takes
  int multiprocessors = 132;                  // of the card
  std::function<int(runtime::Stream)> limit;  // of a stream
};
State& GetState();
void Alarm();  // as a kernel that gives up

}  // namespace fake
}  // namespace cuda
}  // namespace frnn
