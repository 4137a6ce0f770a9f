// Fibers, on which the threads of emulate.h run: stacks of their own, and the switch between them.
#pragma once
#include <cstddef>
#include <memory>
#include <vector>

#include "emulate_state.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace frnn::cuda::emulate {

constexpr size_t kStack = 256 << 10;  // only the pages touched take memory

#ifdef __x86_64__
// Callee-saved registers go on the stack, the stack pointer into *from. SysV ABI.
extern "C" void fused_rnn_switch_stack(void** from, void* to);
struct Context {
  void* stack_pointer = nullptr;
  void Start(char* stack, size_t bytes, void (*entry)()) {
    auto** top = reinterpret_cast<void**>(stack + bytes);
    top[-2] = reinterpret_cast<void*>(entry);  // where the switch returns to
    stack_pointer = top - 8;                   // six registers below it
  }
  void SwitchTo(Context& to) { fused_rnn_switch_stack(&stack_pointer, to.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;
  void Start(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void SwitchTo(Context& to) { swapcontext(&context, &to.context); }
};
#endif

struct Fiber {
  Context context;
  char* stack = nullptr;  // null: the host's own
  size_t colour = 0;
#ifdef __SANITIZE_ADDRESS__
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake = nullptr;
#endif
};

// A stack whose frames will not be left one by one.
inline void ForgetFrames([[maybe_unused]] char* stack) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack, kStack);
#endif
}

inline void SwitchFiber(Fiber& from, Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.size);
#endif
  from.context.SwitchTo(to.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

inline Fiber host;                                  // the scheduler's
inline std::vector<std::unique_ptr<Fiber>> fibers;  // all that were ever made
inline std::vector<Fiber*> idle_fibers;

}  // namespace frnn::cuda::emulate
