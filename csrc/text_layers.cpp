// The decoder layers of a language model over rows of tokens, in fp32 on a CPU: all of a pass without gradients in one
// call. A small model's pass is hundreds of small operations, most of whose time is not their arithmetic.
//
// Compiled by videor1_kernels/extension.py at its first use, called through ctypes. Norms, rotary positions and
// attention are the functions of csrc/decode_step.cpp, decode_attention.cpp and prefix_attention.cpp, whose addresses
// the caller gives; the products and what is between them are here. A row's sums do not depend on the other rows.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "videor1/attention_tile.h"

namespace {

using namespace videor1;

constexpr int64_t kPanel = 32;   // outputs of a product that are computed together, from weights that lie together
constexpr int64_t kBlock = 48;   // rows whose intermediate values stay in cache
constexpr int64_t kDepth = 512;  // of one sum; longer ones are sums of these
constexpr int64_t kFilled = 16;  // rows of memory behind the last, which a product's last block reads and writes

// x [rows, in] -> x W^T + bias, [rows, out]; with a rank, the last `rank` of its outputs are the A x of LoRA adapters,
// and the others become theirs plus B (A x).
struct Linear {
  const float *panels, *bias, *b_panels;  // [outputs / kPanel, inputs, kPanel]; bias may be null, with a rank it is not
  int64_t in, out, rank;
};

struct Layer {
  const float* norm;
  Linear qkv, out;
  const float* mlp_norm;
  Linear gate_up, down;
  const float *q_norm, *k_norm;                        // of each head; null: there are none
  float *prefix_k, *prefix_v, *suffix_k, *suffix_v;  // its part of the cache; null: there is none
};

using Norm = int (*)(const void* x, const void* residual, const void* weight, void* summed, void* normed, int64_t rows,
                     int64_t width, int64_t x_stride, int64_t residual_stride, int dtypes, float eps, int64_t grain,
                     void* parallel_for);
using Rotary = int (*)(const void* qkv, const void* cos, const void* sin, void* suffix_k, void* suffix_v, void* q,
                       const int64_t* positions, const int64_t* lengths, const int64_t* slots, const float* q_norm,
                       const float* k_norm, float eps, const int64_t* numbers, int kind, int64_t grain, void* parallel_for);
using Decoding = int (*)(const float* q, const float* prefix_k, const float* prefix_v, const float* suffix_k,
                         const float* suffix_v, float* out, const int64_t* rows, const int64_t* lengths,
                         const int64_t* numbers, float scale, int64_t grain, void* parallel_for);
using Packed = int (*)(void* q, void* k, void* v, float* out, float* lse, const int64_t* segments,
                       const int64_t* numbers, float scale, void* parallel_for);

// One pass; every member has 8 bytes. Strides are in elements: of the cache's tokens and heads, of its slots first.
struct Pass {
  float* x;  // [rows, hidden]: the embeddings, which become what the last norm takes
  int64_t rows, hidden, heads, kv_heads, dim, mlp, count, bits;
  double eps, head_eps, scale;
  const Layer* layers;
  const float *cos, *sin;  // rows of dim
  int64_t table_rows;
  int64_t prefix_k[2], prefix_v[2], suffix_k[3], suffix_v[3];
  // Decoding: of each row its position in the tables, its token's number and slot, and (start, length, slot).
  const int64_t *positions, *lengths, *slots, *prefixes;
  int64_t slot_count, capacity;
  // A packed row, with positions 0 to rows - 1: segments of prefix_attention, and (to, from, length) of the rows that go
  // into the cache's prefixes.
  const int64_t *segments, *copies;
  int64_t segment_count, copy_count;
  Norm norm_of;
  Rotary rotary;
  Decoding decoding;
  Packed packed;
};

int64_t padded(int64_t width) { return (width + kPanel - 1) / kPanel * kPanel; }

// c [rows, out] = or += a [rows, depth] panels; bias: added.
template <typename P>
ALWAYS_INLINE void product(const float* a, int64_t lda, const float* panels, const float* bias, float* c, int64_t ldc,
                           int64_t rows, int64_t depth, int64_t out, bool onto) {
  for (int64_t n = 0; n < out; n += kPanel, panels += depth * kPanel)
    for (int64_t r = 0; r < rows; r += P::kMost) {
      if (bias != nullptr)
        for (int64_t i = r; i < std::min(r + P::kMost, rows); ++i) std::memcpy(c + i * ldc + n, bias + n, kPanel * sizeof(float));
      for (int64_t d = 0; d < depth; d += kDepth) {
        const bool more = onto || bias != nullptr || d > 0;
        const int64_t some = std::min(kDepth, depth - d);
        for (int64_t l = 0; l < kPanel; l += 2 * P::kLanes)
          rows_of<P, 2>(rows - r, a + r * lda + d, lda, 1, panels + d * kPanel + l, kPanel, c + r * ldc + n + l, ldc,
                        some, more);
      }
    }
}

template <typename P>
ALWAYS_INLINE void linear(const Linear& layer, const float* x, int64_t ldx, float* out, int64_t rows) {
  const int64_t width = padded(layer.out + layer.rank);
  product<P>(x, ldx, layer.panels, layer.bias, out, width, rows, layer.in, layer.out + layer.rank, false);
  if (layer.rank) {
    // The panels of B end where A x begins only if a panel does: what is behind the outputs is overwritten, after all
    // of it has been read.
    thread_local std::vector<float> ax;
    ax.resize((rows + kFilled) * layer.rank);
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(&ax[r * layer.rank], out + r * width + layer.out, layer.rank * sizeof(float));
    product<P>(ax.data(), layer.rank, layer.b_panels, nullptr, out, width, rows, layer.rank, layer.out, true);
  }
}

// out [rows, width] = silu(gate) up of x, whose rows hold gate and up side by side.
template <typename P>
ALWAYS_INLINE void silu_mul(const float* x, int64_t ldx, float* out, int64_t ldo, int64_t rows, int64_t width) {
  using F = typename P::F;
  const auto one = [](const float* gate, const float* up, float* to) {
    const F g = at<P>(gate);
    F e = g > F{} ? -g : g;
    exp_negative<P>(e);
    at<P>(to) = (g > F{} ? g : g * e) / (e + 1.0f) * at<P>(up);
  };
  float gate[P::kLanes], up[P::kLanes], last[P::kLanes];
  for (int64_t r = 0; r < rows; ++r, x += ldx, out += ldo) {
    int64_t i = 0;
    for (; i + P::kLanes <= width; i += P::kLanes) one(x + i, x + width + i, out + i);
    if (i < width) {
      std::fill(gate, gate + P::kLanes, 0.0f);
      std::fill(up, up + P::kLanes, 0.0f);
      std::copy(x + i, x + width, gate);
      std::copy(x + width + i, x + 2 * width, up);
      one(gate, up, last);
      std::copy(last, last + (width - i), out + i);
    }
  }
}

struct Steps {
  void (*linear)(const Linear& layer, const float* x, int64_t ldx, float* out, int64_t rows);
  void (*silu_mul)(const float* x, int64_t ldx, float* out, int64_t ldo, int64_t rows, int64_t width);
};

#define VIDEOR1_STEPS(name, target, ...)                                                                       \
  struct name {                                                                                                \
    using P = __VA_ARGS__;                                                                                     \
    target static void linear(const Linear& layer, const float* x, int64_t ldx, float* out, int64_t rows) {    \
      ::linear<P>(layer, x, ldx, out, rows);                                                                   \
    }                                                                                                          \
    target static void silu_mul(const float* x, int64_t ldx, float* out, int64_t ldo, int64_t rows,            \
                                int64_t width) {                                                               \
      ::silu_mul<P>(x, ldx, out, ldo, rows, width);                                                            \
    }                                                                                                          \
    static constexpr Steps steps{linear, silu_mul};                                                            \
  }

#if defined(__x86_64__) && defined(__GNUC__)
VIDEOR1_STEPS(Avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), Processor<64, 12, 4>);
VIDEOR1_STEPS(Avx2, __attribute__((target("avx2,fma"))), Processor<32, 6, 2>);
VIDEOR1_STEPS(Plain, , Processor<16, 6, 2>);
#else
VIDEOR1_STEPS(Plain, , Processor<16, 12, 4>);
#endif

