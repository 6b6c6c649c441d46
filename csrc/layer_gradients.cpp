// What a decoder layer computes between its products and its attention, in fp32 on a CPU, with gradients: the norm of the
// residual stream, rotary positions behind a norm of each head, the gated activation. Each is one pass over memory, where
// torch makes five to fifteen.
//
// Compiled by videor1_kernels/extension.py at its first use, called through ctypes. Widths are multiples of 16, halves of
// heads of 4. Rows are cut into blocks of kRowsOfSum, whose sums for a norm's weight are stored apart: the bits are the same
// for any number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "videor1/attention_tile.h"
#include "videor1/ranges.h"

namespace {

using namespace videor1;

constexpr int64_t kRowsOfSum = 64;

using Narrow = Processor<16, 6, 2>;  // for heads whose halves are not whole vectors

template <typename P>
ALWAYS_INLINE float sum_of(const typename P::F& x) {
  float total = x[0];
  for (int l = 1; l < P::kLanes; ++l) total += x[l];
  return total;
}

// 1 / sqrt(mean(x^2) + eps)
template <typename P>
ALWAYS_INLINE float scale_of(const float* x, int64_t width, float eps) {
  typename P::F squares{};
  for (int64_t i = 0; i < width; i += P::kLanes) squares += at<P>(x + i) * at<P>(x + i);
  return 1.0f / std::sqrt(sum_of<P>(squares) / static_cast<float>(width) + eps);
}

// The gradient of x from that of y = weight x / sqrt(mean(x^2) + eps), added to `to` or written there; `weight_grad` gets
// its part of the weight's.
template <typename P, bool kAdd>
ALWAYS_INLINE void norm_gradient(const float* grad, const float* x, const float* weight, int64_t width, float eps,
                                 float* to, float* weight_grad) {
  using F = typename P::F;
  const float scale = scale_of<P>(x, width, eps);
  F products{};
  for (int64_t i = 0; i < width; i += P::kLanes) products += at<P>(grad + i) * at<P>(weight + i) * at<P>(x + i);
  const float shared = sum_of<P>(products) * scale * scale / static_cast<float>(width);
  for (int64_t i = 0; i < width; i += P::kLanes) {
    const F g = at<P>(grad + i), own = at<P>(x + i);
    at<P>(weight_grad + i) += g * (own * scale);
    const F change = scale * (g * at<P>(weight + i) - own * shared);
    at<P>(to + i) = kAdd ? at<P>(to + i) + change : change;
  }
}

struct Norm {
  const float *grad, *x, *weight;
  float *stream, *weight_grad;  // [rows, width]: added to; [blocks, width]: filled
  int64_t rows, width;
  float eps;
};

template <typename P>
ALWAYS_INLINE void norm_backward(const Norm& call, int64_t begin, int64_t end) {
  const int64_t width = call.width;
  for (int64_t block = begin; block < end; ++block) {
    float* weight_grad = call.weight_grad + block * width;
    std::fill(weight_grad, weight_grad + width, 0.0f);
    for (int64_t row = block * kRowsOfSum; row < std::min((block + 1) * kRowsOfSum, call.rows); ++row)
      norm_gradient<P, true>(call.grad + row * width, call.x + row * width, call.weight, width, call.eps,
                             call.stream + row * width, weight_grad);
  }
}

struct Silu {
  const float *gate_up, *grad;  // [rows, 2 width]; [rows, width], null: forward alone
  float *out, *gate_up_grad;    // [rows, width]; [rows, 2 width]
  int64_t rows, width;
};

template <typename P>
ALWAYS_INLINE void silu_mul(const Silu& call, int64_t begin, int64_t end) {
  using F = typename P::F;
  const int64_t width = call.width;
  for (int64_t row = begin * kRowsOfSum; row < std::min(end * kRowsOfSum, call.rows); ++row) {
    const float *gate = call.gate_up + 2 * row * width, *up = gate + width, *grad = call.grad + row * width;
    float *out = call.out + row * width, *gate_grad = call.gate_up_grad + 2 * row * width, *up_grad = gate_grad + width;
    for (int64_t i = 0; i < width; i += P::kLanes) {
      const F g = at<P>(gate + i), u = at<P>(up + i);
      F e = g > F{} ? -g : g;
      exp_negative<P>(e);
      const F sigmoid = (g > F{} ? F{} + 1.0f : e) / (e + 1.0f), silu = g * sigmoid;
      at<P>(out + i) = silu * u;
      if (call.grad == nullptr) continue;
      const F d = at<P>(grad + i);
      at<P>(up_grad + i) = d * silu;
      at<P>(gate_grad + i) = d * u * (sigmoid + silu * (1.0f - sigmoid));
    }
  }
}

struct Rotary {
  const float *qkv, *cos, *sin, *q_norm, *k_norm;  // [rows, (heads + 2 kv_heads) dim]; [rows, dim]; null: no norm
  float* out;                                      // [rows, (heads + kv_heads) dim]
  const float *dq, *dk, *dv;                       // null: forward
  float *qkv_grad, *norm_grads;                    // norm_grads [blocks, 2, dim]
  int64_t rows, heads, kv_heads, dim;
  float eps;
};

template <typename P>
ALWAYS_INLINE void rotary(const Rotary& call, int64_t begin, int64_t end) {
  using F = typename P::F;
  const int64_t dim = call.dim, half = dim / 2, rotated = call.heads + call.kv_heads, width = (rotated + call.kv_heads) * dim;
  for (int64_t row = begin * kRowsOfSum; row < std::min(end * kRowsOfSum, call.rows); ++row) {
    const float *cos = call.cos + row * dim, *sin = call.sin + row * dim;
    for (int64_t head = 0; head < rotated; ++head) {
      const float *x = call.qkv + row * width + head * dim, *norm = head < call.heads ? call.q_norm : call.k_norm;
      float* to = call.out + (row * rotated + head) * dim;
      const float scale = norm == nullptr ? 1.0f : scale_of<P>(x, dim, call.eps);
      for (int64_t i = 0; i < half; i += P::kLanes) {
        F first = at<P>(x + i), second = at<P>(x + i + half);
        if (norm != nullptr) {
          first *= scale * at<P>(norm + i);
          second *= scale * at<P>(norm + i + half);
        }
        at<P>(to + i) = first * at<P>(cos + i) - second * at<P>(sin + i);
        at<P>(to + i + half) = second * at<P>(cos + i + half) + first * at<P>(sin + i + half);
      }
    }
  }
}

template <typename P>
ALWAYS_INLINE void rotary_backward(const Rotary& call, int64_t begin, int64_t end) {
  const int64_t dim = call.dim, half = dim / 2, rotated = call.heads + call.kv_heads, width = (rotated + call.kv_heads) * dim;
  for (int64_t block = begin; block < end; ++block) {
    float* norm_grads = call.norm_grads + 2 * block * dim;
    if (call.q_norm != nullptr) std::fill(norm_grads, norm_grads + 2 * dim, 0.0f);
    for (int64_t row = block * kRowsOfSum; row < std::min((block + 1) * kRowsOfSum, call.rows); ++row) {
      const float *cos = call.cos + row * dim, *sin = call.sin + row * dim;
      float* out = call.qkv_grad + row * width;
      for (int64_t head = 0; head < rotated; ++head) {
        const bool is_q = head < call.heads;
        const float* grad = is_q ? call.dq + (row * call.heads + head) * dim
                                 : call.dk + (row * call.kv_heads + head - call.heads) * dim;
        float* to = out + head * dim;
        for (int64_t i = 0; i < half; i += P::kLanes) {
          const typename P::F first = at<P>(grad + i), second = at<P>(grad + i + half);
          at<P>(to + i) = first * at<P>(cos + i) + second * at<P>(sin + i + half);
          at<P>(to + i + half) = second * at<P>(cos + i + half) - first * at<P>(sin + i);
        }
        if (call.q_norm != nullptr)
          norm_gradient<P, false>(to, call.qkv + row * width + head * dim, is_q ? call.q_norm : call.k_norm, dim,
                                  call.eps, to, norm_grads + (is_q ? 0 : dim));
      }
      std::copy(call.dv + row * call.kv_heads * dim, call.dv + (row + 1) * call.kv_heads * dim, out + rotated * dim);
    }
  }
}

// What is done to the blocks of rows from `begin` to `end`.
struct Work {
  enum Kind { kNorm, kSilu, kRotary, kRotaryBackward } kind;
  const void* call;
};

template <typename P>
ALWAYS_INLINE void blocks_of(int64_t begin, int64_t end, void* data) {
  const Work& work = *static_cast<const Work*>(data);
  switch (work.kind) {
    case Work::kNorm: return norm_backward<P>(*static_cast<const Norm*>(work.call), begin, end);
    case Work::kSilu: return silu_mul<P>(*static_cast<const Silu*>(work.call), begin, end);
    default: break;
  }
  const Rotary& call = *static_cast<const Rotary*>(work.call);
  const bool wide = call.dim / 2 % P::kLanes == 0, forward = work.kind == Work::kRotary;
  if (wide)
    forward ? rotary<P>(call, begin, end) : rotary_backward<P>(call, begin, end);
  else
    forward ? rotary<Narrow>(call, begin, end) : rotary_backward<Narrow>(call, begin, end);
}

VIDEOR1_RANGE_FOR(blocks_of)

int over_blocks(Work::Kind kind, const void* call, int64_t rows, int64_t bits, void* parallel_for) {
  Work work{kind, call};
  return over((rows + kRowsOfSum - 1) / kRowsOfSum, 1, parallel_for, range_for(bits), &work);
}

}  // namespace

