// The reports of emulate.h, and the handlers of faults in a kernel.
#include "emulate_reports.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <utility>

#include "emulate_fibers.h"

namespace frnn::cuda::emulate {

std::string Format(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  return text;
}
std::string Name(uint3 i) { return Format("(%u, %u, %u)", i.x, i.y, i.z); }

namespace {
std::string KernelName() {
  Dl_info info;  // holds the symbol before the address, if this one has none: see -rdynamic
  if (!dladdr(grid->kernel, &info) || info.dli_saddr != grid->kernel)
    return Format("%p", grid->kernel);
  int status = 0;
  char* name = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string text = name ? name : info.dli_sname;
  std::free(name);
  return text;
}
}  // namespace

void Report(const std::string& message) {
  if (!grid->error.empty()) return;
  grid->error = "emulation: kernel " + KernelName();
  if (current)
    grid->error +=
        ", block " + Name(current->warp->cta->index) + ", thread " + Name(current->index);
  grid->error += ": " + message;
  if (Seeded()) grid->error += Format(" (seed %llu)", (unsigned long long)settings.seed);
}

namespace {
std::string Distance(const char* p, const char* begin, size_t bytes) {
  if (p < begin) return Format("%td bytes before", begin - p);
  if (p >= begin + bytes) return Format("%td bytes past the end of", p - begin - ptrdiff_t(bytes));
  return Format("at byte %td of", p - begin);
}

std::string Describe(const void* address) {
  const char* p = static_cast<const char*>(address);
  std::string text = Format("address %p", address);
  if (!p) return text + ", null, or a 16-byte access that is not aligned";
  for (auto& cluster : grid->clusters)
    for (const Cta& cta : cluster->ctas)
      if (cta.arena && p >= cta.arena - kPage && p < cta.arena + kArena + kPage) {
        const size_t bytes = grid->config.shared;
        const std::string place = "shared memory of block " + Name(cta.index);
        if (!bytes) return text + ", outside of the " + place;
        return text + ", " + Distance(p, cta.arena + DynamicOffset(), bytes) +
               Format(" the %zu bytes of dynamic ", bytes) + place;
      }
  for (auto& fiber : fibers)
    if (p >= fiber->stack - kPage && p < fiber->stack) return text + ", the stack has overflowed";
  return text;
}
}  // namespace

// One line for each group of threads of a block that wait in the same place.
void ReportDeadlock(const char* what) {
  std::string text = what;
  int lines = 0;
  for (auto& cluster : grid->clusters)
    for (const Cta& cta : cluster->ctas) {
      std::map<std::string, std::pair<unsigned, uint3>> groups;
      for (const Thread& t : cta.threads)
        if (!t.exited) {
          auto [it, fresh] = groups.try_emplace(t.where ? t.where : "the kernel", 0u, t.index);
          it->second.first++;
        }
      for (auto& [where, group] : groups)
        if (++lines <= 12)
          text += Format("\n  block %s: %u threads of %zu, the first %s, in %s",
                         Name(cta.index).c_str(), group.first, cta.threads.size(),
                         Name(group.second).c_str(), where.c_str());
    }
  if (lines > 12) text += Format("\n  and %d lines more", lines - 12);
  const uint64_t absent = CtasOfGrid() - grid->next_cluster * grid->config.cluster;
  if (absent > 0)
    text += Format("\n  %llu blocks were not resident: the launch is not cooperative",
                   (unsigned long long)absent);
  Report(text);
}

// ---- faults ----

namespace {
void OnFault(int number, siginfo_t* info, void*) {
  if (!current) {  // not in device code: as without this handler
    signal(number, SIG_DFL);
    return;
  }
  const char* what = number == SIGILL   ? "illegal instruction (or a check of the compiler's)"
                     : number == SIGFPE ? "division by zero"
                                        : "illegal access";
  Report(std::string(what) + ", " + Describe(info->si_addr));
  Suspend();
}
}  // namespace

FaultHandlers::FaultHandlers() {
  static char* const stack = MapGuarded(kStack);
  ForgetFrames(stack);
  stack_t mine = {};
  mine.ss_sp = stack;
  mine.ss_size = kStack;
  sigaltstack(&mine, &old_stack_);
  struct sigaction action = {};
  action.sa_sigaction = OnFault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler does not return
  for (size_t i = 0; i < std::size(kSignals); i++) sigaction(kSignals[i], &action, &old_[i]);
}

FaultHandlers::~FaultHandlers() {
  for (size_t i = 0; i < std::size(kSignals); i++) sigaction(kSignals[i], &old_[i], nullptr);
  sigaltstack(&old_stack_, nullptr);
}

}  // namespace frnn::cuda::emulate
