// Frames to patches on a CPU in one pass: every source row is converted once, rows are summed into the rows of the output
// (vertical filter), those into its pixels (horizontal filter), rounded once, and stored where their patches are.
//
// Temporary memory: the source rows of one window in fp32 RGB, per thread. Sums are in a fixed order.
#include "frames_to_patches.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "videor1/simd.h"

namespace videor1 {
namespace {

constexpr int64_t kLanes = 16, kVectors = 4, kStep = kLanes * kVectors;

int64_t rounded_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

struct ChromaRow {
  float *r, *g, *b;  // one entry a pixel
};

template <typename Sample, int kNext, int kShift>
VIDEOR1_HD void chroma_row(const ColorMatrix& m, const Sample* u, const Sample* v, int64_t width, ChromaRow out) {
  for (int64_t i = 0; i < width / 2; ++i) {
    const Chroma c = chroma_of(m, float(u[i * kNext] >> kShift), float(v[i * kNext] >> kShift));
    out.r[2 * i] = out.r[2 * i + 1] = c.r;
    out.g[2 * i] = out.g[2 * i + 1] = c.g;
    out.b[2 * i] = out.b[2 * i + 1] = c.b;
  }
  if (width % 2) {
    const Chroma c = chroma_of(m, float(u[width / 2 * kNext] >> kShift), float(v[width / 2 * kNext] >> kShift));
    out.r[width - 1] = c.r, out.g[width - 1] = c.g, out.b[width - 1] = c.b;
  }
}

template <typename Sample, int kShift>
VIDEOR1_HD void luma_row(float scale, const Sample* y, ChromaRow c, int64_t width, float* __restrict r,
                         float* __restrict g, float* __restrict b) {
  for (int64_t x = 0; x < width; ++x) {
    const float luma = scale * float(y[x] >> kShift);
    r[x] = clamp_level(luma + c.r[x], 255.0f);
    g[x] = clamp_level(luma + c.g[x], 255.0f);
    b[x] = clamp_level(luma + c.b[x], 255.0f);
  }
}

EVERY_CPU void chroma_planar(const ColorMatrix& m, const uint8_t* u, const uint8_t* v, int64_t width, ChromaRow out) {
  chroma_row<uint8_t, 1, 0>(m, u, v, width, out);
}
EVERY_CPU void chroma_pairs(const ColorMatrix& m, const uint8_t* uv, int64_t width, ChromaRow out) {
  chroma_row<uint8_t, 2, 0>(m, uv, uv + 1, width, out);
}
EVERY_CPU void chroma_p010(const ColorMatrix& m, const uint16_t* uv, int64_t width, ChromaRow out) {
  chroma_row<uint16_t, 2, 6>(m, uv, uv + 1, width, out);
}
EVERY_CPU void luma_8(float scale, const uint8_t* y, ChromaRow c, int64_t width, float* rgb, int64_t pitch) {
  luma_row<uint8_t, 0>(scale, y, c, width, rgb, rgb + pitch, rgb + 2 * pitch);
}
EVERY_CPU void luma_p010(float scale, const uint16_t* y, ChromaRow c, int64_t width, float* rgb, int64_t pitch) {
  luma_row<uint16_t, 6>(scale, y, c, width, rgb, rgb + pitch, rgb + 2 * pitch);
}
EVERY_CPU void rgb_row(const uint8_t* in, int64_t width, float* __restrict rgb, int64_t pitch) {
  for (int64_t x = 0; x < width; ++x) {
    rgb[x] = float(in[3 * x]);
    rgb[pitch + x] = float(in[3 * x + 1]);
    rgb[2 * pitch + x] = float(in[3 * x + 2]);
  }
}

// out[x] = sum of weights[j] rows[j][x]; width is a multiple of kStep.
EVERY_CPU void sum_rows(const float* const* rows, const float* weights, int64_t taps, int64_t width, float* out) {
  for (int64_t x = 0; x < width; x += kStep) {
    Lanes sums[kVectors] = {};
    for (int64_t j = 0; j < taps; ++j) {
      const Lanes* row = reinterpret_cast<const Lanes*>(rows[j] + x);
      for (int64_t v = 0; v < kVectors; ++v) sums[v] += weights[j] * row[v];
    }
    for (int64_t v = 0; v < kVectors; ++v) reinterpret_cast<Lanes*>(out + x)[v] = sums[v];
  }
}

// Levels [3, width] of one row [3, pitch]: rounded half to even. Windows are read up to a multiple of kLanes, where the
// weights are 0 and the row is finite.
EVERY_CPU void sum_columns(const float* row, int64_t pitch, const Table& table, int64_t width, uint8_t* levels) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which its low bits then hold
  for (int64_t x = 0; x < width; ++x) {
    const float* weights = table.weights + x * table.pitch;
    const float* from = row + table.first[x];
    Lanes r{}, g{}, b{};
    for (int64_t j = 0; j < table.taps; j += kLanes) {
      const Lanes w = *reinterpret_cast<const Lanes*>(weights + j);
      r += w * *reinterpret_cast<const Lanes*>(from + j);
      g += w * *reinterpret_cast<const Lanes*>(from + pitch + j);
      b += w * *reinterpret_cast<const Lanes*>(from + 2 * pitch + j);
    }
    const Quarter sums = sums_of(r, g, b, Lanes{});
    for (int64_t k = 0; k < 3; ++k) {
      const float rounded = clamp_level(sums[k], 255.0f) + magic;
      uint32_t bits;
      std::memcpy(&bits, &rounded, sizeof bits);
      levels[k * width + x] = uint8_t(bits);
    }
  }
}

// Pixel x of channel c goes to out + c * channel + columns[x].
template <typename Out>
void store_row(const uint8_t* levels, const Out* map, const int64_t* columns, int64_t width, int64_t channel, Out* out) {
  for (int64_t c = 0; c < 3; ++c, out += channel, map += 256, levels += width)
    for (int64_t x = 0; x < width; ++x) out[columns[x]] = map[levels[x]];
}

struct Shared {  // by all tasks of a call
  const Job& job;
  int64_t bands, pitch;
  std::vector<int64_t> column_offsets;
};

// Source rows of one frame as fp32 RGB [3, pitch] each, the last ``capacity`` of them.
class Rows {
 public:
  Rows(const Source& source, int64_t frame, int64_t pitch, int64_t capacity)
      : source_(source), frame_(frame), pitch_(pitch), capacity_(capacity), rows_(capacity * 3 * pitch), chroma_(3 * pitch) {}

