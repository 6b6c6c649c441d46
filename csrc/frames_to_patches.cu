// Frames to patches on a card in one pass: a block makes kRows rows of a tile of columns of one frame.
//
//   1. Vertical filter: a thread owns kPixels neighbouring source columns and walks down the rows that the kRows windows
//      cover; it converts each pixel once and adds it to the sums of the windows it is in, in registers.
//   2. Horizontal filter: lanes hold the kValues = 3 kRows sums of a column, so that the reads of shared memory, where the
//      vertical sums lie column by column, hit every bank once; a warp makes two output columns at a time.
//   3. The rounded levels are staged in shared memory and leave in runs of a patch's side, to every slot they belong to.
//
// Floor for F frames of H x W: 1.5 F H W bytes in (NV12). Rows are read (3 / kRows + 1) times from the L2 cache, where
// windows overlap by three quarters: the price of keeping sums in registers.
#include <cuda_runtime.h>

#include "frames_to_patches.h"

namespace videor1 {
namespace {

constexpr int kThreads = 256, kPixels = 4, kRows = 4, kValues = 3 * kRows;
constexpr int kTile = kThreads * kPixels;          // source columns of a tile
constexpr int kGroup = kPixels * kValues + 4;          // floats of a thread's columns; 4 more keep 8 lanes off each other's banks
constexpr int kMostOutputs = 256;                      // output columns of a tile
constexpr int kAlign = 4;                              // first taps of a column's window are multiples of it

struct Tiling {
  int outputs, rows_capacity;  // output columns of a tile; source rows that kRows windows cover, at most
};

template <typename Sample>
__device__ __forceinline__ float sample_of(Sample stored) {
  return float(sizeof(Sample) == 2 ? stored >> 6 : stored);
}

template <typename Sample, int kCount>
struct alignas(sizeof(Sample) * kCount) Pack {
  Sample at[kCount];
};

// kCount samples; those at ``size`` and beyond are 0.
template <typename Sample, int kCount, bool kAligned>
__device__ __forceinline__ Pack<Sample, kCount> load(const Sample* row, int from, int size) {
  if (kAligned && from + kCount <= size) return *reinterpret_cast<const Pack<Sample, kCount>*>(row + from);
  Pack<Sample, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack.at[i] = from + i < size ? row[from + i] : Sample(0);
  return pack;
}

// The samples of kPixels pixels of two rows, the second of which may not exist.
template <int kLayout, typename Sample, bool kAligned>
struct Pair {
  Pack<Sample, kPixels> luma[2];
  Pack<Sample, kPixels / 2> u, v;
  Pack<Sample, kPixels> uv;
  Pack<Sample, kPixels> rgb[2][3];

  __device__ __forceinline__ void fetch(const Source& s, int64_t frame, int row, int x) {
    const int width = int(s.width), second = row + 1 < int(s.height) ? row + 1 : row;
    const Sample* first_plane = static_cast<const Sample*>(s.planes[0]) + frame * s.frame_stride[0];
    const Sample* rows[2] = {first_plane + row * s.row_stride[0], first_plane + second * s.row_stride[0]};
    if (kLayout == kRgb) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int part = 0; part < 3; ++part)
          rgb[i][part] = load<Sample, kPixels, kAligned>(rows[i], 3 * x + kPixels * part, 3 * width);
      return;
    }
    luma[0] = load<Sample, kPixels, kAligned>(rows[0], x, width);
    luma[1] = load<Sample, kPixels, kAligned>(rows[1], x, width);
    const int chroma_width = (width + 1) / 2;
    const Sample* row_1 = static_cast<const Sample*>(s.planes[1]) + frame * s.frame_stride[1] + row / 2 * s.row_stride[1];
    if (kLayout == kSemiPlanar) {
      uv = load<Sample, kPixels, kAligned>(row_1, x, 2 * chroma_width);
    } else {
      const Sample* row_2 = static_cast<const Sample*>(s.planes[2]) + frame * s.frame_stride[2] + row / 2 * s.row_stride[2];
      u = load<Sample, kPixels / 2, kAligned>(row_1, x / 2, chroma_width);
      v = load<Sample, kPixels / 2, kAligned>(row_2, x / 2, chroma_width);
    }
  }

