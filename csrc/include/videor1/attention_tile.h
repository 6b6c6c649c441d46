// The steps of attention on a tile of keys and query rows, in fp32, for vectors of any width.
//
// Tiles stand transposed, [keys, kStride]: a vector holds several rows of queries at one key, so that a softmax needs
// no sum across lanes, and the products read a tile and its transpose alike. A row is a query of one head.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "videor1/exp.h"

namespace videor1 {

// At most, of a tile. What the products round up to, 12 rows of registers and 32 lanes, divides both.
constexpr int kKeys = 96, kRows = 96;
constexpr int kStride = kRows + 16;  // rows of a segment may begin at any 4th lane, and their last vector goes on

// A processor's vectors, and how many rows of a product stay in its registers: a block of sums has kMost rows, or fewer
// in steps of kStep, of two vectors.
template <int kBytes, int kMost_, int kStep_>
struct Processor {
  typedef float F __attribute__((vector_size(kBytes), aligned(4)));
  typedef int32_t I __attribute__((vector_size(kBytes), aligned(4)));
  static constexpr int kLanes = kBytes / sizeof(float);
  static constexpr int kMost = kMost_;
  static constexpr int kStep = kStep_;
};

// The widest vectors, in bits, that this processor has code for here: of up to `bits`, 128 at least.
inline int64_t widest_vectors(int64_t bits) {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (bits >= 512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return 512;
  if (bits >= 256 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 256;
#endif
  return 128;
}

template <typename P>
ALWAYS_INLINE typename P::F& at(float* x) {
  return *reinterpret_cast<typename P::F*>(x);
}
template <typename P>
ALWAYS_INLINE const typename P::F& at(const float* x) {
  return *reinterpret_cast<const typename P::F*>(x);
}

// c [M, N vectors] = (onto ? c : 0) + a [M, depth] b [depth, N vectors]; a's rows lie `row` apart, its columns `step`.
template <typename P, int M, int N>
ALWAYS_INLINE void block(const float* a, int64_t row, int64_t step, const float* b, int64_t ldb, float* c, int64_t ldc,
                         int64_t depth, bool onto) {
  using F = typename P::F;
  F sum[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sum[m][n] = F{};
  for (int64_t d = 0; d < depth; ++d, a += step, b += ldb) {
    F w[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) w[n] = at<P>(b + n * P::kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) sum[m][n] += a[m * row] * w[n];
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      typename P::F& to = at<P>(c + m * ldc + n * P::kLanes);
      to = onto ? to + sum[m][n] : sum[m][n];  // a sum of blocks, which errs less than one long sum
    }
}

// The same for up to kMost rows, rounded up to a multiple of kStep.
template <typename P, int N>
ALWAYS_INLINE void rows_of(int64_t rows, const float* a, int64_t row, int64_t step, const float* b, int64_t ldb,
                           float* c, int64_t ldc, int64_t depth, bool onto) {
  if (rows > 2 * P::kStep)
    block<P, P::kMost, N>(a, row, step, b, ldb, c, ldc, depth, onto);
  else if (rows > P::kStep)
    block<P, 2 * P::kStep, N>(a, row, step, b, ldb, c, ldc, depth, onto);
  else
    block<P, P::kStep, N>(a, row, step, b, ldb, c, ldc, depth, onto);
}

// c [keys, rows] = a [keys, depth] b [depth, rows]. Of row r only the first count[r] keys are needed; null: all.
template <typename P>
ALWAYS_INLINE void scores(const float* a, int64_t lda, const float* b, float* c, int64_t keys, int64_t rows,
                          int64_t depth, const int32_t* count) {
  for (int64_t r = 0; r < rows;) {
    const int64_t width = rows - r > P::kLanes ? 2 * P::kLanes : P::kLanes;
    const int64_t needed = count ? count[std::min(r + width, rows) - 1] : keys;
    for (int64_t k = 0; k < needed; k += P::kMost) {
      const float* own = a + k * lda;
      float* to = c + k * kStride + r;
      if (width > P::kLanes)
        rows_of<P, 2>(needed - k, own, lda, 1, b + r, kStride, to, kStride, depth, false);
      else
        rows_of<P, 1>(needed - k, own, lda, 1, b + r, kStride, to, kStride, depth, false);
    }
    r += width;
  }
}

// c [rows, columns] += a^T b, with a [keys, rows], b [keys, columns]. Row r of c takes the first count[r] keys; what a
// holds at the others of a block of rows is 0.
template <typename P>
ALWAYS_INLINE void collect(const float* a, const float* b, float* c, int64_t keys, int64_t rows, int64_t columns,
                           const int32_t* count) {
  for (int64_t j = 0; j < columns;) {
    const int64_t width = columns - j > P::kLanes ? 2 * P::kLanes : P::kLanes;
    for (int64_t r = 0; r < rows; r += P::kMost) {
      const int64_t depth = count ? count[std::min<int64_t>(r + P::kMost, rows) - 1] : keys;
      float* to = c + r * columns + j;
      if (width > P::kLanes)
        rows_of<P, 2>(rows - r, a + r, 1, kStride, b + j, columns, to, columns, depth, true);
      else
        rows_of<P, 1>(rows - r, a + r, 1, kStride, b + j, columns, to, columns, depth, true);
    }
    j += width;
  }
}

// c [keys, columns] += a b, with a [keys, rows], b [rows, columns]. Key k takes the rows from first + k * repeat on.
template <typename P>
ALWAYS_INLINE void spread(const float* a, const float* b, float* c, int64_t keys, int64_t rows, int64_t columns,
                          int64_t first, int64_t repeat) {
  for (int64_t j = 0; j < columns;) {
    const int64_t width = columns - j > P::kLanes ? 2 * P::kLanes : P::kLanes;
    for (int64_t k = 0; k < keys; k += P::kMost) {
      const int64_t begin = std::min(rows, std::max<int64_t>(0, first + k * repeat));
      const float* own = a + k * kStride + begin;
      float* to = c + k * columns + j;
      if (width > P::kLanes)
        rows_of<P, 2>(keys - k, own, kStride, 1, b + begin * columns + j, columns, to, columns, rows - begin, true);
      else
        rows_of<P, 1>(keys - k, own, kStride, 1, b + begin * columns + j, columns, to, columns, rows - begin, true);
    }
    j += width;
  }
}

// How many keys each of a vector of rows sees, and how many all of them do; of `rows` of them the rest is no row.
template <typename P>
struct Seen {
  typename P::I each;
  int64_t all, any;

  ALWAYS_INLINE Seen(const int32_t* count, int64_t r, int64_t keys, int64_t rows) : each{}, all(keys), any(keys) {
    if (!count) return;
    std::memcpy(&each, count + r, sizeof each);
    all = r + P::kLanes > rows ? 0 : count[r];
    any = count[std::min<int64_t>(r + P::kLanes, rows) - 1];
  }
};

// One step of the online softmax: s [keys, rows] becomes e^(s - top), 0 where a row does not see a key; top, the
// largest score so far, and sum, of e^(s - top), are renewed, and out [rows, columns] is scaled to the new top.
template <typename P>
ALWAYS_INLINE void soften(float* s, int64_t keys, int64_t rows, const int32_t* count, float* top, float* sum,
                          float* out, int64_t columns) {
  using F = typename P::F;
  alignas(64) float factor[kStride];
  for (int64_t r = 0; r < rows; r += P::kLanes) {
    const Seen<P> seen(count, r, keys, rows);
    const F hidden = F{} - std::numeric_limits<float>::infinity();
    F most = at<P>(top + r);
    float* own = s + r;
    int64_t k = 0;
    for (; k < seen.all; ++k) {
      const F x = at<P>(own + k * kStride);
      most = x > most ? x : most;
    }
    for (; k < seen.any; ++k) {
      F& x = at<P>(own + k * kStride);
      x = seen.each > static_cast<int32_t>(k) ? x : hidden;
      most = x > most ? x : most;
    }
    F change = at<P>(top + r) - most;
    exp_negative<P>(change);
    F total = F{};
    for (k = 0; k < seen.any; ++k) {
      F x = at<P>(own + k * kStride) - most;
      exp_negative<P>(x);
      at<P>(own + k * kStride) = x;
      total += x;
    }
    for (; k < keys; ++k) at<P>(own + k * kStride) = F{};
    at<P>(top + r) = most;
    at<P>(sum + r) = at<P>(sum + r) * change + total;
    at<P>(factor + r) = change;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; j += P::kLanes) at<P>(out + r * columns + j) *= factor[r];
}

// s becomes the probabilities p = e^(s - lse), and dp the gradient of the scores, p (dp - delta): both [keys, rows], 0
// where a row does not see a key, and in the keys that fill the last block of a product.
template <typename P>
ALWAYS_INLINE void differentiate(float* s, float* dp, int64_t keys, int64_t rows, const int32_t* count,
                                 const float* lse, const float* delta) {
  using F = typename P::F;
  const int64_t filled = (keys + P::kStep - 1) / P::kStep * P::kStep;
  for (int64_t r = 0; r < rows; r += P::kLanes) {
    const Seen<P> seen(count, r, keys, rows);
    const F high = at<P>(lse + r), shared = at<P>(delta + r);
    float *own = s + r, *gradient = dp + r;
    int64_t k = 0;
    for (; k < seen.any; ++k) {
      F p = at<P>(own + k * kStride) - high;
      exp_negative<P>(p);
      F d = p * (at<P>(gradient + k * kStride) - shared);
      if (k >= seen.all) {
        const auto sees = seen.each > static_cast<int32_t>(k);
        p = sees ? p : F{};
        d = sees ? d : F{};
      }
      at<P>(own + k * kStride) = p;
      at<P>(gradient + k * kStride) = d;
    }
    for (; k < filled; ++k) at<P>(own + k * kStride) = at<P>(gradient + k * kStride) = F{};
  }
}

}  // namespace videor1
