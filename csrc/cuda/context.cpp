#include "cuda/context.h"

#include <string>

namespace frnn {
namespace cuda {
namespace {

// `after` goes on once `before` has done what it was given so far.
void Order(const Call& call, runtime::Stream before, runtime::Stream after) {
  const runtime::Event event = call.context.event.get();
  runtime::Record(event, before);
  runtime::Wait(after, event);
}

// The contexts of a thread, by device.
struct Contexts {
  std::vector<std::unique_ptr<Context>> of;
  ~Contexts() {
    for (auto& context : of)
      if (context) context->device.Return(std::move(context));
  }
};

constexpr const char* kGaveUp =
    "fused_rnn: a kernel of an earlier call gave up waiting for blocks of its own that did "
    "not get onto the card within a minute. What that call returned is NaN from some step on,"
    " and so is what was computed from it: repeat it. From here on layers on this device take"
    " a product and a kernel per step; FUSED_RNN_VARIANT=graph has them do so from the start.";

}  // namespace

// Neither it nor what belongs to it is ever freed: at exit the driver may be gone before.
Device& Device::Get(int index) {
  static std::mutex& mutex = *new std::mutex;
  static auto& devices = *new std::map<int, std::unique_ptr<Device>>;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& device = devices[index];
  if (!device) device.reset(new Device(index));
  return *device;
}

Device::Device(int index) : facts_(runtime::Facts(index)), alarm_(runtime::NewSharedWord()) {}

CudaDevice Device::FactsFor(runtime::Stream stream) {
  CudaDevice facts = facts_;
  facts.multiprocessors = runtime::Multiprocessors(stream, facts.multiprocessors);
  const std::lock_guard<std::mutex> lock(mutex_);
  const volatile uint32_t& alarm = *alarm_;
  if (alarm != 0 && together_) {  // once: from here on nobody waits
    together_ = false;
    throw runtime::Error(kGaveUp);
  }
  facts.together = together_;
  return facts;
}

int64_t Device::BlocksAtOnce(const runtime::Shape& shape, runtime::Stream stream,
                             int multiprocessors) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto [found, is_new] =
      at_once_.try_emplace({shape.kernel, shape.shared, shape.cluster, multiprocessors}, 0);
  if (is_new) {
    try {
      found->second = runtime::BlocksAtOnce(shape, stream, multiprocessors);
    } catch (...) {
      at_once_.erase(found);
      throw;
    }
  }
  return found->second;
}

void Device::Refuse(const runtime::Shape& shape, int multiprocessors) {
  const std::lock_guard<std::mutex> lock(mutex_);
  at_once_[{shape.kernel, shape.shared, shape.cluster, multiprocessors}] = 0;
}

std::unique_ptr<Context> Device::Take() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      auto context = std::move(idle_.back());
      idle_.pop_back();
      return context;
    }
  }
  return std::make_unique<Context>(*this);
}

void Device::Return(std::unique_ptr<Context> context) {
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(context));
}

Context& Context::Get(int device) {
  thread_local Contexts contexts;
  if (size_t(device) >= contexts.of.size()) contexts.of.resize(device + 1);
  auto& context = contexts.of[device];
  if (!context) context = Device::Get(device).Take();
  return *context;
}

Call::Call(const CudaCall& from)
    : from(from),
      context(Context::Get(from.device)),
      device(context.device.FactsFor(from.stream)),
      allow_tf32(from.allow_tf32),
      streams{from.stream, context.second.get()} {}

void Call::TakeWorkspace(int streams, int64_t bytes) {
  const int64_t of_products = streams * device.product_bytes;
  of_products_ = static_cast<char*>(from.workspace(from.binding, of_products + bytes));
  workspace = of_products_ + of_products;
}

CudaQueue Call::Queue(int i) const {
  const int64_t bytes = device.product_bytes;
  return {streams[i], context.blas.get(), of_products_ + i * bytes, bytes};
}

Beside::Beside(const Call& call, bool wanted) : call_(call) {
  if (!wanted) return;
  Order(call, call.streams[0], call.streams[1]);
  open_ = true;
}

void Beside::Join() {
  if (!open_) return;
  Order(call_, call_.streams[1], call_.streams[0]);
  open_ = false;
}

Beside::~Beside() {
  try {
    Join();
  } catch (const runtime::Error&) {
    runtime::Synchronize(call_.streams[1]);
  }
}

}  // namespace cuda
}  // namespace frnn