  __device__ __forceinline__ Chroma chroma(const ColorMatrix& m, int i) const {
    if (kLayout == kRgb) return {};
    if (kLayout == kSemiPlanar) return chroma_of(m, sample_of(uv.at[2 * i]), sample_of(uv.at[2 * i + 1]));
    return chroma_of(m, sample_of(u.at[i]), sample_of(v.at[i]));
  }

  // Levels over 255 (RGB: levels) of pixel i of row ``which``.
  __device__ __forceinline__ void levels(const ColorMatrix& m, const Chroma& c, int which, int i, float (&out)[3]) const {
    if (kLayout == kRgb) {
#pragma unroll
      for (int k = 0; k < 3; ++k) out[k] = sample_of(rgb[which][(3 * i + k) / kPixels].at[(3 * i + k) % kPixels]);
      return;
    }
    const float y = sample_of(luma[which].at[i]);
    out[0] = __saturatef(m.y * y + c.r);
    out[1] = __saturatef(m.y * y + c.g);
    out[2] = __saturatef(m.y * y + c.b);
  }
};

__device__ __forceinline__ void add_to_windows(float (&sums)[kRows][kPixels][3], const float4 weights,
                                               const float (&pixel)[kPixels][3]) {
  const float w[kRows] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    if (w[k] == 0) continue;  // the same for the whole block
#pragma unroll
    for (int i = 0; i < kPixels; ++i)
#pragma unroll
      for (int c = 0; c < 3; ++c) sums[k][i][c] += w[k] * pixel[i][c];
  }
}

template <int kLayout>
__device__ __forceinline__ unsigned char level_of(float sum) {
  const float top = kLayout == kRgb ? 255.0f : 1.0f, unit = kLayout == kRgb ? 1.0f : 255.0f;
  return static_cast<unsigned char>(__float2int_rn(clamp_level(sum, top) * unit));
}

// To every slot the frame belongs to; (y, x) is the stored pixel.
template <typename Out>
__device__ __forceinline__ void store_level(const Job& job, int64_t frame, int y, int x, int channel, unsigned char level) {
  const Out pixel = static_cast<const Out*>(job.levels)[channel * 256 + level];
  const int patch = job.upright.patch;
  const int64_t height = job.upright.upright_height(), width = job.upright.upright_width();
  const int64_t offset =
      channel * channel_offset(patch) + job.upright.offset_of_stored_row(y) + job.upright.offset_of_stored_column(x);
  const int64_t slots[2] = {frame, job.permuted ? job.slots[frame] : 0};
  void* const outputs[2] = {job.ordered, job.permuted};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!outputs[i]) continue;
    for (int copy = 0; copy < slots_of(slots[i], job.source.frames); ++copy)
      static_cast<Out*>(outputs[i])[offset_of_slot(patch, slots[i] + copy, height, width) + offset] = pixel;
  }
}

template <int kLayout, typename Sample, bool kAligned, typename Out>
__global__ void __launch_bounds__(kThreads) patches_kernel(const Job job, const Tiling tiling) {
  extern __shared__ float4 memory[];
  float4* const row_weights = memory;                                                  // [rows_capacity]
  float* const sums_of_columns = reinterpret_cast<float*>(memory + tiling.rows_capacity);  // [kThreads, kGroup]
  unsigned char* const staged = reinterpret_cast<unsigned char*>(sums_of_columns + kThreads * kGroup);

  const Source& source = job.source;
  const int64_t frame = blockIdx.z;
  const int height = int(job.upright.height), width = int(job.upright.width);
  const int y0 = blockIdx.y * kRows, x0 = blockIdx.x * tiling.outputs;
  const int outputs = min(tiling.outputs, width - x0);
  const int first_row = job.rows.first[y0] & ~1;
  const int end_row = min(job.rows.first[min(y0 + kRows, height) - 1] + int(job.rows.taps), int(source.height));
  for (int i = threadIdx.x; i < (end_row - first_row) * kRows; i += kThreads) {
    const int y = y0 + i % kRows, tap = y < height ? first_row + i / kRows - job.rows.first[y] : -1;
    reinterpret_cast<float*>(row_weights)[i] =
        tap >= 0 && tap < job.rows.taps ? job.rows.weights[y * job.rows.pitch + tap] : 0.0f;
  }
  __syncthreads();

  float sums[kRows][kPixels][3] = {};
  const int first_column = job.columns.first[x0];  // a multiple of kAlign
  const int x = first_column + kPixels * threadIdx.x;
  if (x < source.width) {
    Pair<kLayout, Sample, kAligned> here, next;
    here.fetch(source, frame, first_row, x);
    for (int row = first_row; row < end_row; row += 2) {
      if (row + 2 < end_row) next.fetch(source, frame, row + 2, x);  // on its way while this pair is added
      Chroma chroma[kPixels / 2];
#pragma unroll
      for (int i = 0; i < kPixels / 2; ++i) chroma[i] = here.chroma(source.color, i);
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        if (row + which >= end_row) break;
        float pixel[kPixels][3];
#pragma unroll
        for (int i = 0; i < kPixels; ++i) here.levels(source.color, chroma[i / 2], which, i, pixel[i]);
        add_to_windows(sums, row_weights[row + which - first_row], pixel);
      }
      here = next;
    }
  }
  float* const own = sums_of_columns + threadIdx.x * kGroup;
