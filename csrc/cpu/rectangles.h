// The pieces of a product that threads take one by one.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <vector>

namespace epmq {

constexpr int64_t kSegment = 192;  // output rows per rectangle, the unit of work given to a thread

struct Rectangle {
  bool cross;
  int64_t column, row_begin, row_end;
};

// Column by column of `width`: rectangles of the lower triangle of a [columns, columns] matrix, if that is wanted, and
// those (`cross`) of the full [rows, columns] one. step: what beginnings in the triangle are multiples of.
inline std::vector<Rectangle> rectangles(int64_t columns, bool triangle, int64_t rows, int64_t width, int64_t step) {
  std::vector<Rectangle> all;
  for (int64_t column = 0; column < columns; column += width) {
    for (int64_t row = column / step * step; triangle && row < columns; row += kSegment)
      all.push_back({false, column, row, std::min(row + kSegment, columns)});
    for (int64_t row = 0; row < rows; row += kSegment)
      all.push_back({true, column, row, std::min(row + kSegment, rows)});
  }
  return all;
}

}  // namespace epmq
