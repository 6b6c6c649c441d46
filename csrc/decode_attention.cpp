// Attention of one new token per row over its group's prefix and its own suffix, in fp32 on a CPU: dozens of small tensor
// operations in one call, and no copy of a key or value.
//
// Compiled by videor1_kernels/extension.py at its first use, called through ctypes. A row and key head is one task that
// sums in a fixed order: the bits are the same for any number of threads.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "videor1/exp.h"
#include "videor1/simd.h"

namespace {

constexpr int kLanes = 16;  // head dims are multiples of it

struct Strides {
  int64_t entry, head;  // of consecutive tokens, and of key heads, in elements
};

struct Call {
  const float *q, *prefix_k, *prefix_v, *suffix_k, *suffix_v;
  float* out;
  const int64_t* rows;     // [R, 3]: start and length of the prefix, slot
  const int64_t* lengths;  // [R], of suffixes
  int64_t heads, repeat, dim;
  Strides pk, pv, sk, sv;
  int64_t sk_slot, sv_slot;
  float scale;
};

using videor1::exp_negative;
using videor1::Lanes;
using videor1::Quarter;
using videor1::Scalar;
using videor1::sums_of;

ALWAYS_INLINE float sum_of(Lanes x) { return sums_of(x, x, x, x)[0]; }

ALWAYS_INLINE Lanes product_of(const float* q, const float* k, int64_t dim) {
  Lanes sum = {0};
  for (int64_t d = 0; d < dim; d += kLanes)
    sum += *reinterpret_cast<const Lanes*>(q + d) * *reinterpret_cast<const Lanes*>(k + d);
  return sum;
}

// scores[i * total + t] = q[i] . k[t] for the `repeat` query heads of a key head
ALWAYS_INLINE void scores_of(const float* q, const float* k, int64_t stride, int64_t count, int64_t repeat, int64_t dim,
                             int64_t total, float* scores) {
  int64_t t = 0;
  for (; t + kLanes <= count; t += kLanes, k += kLanes * stride) {
    for (int64_t i = 0; i < repeat; ++i) {
      Lanes products[kLanes];
      for (int j = 0; j < kLanes; ++j) products[j] = product_of(q + i * dim, k + j * stride, dim);
      *reinterpret_cast<Lanes*>(scores + i * total + t) = sums_of(products);
    }
  }
  for (; t + 4 <= count; t += 4, k += 4 * stride) {
    for (int64_t i = 0; i < repeat; ++i) {
      const float* own = q + i * dim;
      *reinterpret_cast<Quarter*>(scores + i * total + t) =
          sums_of(product_of(own, k, dim), product_of(own, k + stride, dim), product_of(own, k + 2 * stride, dim),
                  product_of(own, k + 3 * stride, dim));
    }
  }
  for (; t < count; ++t, k += stride)
    for (int64_t i = 0; i < repeat; ++i) scores[i * total + t] = sum_of(product_of(q + i * dim, k, dim));
}

// out += sum over t of weights[t] * v[t] for M * kLanes entries, which stay in registers; even and odd tokens are summed
// apart, so that one addition does not wait for the last.
template <int M>
ALWAYS_INLINE void add_weighted(const float* weights, const float* v, int64_t stride, int64_t count, float* out) {
  Lanes even[M], odd[M];
  for (int m = 0; m < M; ++m) {
    even[m] = *reinterpret_cast<const Lanes*>(out + m * kLanes);
    odd[m] = Lanes{0};
  }
  int64_t t = 0;
  for (; t + 2 <= count; t += 2, v += 2 * stride)
    for (int m = 0; m < M; ++m) {
      even[m] += weights[t] * *reinterpret_cast<const Lanes*>(v + m * kLanes);
      odd[m] += weights[t + 1] * *reinterpret_cast<const Lanes*>(v + stride + m * kLanes);
    }
  if (t < count)
    for (int m = 0; m < M; ++m) even[m] += weights[t] * *reinterpret_cast<const Lanes*>(v + m * kLanes);
  for (int m = 0; m < M; ++m) *reinterpret_cast<Lanes*>(out + m * kLanes) = even[m] + odd[m];
}

// out[i] += sum over t of weights[i * total + t] * v[t]
ALWAYS_INLINE void add_values(const float* weights, const float* v, int64_t stride, int64_t count, int64_t repeat,
                       int64_t dim, int64_t total, float* out) {
  for (int64_t i = 0; i < repeat; ++i) {
    const float* own = weights + i * total;
    float* to = out + i * dim;
    int64_t d = 0;
    for (; d + 4 * kLanes <= dim; d += 4 * kLanes) add_weighted<4>(own, v + d, stride, count, to + d);
    for (; d + 2 * kLanes <= dim; d += 2 * kLanes) add_weighted<2>(own, v + d, stride, count, to + d);
    if (d < dim) add_weighted<1>(own, v + d, stride, count, to + d);
  }
}

EVERY_CPU void attend(const Call& call, int64_t row, int64_t head, std::vector<float>& memory) {
  const int64_t start = call.rows[3 * row], prefix = call.rows[3 * row + 1], slot = call.rows[3 * row + 2];
  const int64_t suffix = call.lengths[row], repeat = call.repeat, dim = call.dim;
  const int64_t total = (prefix + suffix + kLanes - 1) / kLanes * kLanes;
  memory.resize(repeat * (total + dim));
  float* scores = memory.data();
  float* queries = scores + repeat * total;
  const int64_t at = (row * call.heads + head) * repeat * dim;
  for (int64_t i = 0; i < repeat * dim; ++i) queries[i] = call.q[at + i] * call.scale;

  const float* own_k = call.suffix_k + slot * call.sk_slot + head * call.sk.head;
  const float* own_v = call.suffix_v + slot * call.sv_slot + head * call.sv.head;
  const float* shared_k = call.prefix_k + start * call.pk.entry + head * call.pk.head;
  const float* shared_v = call.prefix_v + start * call.pv.entry + head * call.pv.head;
  scores_of(queries, shared_k, call.pk.entry, prefix, repeat, dim, total, scores);
  scores_of(queries, own_k, call.sk.entry, suffix, repeat, dim, total, scores + prefix);

  float* out = call.out + at;
  std::fill(out, out + repeat * dim, 0.0f);
  float sums[kLanes];
  for (int64_t i = 0; i < repeat; ++i) {
    float* own = scores + i * total;
    for (int64_t t = prefix + suffix; t < total; ++t) own[t] = own[0];  // fills the last lanes; not counted below
    float top[kLanes];
    std::copy(own, own + kLanes, top);
    for (int64_t t = 0; t < total; t += kLanes)
      for (int l = 0; l < kLanes; ++l) top[l] = own[t + l] > top[l] ? own[t + l] : top[l];
    const float most = *std::max_element(top, top + kLanes);
    for (int64_t t = 0; t < total; ++t) {
      own[t] -= most;
      exp_negative<Scalar>(own[t]);
    }
    for (int64_t t = prefix + suffix; t < total; ++t) own[t] = 0.0f;
    std::fill(sums, sums + kLanes, 0.0f);
    for (int64_t t = 0; t < total; t += kLanes)
      for (int l = 0; l < kLanes; ++l) sums[l] += own[t + l];
    const float inverse = 1.0f / sum_of(*reinterpret_cast<const Lanes*>(sums));
    for (int64_t t = 0; t < total; ++t) own[t] *= inverse;
  }
  add_values(scores, shared_v, call.pv.entry, prefix, repeat, dim, total, out);
  add_values(scores + prefix, own_v, call.sv.entry, suffix, repeat, dim, total, out);
}

using Parallel = int (*)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);