const Steps& steps_for(int64_t bits) {
#if defined(__x86_64__) && defined(__GNUC__)
  const int64_t widest = widest_vectors(bits);
  if (widest == 512) return Avx512::steps;
  if (widest == 256) return Avx2::steps;
#endif
  return Plain::steps;
}

// Memory of one thread's passes, kept for its next.
struct Memory {
  std::vector<float> values[9];
  std::vector<int64_t> numbers;

  float* of(int which, int64_t rows, int64_t width) {
    std::vector<float>& own = values[which];
    const size_t size = (rows + kFilled) * width;
    if (own.size() < size) own.assign(size, 0.0f);  // what fills up a block is multiplied too
    return own.data();
  }
};

#define VIDEOR1_TRY(call) \
  if (const int error = (call)) return error

struct Buffers {
  float *q, *k, *v, *attended, *lse, *normed, *qkv, *change, *mlp;
};

// Writes q, and k and v to the cache or, of a packed row, to k and v [rows, kv_heads, dim] and from there to the cache.
int rotary(const Pass& pass, const Layer& layer, const Buffers& to, const int64_t* ones, int64_t first, int64_t rows) {
  const int64_t width = pass.kv_heads * pass.dim, stride = padded((pass.heads + 2 * pass.kv_heads) * pass.dim + layer.qkv.rank);
  const bool decoding = pass.segments == nullptr;
  const int64_t packed[3] = {width, width, pass.dim};
  const int64_t *ks = decoding ? pass.suffix_k : packed, *vs = decoding ? pass.suffix_v : packed;
  const int64_t numbers[17] = {rows, pass.heads, pass.kv_heads, pass.dim, decoding ? pass.table_rows : rows,
                               decoding ? pass.slot_count : rows, decoding ? pass.capacity : 1, stride, pass.dim, pass.dim,
                               ks[0], ks[1], ks[2], vs[0], vs[1], vs[2], pass.dim};
  float* q = to.q + first * pass.heads * pass.dim;
  if (decoding)
    return pass.rotary(to.qkv, pass.cos, pass.sin, layer.suffix_k, layer.suffix_v, q, pass.positions + first,
                       pass.lengths + first, pass.slots + first, layer.q_norm, layer.k_norm, pass.head_eps, numbers, 0,
                       rows, nullptr);
  const int64_t* count = ones + kBlock;  // 0, 1, 2 ..: a row's position in its block, and its slot
  return pass.rotary(to.qkv, pass.cos + first * pass.dim, pass.sin + first * pass.dim, to.k + first * width,
                     to.v + first * width, q, count, ones, count, layer.q_norm, layer.k_norm, pass.head_eps, numbers, 0,
                     rows, nullptr);
}

