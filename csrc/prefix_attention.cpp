// Attention over a packed row of shared-prefix groups, forward and backward in one call each, in fp32 on a CPU.
//
// Compiled by videor1_kernels/extension.py at its first use, called through ctypes. A tile of query rows takes its
// prompt's keys for all of its rows together, then its segments' own keys, and skips what no row sees. The backward
// pass forms each product once: a range of tiles sums the key gradients of all it sees in memory of its own, and these
// sums are added in a fixed order. How the work is cut depends on the lengths alone, so the bits are the same for any
// number of threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "videor1/attention_tile.h"
#include "videor1/row_tiles.h"

namespace {

using namespace videor1;

constexpr int64_t kParts = 16;            // ranges of tiles that a backward pass is cut into, for as many threads
constexpr int64_t kPartTiles = 4;         // tiles of a range, at least
constexpr int64_t kThreadWork = 1 << 21;  // multiplications that are worth more than one thread

// The steps of attention_tile.h on one kind of processor.
struct Steps {
  void (*scores)(const float* a, int64_t lda, const float* b, float* c, int64_t keys, int64_t rows, int64_t depth,
                 const int32_t* count);
  void (*collect)(const float* a, const float* b, float* c, int64_t keys, int64_t rows, int64_t columns,
                  const int32_t* count);
  void (*spread)(const float* a, const float* b, float* c, int64_t keys, int64_t rows, int64_t columns, int64_t first,
                 int64_t repeat);
  void (*soften)(float* s, int64_t keys, int64_t rows, const int32_t* count, float* top, float* sum, float* out,
                 int64_t columns);
  void (*differentiate)(float* s, float* dp, int64_t keys, int64_t rows, const int32_t* count, const float* lse,
                        const float* delta);
};

#define VIDEOR1_STEPS(name, target, ...)                                                                              \
  struct name {                                                                                                       \
    using P = __VA_ARGS__;                                                                                            \
    target static void scores(const float* a, int64_t lda, const float* b, float* c, int64_t keys, int64_t rows,      \
                              int64_t depth, const int32_t* count) {                                                  \
      videor1::scores<P>(a, lda, b, c, keys, rows, depth, count);                                                     \
    }                                                                                                                 \
    target static void collect(const float* a, const float* b, float* c, int64_t keys, int64_t rows, int64_t columns, \
                               const int32_t* count) {                                                                \
      videor1::collect<P>(a, b, c, keys, rows, columns, count);                                                       \
    }                                                                                                                 \
    target static void spread(const float* a, const float* b, float* c, int64_t keys, int64_t rows, int64_t columns,  \
                              int64_t first, int64_t repeat) {                                                        \
      videor1::spread<P>(a, b, c, keys, rows, columns, first, repeat);                                                \
    }                                                                                                                 \
    target static void soften(float* s, int64_t keys, int64_t rows, const int32_t* count, float* top, float* sum,     \
                              float* out, int64_t columns) {                                                          \
      videor1::soften<P>(s, keys, rows, count, top, sum, out, columns);                                               \
    }                                                                                                                 \
    target static void differentiate(float* s, float* dp, int64_t keys, int64_t rows, const int32_t* count,           \
                                     const float* lse, const float* delta) {                                          \
      videor1::differentiate<P>(s, dp, keys, rows, count, lse, delta);                                                \
    }                                                                                                                 \
    static constexpr Steps steps{scores, collect, spread, soften, differentiate};                                     \
  }

#if defined(__x86_64__)
VIDEOR1_STEPS(Avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), Processor<64, 12, 4>);
VIDEOR1_STEPS(Avx2, __attribute__((target("avx2,fma"))), Processor<32, 6, 2>);
VIDEOR1_STEPS(Plain, , Processor<16, 6, 2>);
#else
VIDEOR1_STEPS(Plain, , Processor<16, 12, 4>);  // 32 registers, as on aarch64
#endif

