// The antialiased bicubic filter (a = -0.5) of F.interpolate(mode="bicubic", antialias=True), as tables.
#pragma once

#include <cmath>
#include <cstdint>

#include "videor1/portable.h"

namespace videor1 {

VIDEOR1_HD double cubic(double x) {
  x = x < 0 ? -x : x;
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  if (x < 2) return ((-0.5 * x + 2.5) * x - 4) * x + 2;
  return 0;
}

// Which source samples make an output sample: first, first + 1, ..., first + count - 1.
struct Window {
  int64_t first, count;
  double centre, support;  // in source samples; support: half the width of a tap of the cubic
};

VIDEOR1_HD Window window_of(int64_t out, int64_t size_in, int64_t size_out) {
  const double scale = double(size_in) / double(size_out), s = scale > 1 ? scale : 1, centre = scale * (double(out) + 0.5);
  int64_t first = int64_t(centre - 2 * s + 0.5), end = int64_t(centre + 2 * s + 0.5);
  first = first < 0 ? 0 : first;
  end = end > size_in ? size_in : end;
  return {first, end - first, centre, s};
}

// Entries of the widest window, at most, where each begins at a multiple of ``align`` (entries before it weigh 0).
inline int64_t most_taps(int64_t size_in, int64_t size_out, int64_t align) {
  int64_t most = 0;
  for (int64_t i = 0; i < size_out; ++i) {
    const Window w = window_of(i, size_in, size_out);
    const int64_t count = w.count + w.first % align;
    most = count > most ? count : most;
  }
  return most;
}

// first [size_out], weights [size_out, pitch]: each row sums to 1, entries outside of a window are 0.
inline void resample_table(int64_t size_in, int64_t size_out, int64_t align, int64_t pitch, int32_t* first,
                           float* weights) {
  for (int64_t i = 0; i < size_out; ++i) {
    const Window w = window_of(i, size_in, size_out);
    const int64_t lead = w.first % align;
    double sum = 0;
    for (int64_t j = 0; j < w.count; ++j) sum += cubic((double(w.first + j) - w.centre + 0.5) / w.support);
    first[i] = int32_t(w.first - lead);
    for (int64_t j = 0; j < pitch; ++j) {
      const bool inside = j >= lead && j < lead + w.count;
      const double tap = inside ? cubic((double(w.first + j - lead) - w.centre + 0.5) / w.support) / sum : 0;
      weights[i * pitch + j] = float(tap);
    }
  }
}

}  // namespace videor1
