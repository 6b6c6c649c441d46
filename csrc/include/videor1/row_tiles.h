// How a packed row of shared-prefix groups is cut into tiles of query rows, and which keys a tile takes.
//
// A row is a query of one of the heads that share a key head; rows of a segment are numbered by query, then by head.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "videor1/attention_tile.h"

namespace videor1 {

constexpr int64_t kAllRows = std::numeric_limits<int32_t>::min();

inline int64_t up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// A prompt or a completion, and the prompt that it sees besides itself: none, of length 0, for a prompt.
struct Segment {
  int64_t start, length, prompt, prompt_length;
};

// Rows of one segment in a tile, in the lanes from `lane` on; `row` is the first of them within the segment.
struct Piece {
  int64_t segment, lane, rows, row;
};

// Pieces of a prompt, or of completions of one prompt.
struct Tile {
  int64_t first, last;  // pieces
  int64_t lanes, prompt, prompt_length, work;
};

// The packed row, for query heads of which `repeat` share a key head.
struct RowTiles {
  int64_t repeat;
  std::vector<Segment> segments;
  std::vector<int64_t> groups;       // the first segment of each group, its prompt, and the end
  std::vector<Piece> pieces;
  std::vector<Tile> tiles;
  std::vector<int64_t> group_tiles;  // the first tile of each group, and the end

  // segments: start, length, start and length of the prompt of each.
  RowTiles(const int64_t* numbers, int64_t count, int64_t repeat) : repeat(repeat) {
    for (int64_t i = 0; i < count; ++i, numbers += 4) {
      segments.push_back({numbers[0], numbers[1], numbers[2], numbers[3]});
      if (segments.back().prompt_length == 0) groups.push_back(i);
    }
    groups.push_back(count);
    for (size_t g = 0; g + 1 < groups.size(); ++g) {
      group_tiles.push_back(tiles.size());
      add_tiles(groups[g], groups[g] + 1);
      add_tiles(groups[g] + 1, groups[g + 1]);
    }
    group_tiles.push_back(tiles.size());
  }

 private:
  // Of segments that see the same prompt.
  void add_tiles(int64_t first, int64_t last) {
    int64_t segment = first, row = 0;
    while (segment < last) {
      const int64_t piece = pieces.size();
      Tile tile{piece, piece, 0, segments[segment].prompt, segments[segment].prompt_length, 0};
      while (segment < last && tile.lanes < kRows) {
        const int64_t end = segments[segment].length * repeat, rows = std::min(kRows - tile.lanes, end - row);
        pieces.push_back({segment, tile.lanes, rows, row});
        row += rows;
        tile.work += rows * ((row - 1) / repeat + 1 + kKeys);
        tile.lanes += up(rows, 4);
        if (row == end) ++segment, row = 0;
      }
      tile.work += tile.lanes * tile.prompt_length;
      tile.last = pieces.size();
      tiles.push_back(tile);
    }
  }
};

// Calls body(lane, token, query head) for the rows of a tile.
template <typename Body>
void for_rows(const RowTiles& row, const Tile& tile, int64_t head, const Body& body) {
  for (int64_t p = tile.first; p < tile.last; ++p) {
    const Piece& piece = row.pieces[p];
    int64_t token = row.segments[piece.segment].start + piece.row / row.repeat, i = piece.row % row.repeat;
    for (int64_t r = 0; r < piece.rows; ++r) {
      body(piece.lane + r, token, head * row.repeat + i);
      if (++i == row.repeat) ++token, i = 0;
    }
  }
}

// `count` keys of one segment, from token `key` on, that `rows` rows of a tile take together. The k-th is seen from the
// row first + k * repeat on.
struct Keys {
  int64_t lane, rows, key, count, first;
  const int32_t* seen;  // by each row, how many of them; null: all
};

// Calls body(keys, segment) for all that a tile's rows see; the segment of its prompt is -1.
template <typename Body>
void for_keys(const RowTiles& row, const Tile& tile, const Body& body) {
  const auto cut = [](int64_t length) {  // into equal parts, so that none is tiny
    const int64_t count = (length + kKeys - 1) / kKeys;
    return count ? up((length + count - 1) / count, 12) : kKeys;
  };
  const int64_t step = cut(tile.prompt_length);
  for (int64_t k = 0; k < tile.prompt_length; k += step)
    body(Keys{0, tile.lanes, tile.prompt + k, std::min(step, tile.prompt_length - k), kAllRows, nullptr}, int64_t{-1});
  int32_t seen[kStride];
  for (int64_t p = tile.first; p < tile.last; ++p) {
    const Piece& piece = row.pieces[p];
    const int64_t end = (piece.row + piece.rows - 1) / row.repeat + 1, own = cut(end);
    const int64_t start = row.segments[piece.segment].start;
    for (int64_t k = 0; k < end; k += own) {
      const int64_t count = std::min(own, end - k);
      Keys keys{piece.lane, piece.rows, start + k, count, k * row.repeat - piece.row, seen};
      if (tile.last - tile.first == 1 && keys.first + (count - 1) * row.repeat <= 0) {
        keys.seen = nullptr;
        keys.first = kAllRows;
      } else {
        int64_t token = piece.row / row.repeat, i = piece.row % row.repeat;
        for (int64_t r = 0; r < piece.rows; ++r) {
          seen[r] = static_cast<int32_t>(std::min(count, std::max<int64_t>(0, token - k + 1)));
          if (++i == row.repeat) ++token, i = 0;
        }
        std::fill(seen + piece.rows, seen + up(piece.rows, 16), 0);
      }
      body(keys, piece.segment);
    }
  }
}

}  // namespace videor1