// Those with vectors of up to `bits`.
const Steps& steps_for(int64_t bits) {
#if defined(__x86_64__)
  const int64_t widest = widest_vectors(bits);
  if (widest == 512) return Avx512::steps;
  if (widest == 256) return Avx2::steps;
#endif
  return Plain::steps;
}

// Memory that is not set, aligned to cache lines.
class Memory {
 public:
  float* of(int64_t count) {
    if (count > size_) {
      data_.reset(static_cast<float*>(std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64)));
      size_ = data_ ? count : 0;
      if (!data_) throw std::bad_alloc();
    }
    return data_.get();
  }

  void free_beyond(int64_t count) {
    if (size_ <= count) return;
    data_.reset();
    size_ = 0;
  }

 private:
  struct Free {
    void operator()(float* x) const { std::free(x); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

// A [tokens, heads, D] tensor of fp32 or bf16, whose entries of a head are neighbours.
struct Rows {
  void* data;
  int64_t token, head;  // strides, in elements
  bool bf16;

  // to [width] = factor * the entries of a token's head, filled up with 0.
  void read(int64_t t, int64_t h, int64_t dim, int64_t width, float factor, float* to) const {
    const int64_t start = t * token + h * head;
    if (bf16) {
      const uint16_t* from = static_cast<const uint16_t*>(data) + start;
      for (int64_t d = 0; d < dim; ++d) {
        const uint32_t bits = static_cast<uint32_t>(from[d]) << 16;
        float x;
        std::memcpy(&x, &bits, sizeof x);
        to[d] = x * factor;
      }
    } else {
      const float* from = static_cast<const float*>(data) + start;
      for (int64_t d = 0; d < dim; ++d) to[d] = from[d] * factor;
    }
    for (int64_t d = dim; d < width; ++d) to[d] = 0.0f;
  }

  // The entries of a token's head = factor * from [dim].
  void write(int64_t t, int64_t h, int64_t dim, float factor, const float* from) const {
    const int64_t start = t * token + h * head;
    if (bf16) {
      uint16_t* to = static_cast<uint16_t*>(data) + start;
      for (int64_t d = 0; d < dim; ++d) {
        const float x = from[d] * factor;
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
        to[d] = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
      }
    } else {
      float* to = static_cast<float*>(data) + start;
      for (int64_t d = 0; d < dim; ++d) to[d] = from[d] * factor;
    }
  }
};

// Tiles of one group, for one key head: what sums key gradients by itself. Its keys are those of its prompt and, where
// it has completions, of its segments [first_segment, last_segment).
struct Range {
  int64_t group, head, first, last;  // tiles
  int64_t first_segment, last_segment, memory;
};

struct Call {
  const Steps* steps;
  int64_t tokens, heads, dim, width;  // heads of keys; width: dim, up to a multiple of 16
  float scale;
  Rows q, k, v;
  RowTiles row;
  const float *keys, *values;  // fp32 [heads, tokens + kKeys, width]: products round up and read past the end
  void* parallel_for;
  int64_t threads;

  const float* key(const float* from, int64_t head, int64_t token) const {
    return from + (head * (tokens + kKeys) + token) * width;
  }
};

// Calls body(i) for i in [0, count), on several threads if the work is worth them. A thread takes the next that no one
// has taken, as some take longer than others.
template <typename Body>
int for_each(const Call& call, int64_t count, int64_t work, const Body& body) {
  if (call.parallel_for == nullptr || call.threads < 2 || count < 2 || work < kThreadWork) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return 0;
  }
  struct Shared {
    const Body* body;
    int64_t count;
    std::atomic<int64_t> next;
  } shared{&body, count, {0}};
  using ParallelFor = int (*)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
  const auto some = [](int64_t, int64_t, void* data) {
    Shared& all = *static_cast<Shared*>(data);
    for (int64_t i = all.next++; i < all.count; i = all.next++) (*all.body)(i);
  };
  return reinterpret_cast<ParallelFor>(call.parallel_for)(0, std::min(call.threads, count), 1, some, &shared);
}

// The keys and values in fp32, their entries filled up to whole vectors.
int pack(Call& call, Memory& memory) {
  const int64_t size = call.heads * (call.tokens + kKeys) * call.width;
  float* packed = memory.of(2 * size);
  call.keys = packed;
  call.values = packed + size;
  const int64_t step = 256, steps = (call.tokens + step - 1) / step;
  return for_each(call, steps * call.heads, size, [&](int64_t task) {
    const int64_t head = task / steps, first = task % steps * step, last = std::min(call.tokens, first + step);
    for (int64_t t = first; t < last; ++t) {
      const int64_t at = call.key(call.keys, head, t) - call.keys;
      call.k.read(t, head, call.dim, call.width, 1.0f, packed + at);
      call.v.read(t, head, call.dim, call.width, 1.0f, packed + size + at);
    }
  });
}

// rows [kRows, width] = factor * those of a tile, and their transpose [width, kStride]; 0 in lanes that no row has.
void load(const Call& call, const Tile& tile, int64_t head, const Rows& from, float factor, float* rows,
          float* columns) {
  const int64_t width = call.width;
  for (int64_t p = tile.first; p < tile.last; ++p) {
    const Piece& piece = call.row.pieces[p];
    std::fill(rows + (piece.lane + piece.rows) * width, rows + (piece.lane + up(piece.rows, 4)) * width, 0.0f);
  }
  for_rows(call.row, tile, head, [&](int64_t lane, int64_t token, int64_t h) {
    from.read(token, h, call.dim, width, factor, rows + lane * width);
  });
  for (int64_t lane = 0; lane < tile.lanes; lane += 4) {
    const float* four = rows + lane * width;
    for (int64_t d = 0; d < width; d += 4) {
      Quarter x[4];
      for (int i = 0; i < 4; ++i) std::memcpy(&x[i], four + i * width + d, sizeof x[i]);
      for (int i = 0; i < 4; ++i) {
        const Quarter column{x[0][i], x[1][i], x[2][i], x[3][i]};
        std::memcpy(columns + (d + i) * kStride + lane, &column, sizeof column);
      }
    }
  }
  for (int64_t d = 0; d < width; ++d)
    std::fill(columns + d * kStride + tile.lanes, columns + d * kStride + up(tile.lanes, 16), 0.0f);
}

void attend(const Call& call, const Tile& tile, int64_t head, float* out, float* lse, Memory& memory) {
  const int64_t width = call.width;
  float* query_rows = memory.of(2 * kRows * width + (width + kKeys + 2) * kStride);
  float* result = query_rows + kRows * width;
  float* queries = result + kRows * width;
  float* s = queries + width * kStride;
  float* top = s + kKeys * kStride;
  float* sum = top + kStride;
  load(call, tile, head, call.q, call.scale, query_rows, queries);
  std::fill(result, result + tile.lanes * width, 0.0f);
  std::fill(top, top + kStride, std::numeric_limits<float>::lowest());
  std::fill(sum, sum + kStride, 0.0f);
  for_keys(call.row, tile, [&](const Keys& keys, int64_t) {
    const float* own = call.key(call.keys, head, keys.key);
    float* rows = result + keys.lane * width;
    call.steps->scores(own, width, queries + keys.lane, s, keys.count, keys.rows, call.dim, keys.seen);
    call.steps->soften(s, keys.count, keys.rows, keys.seen, top + keys.lane, sum + keys.lane, rows, width);
    call.steps->collect(s, call.key(call.values, head, keys.key), rows, keys.count, keys.rows, width, keys.seen);
  });
  const Rows to{out, call.heads * call.row.repeat * call.dim, call.dim, false};
  for_rows(call.row, tile, head, [&](int64_t lane, int64_t token, int64_t h) {
    to.write(token, h, call.dim, 1.0f / sum[lane], result + lane * width);
    lse[h * call.tokens + token] = top[lane] + std::log(sum[lane]);
  });
}

// The ranges of tiles, in the order of groups and heads, and how much memory their sums take.
std::vector<Range> ranges(const Call& call, int64_t& size) {
  const int64_t groups = call.row.groups.size() - 1;
  const int64_t wanted = (kParts + groups * call.heads - 1) / (groups * call.heads);
  std::vector<Range> made;
  size = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = call.row.group_tiles[g], end = call.row.group_tiles[g + 1];
    const int64_t parts = std::max<int64_t>(1, std::min(wanted, (end - first) / kPartTiles));
    int64_t total = 0;
    for (int64_t i = first; i < end; ++i) total += call.row.tiles[i].work;
    const auto part_of = [&](int64_t work) { return (work - 1) * parts / total; };  // of the tile that ends there
    for (int64_t head = 0; head < call.heads; ++head) {
      int64_t begin = first, done = 0;
      for (int64_t i = first; i < end; ++i) {
        done += call.row.tiles[i].work;
        const bool more = i + 1 < end && part_of(done + call.row.tiles[i + 1].work) == part_of(done);
        if (more) continue;
        Range range{g, head, begin, i + 1, 0, 0, size};
        size += up(call.row.segments[call.row.groups[g]].length, 12);
        const int64_t last = call.row.pieces[call.row.tiles[i].last - 1].segment;
        const int64_t from = std::max(call.row.groups[g] + 1, call.row.pieces[call.row.tiles[begin].first].segment);
        range.first_segment = from;
        range.last_segment = std::max(from, last + 1);
        for (int64_t x = from; x < range.last_segment; ++x) size += up(call.row.segments[x].length, 12);
        made.push_back(range);
        begin = i + 1;
      }
    }
  }
  return made;
}

