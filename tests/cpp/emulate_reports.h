// What a launch is given up with, in words: who did what, where, in which thread.
#pragma once
#include <signal.h>

#include <iterator>
#include <string>

#include "emulate.h"

namespace frnn::cuda::emulate {

std::string Format(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string Name(uint3 i);
// The first one of a launch is what it throws.
void Report(const std::string& message);
void ReportDeadlock(const char* what);

// ---- faults ----

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};

// Handlers and their stack, for the time of a launch.
class FaultHandlers {
 public:
  FaultHandlers();
  ~FaultHandlers();

 private:
  struct sigaction old_[std::size(kSignals)];
  stack_t old_stack_;
};

}  // namespace frnn::cuda::emulate
