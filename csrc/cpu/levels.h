// Levels of instructions, and the one that a process may use at most.
#pragma once

namespace frnn {

#define LEVEL(name) name,
enum class Level {
#include "cpu/levels.def"
};
#undef LEVEL

const char* NameOf(Level level);
// FUSED_RNN_CPU_CAPABILITY, or the highest if that is not set. Throws std::invalid_argument.
Level HighestLevel();

}  // namespace frnn
