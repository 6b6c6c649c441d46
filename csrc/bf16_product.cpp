// C[n, m] (fp32) = A[n, k] B[m, k]^T of bf16 matrices, summed in fp32: torch has no CPU operator with such a result.
//
// Compiled by videor1_kernels/extension.py at its first use, called through ctypes; neither torch's headers nor its
// libraries are needed. vdpbf16ps multiplies exactly, rounds each sum to nearest, and takes subnormal inputs and sums
// (below 1.2e-38) as 0. An entry of C is the sum of blocks of kDepth terms and does not depend on who computes it: the
// bits are the same for any number of threads.
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#define WITH_BF16 __attribute__((target("avx512f,avx512bw,avx512bf16")))

namespace {

constexpr int kColumns = 64;  // of C, held in registers: kVectors of 16
constexpr int kVectors = kColumns / 16;
constexpr int kRows = 6;      // 24 registers of sums, 4 of B, 1 of A, of 32
constexpr int kDepth = 512;   // of k, summed in registers: at this depth as accurate as oneDNN's product of fp32
constexpr int kPairs = kDepth / 2;

struct Product {
  const uint16_t* a;
  const uint16_t* b;
  float* c;
  int64_t n, m, k, lda, ldb, ldc;  // the strides of rows, in elements
};

// Rows of b [columns, depth] -> packed [depth / 2, kColumns] of pairs along k, 0 where there is no element.
void pack(const uint16_t* b, int64_t ldb, int64_t columns, int64_t depth, uint32_t* packed) {
  const int64_t pairs = (depth + 1) / 2;
  for (int64_t p = 0; p < pairs; p += 16) {  // a cache line of B at a time
    const int64_t count = std::min<int64_t>(16, pairs - p);
    for (int64_t j = 0; j < kColumns; ++j) {
      uint32_t line[16] = {0};
      if (j < columns) std::memcpy(line, b + j * ldb + 2 * p, 2 * std::min<int64_t>(2 * count, depth - 2 * p));
      for (int64_t i = 0; i < count; ++i) packed[(p + i) * kColumns + j] = line[i];
    }
  }
}

// c [rows, columns] = (onto ? c : 0) + a [rows, depth] * packed.
template <int rows>
WITH_BF16 void tile(const uint16_t* a, int64_t lda, const uint32_t* packed, int64_t depth, float* c, int64_t ldc,
                    int64_t columns, bool onto) {
  __m512 sum[rows][kVectors];
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_setzero_ps();
  const int64_t whole = depth / 2;
  for (int64_t p = 0; p < whole; ++p) {
    __m512bh w[kVectors];
    for (int v = 0; v < kVectors; ++v) w[v] = (__m512bh)_mm512_loadu_si512(packed + p * kColumns + 16 * v);
    for (int r = 0; r < rows; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * lda + 2 * p, sizeof pair);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], x, w[v]);
    }
  }
  if (depth % 2) {
    for (int r = 0; r < rows; ++r) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(a[r * lda + depth - 1]);
      for (int v = 0; v < kVectors; ++v) {
        const __m512bh w = (__m512bh)_mm512_loadu_si512(packed + whole * kColumns + 16 * v);
        sum[r][v] = _mm512_dpbf16_ps(sum[r][v], x, w);
      }
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = columns - 16 * v;
      if (left <= 0) break;
      const __mmask16 mask = left >= 16 ? 0xffff : (1u << left) - 1;
      float* out = c + r * ldc + 16 * v;
      if (onto) sum[r][v] = _mm512_add_ps(sum[r][v], _mm512_maskz_loadu_ps(mask, out));
      _mm512_mask_storeu_ps(out, mask, sum[r][v]);
    }
  }
}

using Tile = void (*)(const uint16_t*, int64_t, const uint32_t*, int64_t, float*, int64_t, int64_t, bool);
constexpr Tile kTiles[kRows] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};

// The columns [begin, end) of C, in units of kColumns.
void panels(int64_t begin, int64_t end, void* context) {
  const Product& t = *static_cast<const Product*>(context);
  alignas(64) uint32_t packed[kPairs * kColumns];
  for (int64_t j = begin * kColumns; j < std::min(end * kColumns, t.m); j += kColumns) {
    const int64_t columns = std::min<int64_t>(kColumns, t.m - j);
    int64_t start = 0;
    do {  // once for k = 0 too: C is 0 then
      const int64_t depth = std::min<int64_t>(kDepth, t.k - start);
      pack(t.b + j * t.ldb + start, t.ldb, columns, depth, packed);
      for (int64_t i = 0; i < t.n; i += kRows) {
        const int64_t rows = std::min<int64_t>(kRows, t.n - i);
        kTiles[rows - 1](t.a + i * t.lda + start, t.lda, packed, depth, t.c + i * t.ldc + j, t.ldc, columns, start > 0);
      }
      start += kDepth;
    } while (start < t.k);
  }
}

}  // namespace

// torch_parallel_for of torch/csrc/stable/c/shim.h: torch's own threads, as many as torch.get_num_threads() says.
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, void (*)(int64_t, int64_t, void*), void*);

extern "C" int bf16_product_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16");
}

// Rows of A, B and C may lie anywhere; the elements of a row are neighbours. Without parallel_for: on this thread.
// Returns 0, or parallel_for's error.
extern "C" int bf16_product(const uint16_t* a, const uint16_t* b, float* c, int64_t n, int64_t m, int64_t k,
                            int64_t lda, int64_t ldb, int64_t ldc, ParallelFor parallel_for) {
  Product product{a, b, c, n, m, k, lda, ldb, ldc};
  const int64_t count = (m + kColumns - 1) / kColumns;
  if (parallel_for) return parallel_for(0, count, 1, panels, &product);
  panels(0, count, &product);
  return 0;
}
