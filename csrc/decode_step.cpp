// What a decode step does between its products, on a CPU in fp32 and bf16: the norm of the residual stream, rotary
// positions with the write into the KV cache, and the gated norm of a linear attention's heads. Each is a few thousand
// numbers, for which torch takes ten to twenty calls.
//
// Compiled by videor1_kernels/extension.py at its first use, called through ctypes. A row is one task: the bits are the
// same for any number of threads. Values are rounded where torch's operations round them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "videor1/exp.h"
#include "videor1/ranges.h"
#include "videor1/simd.h"

namespace {

constexpr int kLanes = 16;
using videor1::Lanes;
using videor1::sums_of;

struct Bf16 {
  uint16_t bits;
};

ALWAYS_INLINE float wide(float x) { return x; }

ALWAYS_INLINE float wide(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
T narrow(float x);

template <>
ALWAYS_INLINE float narrow<float>(float x) {
  return x;
}

template <>
ALWAYS_INLINE Bf16 narrow<Bf16>(float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return Bf16{static_cast<uint16_t>(x != x ? 0x7fc0 : rounded)};
}

template <typename T>
ALWAYS_INLINE float rounded(float x) {
  return wide(narrow<T>(x));
}

struct Norm {
  const void *x, *residual, *weight;
  void *summed, *normed;
  int64_t width, x_stride, residual_stride;
  int kind;
  float eps;
};

// 1 / sqrt(mean(x^2) + eps) of the entries of a row.
template <typename T>
ALWAYS_INLINE float scale_of(const T* x, int64_t width, float eps) {
  Lanes squares = {0};
  int64_t h = 0;
  for (; h + kLanes <= width; h += kLanes)
    for (int l = 0; l < kLanes; ++l) squares[l] += wide(x[h + l]) * wide(x[h + l]);
  for (int l = 0; h < width; ++h, ++l) squares[l] += wide(x[h]) * wide(x[h]);
  const float mean = sums_of(squares, squares, squares, squares)[0] / static_cast<float>(width);
  return 1.0f / std::sqrt(mean + eps);
}

// S: of summed. Without a residual x is summed, and neither added to nor written. kUnitOffset: the factor is 1 + weight,
// and the product alone is rounded.
template <bool kUnitOffset, typename X, typename S, typename W, typename Out>
ALWAYS_INLINE void norm_row(const Norm& call, int64_t row) {
  const int64_t width = call.width;
  const X* x = static_cast<const X*>(call.x) + row * call.x_stride;
  const S* summed = reinterpret_cast<const S*>(x);
  if (call.residual != nullptr) {
    const S* residual = static_cast<const S*>(call.residual) + row * call.residual_stride;
    S* out = static_cast<S*>(call.summed) + row * width;
    for (int64_t h = 0; h < width; ++h) out[h] = narrow<S>(wide(x[h]) + wide(residual[h]));
    summed = out;
  }
  const float scale = scale_of(summed, width, call.eps);
  const W* weight = static_cast<const W*>(call.weight);
  Out* normed = static_cast<Out*>(call.normed) + row * width;
  for (int64_t h = 0; h < width; ++h) {
    const float factor = wide(weight[h]), value = wide(summed[h]) * scale;
    normed[h] = narrow<Out>(kUnitOffset ? value * (1.0f + factor) : factor * rounded<S>(value));
  }
}

EVERY_CPU void norm_rows(int64_t begin, int64_t end, void* data) {
  const Norm& call = *static_cast<const Norm*>(data);
  for (int64_t row = begin; row < end; ++row) switch (call.kind) {  // bits: x, summed, weight are bf16; unit offset
      case 0: norm_row<false, float, float, float, float>(call, row); break;
      case 1: norm_row<false, Bf16, float, float, float>(call, row); break;
      case 2: norm_row<false, float, Bf16, float, float>(call, row); break;
      case 3: norm_row<false, Bf16, Bf16, float, float>(call, row); break;
      case 4: norm_row<false, float, float, Bf16, float>(call, row); break;
      case 5: norm_row<false, Bf16, float, Bf16, float>(call, row); break;
      case 6: norm_row<false, float, Bf16, Bf16, Bf16>(call, row); break;
      case 7: norm_row<false, Bf16, Bf16, Bf16, Bf16>(call, row); break;
      case 8: norm_row<true, float, float, float, float>(call, row); break;
      case 9: norm_row<true, Bf16, float, float, float>(call, row); break;
      case 10: norm_row<true, float, Bf16, float, Bf16>(call, row); break;
      case 11: norm_row<true, Bf16, Bf16, float, Bf16>(call, row); break;
      case 12: norm_row<true, float, float, Bf16, float>(call, row); break;
      case 13: norm_row<true, Bf16, float, Bf16, float>(call, row); break;
      case 14: norm_row<true, float, Bf16, Bf16, Bf16>(call, row); break;
      default: norm_row<true, Bf16, Bf16, Bf16, Bf16>(call, row);
    }
}

struct Rotary {
  const void *qkv, *cos, *sin;
  void *q, *suffix_k, *suffix_v;
  const int64_t *positions, *lengths, *slots;
  const float *q_norm, *k_norm;  // null: heads are rotated as they are
  float eps;
  int64_t heads, kv_heads, dim, row_stride, cos_stride, sin_stride;
  int64_t k_slot, k_token, k_head, v_slot, v_token, v_head;
  int64_t rotary_dim;  // of a head the first entries, which are rotated
  int kind;
};

enum class HeadNorm { kNone, kWeight, kUnitOffset };  // the factor of a unit offset is 1 + weight

// An entry of a head, normalised.
template <HeadNorm kNorm, typename T>
ALWAYS_INLINE float normed(T x, float scale, const float* norm, int64_t d) {
  if (kNorm == HeadNorm::kNone) return wide(x);
  const float value = wide(x) * scale;
  return kNorm == HeadNorm::kWeight ? rounded<T>(value) * norm[d] : rounded<T>(value * (1.0f + norm[d]));
}

template <HeadNorm kNorm, typename T, typename Table>
ALWAYS_INLINE void rotate(const T* x, const Table* cos, const Table* sin, const float* norm, float eps, int64_t dim,
                          int64_t rotary_dim, T* out) {
  const int64_t half = rotary_dim / 2;
  const float scale = kNorm == HeadNorm::kNone ? 1.0f : scale_of(x, dim, eps);
  for (int64_t d = 0; d < half; ++d) {
    const float low = normed<kNorm>(x[d], scale, norm, d), high = normed<kNorm>(x[d + half], scale, norm, d + half);
    out[d] = narrow<T>(low * wide(cos[d]) - high * wide(sin[d]));
    out[d + half] = narrow<T>(high * wide(cos[d + half]) + low * wide(sin[d + half]));
  }
  for (int64_t d = rotary_dim; d < dim; ++d) out[d] = narrow<T>(normed<kNorm>(x[d], scale, norm, d));
}

template <HeadNorm kNorm, typename T, typename Table>
ALWAYS_INLINE void rotary_row(const Rotary& call, int64_t row) {
  const int64_t dim = call.dim;
  const T* x = static_cast<const T*>(call.qkv) + row * call.row_stride;
  const Table* cos = static_cast<const Table*>(call.cos) + call.positions[row] * call.cos_stride;
  const Table* sin = static_cast<const Table*>(call.sin) + call.positions[row] * call.sin_stride;
  T* q = static_cast<T*>(call.q) + row * call.heads * dim;
  for (int64_t head = 0; head < call.heads; ++head, x += dim, q += dim)
    rotate<kNorm>(x, cos, sin, call.q_norm, call.eps, dim, call.rotary_dim, q);
  const int64_t slot = call.slots == nullptr ? row : call.slots[row], token = call.lengths[row] - 1;
  T* k = static_cast<T*>(call.suffix_k) + slot * call.k_slot + token * call.k_token;
  for (int64_t head = 0; head < call.kv_heads; ++head, x += dim)
    rotate<kNorm>(x, cos, sin, call.k_norm, call.eps, dim, call.rotary_dim, k + head * call.k_head);
  T* v = static_cast<T*>(call.suffix_v) + slot * call.v_slot + token * call.v_token;
  for (int64_t head = 0; head < call.kv_heads; ++head, x += dim)
    std::memcpy(v + head * call.v_head, x, dim * sizeof(T));
}

EVERY_CPU void rotary_rows(int64_t begin, int64_t end, void* data) {
  const Rotary& call = *static_cast<const Rotary*>(data);
  const int norms = call.q_norm == nullptr ? 0 : 4;
  for (int64_t row = begin; row < end; ++row) switch (call.kind + norms) {  // bits: values, tables are bf16; then norms
      case 0: rotary_row<HeadNorm::kNone, float, float>(call, row); break;
      case 1: rotary_row<HeadNorm::kNone, Bf16, float>(call, row); break;
      case 2: rotary_row<HeadNorm::kNone, float, Bf16>(call, row); break;
      case 3: rotary_row<HeadNorm::kNone, Bf16, Bf16>(call, row); break;
      case 4: rotary_row<HeadNorm::kWeight, float, float>(call, row); break;
      case 5: rotary_row<HeadNorm::kWeight, Bf16, float>(call, row); break;
      case 6: rotary_row<HeadNorm::kWeight, float, Bf16>(call, row); break;
      case 7: rotary_row<HeadNorm::kWeight, Bf16, Bf16>(call, row); break;
      case 8: rotary_row<HeadNorm::kUnitOffset, float, float>(call, row); break;
      case 9: rotary_row<HeadNorm::kUnitOffset, Bf16, float>(call, row); break;
      case 10: rotary_row<HeadNorm::kUnitOffset, float, Bf16>(call, row); break;
      default: rotary_row<HeadNorm::kUnitOffset, Bf16, Bf16>(call, row);
    }
}

struct GatedNorm {
  const void *x, *gate, *weight;
  void* out;
  int64_t heads, dim, x_row, x_head, gate_row, gate_head;
  int dtypes;
  float eps;
};

// `count` entries of a head, up to a vector. S: what the dtypes of a head and of the weight promote to.
template <typename P, typename S, typename X, typename G, typename W>
ALWAYS_INLINE void gate_some(const X* x, const G* gate, const W* weight, float scale, int64_t count, X* out) {
  using F = typename P::F;
  float gates[P::kLanes] = {0}, weighted[P::kLanes] = {0};
  for (int l = 0; l < count; ++l) gates[l] = wide(gate[l]);
  for (int l = 0; l < count; ++l) weighted[l] = rounded<S>(wide(weight[l]) * rounded<X>(wide(x[l]) * scale));
  F& z = videor1::at<P>(gates);
  F e = z > F{} ? -z : z;
  videor1::exp_negative<P>(e);
  z = (z > F{} ? z : z * e) / (e + 1.0f) * videor1::at<P>(weighted);
  for (int l = 0; l < count; ++l) out[l] = narrow<X>(gates[l]);
}

template <typename P, typename X, typename G, typename W, typename S>
ALWAYS_INLINE void gated_head(const GatedNorm& call, int64_t task) {
  const int64_t row = task / call.heads, head = task % call.heads, dim = call.dim;
  const X* x = static_cast<const X*>(call.x) + row * call.x_row + head * call.x_head;
  const G* gate = static_cast<const G*>(call.gate) + row * call.gate_row + head * call.gate_head;
  const W* weight = static_cast<const W*>(call.weight);
  X* out = static_cast<X*>(call.out) + task * dim;
  const float scale = scale_of(x, dim, call.eps);
  int64_t d = 0;
  for (; d + P::kLanes <= dim; d += P::kLanes) gate_some<P, S>(x + d, gate + d, weight + d, scale, P::kLanes, out + d);
  if (d < dim) gate_some<P, S>(x + d, gate + d, weight + d, scale, dim - d, out + d);
}

template <typename P>
ALWAYS_INLINE void gated_heads(int64_t begin, int64_t end, void* data) {
  const GatedNorm& call = *static_cast<const GatedNorm*>(data);
  for (int64_t task = begin; task < end; ++task) switch (call.dtypes) {  // bits: x, gate, weight are bf16
      case 0: gated_head<P, float, float, float, float>(call, task); break;
      case 1: gated_head<P, Bf16, float, float, float>(call, task); break;
      case 2: gated_head<P, float, Bf16, float, float>(call, task); break;
      case 3: gated_head<P, Bf16, Bf16, float, float>(call, task); break;
      case 4: gated_head<P, float, float, Bf16, float>(call, task); break;
      case 5: gated_head<P, Bf16, float, Bf16, Bf16>(call, task); break;
      case 6: gated_head<P, float, Bf16, Bf16, float>(call, task); break;
      default: gated_head<P, Bf16, Bf16, Bf16, Bf16>(call, task);
    }
}

VIDEOR1_RANGE_FOR(gated_heads)

}  // namespace

// Each returns 0, or what torch_parallel_for did. Strides are in elements; grain: rows that are worth a thread.

extern "C" int add_rms_norm(const void* x, const void* residual, const void* weight, void* summed, void* normed,
                            int64_t rows, int64_t width, int64_t x_stride, int64_t residual_stride, int kind,
                            float eps, int64_t grain, void* parallel_for) {
  Norm call{x, residual, weight, summed, normed, width, x_stride, residual_stride, kind, eps};
  return videor1::over(rows, grain, parallel_for, norm_rows, &call);
}

// numbers: R, Hq, Hkv, D, P, S, C, then the strides of rows of qkv, cos, sin, and (slot, token, head) of suffix_k and
// suffix_v, and how many entries of a head are rotated. kind: 1 for values, 2 for tables in bf16, 4 for norms with a unit
// offset. Returns -1, and nothing is written, where a position, length or slot is out of range.
extern "C" int rotary_append(const void* qkv, const void* cos, const void* sin, void* suffix_k, void* suffix_v, void* q,
                             const int64_t* positions, const int64_t* lengths, const int64_t* slots,
                             const float* q_norm, const float* k_norm, float eps, const int64_t* numbers, int kind,
                             int64_t grain, void* parallel_for) {
  const int64_t* n = numbers;
  for (int64_t row = 0; row < n[0]; ++row) {
    const int64_t position = positions[row], slot = slots == nullptr ? row : slots[row], length = lengths[row];
    if (position < 0 || position >= n[4] || slot < 0 || slot >= n[5] || length < 1 || length > n[6]) return -1;
  }
  Rotary call{qkv,  cos,  sin,  q,    suffix_k, suffix_v, positions, lengths, slots, q_norm, k_norm, eps,   n[1],
              n[2], n[3], n[7], n[8], n[9],     n[10],    n[11],     n[12],   n[13], n[14],  n[15],  n[16], kind};
  return videor1::over(n[0], grain, parallel_for, rotary_rows, &call);
}

// numbers: R, Hv, D, then the strides of rows and heads of x and of gate, and how many bits a vector may have. grain:
// heads that are worth a thread.
extern "C" int gated_rms_norm(const void* x, const void* gate, const void* weight, void* out, float eps,
                              const int64_t* numbers, int dtypes, int64_t grain, void* parallel_for) {
  const int64_t* n = numbers;
  GatedNorm call{x, gate, weight, out, n[1], n[2], n[3], n[4], n[5], n[6], dtypes, eps};
  return videor1::over(n[0] * n[1], grain, parallel_for, range_for(n[7]), &call);
}