#pragma unroll
  for (int i = 0; i < kPixels; ++i)
#pragma unroll
    for (int k = 0; k < kValues; k += 4) {
      float4 four;
      four.x = sums[k / 3][i][k % 3], four.y = sums[(k + 1) / 3][i][(k + 1) % 3];
      four.z = sums[(k + 2) / 3][i][(k + 2) % 3], four.w = sums[(k + 3) / 3][i][(k + 3) % 3];
      *reinterpret_cast<float4*>(own + i * kValues + k) = four;
    }
  __syncthreads();

  const int lane = threadIdx.x % 32, value = lane % kValues, together = 32 / kValues;
  if (lane < together * kValues) {
    for (int i = threadIdx.x / 32 * together + lane / kValues; i < outputs; i += kThreads / 32 * together) {
      const float4* weights = reinterpret_cast<const float4*>(job.columns.weights + (x0 + i) * job.columns.pitch);
      const float* from = sums_of_columns + (job.columns.first[x0 + i] - first_column) / kPixels * kGroup + value;
      float sum = 0;
      for (int j = 0; j < job.columns.taps; j += kPixels, from += kGroup) {
        const float4 w = weights[j / kPixels];
        sum += w.x * from[0];
        sum += w.y * from[kValues];
        sum += w.z * from[2 * kValues];
        sum += w.w * from[3 * kValues];
      }
      staged[value * tiling.outputs + i] = level_of<kLayout>(sum);
    }
  }
  __syncthreads();

  for (int i = threadIdx.x; i < kValues * outputs; i += kThreads) {
    const int of_row = i / outputs, column = i % outputs, y = y0 + of_row / 3;
    if (y >= height) break;
    store_level<Out>(job, frame, y, x0 + column, of_row % 3, staged[of_row * tiling.outputs + column]);
  }
}

// A thread a stored pixel of the output, straight from the definition: for windows too wide for a tile.
template <int kLayout, typename Sample, typename Out>
__global__ void __launch_bounds__(kThreads) direct_kernel(const Job job) {
  const int64_t frame = blockIdx.z, y = blockIdx.y;
  const int x = blockIdx.x * kThreads + threadIdx.x;
  if (x >= job.upright.width) return;
  float sums[3] = {};
  for (int i = 0; i < job.rows.taps; ++i) {
    const int row = job.rows.first[y] + i;
    if (row >= job.source.height) break;
    for (int j = 0; j < job.columns.taps; ++j) {
      const int column = job.columns.first[x] + j, even = column & ~1;
      if (column >= job.source.width) break;
      Pair<kLayout, Sample, false> pair;
      pair.fetch(job.source, frame, row & ~1, even);
      float pixel[2][3];
      const Chroma chroma = pair.chroma(job.source.color, 0);
      pair.levels(job.source.color, chroma, row & 1, 0, pixel[0]);
      pair.levels(job.source.color, chroma, row & 1, 1, pixel[1]);
      const float w = job.rows.weights[y * job.rows.pitch + i] * job.columns.weights[x * job.columns.pitch + j];
#pragma unroll
      for (int c = 0; c < 3; ++c) sums[c] += w * (column & 1 ? pixel[1][c] : pixel[0][c]);
    }
  }
#pragma unroll
  for (int c = 0; c < 3; ++c)
    store_level<Out>(job, frame, int(y), x, c, level_of<kLayout>(sums[c]));
}

