// Compiler macros shared by every header. The only #ifdef __CUDACC__ outside cuda/.
#pragma once

#ifdef __CUDACC__
#define FRNN_HD __host__ __device__ __forceinline__
#define FRNN_UNROLL _Pragma("unroll")
#else
#define FRNN_HD inline __attribute__((always_inline))
#define FRNN_UNROLL _Pragma("GCC unroll 32")
#endif
#define FRNN_INLINE inline __attribute__((always_inline))
#define FRNN_NOINLINE __attribute__((noinline))
#define FRNN_INLINE_LAMBDA __attribute__((always_inline))