  const float* at(int64_t row) const { return rows_.data() + row % capacity_ * 3 * pitch_; }

  void convert_up_to(int64_t first, int64_t end) {
    for (next_ = std::max(next_, first); next_ < end; ++next_) convert(next_);
  }

 private:
  template <typename Sample>
  const Sample* row_of(int plane, int64_t row) const {
    return static_cast<const Sample*>(source_.planes[plane]) + frame_ * source_.frame_stride[plane] +
           row * source_.row_stride[plane];
  }

  void convert(int64_t row) {
    float* out = rows_.data() + row % capacity_ * 3 * pitch_;
    const int64_t width = source_.width;
    if (source_.layout == kRgb) return rgb_row(row_of<uint8_t>(0, row), width, out, pitch_);
    const ChromaRow chroma{chroma_.data(), chroma_.data() + pitch_, chroma_.data() + 2 * pitch_};
    if (chroma_row_ != row / 2) {
      chroma_row_ = row / 2;
      if (source_.sample_bytes == 2)
        chroma_p010(source_.color, row_of<uint16_t>(1, row / 2), width, chroma);
      else if (source_.layout == kSemiPlanar)
        chroma_pairs(source_.color, row_of<uint8_t>(1, row / 2), width, chroma);
      else
        chroma_planar(source_.color, row_of<uint8_t>(1, row / 2), row_of<uint8_t>(2, row / 2), width, chroma);
    }
    if (source_.sample_bytes == 2)
      luma_p010(source_.color.y, row_of<uint16_t>(0, row), chroma, width, out, pitch_);
    else
      luma_8(source_.color.y, row_of<uint8_t>(0, row), chroma, width, out, pitch_);
  }