void copy_prefixes(const Pass& pass, const float* from, float* to, const int64_t* strides) {
  for (const int64_t* c = pass.copies; c < pass.copies + 3 * pass.copy_count; c += 3)
    for (int64_t t = 0; t < c[2]; ++t)
      for (int64_t h = 0; h < pass.kv_heads; ++h)
        std::memcpy(to + (c[0] + t) * strides[0] + h * strides[1], from + ((c[1] + t) * pass.kv_heads + h) * pass.dim,
                    pass.dim * sizeof(float));
}

int attention(const Pass& pass, const Layer& layer, const Buffers& to) {
  const int64_t repeat = pass.heads / pass.kv_heads, key = pass.kv_heads * pass.dim;
  if (pass.segments == nullptr) {
    const int64_t numbers[15] = {pass.rows, pass.kv_heads, repeat, pass.dim, pass.prefix_k[0], pass.prefix_k[1],
                                 pass.prefix_v[0], pass.prefix_v[1], pass.suffix_k[0], pass.suffix_k[1], pass.suffix_k[2],
                                 pass.suffix_v[0], pass.suffix_v[1], pass.suffix_v[2], pass.bits};
    return pass.decoding(to.q, layer.prefix_k, layer.prefix_v, layer.suffix_k, layer.suffix_v, to.attended, pass.prefixes,
                         pass.lengths, numbers, pass.scale, pass.rows * pass.kv_heads, nullptr);
  }
  if (layer.prefix_k != nullptr) {
    copy_prefixes(pass, to.k, layer.prefix_k, pass.prefix_k);
    copy_prefixes(pass, to.v, layer.prefix_v, pass.prefix_v);
  }
  const int64_t numbers[14] = {pass.rows, pass.kv_heads, repeat, pass.dim, 0, pass.segment_count, 1, pass.bits,
                               pass.heads * pass.dim, pass.dim, key, pass.dim, key, pass.dim};
  return pass.packed(to.q, to.k, to.v, to.attended, to.lse, pass.segments, numbers, pass.scale, nullptr);
}

