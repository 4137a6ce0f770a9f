// What parts.cpp asks the processor and the system for, all of it granted.
#pragma once
#include <sys/syscall.h>
#include <unistd.h>

#define bit_OSXSAVE 1u

inline int __get_cpuid(unsigned, unsigned* a, unsigned* b, unsigned* c, unsigned* d) {
  *a = *b = *c = *d = ~0u;
  return 1;
}
inline int __get_cpuid_count(unsigned, unsigned, unsigned* a, unsigned* b, unsigned* c,
                             unsigned* d) {
  return __get_cpuid(0, a, b, c, d);
}

#define syscall(...) 0
