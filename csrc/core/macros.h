// Compiler macros shared by every header. The only #ifdef __CUDACC__ outside cuda/.
#pragma once

#ifdef __CUDACC__
#define FRNN_HD __host__ __device__ __forceinline__
#define FRNN_UNROLL _Pragma("unroll")
#else
#define FRNN_HD inline __attribute__((always_inline))
#ifdef FUSED_RNN_EMULATE
#define FRNN_UNROLL  // nothing but time to compile
#else
#define FRNN_UNROLL _Pragma("GCC unroll 32")
#endif
#endif
// What libraries of single cells find in the main one.
#define FRNN_EXPORT __attribute__((visibility("default")))
#define FRNN_INLINE inline __attribute__((always_inline))
#define FRNN_NOINLINE __attribute__((noinline))
#define FRNN_INLINE_LAMBDA __attribute__((always_inline))
// For a product that is in a sum with what it may cancel: for AArch64 compilers make a multiply-add of
// them, which does not round the product as it was rounded before.
#ifdef __aarch64__
#define FRNN_ROUNDED(v) asm("" : "+w"(v))
#else
#define FRNN_ROUNDED(v)
#endif
// For a vector that several instructions use: compilers may read it from memory in each of them, as an
// operand, and then loads run short before multiply-adds do.
#ifndef FRNN_KEEP_IN_REGISTER
#if defined(__x86_64__) && !defined(__CUDACC__)
#define FRNN_KEEP_IN_REGISTER(v) asm("" : "+v"(v))
#else
#define FRNN_KEEP_IN_REGISTER(v)
#endif
#endif
