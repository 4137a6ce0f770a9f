// The operators on the CPU.
#include "ops/cpu.h"

FRNN_REGISTER(frnn::Cpu, CPU)

extern "C" __attribute__((visibility("default"))) const char* frnn_cpu_capability() {
  return frnn::CpuCapability();
}