int run(const Pass& pass) {
  static thread_local Memory memory;
  const Steps& steps = steps_for(pass.bits);
  const int64_t rows = pass.rows, hidden = pass.hidden, width = pass.heads * pass.dim, key = pass.kv_heads * pass.dim;
  int64_t widest[3] = {0, 0, 0};
  for (const Layer* layer = pass.layers; layer < pass.layers + pass.count; ++layer) {
    widest[0] = std::max(widest[0], padded(layer->qkv.out + layer->qkv.rank));
    widest[1] = std::max({widest[1], padded(layer->out.out + layer->out.rank), padded(layer->down.out + layer->down.rank)});
    widest[2] = std::max(widest[2], padded(layer->gate_up.out + layer->gate_up.rank));
  }
  const Buffers to{memory.of(0, rows, width), memory.of(1, rows, key), memory.of(2, rows, key), memory.of(3, rows, width),
                   memory.of(4, rows, pass.heads), memory.of(5, kBlock, std::max(hidden, pass.mlp)),
                   memory.of(6, kBlock, std::max(widest[0], widest[1])), memory.of(7, rows, widest[1]), memory.of(8, kBlock, widest[2])};
  memory.numbers.assign(kBlock, 1);
  for (int64_t i = 0; i < kBlock; ++i) memory.numbers.push_back(i);
  const int64_t* ones = memory.numbers.data();

  // The residual stream x of some rows: x += change, then normed = its norm.
  const auto norm = [&](const float* weight, float* x, const float* change, int64_t stride, float* normed, int64_t count) {
    return change == nullptr
               ? pass.norm_of(x, nullptr, weight, nullptr, normed, count, hidden, hidden, 0, 0, pass.eps, count, nullptr)
               : pass.norm_of(change, x, weight, x, normed, count, hidden, stride, hidden, 0, pass.eps, count, nullptr);
  };
  int64_t stride = 0;  // of change: what the last layer adds, and the next norm takes
  for (int64_t l = 0; l < pass.count; ++l) {
    const Layer& layer = pass.layers[l];
    for (int64_t first = 0; first < rows; first += kBlock) {
      const int64_t some = std::min(kBlock, rows - first);
      float *x = pass.x + first * hidden, *change = l ? to.change + first * stride : nullptr;
      VIDEOR1_TRY(norm(layer.norm, x, change, stride, to.normed, some));
      steps.linear(layer.qkv, to.normed, hidden, to.qkv, some);
      VIDEOR1_TRY(rotary(pass, layer, to, ones, first, some));
    }
    VIDEOR1_TRY(attention(pass, layer, to));
    const int64_t out = padded(layer.out.out + layer.out.rank);
    stride = padded(layer.down.out + layer.down.rank);
    for (int64_t first = 0; first < rows; first += kBlock) {
      const int64_t some = std::min(kBlock, rows - first);
      float *x = pass.x + first * hidden, *change = to.change + first * stride;
      steps.linear(layer.out, to.attended + first * width, width, to.qkv, some);
      VIDEOR1_TRY(norm(layer.mlp_norm, x, to.qkv, out, to.normed, some));
      steps.linear(layer.gate_up, to.normed, hidden, to.mlp, some);
      steps.silu_mul(to.mlp, padded(layer.gate_up.out + layer.gate_up.rank), to.normed, pass.mlp, some, pass.mlp);
      steps.linear(layer.down, to.normed, pass.mlp, change, some);
    }
  }
  for (int64_t row = 0; row < rows && pass.count; ++row)
    for (int64_t h = 0; h < hidden; ++h) pass.x[row * hidden + h] += to.change[row * stride + h];
  return 0;
}

}  // namespace

// Returns 0, what a function of the pass returned, or -1000 where there is no memory.
extern "C" int text_layers(const Pass* pass) {
  try {
    return run(*pass);
  } catch (const std::bad_alloc&) {
    return -1000;
  }
}