  const Source& source_;
  int64_t frame_, pitch_, capacity_, next_ = 0, chroma_row_ = -1;
  std::vector<float> rows_, chroma_;  // what no pixel fills stays 0
};

template <typename Out>
void store(const Job& job, int64_t frame, int64_t row, const uint8_t* levels, const int64_t* columns) {
  const int patch = job.upright.patch;
  const int64_t height = job.upright.upright_height(), width = job.upright.upright_width();
  const int64_t row_offset = job.upright.offset_of_stored_row(row);
  const int64_t slots[2] = {frame, job.permuted ? job.slots[frame] : 0};
  void* const outputs[2] = {job.ordered, job.permuted};
  for (int i = 0; i < 2; ++i) {
    if (!outputs[i]) continue;
    for (int copy = 0; copy < slots_of(slots[i], job.source.frames); ++copy)
      store_row(levels, static_cast<const Out*>(job.levels), columns, job.upright.width, channel_offset(patch),
                static_cast<Out*>(outputs[i]) + offset_of_slot(patch, slots[i] + copy, height, width) + row_offset);
  }
}

void run_task(int64_t index, void* context) {
  const Shared& shared = *static_cast<const Shared*>(context);
  const Job& job = shared.job;
  const int64_t frame = index / shared.bands, band = index % shared.bands, height = job.upright.height;
  Rows rows(job.source, frame, shared.pitch, job.rows.taps);
  std::vector<float> row(3 * shared.pitch);
  std::vector<uint8_t> levels(3 * job.upright.width);
  std::vector<const float*> window(job.rows.taps);
  for (int64_t y = band * height / shared.bands; y < (band + 1) * height / shared.bands; ++y) {
    const int64_t first = job.rows.first[y], end = std::min(first + job.rows.taps, job.source.height);
    rows.convert_up_to(first, end);
    for (int64_t j = 0; j < end - first; ++j) window[j] = rows.at(first + j);
    sum_rows(window.data(), job.rows.weights + y * job.rows.pitch, end - first, 3 * shared.pitch, row.data());
    sum_columns(row.data(), shared.pitch, job.columns, job.upright.width, levels.data());
    const int64_t* columns = shared.column_offsets.data();
    if (job.out_bytes == 1) store<uint8_t>(job, frame, y, levels.data(), columns);
    else if (job.out_bytes == 2) store<uint16_t>(job, frame, y, levels.data(), columns);
    else store<uint32_t>(job, frame, y, levels.data(), columns);
  }
}

}  // namespace

void frames_to_patches_cpu(const Job& job, int64_t threads, ParallelFor parallel_for) {
  // Bands of a frame share the rows of a window, which each converts for itself: only as many as keep the threads busy.
  const int64_t frames = job.source.frames;
  const int64_t most = job.upright.height / (2 * job.upright.patch);  // a block of patches each
  const int64_t bands = threads == 1 ? 1 : std::clamp((4 * threads - 1) / frames + 1, int64_t(1), most);
  const int64_t pitch = rounded_up(job.source.width + rounded_up(job.columns.taps, kLanes), kStep);
  Shared shared{job, bands, pitch, std::vector<int64_t>(job.upright.width)};
  for (int64_t x = 0; x < job.upright.width; ++x) shared.column_offsets[x] = job.upright.offset_of_stored_column(x);
  parallel_for(frames * bands, run_task, &shared);
}

}  // namespace videor1
