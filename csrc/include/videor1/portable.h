// One source for C++ and CUDA: what both compile is marked VIDEOR1_HD.
#pragma once

#ifdef __CUDACC__
#define VIDEOR1_HD __host__ __device__ __forceinline__
#else
#define VIDEOR1_HD inline __attribute__((always_inline))  // into each clone of a function made for several CPUs
#endif
