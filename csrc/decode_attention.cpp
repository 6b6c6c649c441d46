// Attention of one new token per row over its group's prefix and its own suffix, in fp32 on a CPU: dozens of small tensor
// operations in one call.
//
// Compiled by videor1_kernels/extension.py at its first use, called through ctypes. Rows of one prefix take its keys
// together, as products of matrices, and then each its own. A tile of such rows and a key head is one task. What a row
// sums, and in which order, depends neither on the rows beside it nor on the number of threads.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <unordered_map>
#include <vector>

#include "videor1/attention_tile.h"
#include "videor1/exp.h"
#include "videor1/ranges.h"
#include "videor1/simd.h"

namespace {

constexpr int kBlock = 12;  // keys of a product, which every processor's blocks divide
constexpr int kFew = 4;
constexpr int kFull = 16;  // lanes of the widest vector; head dims are multiples of it

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

using namespace videor1;

// scores[i * total + t] = q[i] . k[t] for the `heads` queries of a row, and `count` keys; behind the last, that key again,
// up to a whole vector. A vector holds entries of one key, whose sums become the lanes of another.
template <typename P>
ALWAYS_INLINE void scores_of(const float* q, const float* k, int64_t stride, int64_t count, int64_t heads, int64_t dim,
                             int64_t total, float* scores) {
  typename P::F products[P::kLanes];
  for (int64_t t = 0; t < count; t += P::kLanes) {
    const float* keys[P::kLanes];
    for (int j = 0; j < P::kLanes; ++j) keys[j] = k + std::min(t + j, count - 1) * stride;
    for (int64_t i = 0; i < heads; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < P::kLanes; ++j) {
        products[j] = at<P>(q + i * dim) * at<P>(keys[j]);
        for (int64_t d = P::kLanes; d < dim; d += P::kLanes) products[j] += at<P>(q + i * dim + d) * at<P>(keys[j] + d);
      }
      at<P>(scores + i * total + t) = sums_of(products);
    }
  }
}

// out += sum over t of weights[t] * v[t] for M vectors of entries, which stay in registers; even and odd tokens are
// summed apart, so that one addition does not wait for the last.
template <typename P, int M>
ALWAYS_INLINE void add_weighted(const float* weights, const float* v, int64_t stride, int64_t count, float* out) {
  typename P::F even[M], odd[M];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    even[m] = at<P>(out + m * P::kLanes);
    odd[m] = typename P::F{};
  }
  int64_t t = 0;
  for (; t + 2 <= count; t += 2, v += 2 * stride)
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      even[m] += weights[t] * at<P>(v + m * P::kLanes);
      odd[m] += weights[t + 1] * at<P>(v + stride + m * P::kLanes);
    }
  if (t < count)
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) even[m] += weights[t] * at<P>(v + m * P::kLanes);
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) at<P>(out + m * P::kLanes) = even[m] + odd[m];
}

// out[i] += sum over t of weights[i * total + t] * v[t]
template <typename P>
ALWAYS_INLINE void add_values(const float* weights, const float* v, int64_t stride, int64_t count, int64_t heads,
                              int64_t dim, int64_t total, float* out) {
  for (int64_t i = 0; i < heads; ++i) {
    const float* own = weights + i * total;
    float* to = out + i * dim;
    int64_t d = 0;
    for (; d + 4 * P::kLanes <= dim; d += 4 * P::kLanes) add_weighted<P, 4>(own, v + d, stride, count, to + d);
    for (; d + 2 * P::kLanes <= dim; d += 2 * P::kLanes) add_weighted<P, 2>(own, v + d, stride, count, to + d);
    if (d < dim) add_weighted<P, 1>(own, v + d, stride, count, to + d);
  }
}

// Some query heads of rows that share a prefix: a lane is a query, `repeat` of each row.
struct Tile {
  const int32_t* rows;   // of the group
  int64_t first, lanes;  // among the group's queries
};

// Memory of one thread; a tile of keys or rows is filled up to whole blocks of a product.
struct Memory {
  alignas(64) float scores[(kKeys + 16) * kStride], top[kStride], sum[kStride];
  std::vector<float> queries, turned, out, keys, values, own;
};

// How many of a prefix's keys are taken at once: equal parts, so that none is tiny.
ALWAYS_INLINE int64_t part_of(int64_t length) {
  const int64_t parts = std::max<int64_t>(1, (length + kKeys - 1) / kKeys);
  return std::max<int64_t>(1, ((length + parts - 1) / parts + kBlock - 1) / kBlock) * kBlock;
}