Tiling tiling_of(const Job& job) {
  // n outputs cover (n - 1) scale + taps source columns, one more for the rounding of each end and kAlign for the start.
  const double across = double(job.source.width) / double(job.upright.width);
  const double down = double(job.source.height) / double(job.upright.height);
  const double room = double(kTile - job.columns.taps - kAlign - 2);
  int64_t outputs = room < 0 ? 0 : int64_t(room / across) + 1;
  outputs = outputs < kMostOutputs ? outputs : kMostOutputs;
  if (outputs < job.upright.width) {  // tiles of equal width
    const int64_t tiles = outputs ? (job.upright.width + outputs - 1) / outputs : 1;
    outputs = outputs ? (job.upright.width + tiles - 1) / tiles : 0;
  } else {
    outputs = job.upright.width;
  }
  return {int(outputs), int((kRows - 1) * down + double(job.rows.taps)) + 4};
}

template <int kLayout, typename Sample, bool kAligned, typename Out>
cudaError_t launch(const Job& job, cudaStream_t stream) {
  const Tiling tiling = tiling_of(job);
  const size_t bytes = sizeof(float4) * tiling.rows_capacity + sizeof(float) * kThreads * kGroup + kValues * tiling.outputs;
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error) return error;
  if (job.source.frames > 65535) return cudaErrorInvalidConfiguration;  // the grid's limit
  if (tiling.outputs < 1 || bytes > size_t(most)) {
    const dim3 grid(unsigned((job.upright.width + kThreads - 1) / kThreads), unsigned(job.upright.height),
                    unsigned(job.source.frames));
    direct_kernel<kLayout, Sample, Out><<<grid, kThreads, 0, stream>>>(job);
    return cudaGetLastError();
  }
  const auto kernel = patches_kernel<kLayout, Sample, kAligned, Out>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error) return error;
  const dim3 grid(unsigned((job.upright.width + tiling.outputs - 1) / tiling.outputs),
                  unsigned((job.upright.height + kRows - 1) / kRows), unsigned(job.source.frames));
  kernel<<<grid, kThreads, bytes, stream>>>(job, tiling);
  return cudaGetLastError();
}

template <int kLayout, typename Sample, bool kAligned>
cudaError_t launch_out(const Job& job, cudaStream_t stream) {
  if (job.out_bytes == 1) return launch<kLayout, Sample, kAligned, uint8_t>(job, stream);
  if (job.out_bytes == 2) return launch<kLayout, Sample, kAligned, uint16_t>(job, stream);
  return launch<kLayout, Sample, kAligned, uint32_t>(job, stream);
}

template <int kLayout, typename Sample>
cudaError_t launch_aligned(const Job& job, cudaStream_t stream) {
  bool aligned = true;  // for loads of kPixels samples (half as many of planar U and V)
  for (int i = 0; i < 3 && job.source.planes[i]; ++i) {
    const int64_t bytes = int64_t(sizeof(Sample)) * (kLayout == kPlanar && i ? kPixels / 2 : kPixels);
    aligned = aligned && reinterpret_cast<uintptr_t>(job.source.planes[i]) % bytes == 0 &&
              job.source.frame_stride[i] * int64_t(sizeof(Sample)) % bytes == 0 &&
              job.source.row_stride[i] * int64_t(sizeof(Sample)) % bytes == 0;
  }
  return aligned ? launch_out<kLayout, Sample, true>(job, stream) : launch_out<kLayout, Sample, false>(job, stream);
}

}  // namespace

int frames_to_patches_cuda(const Job& given, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  Job job = given;
  if (job.source.layout != kRgb) {  // so that a conversion saturates at 1
    ColorMatrix& m = job.source.color;
    for (float* x : {&m.y, &m.rv, &m.gu, &m.gv, &m.bu, &m.r, &m.g, &m.b}) *x /= 255.0f;
  }
  switch (job.source.layout * 2 + (job.source.sample_bytes == 2)) {
    case 2 * kRgb: return launch_aligned<kRgb, uint8_t>(job, stream);
    case 2 * kPlanar: return launch_aligned<kPlanar, uint8_t>(job, stream);
    case 2 * kSemiPlanar: return launch_aligned<kSemiPlanar, uint8_t>(job, stream);
    default: return launch_aligned<kSemiPlanar, uint16_t>(job, stream);
  }
}

}  // namespace videor1
