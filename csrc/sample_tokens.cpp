// One token per row of logits and its log-prob, in fp32 on a CPU: dozens of small tensor operations in one call, of which
// truncation sorts no more than what it keeps.
//
// Compiled by videor1_kernels/extension.py at its first use, called through ctypes. A row's result depends neither on the
// rows beside it nor on the number of threads.
#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "videor1/attention_tile.h"
#include "videor1/ranges.h"

namespace {

using namespace videor1;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kBlock = 64;  // tokens whose sum is kept; a multiple of every vector's lanes
constexpr double kReached = 1 - 1.0 / (int64_t{1} << 40);  // of top_p: only rounding makes such a difference

struct Call {
  const float* logits;
  int64_t stride, vocabulary;
  const double* uniform;
  const int64_t* banned;
  int64_t banned_count;
  float temperature;
  double top_p;
  int64_t top_k;
  int64_t* tokens;
  float* logp;
  std::atomic<int>* failed;  // for want of memory
};

// Of one thread; all but `kept` go on to the end of a block.
struct Memory {
  std::vector<float> scores, weights;
  std::vector<int32_t> keys;
  std::vector<double> blocks;
  std::vector<int64_t> kept;
};

template <typename P>
ALWAYS_INLINE float most_of(const float* x, int64_t size) {
  typename P::F most = typename P::F{} - FLT_MAX;
  for (int64_t i = 0; i < size; i += P::kLanes) most = at<P>(x + i) > most ? at<P>(x + i) : most;
  float one = most[0];
  for (int l = 1; l < P::kLanes; ++l) one = most[l] > one ? most[l] : one;
  return one;
}

// Copies a row, without what is not finite: NaN is the least, +inf the greatest; what fills the last block is -inf.
// Returns the greatest score; plain: all were finite.
template <typename P>
ALWAYS_INLINE float copy(const float* from, float* to, int64_t count, int64_t size, bool& plain) {
  using F = typename P::F;
  const F greatest = F{} + FLT_MAX, least = F{} - FLT_MAX;
  std::memcpy(to, from, count * sizeof(float));
  std::fill(to + count, to + size, 0.0f);
  typename P::I finite = ~typename P::I{};
  for (int64_t i = 0; i < size; i += P::kLanes) {
    F x = at<P>(to + i);
    finite &= (x <= greatest) & (x >= least);
    x = x < greatest ? x : x == x ? greatest : least;
    at<P>(to + i) = x > least ? x : least;
  }
  plain = true;
  for (int l = 0; l < P::kLanes; ++l) plain &= finite[l] != 0;
  std::fill(to + count, to + size, -kInfinity);
  return most_of<P>(to, size);
}

// weights = e^((scores - most) / t)
template <typename P>
ALWAYS_INLINE void soften(const float* scores, float most, float t, int64_t size, float* weights) {
  for (int64_t i = 0; i < size; i += P::kLanes) {
    typename P::F x = (at<P>(scores + i) - most) / t;
    exp_negative<P>(x);
    at<P>(weights + i) = x;
  }
}

// Half a vector of floats, which makes a vector of doubles.
template <typename P>
struct Halves {
  static constexpr int kBytes = P::kLanes * sizeof(float);
  typedef float F __attribute__((vector_size(kBytes / 2), aligned(4)));
  typedef int32_t I __attribute__((vector_size(kBytes / 2), aligned(4)));
  typedef double D __attribute__((vector_size(kBytes)));
  static constexpr int kLanes = P::kLanes / 2;
};

// The sum of the weights of a block whose keys are `least` or more; keys null: of all.
template <typename P>
ALWAYS_INLINE double block_sum(const float* weights, const int32_t* keys, int32_t least) {
  using H = Halves<P>;
  typename H::D sums[2] = {};
  for (int64_t i = 0; i < kBlock; i += 2 * H::kLanes)
    for (int j = 0; j < 2; ++j) {
      typename H::F w = *reinterpret_cast<const typename H::F*>(weights + i + j * H::kLanes);
      if (keys != nullptr) w = *reinterpret_cast<const typename H::I*>(keys + i + j * H::kLanes) >= least ? w : typename H::F{};
      sums[j] += __builtin_convertvector(w, typename H::D);
    }
  sums[0] += sums[1];
  double total = sums[0][0];
  for (int l = 1; l < H::kLanes; ++l) total += sums[0][l];
  return total;
}

// The sum of all weights whose keys are `least` or more; blocks: that of each block, if not null.
template <typename P>
ALWAYS_INLINE double sum(const float* weights, int64_t size, double* blocks = nullptr, const int32_t* keys = nullptr,
                         int32_t least = 0) {
  double total = 0.0;
  for (int64_t first = 0; first < size; first += kBlock) {
    const double own = block_sum<P>(weights + first, keys == nullptr ? nullptr : keys + first, least);
    if (blocks != nullptr) blocks[first / kBlock] = own;
    total += own;
  }
  return total;
}

// Integers in the order of the scores.
template <typename P>
ALWAYS_INLINE void make_keys(const float* scores, int32_t* keys, int64_t size) {
  for (int64_t i = 0; i < size; i += P::kLanes) {
    const typename P::F x = at<P>(scores + i) + 0.0f;  // -0 is 0
    typename P::I bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits ^= (bits >> 31) & 0x7fffffff;
    std::memcpy(keys + i, &bits, sizeof bits);
  }
}

// The greatest key from `low` to `high` for which `enough` holds, as it does for `low`; if for one, then for all below.
template <typename Enough>
ALWAYS_INLINE int32_t greatest(int32_t low, int32_t high, const Enough& enough) {
  while (low < high) {
    const int32_t middle = static_cast<int32_t>((static_cast<int64_t>(low) + high + 1) >> 1);
    if (enough(middle))
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// The ids that top_k and top_p keep, in ascending order.
template <typename P>
ALWAYS_INLINE void truncate(const Call& call, const float* scores, const float* weights, float most, Memory& memory) {
  using I = typename P::I;
  const int64_t count = call.vocabulary, size = memory.scores.size();
  std::vector<int64_t>& kept = memory.kept;
  int32_t* keys = memory.keys.data();
  make_keys<P>(scores, keys, size);
  kept.clear();
  const auto key_of = [](float x) {
    int32_t bits;
    std::memcpy(&bits, &(x += 0.0f), sizeof bits);
    return bits ^ ((bits >> 31) & 0x7fffffff);
  };
  if (call.top_k) {
    const int32_t least = greatest(key_of(-kInfinity), key_of(most), [&](int32_t key) {
      I found{};
      for (int64_t i = 0; i < size; i += P::kLanes) {
        I own;
        std::memcpy(&own, keys + i, sizeof own);
        found -= own >= key;
      }
      int64_t many = 0;
      for (int l = 0; l < P::kLanes; ++l) many += found[l];
      return many >= call.top_k;
    });
    int64_t equal = call.top_k;  // how many of those that are equal to the least stay: the first ones
    for (int64_t i = 0; i < count; ++i) equal -= keys[i] > least;
    for (int64_t i = 0; i < count; ++i)
      if (keys[i] >= least && (keys[i] > least || equal-- > 0)) kept.push_back(i);
    if (call.top_p >= 1.0) return;
    std::sort(kept.begin(), kept.end(), [&](int64_t a, int64_t b) { return keys[a] != keys[b] ? keys[a] > keys[b] : a < b; });
    double total = 0.0, before = 0.0;
    for (const int64_t i : kept) total += weights[i];
    const double need = total * (call.top_p * kReached);
    size_t some = 0;
    while (some < kept.size() && (some == 0 || before < need)) before += weights[kept[some++]];
    kept.resize(some);
    std::sort(kept.begin(), kept.end());
    return;
  }
  const double need = sum<P>(weights, size) * (call.top_p * kReached);
  const auto above = [&](int32_t key) { return sum<P>(weights, size, nullptr, keys, key); };
  const int32_t last = key_of(most);
  const int32_t least = greatest(key_of(-kInfinity), last, [&](int32_t key) { return above(key) >= need; });
  double before = least < last ? above(least + 1) : 0.0;  // of those that are likelier than the last ones kept
  for (int64_t i = 0; i < count; ++i) {
    if (keys[i] < least) continue;
    if (keys[i] == least) {
      if (before >= need && !(least == last && before == 0.0)) continue;
      before += weights[i];
    }
    kept.push_back(i);
  }
}

// The first id of positive weight at which the cumulative weight exceeds the target, or the last such id.
template <typename P>
ALWAYS_INLINE int64_t draw(const Call& call, double uniform, const float* weights, Memory& memory) {
  int64_t last = -1;
  double reached = 0.0;
  const auto within = [&](double total) {
    const double target = uniform * total;
    return target > 0.0 ? target : 0.0;  // NaN is 0
  };
  if (call.top_k || call.top_p < 1.0) {
    for (const int64_t i : memory.kept) reached += weights[i];
    const double target = within(reached);
    reached = 0.0;
    for (const int64_t i : memory.kept) {
      if (!(weights[i] > 0.0f)) continue;
      last = i;
      if ((reached += weights[i]) > target) break;
    }
    return last;
  }
  const int64_t size = memory.weights.size();
  memory.blocks.resize(size / kBlock);
  const double target = within(sum<P>(weights, size, memory.blocks.data()));
  int64_t block = -1;  // of the target, or the last one of positive weight
  for (int64_t b = 0; b < size / kBlock; ++b) {
    if (!(memory.blocks[b] > 0.0)) continue;
    if (block >= 0) reached += memory.blocks[block];
    block = b;
    if (reached + memory.blocks[b] > target) break;
  }
  for (int64_t i = block * kBlock; i < block * kBlock + kBlock; ++i) {
    if (!(weights[i] > 0.0f)) continue;
    last = i;
    if ((reached += weights[i]) > target) break;
  }
  return last;
}

// The token and the log-prob of a row.
template <typename P>
ALWAYS_INLINE void sample(const Call& call, int64_t row, Memory& memory) {
  const int64_t count = call.vocabulary, size = memory.scores.size();
  const float t = call.temperature > 0.0f ? call.temperature : 1.0f;
  const float* logits = call.logits + row * call.stride;
  float *scores = memory.scores.data(), *weights = memory.weights.data();
  bool plain;
  const float top = copy<P>(logits, scores, count, size, plain);
  float most = top;
  double others = 0.0;  // the weight of banned tokens, where none of them is the likeliest; if named twice, then 0
  for (int64_t i = 0; i < call.banned_count; ++i) {
    float& score = scores[call.banned[i]];
    others += std::exp((static_cast<double>(score) - top) / t);
    score = -kInfinity;
  }
  if (call.banned_count) most = most_of<P>(scores, size);
  int64_t token;
  soften<P>(scores, most, t, size, weights);
  if (call.temperature > 0.0f) {
    if (call.top_k || call.top_p < 1.0) truncate<P>(call, scores, weights, most, memory);
    token = draw<P>(call, call.uniform[row], weights, memory);
  } else {
    token = std::max_element(scores, scores + count) - scores;
  }
  call.tokens[row] = token;
  // The log-prob is of the whole row, in which a banned token may be the likeliest, and of which some may be infinite.
  if (top != most || !plain) {
    copy<P>(logits, scores, count, size, plain);
    soften<P>(scores, top, t, size, weights);
    others = 0.0;
  }
  bool known = true;
  if (!plain) {
    known = top > -FLT_MAX;
    for (int64_t i = 0; i < count; ++i) known &= logits[i] < kInfinity;
  }
  const double own = (logits[token] - top) / t, total = sum<P>(weights, size) + others;
  call.logp[row] = known ? static_cast<float>(own - std::log(total)) : std::numeric_limits<float>::quiet_NaN();
}

template <typename P>
ALWAYS_INLINE void sample_rows(int64_t begin, int64_t end, void* data) {
  const Call& call = *static_cast<const Call*>(data);
  static thread_local Memory memory;
  const int64_t size = (call.vocabulary + kBlock - 1) / kBlock * kBlock;
  try {
    memory.scores.resize(size);
    memory.weights.resize(size);
    memory.keys.resize(size);
    for (int64_t row = begin; row < end; ++row) sample<P>(call, row, memory);
  } catch (const std::bad_alloc&) {
    *call.failed = 1;
  }
}

VIDEOR1_RANGE_FOR(sample_rows)

}  // namespace

// top_k 0, top_p 1: off; temperature 0: the likeliest. bits: of a vector; grain: rows that are worth a thread. Returns
// 0, what torch_parallel_for did, or -1000 where there is no memory.
extern "C" int sample_tokens(const float* logits, int64_t stride, int64_t rows, int64_t vocabulary,
                             const double* uniform, const int64_t* banned, int64_t banned_count, float temperature,
                             double top_p, int64_t top_k, int64_t* tokens, float* logp, int64_t bits, int64_t grain,
                             void* parallel_for) {
  std::atomic<int> failed{0};
  Call call{logits,      stride, vocabulary, uniform, banned, banned_count,
            temperature, top_p,  top_k,      tokens,  logp,   &failed};
  const int error = over(rows, grain, parallel_for, range_for(bits), &call);
  return failed ? -1000 : error;
}