// The values of `count` tokens, one after the other.
ALWAYS_INLINE const float* values_of(const Call& call, int64_t token, int64_t head, int64_t count, Memory& memory) {
  const float* v = call.prefix_v + token * call.pv.entry + head * call.pv.head;
  if (call.pv.entry == call.dim) return v;
  for (int64_t t = 0; t < count; ++t)
    std::memcpy(&memory.values[t * call.dim], v + t * call.pv.entry, call.dim * sizeof(float));
  return memory.values.data();
}

template <typename P>
ALWAYS_INLINE void take_prefix(const Call& call, int64_t start, int64_t length, int64_t head, int64_t lanes, Memory& memory) {
  const int64_t dim = call.dim, step = part_of(length);
  for (int64_t from = 0; from < length; from += step) {
    const int64_t count = std::min(step, length - from);
    const float* k = call.prefix_k + (start + from) * call.pk.entry + head * call.pk.head;
    const float* v = values_of(call, start + from, head, count, memory);
    // A product reads whole blocks of keys: what is behind the last key may be no memory of the cache's.
    const int64_t whole = count / kBlock * kBlock;
    for (int64_t t = whole; t < count; ++t)
      std::memcpy(&memory.keys[(t - whole) * dim], k + t * call.pk.entry, dim * sizeof(float));
    scores<P>(k, call.pk.entry, memory.turned.data(), memory.scores, whole, lanes, dim, nullptr);
    scores<P>(memory.keys.data(), dim, memory.turned.data(), memory.scores + whole * kStride, count - whole, lanes, dim,
              nullptr);
    soften<P>(memory.scores, count, lanes, nullptr, memory.top, memory.sum, memory.out.data(), dim);
    collect<P>(memory.scores, v, memory.out.data(), count, lanes, dim, nullptr);
  }
}

// The same for up to kFew queries, which would leave vectors of queries empty: here a vector holds keys, turned first. A
// query's products and sums are those of take_prefix, in the same order.
template <typename P>
ALWAYS_INLINE void take_prefix_for_few(const Call& call, int64_t start, int64_t length, int64_t head, int64_t lanes,
                                       Memory& memory) {
  using F = typename P::F;
  const int64_t dim = call.dim, step = part_of(length);
  float* weights = memory.scores;  // [kFew, kStride]
  for (int64_t from = 0; from < length; from += step) {
    const int64_t count = std::min(step, length - from);
    const float* k = call.prefix_k + (start + from) * call.pk.entry + head * call.pk.head;
    const float* v = values_of(call, start + from, head, count, memory);
    for (int64_t t = 0; t < count; t += kFull)
      for (int64_t d = 0; d < dim; d += kFull) {
        Lanes block[kFull];
        for (int64_t i = 0; i < kFull; ++i) {  // behind the last key, that key again
          const int64_t key = std::min(t + i, count - 1);
          block[i] = *reinterpret_cast<const Lanes*>(k + key * call.pk.entry + d);
          __builtin_prefetch(v + key * dim + d);  // read next; and the keys of the next part
          __builtin_prefetch(k + (key + step) * call.pk.entry + d);
        }
        turn(block);
        for (int64_t i = 0; i < kFull; ++i) *reinterpret_cast<Lanes*>(&memory.keys[(d + i) * kStride + t]) = block[i];
      }
    for (int64_t t = 0; t < count; t += 2 * P::kLanes)
      rows_of<P, 2>(lanes, memory.queries.data(), dim, 1, &memory.keys[t], kStride, weights + t, kStride, dim, false);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      float* own = weights + lane * kStride;
      float most = memory.top[lane];
      for (int64_t t = 0; t < count; ++t) most = own[t] > most ? own[t] : most;
      for (int64_t t = 0; t < count; t += P::kLanes) {
        F x = at<P>(own + t) - most;
        exp_negative<P>(x);
        at<P>(own + t) = x;
      }
      float total = 0.0f, change = memory.top[lane] - most;
      exp_negative<Scalar>(change);
      for (int64_t t = 0; t < count; ++t) total += own[t];
      memory.top[lane] = most;
      memory.sum[lane] = memory.sum[lane] * change + total;
      for (int64_t d = 0; d < dim; ++d) memory.out[lane * dim + d] *= change;
    }
    for (int64_t d = 0; d < dim;) {
      if (dim - d > P::kLanes)
        rows_of<P, 2>(lanes, weights, kStride, 1, v + d, dim, &memory.out[d], dim, count, true), d += 2 * P::kLanes;
      else
        rows_of<P, 1>(lanes, weights, kStride, 1, v + d, dim, &memory.out[d], dim, count, true), d += P::kLanes;
    }
  }
}

