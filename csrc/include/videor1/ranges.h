// Loops over rows or tasks: on torch's threads, and in code for the widest vectors that a processor has.
#pragma once

#include <cstdint>

#include "videor1/attention_tile.h"

namespace videor1 {

// What is done to the rows or tasks from `begin` to `end`.
using Range = void (*)(int64_t begin, int64_t end, void* data);

// [0, count) in grains of `grain`, on torch's threads where there is more than one grain and a loop to do it. Returns 0,
// or what that loop did.
inline int over(int64_t count, int64_t grain, void* parallel_for, Range some, void* data) {
  using Parallel = int (*)(int64_t begin, int64_t end, int64_t grain, Range some, void* data);
  if (parallel_for != nullptr && count > grain)
    return reinterpret_cast<Parallel>(parallel_for)(0, count, grain, some, data);
  some(0, count, data);
  return 0;
}

}  // namespace videor1

#define VIDEOR1_RANGE(name, target, body, ...) \
  target void name(int64_t begin, int64_t end, void* data) { body<__VA_ARGS__>(begin, end, data); }

// A function range_for(bits) that returns body<P>(begin, end, data) for the widest P with vectors of up to `bits`.
#if defined(__x86_64__) && defined(__GNUC__)
#define VIDEOR1_RANGE_FOR(body)                                                                                     \
  VIDEOR1_RANGE(range_512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), body,                 \
                videor1::Processor<64, 12, 4>)                                                                      \
  VIDEOR1_RANGE(range_256, __attribute__((target("avx2,fma"))), body, videor1::Processor<32, 6, 2>)                 \
  VIDEOR1_RANGE(range_128, , body, videor1::Processor<16, 6, 2>)                                                    \
  videor1::Range range_for(int64_t bits) {                                                                          \
    const int64_t widest = videor1::widest_vectors(bits);                                                           \
    return widest == 512 ? range_512 : widest == 256 ? range_256 : range_128;                                       \
  }
#else
#define VIDEOR1_RANGE_FOR(body)                                  \
  VIDEOR1_RANGE(range_128, , body, videor1::Processor<16, 6, 2>) \
  videor1::Range range_for(int64_t) { return range_128; }
#endif
