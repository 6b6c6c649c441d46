// Enough of CUDA to run a kernel's blocks on a CPU, one after the other: the threads of a block are fibers that take turns
// at __syncthreads, in another order each time. Shared memory starts as NaN, and what lies behind it must stay untouched.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline dim3 blockIdx, threadIdx;

using std::min;
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }

using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace emulation {

constexpr size_t kSharedBytes = 99 << 10, kGuard = 1 << 10;  // of a consumer's card
inline unsigned char shared_memory[kSharedBytes + kGuard] __attribute__((aligned(128)));

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 << 10);
  bool done = false;
};
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline size_t current;
inline const std::function<void()>* body;

inline void enter() {
  (*body)();
  fibers[current].done = true;
}

inline void launch(const std::function<void()>& kernel, dim3 grid, unsigned threads, size_t bytes, cudaStream_t) {
  std::mt19937 random(0);
  std::vector<size_t> order(threads);
  std::iota(order.begin(), order.end(), 0);
  body = &kernel;
  fibers.resize(threads);
  for (unsigned block = 0; block < grid.x * grid.y * grid.z; ++block) {
    blockIdx = dim3(block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y);
    std::memset(shared_memory, 0xff, sizeof shared_memory);
    for (auto& fiber : fibers) {
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, enter, 0);
    }
    size_t running = threads;
    while (running) {
      std::shuffle(order.begin(), order.end(), random);
      for (size_t i : order) {
        if (fibers[i].done) continue;
        current = i;
        threadIdx = dim3(unsigned(i));
        swapcontext(&scheduler, &fibers[i].context);
        running -= fibers[i].done;
      }
    }
    for (size_t i = bytes; i < sizeof shared_memory; ++i)
      if (shared_memory[i] != 0xff) {
        std::fprintf(stderr, "a block wrote at byte %zu of its %zu bytes of shared memory\n", i, bytes);
        std::abort();
      }
  }
}

}  // namespace emulation

inline void __syncthreads() { swapcontext(&emulation::fibers[emulation::current].context, &emulation::scheduler); }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = int(emulation::kSharedBytes), cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int bytes) {
  return size_t(bytes) <= emulation::kSharedBytes ? cudaSuccess : cudaErrorInvalidConfiguration;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
