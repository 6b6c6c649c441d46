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
typedef float Octet __attribute__((vector_size(32), aligned(4)));
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

// Lanes of two vectors by number, those of the second behind those of the first.
#if defined(__clang__) || __GNUC__ >= 12
#define VIDEOR1_PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
template <int kBytes>
struct Picks {
  typedef int type __attribute__((vector_size(kBytes)));
};
#define VIDEOR1_PICK(a, b, ...) __builtin_shuffle(a, b, Picks<sizeof(a)>::type{__VA_ARGS__})
#endif

// The sums of the lanes of sixteen vectors, which are overwritten: neighbours are added, in pairs of vectors each time.
ALWAYS_INLINE Lanes sums_of(Lanes* x) {
  for (int i = 0; i < 8; ++i) {
    const Lanes a = x[2 * i], b = x[2 * i + 1];
    x[i] = VIDEOR1_PICK(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           VIDEOR1_PICK(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
  for (int i = 0; i < 4; ++i) {
    const Lanes a = x[2 * i], b = x[2 * i + 1];
    x[i] = VIDEOR1_PICK(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           VIDEOR1_PICK(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  for (int i = 0; i < 2; ++i) {
    const Lanes a = x[2 * i], b = x[2 * i + 1];
    x[i] = VIDEOR1_PICK(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           VIDEOR1_PICK(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  }
  const Lanes a = x[0], b = x[1];
  return VIDEOR1_PICK(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         VIDEOR1_PICK(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

// The same of eight vectors of eight lanes, and of four of four.
ALWAYS_INLINE Octet sums_of(Octet* x) {
  for (int i = 0; i < 4; ++i) {
    const Octet a = x[2 * i], b = x[2 * i + 1];
    x[i] = VIDEOR1_PICK(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + VIDEOR1_PICK(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 2; ++i) {
    const Octet a = x[2 * i], b = x[2 * i + 1];
    x[i] = VIDEOR1_PICK(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + VIDEOR1_PICK(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  const Octet a = x[0], b = x[1];
  return VIDEOR1_PICK(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + VIDEOR1_PICK(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
ALWAYS_INLINE Quarter sums_of(Quarter* x) {
  for (int i = 0; i < 2; ++i) {
    const Quarter a = x[2 * i], b = x[2 * i + 1];
    x[i] = VIDEOR1_PICK(a, b, 0, 4, 2, 6) + VIDEOR1_PICK(a, b, 1, 5, 3, 7);
  }
  return VIDEOR1_PICK(x[0], x[1], 0, 1, 4, 5) + VIDEOR1_PICK(x[0], x[1], 2, 3, 6, 7);
}

// The rows of sixteen vectors become their columns.
ALWAYS_INLINE void turn(Lanes* x) {
#define VIDEOR1_EXCHANGE(step, first, second)                       \
  for (int i = 0; i < 16; ++i)                                      \
    if ((i & step) == 0) {                                          \
      const Lanes a = x[i], b = x[i + step];                        \
      x[i] = VIDEOR1_PICK(a, b, VIDEOR1_LIST first);                \
      x[i + step] = VIDEOR1_PICK(a, b, VIDEOR1_LIST second);        \
    }
#define VIDEOR1_LIST(...) __VA_ARGS__
  VIDEOR1_EXCHANGE(8, (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23), (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
  VIDEOR1_EXCHANGE(4, (0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27), (4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31));
  VIDEOR1_EXCHANGE(2, (0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29), (2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
  VIDEOR1_EXCHANGE(1, (0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30), (1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31));
#undef VIDEOR1_LIST
#undef VIDEOR1_EXCHANGE
}

}  // namespace videor1
