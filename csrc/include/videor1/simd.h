// Vectors through the compiler, for any CPU: a function marked EVERY_CPU is made for several and chosen when it is loaded;
// what it calls must be inlined into each (ALWAYS_INLINE, VIDEOR1_HD).
#pragma once

#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EVERY_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EVERY_CPU
#endif
#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace videor1 {

typedef float Lanes __attribute__((vector_size(64), aligned(4)));
typedef float Quarter __attribute__((vector_size(16), aligned(4)));

ALWAYS_INLINE Quarter folded(Lanes x) {
  Quarter parts[4];
  std::memcpy(parts, &x, sizeof x);
  return (parts[0] + parts[2]) + (parts[1] + parts[3]);
}

// The sums of the lanes of four vectors.
ALWAYS_INLINE Quarter sums_of(Lanes a, Lanes b, Lanes c, Lanes d) {
  const Quarter w = folded(a), x = folded(b), y = folded(c), z = folded(d);
  const Quarter first{w[0], x[0], y[0], z[0]}, second{w[1], x[1], y[1], z[1]};
  const Quarter third{w[2], x[2], y[2], z[2]}, fourth{w[3], x[3], y[3], z[3]};
  return (first + third) + (second + fourth);
}

}  // namespace videor1
