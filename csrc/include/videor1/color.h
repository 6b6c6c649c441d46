// 8- and 10-bit Y'CbCr of BT.601, BT.709 and BT.2020 (non-constant luminance) to RGB levels 0..255.
#pragma once

#include "videor1/portable.h"

namespace videor1 {

// R = y Y + rv V + r, G = y Y + gu U + gv V + g, B = y Y + bu U + b on the samples as they are stored, before the clamp:
// offsets, ranges and bit depths are folded into the constants.
struct ColorMatrix {
  float y, rv, gu, gv, bu, r, g, b;
};

enum Matrix { kBt601 = 0, kBt709 = 1, kBt2020 = 2 };

// Limited range: Y 16..235 and U, V 16..240 at 8 bits, four times that at 10. Full range: 0..2^bits - 1, U and V centred
// on 2^(bits - 1). Levels above or below are clamped after the conversion.
inline ColorMatrix color_matrix(int matrix, bool full_range, int bits) {
  const double weights[3][2] = {{0.299, 0.114}, {0.2126, 0.0722}, {0.2627, 0.0593}};  // kr, kb
  const double kr = weights[matrix][0], kb = weights[matrix][1], kg = 1 - kr - kb;
  const double unit = double(1 << (bits - 8)), top = double((1 << bits) - 1);
  const double luma = full_range ? 255 / top : 255 / (219 * unit), black = full_range ? 0 : 16 * unit;
  const double chroma = full_range ? 255 / top : 255 / (224 * unit), centre = 128 * unit;
  const double rv = 2 * (1 - kr) * chroma, bu = 2 * (1 - kb) * chroma;
  const double gu = -(2 * kb * (1 - kb) / kg) * chroma, gv = -(2 * kr * (1 - kr) / kg) * chroma;
  return {float(luma),
          float(rv),
          float(gu),
          float(gv),
          float(bu),
          float(-luma * black - rv * centre),
          float(-luma * black - (gu + gv) * centre),
          float(-luma * black - bu * centre)};
}

// What U and V add to the three channels of the pixels that share them.
struct Chroma {
  float r, g, b;
};

VIDEOR1_HD Chroma chroma_of(const ColorMatrix& m, float u, float v) {
  return {m.rv * v + m.r, m.gu * u + (m.gv * v + m.g), m.bu * u + m.b};
}

VIDEOR1_HD float clamp_level(float x, float top) {
  x = x < 0.0f ? 0.0f : x;
  return x > top ? top : x;
}

}  // namespace videor1
