// Where a pixel goes among a tower's patches, and the frames a call reads and writes.
#pragma once

#include <cstdint>

#include "videor1/color.h"
#include "videor1/portable.h"

namespace videor1 {

// Patches have sides of 14 or 16 pixels. Each offset below divides by a constant: a division by a number that is known
// only when it runs takes longer than the store.
template <int64_t kPatch>
struct PatchOrder {
  static constexpr int64_t kBlock = 2 * kPatch, kColumns = 3 * 2 * kPatch * kPatch;

  VIDEOR1_HD static int64_t offset_of_row(int64_t y, int64_t width) {
    const int64_t block = y / kBlock, in_block = y % kBlock;
    return (block * (width / kBlock) * 4 + in_block / kPatch * 2) * kColumns + in_block % kPatch * kPatch;
  }
  VIDEOR1_HD static int64_t offset_of_column(int64_t x) {
    const int64_t block = x / kBlock, in_block = x % kBlock;
    return (block * 4 + in_block / kPatch) * kColumns + in_block % kPatch;
  }
};

// Elements before pixel (y, x) of channel 0 of an upright frame of ``width`` pixels: row * columns + column, with
// row = ((hb * width/block + wb) * 2 + hm) * 2 + wm and column = py * patch + px. It is a sum of a term of y and one of x.
VIDEOR1_HD int64_t offset_of_row(int patch, int64_t y, int64_t width) {
  return patch == 14 ? PatchOrder<14>::offset_of_row(y, width) : PatchOrder<16>::offset_of_row(y, width);
}
VIDEOR1_HD int64_t offset_of_column(int patch, int64_t x) {
  return patch == 14 ? PatchOrder<14>::offset_of_column(x) : PatchOrder<16>::offset_of_column(x);
}
VIDEOR1_HD int64_t channel_offset(int patch) { return 2 * patch * patch; }

// Elements before the frame at ``slot`` (2t + tp), of frames of height x width pixels.
VIDEOR1_HD int64_t offset_of_slot(int patch, int64_t slot, int64_t height, int64_t width) {
  return slot / 2 * (height * width) * 6 + slot % 2 * (patch * patch);
}

// Frames are resized as they are stored and brought upright on the way out: mirrored left to right where ``mirrored``
// says so, then turned by ``quarter_turns`` anticlockwise. height and width are those of the resized frame as stored; the
// upright frame is width x height after an odd turn.
struct Upright {
  int64_t height, width;
  int quarter_turns;
  bool mirrored;
  int patch;  // 14 or 16

  VIDEOR1_HD int64_t upright_height() const { return quarter_turns % 2 ? width : height; }
  VIDEOR1_HD int64_t upright_width() const { return quarter_turns % 2 ? height : width; }

  // Stored pixel (y, x) is at offset_of_stored_row(y) + offset_of_stored_column(x).
  VIDEOR1_HD int64_t offset_of_stored_row(int64_t y) const {
    switch (quarter_turns) {
      case 0: return offset_of_row(patch, y, width);
      case 1: return offset_of_column(patch, y);
      case 2: return offset_of_row(patch, height - 1 - y, width);
      default: return offset_of_column(patch, height - 1 - y);
    }
  }
  VIDEOR1_HD int64_t offset_of_stored_column(int64_t stored) const {
    const int64_t x = mirrored ? width - 1 - stored : stored;
    switch (quarter_turns) {
      case 0: return offset_of_column(patch, x);
      case 1: return offset_of_row(patch, width - 1 - x, height);
      case 2: return offset_of_column(patch, width - 1 - x);
      default: return offset_of_row(patch, x, height);
    }
  }
};

enum Layout { kRgb = 0, kPlanar = 1, kSemiPlanar = 2 };  // [H, W, 3]; Y, U, V; Y and U next to V

// Planes as a decoder leaves them. Strides are in samples; samples of a row lie next to each other.
struct Source {
  const void* planes[3];  // unused ones are null
  int64_t frame_stride[3], row_stride[3];
  int64_t frames, height, width;
  int layout, sample_bytes;  // 1, or 2: P010, the sample in the high 10 bits
  ColorMatrix color;
};

struct Table {
  const int32_t* first;  // [size]
  const float* weights;  // [size, pitch], 0 beyond a window
  int64_t pitch, taps;   // taps: of the widest window
};

// Everything of a call. ``levels`` maps channel and level 0..255 to what is stored.
struct Job {
  Source source;
  Upright upright;
  Table rows, columns;   // upright.height and upright.width outputs
  const void* levels;    // [3, 256] of out_bytes each
  const int32_t* slots;  // [frames]: the slot of each frame in ``permuted``
  void* ordered;         // null: not wanted
  void* permuted;
  int out_bytes;         // 1, 2 or 4
};

// A frame goes to up to two slots of each output: an odd number of frames repeats the last one.
VIDEOR1_HD int slots_of(int64_t slot, int64_t frames) { return slot == frames - 1 && frames % 2 ? 2 : 1; }

}  // namespace videor1