// Lanes `lane` to `lane + heads` are queries of one row.
template <typename P>
ALWAYS_INLINE void take_own(const Call& call, int64_t row, int64_t head, int64_t lane, int64_t heads, Memory& memory) {
  using F = typename P::F;
  const int64_t slot = call.rows[3 * row + 2], count = call.lengths[row], dim = call.dim;
  const int64_t total = (count + P::kLanes - 1) / P::kLanes * P::kLanes;
  memory.own.resize(heads * total);
  float* weights = memory.own.data();
  float* out = &memory.out[lane * dim];
  const float* k = call.suffix_k + slot * call.sk_slot + head * call.sk.head;
  const float* v = call.suffix_v + slot * call.sv_slot + head * call.sv.head;
  scores_of<P>(&memory.queries[lane * dim], k, call.sk.entry, count, heads, dim, total, weights);
  for (int64_t i = 0; i < heads; ++i) {
    float* own = weights + i * total;
    F top = at<P>(own);
    for (int64_t t = P::kLanes; t < total; t += P::kLanes) top = at<P>(own + t) > top ? at<P>(own + t) : top;
    float most = memory.top[lane + i];
    for (int l = 0; l < P::kLanes; ++l) most = top[l] > most ? top[l] : most;
    for (int64_t t = 0; t < total; t += P::kLanes) {
      F x = at<P>(own + t) - most;
      exp_negative<P>(x);
      at<P>(own + t) = x;
    }
    for (int64_t t = count; t < total; ++t) own[t] = 0.0f;
    F sums = F{};
    for (int64_t t = 0; t < total; t += P::kLanes) sums += at<P>(own + t);
    float change = memory.top[lane + i] - most, own_sum = 0.0f;
    exp_negative<Scalar>(change);
    for (int l = 0; l < P::kLanes; ++l) own_sum += sums[l];
    memory.sum[lane + i] = memory.sum[lane + i] * change + own_sum;
    for (int64_t d = 0; d < dim; d += P::kLanes) at<P>(out + i * dim + d) *= change;
  }
  add_values<P>(weights, v, call.sv.entry, count, heads, dim, total, out);
}

// Wide vectors where there are lanes for them: a lane's arithmetic is the same in each.
template <typename Wide, typename Half>
ALWAYS_INLINE void attend(const Call& call, const Tile& tile, int64_t head, Memory& memory) {
  const int64_t dim = call.dim, repeat = call.repeat, lanes = tile.lanes;
  const int64_t start = call.rows[3 * tile.rows[0]], length = call.rows[3 * tile.rows[0] + 1];
  memory.queries.resize((kRows + kBlock) * dim);
  memory.turned.resize(dim * kStride);
  memory.keys.resize(kStride * dim);
  memory.values.resize(kKeys * dim);
  memory.out.resize((kRows + kBlock) * dim);
  std::fill_n(memory.out.begin(), (lanes + kBlock) * dim, 0.0f);
  const bool few = lanes <= kFew;
  const int64_t filled = few ? kFew : std::min<int64_t>((lanes + 31) / 32 * 32, kStride);
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const int64_t own = tile.first + lane;
    const float* q = call.q + ((tile.rows[own / repeat] * call.heads + head) * repeat + own % repeat) * dim;
    for (int64_t d = 0; d < dim; ++d) memory.queries[lane * dim + d] = q[d] * call.scale;
  }
  for (int64_t d = 0; d < dim && !few; ++d)
    for (int64_t lane = 0; lane < filled; ++lane)
      memory.turned[d * kStride + lane] = lane < lanes ? memory.queries[lane * dim + d] : 0.0f;
  std::fill_n(memory.top, filled, -std::numeric_limits<float>::infinity());
  std::fill_n(memory.sum, filled, 0.0f);
  if (lanes > Half::kLanes)
    take_prefix<Wide>(call, start, length, head, lanes, memory);
  else if (!few)
    take_prefix<Half>(call, start, length, head, lanes, memory);
  else
    take_prefix_for_few<Wide>(call, start, length, head, lanes, memory);
  for (int64_t lane = 0; lane < lanes;) {
    const int64_t own = tile.first + lane, row = tile.rows[own / repeat], i = own % repeat;
    const int64_t heads = std::min(repeat - i, lanes - lane);
    take_own<Wide>(call, row, head, lane, heads, memory);
    float* to = call.out + ((row * call.heads + head) * repeat + i) * dim;
    for (int64_t j = 0; j < heads; ++j) {
      const float inverse = 1.0f / memory.sum[lane + j];
      for (int64_t d = 0; d < dim; ++d) to[j * dim + d] = memory.out[(lane + j) * dim + d] * inverse;
    }
    lane += heads;
  }
}