// Where a range sums the gradient of a segment's first key; -1: it does not see the segment.
int64_t place(const Call& call, const Range& range, int64_t segment) {
  const int64_t prompt = call.row.groups[range.group];
  if (segment == prompt) return range.memory;
  if (segment < range.first_segment || segment >= range.last_segment) return -1;
  int64_t at = range.memory + up(call.row.segments[prompt].length, 12);
  for (int64_t x = range.first_segment; x < segment; ++x) at += up(call.row.segments[x].length, 12);
  return at;
}

struct Gradients {
  Rows grad, dq, dk, dv;
  const float *out, *lse;
  float *keys, *values;  // sums of the ranges, [size, width]
};

void differentiate_tile(const Call& call, const Gradients& to, const Range& range, const Tile& tile, Memory& memory) {
  const int64_t width = call.width, head = range.head;
  float* query_rows = memory.of(3 * kRows * width + (2 * width + 2 * kKeys + 2) * kStride);
  float* grad_rows = query_rows + kRows * width;
  float* dq = grad_rows + kRows * width;
  float* queries = dq + kRows * width;
  float* grads = queries + width * kStride;
  float* s = grads + width * kStride;
  float* ds = s + kKeys * kStride;
  float* lse = ds + kKeys * kStride;
  float* delta = lse + kStride;
  load(call, tile, head, call.q, call.scale, query_rows, queries);
  load(call, tile, head, to.grad, 1.0f, grad_rows, grads);
  std::fill(dq, dq + tile.lanes * width, 0.0f);
  std::fill(lse, lse + 2 * kStride, 0.0f);
  const int64_t all = call.heads * call.row.repeat;
  for_rows(call.row, tile, head, [&](int64_t lane, int64_t token, int64_t h) {
    lse[lane] = to.lse[h * call.tokens + token];
    const float* x = grad_rows + lane * width;
    const float* y = to.out + (token * all + h) * call.dim;
    float sums[16] = {0};
    int64_t d = 0;
    for (; d + 16 <= call.dim; d += 16)
      for (int i = 0; i < 16; ++i) sums[i] += x[d + i] * y[d + i];
    for (; d < call.dim; ++d) sums[0] += x[d] * y[d];
    for (int half = 8; half; half /= 2)
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    delta[lane] = sums[0];
  });
  for_keys(call.row, tile, [&](const Keys& keys, int64_t segment) {
    const int64_t own = segment < 0 ? call.row.groups[range.group] : segment;
    const int64_t at = (place(call, range, own) + keys.key - call.row.segments[own].start) * width;
    const float *k = call.key(call.keys, head, keys.key), *v = call.key(call.values, head, keys.key);
    const int64_t lane = keys.lane, rows = keys.rows, count = keys.count;
    call.steps->scores(k, width, queries + lane, s, count, rows, call.dim, keys.seen);
    call.steps->scores(v, width, grads + lane, ds, count, rows, call.dim, keys.seen);
    call.steps->differentiate(s, ds, count, rows, keys.seen, lse + lane, delta + lane);
    call.steps->spread(s, grad_rows + lane * width, to.values + at, count, rows, width, keys.first, call.row.repeat);
    call.steps->spread(ds, query_rows + lane * width, to.keys + at, count, rows, width, keys.first, call.row.repeat);
    call.steps->collect(ds, k, dq + lane * width, count, rows, width, keys.seen);
  });
  for_rows(call.row, tile, head, [&](int64_t lane, int64_t token, int64_t h) {
    to.dq.write(token, h, call.dim, call.scale, dq + lane * width);
  });
}