// Each returns 0, or what torch_parallel_for did. Rows lie one after the other; bits: of a vector.

// stream [rows, width] += the gradient of x; weight_grad [rows / 64, width]: parts of the weight's.
extern "C" int rms_norm_backward(const float* grad, const float* x, const float* weight, float* stream,
                                 float* weight_grad, int64_t rows, int64_t width, float eps, int64_t bits,
                                 void* parallel_for) {
  const Norm call{grad, x, weight, stream, weight_grad, rows, width, eps};
  return over_blocks(Work::kNorm, &call, rows, bits, parallel_for);
}

// out [rows, width] = silu(gate) up; with grad, that of out, also gate_up_grad [rows, 2 width].
extern "C" int silu_mul(const float* gate_up, const float* grad, float* out, float* gate_up_grad, int64_t rows,
                        int64_t width, int64_t bits, void* parallel_for) {
  const Silu call{gate_up, grad, out, gate_up_grad, rows, width};
  return over_blocks(Work::kSilu, &call, rows, bits, parallel_for);
}

extern "C" int rotary(const float* qkv, const float* cos, const float* sin, const float* q_norm, const float* k_norm,
                      float* out, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim, float eps, int64_t bits,
                      void* parallel_for) {
  const Rotary call{qkv, cos, sin, q_norm, k_norm, out, nullptr, nullptr, nullptr, nullptr, nullptr, rows, heads, kv_heads, dim, eps};
  return over_blocks(Work::kRotary, &call, rows, bits, parallel_for);
}

// qkv_grad from dq, dk, dv [rows, heads, dim]; norm_grads [rows / 64, 2, dim]: parts of the gradients of q_norm, k_norm.
extern "C" int rotary_backward(const float* dq, const float* dk, const float* dv, const float* qkv, const float* cos,
                               const float* sin, const float* q_norm, const float* k_norm, float* qkv_grad,
                               float* norm_grads, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim, float eps,
                               int64_t bits, void* parallel_for) {
  const Rotary call{qkv, cos, sin, q_norm, k_norm, nullptr, dq, dk, dv, qkv_grad, norm_grads, rows, heads, kv_heads, dim, eps};
  return over_blocks(Work::kRotaryBackward, &call, rows, bits, parallel_for);
}