using Attend = void (*)(const Call& call, const Tile& tile, int64_t head, Memory& memory);

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void attend_512(const Call& call, const Tile& tile,
                                                                                  int64_t head, Memory& memory) {
  attend<Processor<64, 12, 4>, Processor<32, 12, 4>>(call, tile, head, memory);
}

__attribute__((target("avx2,fma"))) void attend_256(const Call& call, const Tile& tile, int64_t head, Memory& memory) {
  attend<Processor<32, 6, 2>, Processor<32, 6, 2>>(call, tile, head, memory);
}

void attend_128(const Call& call, const Tile& tile, int64_t head, Memory& memory) {
  attend<Processor<16, 6, 2>, Processor<16, 6, 2>>(call, tile, head, memory);
}
#else
void attend_128(const Call& call, const Tile& tile, int64_t head, Memory& memory) {
  attend<Processor<16, 12, 4>, Processor<16, 12, 4>>(call, tile, head, memory);
}
#endif

// With vectors of up to `bits`.
Attend attend_for(int64_t bits) {
#if defined(__x86_64__) && defined(__GNUC__)
  const int64_t widest = widest_vectors(bits);
  if (widest == 512) return attend_512;
  if (widest == 256) return attend_256;
#endif
  return attend_128;
}

// The tiles of all rows; `order` holds the rows of each prefix one after the other.
std::vector<Tile> tiles_of(const Call& call, int64_t rows, std::vector<int32_t>& order) {
  std::vector<int64_t> group(rows), counts;
  std::unordered_map<int64_t, int64_t> known;  // by where a prefix begins
  for (int64_t row = 0; row < rows; ++row) {
    if (row && call.rows[3 * row] == call.rows[3 * row - 3]) {
      group[row] = group[row - 1];
    } else {
      group[row] = known.emplace(call.rows[3 * row], counts.size()).first->second;
      if (group[row] == static_cast<int64_t>(counts.size())) counts.push_back(0);
    }
    ++counts[group[row]];
  }
  std::vector<int64_t> next(counts.size(), 0);
  for (size_t g = 1; g < counts.size(); ++g) next[g] = next[g - 1] + counts[g - 1];
  order.resize(rows);
  std::vector<Tile> tiles;
  for (size_t g = 0; g < counts.size(); ++g)
    for (int64_t first = 0; first < counts[g] * call.repeat; first += kRows)
      tiles.push_back({order.data() + next[g], first, std::min<int64_t>(kRows, counts[g] * call.repeat - first)});
  for (int64_t row = 0; row < rows; ++row) order[next[group[row]]++] = row;
  return tiles;
}

struct Tasks {
  const Call& call;
  const std::vector<Tile>& tiles;
  Attend attend;
};

void some(int64_t begin, int64_t end, void* data) {
  const Tasks& all = *static_cast<const Tasks*>(data);
  static thread_local Memory memory;
  for (int64_t task = begin; task < end; ++task)
    all.attend(all.call, all.tiles[task / all.call.heads], task % all.call.heads, memory);
}

}  // namespace

// numbers: R, Hkv, Hq / Hkv, D, then the strides (token, head) of prefix_k, prefix_v, (slot, token, head) of suffix_k,
// suffix_v, and the bits of a vector. rows: start and length of a row's prefix, and its slot; a prefix has one length.
// grain: rows and key heads that are worth a thread. Returns 0, or what torch_parallel_for did.
extern "C" int decode_attention(const float* q, const float* prefix_k, const float* prefix_v, const float* suffix_k,
                                const float* suffix_v, float* out, const int64_t* rows, const int64_t* lengths,
                                const int64_t* numbers, float scale, int64_t grain, void* parallel_for) {
  const int64_t* n = numbers;
  Call call{q, prefix_k, prefix_v, suffix_k, suffix_v, out, rows, lengths, n[1], n[2], n[3],
            {n[4], n[5]}, {n[6], n[7]}, {n[9], n[10]}, {n[12], n[13]}, n[8], n[11], scale};
  if (n[0] == 0) return 0;
  std::vector<int32_t> order;
  const std::vector<Tile> tiles = tiles_of(call, n[0], order);
  Tasks all{call, tiles, attend_for(n[14])};
  const int64_t tasks = tiles.size() * n[1];
  grain = std::max<int64_t>(1, grain * static_cast<int64_t>(tiles.size()) / n[0]);
  return over(tasks, grain, parallel_for, some, &all);
}