// The key gradients of a segment: the sums of all ranges that see it, in their order.
void merge(const Call& call, const Gradients& to, const std::vector<Range>& all, int64_t group, int64_t segment,
           int64_t head, Memory& memory) {
  const auto begin = std::lower_bound(all.begin(), all.end(), std::make_pair(group, head),
                                      [](const Range& range, const std::pair<int64_t, int64_t>& wanted) {
                                        return std::make_pair(range.group, range.head) < wanted;
                                      });
  std::vector<int64_t> places;
  for (auto range = begin; range != all.end() && range->group == group && range->head == head; ++range)
    if (const int64_t at = place(call, *range, segment); at >= 0) places.push_back(at);
  const int64_t width = call.width, start = call.row.segments[segment].start;
  float* sum = memory.of(width);
  for (int64_t t = 0; t < call.row.segments[segment].length; ++t) {
    for (int which = 0; which < 2; ++which) {
      const float* from = (which ? to.values : to.keys) + t * width;
      const float* first = from + places[0] * width;
      if (places.size() > 1) {
        std::copy(first, first + width, sum);
        for (size_t i = 1; i < places.size(); ++i)
          for (int64_t d = 0; d < width; ++d) sum[d] += from[places[i] * width + d];
        first = sum;
      }
      (which ? to.dv : to.dk).write(start + t, head, call.dim, 1.0f, first);
    }
  }
}