void some(int64_t begin, int64_t end, void* data) {
  const Call& call = *static_cast<const Call*>(data);
  static thread_local std::vector<float> memory;
  for (int64_t task = begin; task < end; ++task) attend(call, task / call.heads, task % call.heads, memory);
}

}  // namespace

// numbers: R, Hkv, Hq / Hkv, D, then the strides (token, head) of prefix_k, prefix_v, (slot, token, head) of suffix_k,
// suffix_v; grain: tasks (a row and key head each) that are worth a thread. Returns 0, or what torch_parallel_for did.
extern "C" int decode_attention(const float* q, const float* prefix_k, const float* prefix_v, const float* suffix_k,
                                const float* suffix_v, float* out, const int64_t* rows, const int64_t* lengths,
                                const int64_t* numbers, float scale, int64_t grain, void* parallel_for) {
  const int64_t* n = numbers;
  Call call{q, prefix_k, prefix_v, suffix_k, suffix_v, out, rows, lengths, n[1], n[2], n[3],
            {n[4], n[5]}, {n[6], n[7]}, {n[9], n[10]}, {n[12], n[13]}, n[8], n[11], scale};
  const int64_t tasks = n[0] * n[1];
  if (parallel_for == nullptr || tasks <= grain) {
    some(0, tasks, &call);
    return 0;
  }
  return reinterpret_cast<Parallel>(parallel_for)(0, tasks, grain, some, &call);
}
