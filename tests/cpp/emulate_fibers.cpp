// How a thread starts on a fiber, leaves it to the next ready lane of its warp, and ends.
#include "emulate_fibers.h"

#include "emulate_reports.h"

namespace frnn::cuda::emulate {

#ifdef __x86_64__
asm(R"(
.pushsection .text
.globl fused_rnn_switch_stack
.hidden fused_rnn_switch_stack
.type fused_rnn_switch_stack, @function
fused_rnn_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fused_rnn_switch_stack, .-fused_rnn_switch_stack
.popsection
)");
#endif

namespace {
constexpr size_t kColours = 64, kColour = 320;  // tops of stacks, spread over the sets of a cache

void Enter(Thread* t) {
  current = t;
  thread_index = t->index;
  block_index = t->warp->cta->index;
}

void Start(Thread* t) {
  Enter(t);
  ++progress;
}

// The running thread has returned from the kernel.
void Exit() {
  Thread* t = current;
  Warp& w = *t->warp;
  Cta& cta = *w.cta;
  ++progress;
  t->exited = true;
  w.exited |= 1u << t->lane;
  for (unsigned waiting = w.meeting; waiting; waiting &= waiting - 1) {
    const Thread& other = w.lanes[__builtin_ctz(waiting)];
    if (other.mask >> t->lane & 1)
      return Report(Format("exits while lane %d waits for it in %s", other.lane, other.where));
  }
  Cluster& cluster = *cta.cluster;
  --cta.alive;
  --cluster.alive;
  if (cta.barrier.arrived && cta.barrier.arrived == cta.alive) Complete(cta.barrier);
  if (cluster.barrier.arrived && cluster.barrier.arrived == cluster.alive)
    Complete(cluster.barrier);
  if (cta.alive == 0) {
    for (const auto& [due, d] : grid->deliveries)
      if (d.to == &cta) return Report("the block exits while stores to it are under way");
    if (cta.arena) CheckShared(cta);
  }
  if (cluster.alive == 0) grid->done.push_back(&cluster);
}

// The next ready lane of the warp that has its turn, or null.
Thread* NextLane() {
  for (Grid& g = *grid; g.position < 32; g.position++) {
    const int lane = (g.first + g.step * g.position) & 31;
    if (g.warp->ready >> lane & 1) return &g.warp->lanes[lane];
  }
  return nullptr;
}
void Take(Thread* t) {
  t->warp->ready &= ~(1u << t->lane);
  grid->position++;
}

void FiberMain() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  for (;;) {
    Start(current);
    grid->body(grid->arguments);
    Exit();
    Thread* t = grid->error.empty() ? NextLane() : nullptr;
    if (t && !t->fiber) {  // on this fiber, without a switch
      Take(t);
      current = t;
    } else {
      idle_fibers.push_back(running);
      Leave(*running);
    }
  }
}

// Also for a fiber that was left in the middle of a kernel.
void Restart(Fiber& fiber) {
  ForgetFrames(fiber.stack);
  fiber.context.Start(fiber.stack, kStack - fiber.colour * kColour, FiberMain);
}

Fiber* IdleFiber() {
  if (!idle_fibers.empty()) {
    Fiber* fiber = idle_fibers.back();
    idle_fibers.pop_back();
    return fiber;
  }
  fibers.push_back(std::make_unique<Fiber>());
  Fiber* fiber = fibers.back().get();
  fiber->stack = MapGuarded(kStack);
#ifdef __SANITIZE_ADDRESS__
  fiber->bottom = fiber->stack;
  fiber->size = kStack;
#endif
  fiber->colour = fibers.size() % kColours;
  Restart(*fiber);
  return fiber;
}
}  // namespace

void Leave(Fiber& from) {
  Thread* t = grid->error.empty() ? NextLane() : nullptr;
  if (!t) return SwitchFiber(from, host);
  Take(t);
  poll_budget = Seeded() ? 1 + int(Random(64)) : 64;
  if (t->fiber) {
    Enter(t);
    running = t->fiber;
  } else {
    running = IdleFiber();
    current = t;
  }
  SwitchFiber(from, *running);
}

// Lanes run until each of them waits for another warp, or for time to pass.
void Turn(Warp& w) {
  Grid& g = *grid;
  g.warp = &w;
  g.paused = false;
  do {
    g.position = 0;
    g.first = Seeded() ? int(Random(32)) : 0;
    g.step = Seeded() && Random(2) ? -1 : 1;
    Leave(host);
    current = nullptr;
  } while (g.error.empty() && w.ready && !g.paused && !Chance(8));
}

// Of a launch that was given up.
void RestartFibers() {
  idle_fibers.clear();
  for (auto& fiber : fibers) {
    Restart(*fiber);
    idle_fibers.push_back(fiber.get());
  }
}

}  // namespace frnn::cuda::emulate