Memory& scratch() {
  static thread_local Memory memory;
  return memory;
}

// Memory of a call, which small ones leave to the next of their thread: to get it anew costs as much as a product.
class CallMemory {
 public:
  CallMemory() : packed(kept(0)), sums(kept(1)) {}
  ~CallMemory() {
    packed.free_beyond(kKept);
    sums.free_beyond(kKept);
  }
  Memory &packed, &sums;

 private:
  static constexpr int64_t kKept = 1 << 22;  // floats

  static Memory& kept(int which) {
    static thread_local Memory memory[2];
    return memory[which];
  }
};

// numbers: T, Hkv, Hq / Hkv, D, whether q, k and v are bf16, segments, threads, bits of a vector, then the strides
// (token, head) of q, k, v and the gradient. segments: start, length, start and length of the prompt of each.
Call call_of(void* q, void* k, void* v, const int64_t* segments, const int64_t* numbers, float scale,
             void* parallel_for) {
  const int64_t* n = numbers;
  const bool bf16 = n[4] != 0;
  const auto rows = [&](void* data, int i) { return Rows{data, n[8 + 2 * i], n[9 + 2 * i], bf16}; };
  return Call{&steps_for(n[7]), n[0], n[1], n[3], up(n[3], 16), scale, rows(q, 0), rows(k, 1), rows(v, 2),
              RowTiles(segments, n[5], n[2]), nullptr, nullptr, parallel_for, n[6]};
}

int64_t work_of(const Call& call) {
  int64_t work = 0;
  for (const Tile& tile : call.row.tiles) work += tile.work;
  return work * call.heads * call.width * 2;
}

constexpr int kNoMemory = -1000;

template <typename Body>
int guarded(const Body& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

}  // namespace

// out fp32 [T, Hq, D] and lse fp32 [Hq, T]. Returns 0, kNoMemory, or what torch_parallel_for did.
extern "C" int prefix_attention(void* q, void* k, void* v, float* out, float* lse, const int64_t* segments,
                                const int64_t* numbers, float scale, void* parallel_for) {
  return guarded([&] {
    Call call = call_of(q, k, v, segments, numbers, scale, parallel_for);
    CallMemory memory;
    if (const int error = pack(call, memory.packed)) return error;
    const int64_t tiles = call.row.tiles.size();
    return for_each(call, tiles * call.heads, work_of(call), [&](int64_t task) {  // the last see most keys
      attend(call, call.row.tiles[tiles - 1 - task / call.heads], task % call.heads, out, lse, scratch());
    });
  });
}

// dq [T, Hq, D], dk and dv [T, Hkv, D] in the inputs' dtype, of grad, out fp32 [T, Hq, D] and lse as above.
extern "C" int prefix_attention_backward(void* grad, void* q, void* k, void* v, const float* out, const float* lse,
                                         void* dq, void* dk, void* dv, const int64_t* segments, const int64_t* numbers,
                                         float scale, void* parallel_for) {
  return guarded([&] {
    Call call = call_of(q, k, v, segments, numbers, scale, parallel_for);
    CallMemory memory;
    if (const int error = pack(call, memory.packed)) return error;
    int64_t size = 0;
    const std::vector<Range> all = ranges(call, size);
    const int64_t width = call.width, query = call.heads * call.row.repeat * call.dim, key = call.heads * call.dim;
    const bool bf16 = call.q.bf16;
    Gradients to{{grad, numbers[14], numbers[15], false}, {dq, query, call.dim, bf16}, {dk, key, call.dim, bf16},
                 {dv, key, call.dim, bf16}, out, lse, nullptr, nullptr};
    to.keys = memory.sums.of(2 * size * width);
    to.values = to.keys + size * width;
    const int64_t work = work_of(call);
    const int error = for_each(call, all.size(), work, [&](int64_t i) {
      const Range& range = all[i];
      const int64_t end = (i + 1 < static_cast<int64_t>(all.size()) ? all[i + 1].memory : size) * width;
      for (float* x : {to.keys, to.values}) std::fill(x + range.memory * width, x + end, 0.0f);
      for (int64_t t = range.first; t < range.last; ++t)
        differentiate_tile(call, to, range, call.row.tiles[t], scratch());
    });
    if (error) return error;
    const int64_t segments_count = call.row.segments.size();
    std::vector<int64_t> group(segments_count);
    for (size_t g = 0; g + 1 < call.row.groups.size(); ++g)
      std::fill(group.begin() + call.row.groups[g], group.begin() + call.row.groups[g + 1], g);
    return for_each(call, segments_count * call.heads, work, [&](int64_t i) {
      const int64_t segment = i / call.heads;
      merge(call, to, all, group[segment], segment, i % call.heads, scratch());
    });
  });
}
