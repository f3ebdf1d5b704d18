// Edges of polygons on a small grid: what columns an edge inverts, and from which row. Reasons, and the order of
// operations, are those of operators/rasterize_polygons.py.
#pragma once

#include <cmath>

#include "boxes.h"

namespace cuda_ops {

constexpr int64_t kFifths = 5;
constexpr double kMinSidePx = 0.1;
constexpr int64_t kWordBits = 32;
constexpr double kFarthest = 1125899906842624.0;  // 2^50 fifths of a cell; a point farther out is moved here

// Instance i owns parts instance_offsets[i] to [i + 1], part t owns vertices part_offsets[t] to [t + 1]; offsets never
// fall.
template <class T>
struct Polygons {
  const T* xy;
  const int32_t* part_offsets;
  const int32_t* instance_offsets;
  int64_t per_image;  // instances
};

// Parts [first, end).
struct Parts {
  int32_t first, end;
};

// A row that its image does not have has no parts.
template <class T>
HOST_DEVICE Parts parts_of(const Polygons<T>& polygons, int64_t image, int64_t row) {
  if (row < 0 || row >= polygons.per_image) return {0, 0};
  const int32_t* offsets = polygons.instance_offsets + image * polygons.per_image + row;
  return {offsets[0], offsets[1]};
}

// What moves a point into the frame of a box.
struct Crop {
  double x, y, scale_x, scale_y;
};

// A point of the grid in whole fifths of a cell; integers in float64, which holds all to kFarthest.
struct GridPoint {
  double x, y;
};

HOST_DEVICE double finite(double value) {
  constexpr double largest = 1.7976931348623157e308;
  return value != value ? 0.0 : smaller(larger(value, -largest), largest);
}

template <class T>
HOST_DEVICE Crop crop_of(const Box<T>& box, int64_t size) {
  const double x = finite(box.x1), y = finite(box.y1), cells = static_cast<double>(size);
  return {
      x, y, cells / larger(finite(box.x2) - x, kMinSidePx), cells / larger(finite(box.y2) - y, kMinSidePx)};
}

HOST_DEVICE double to_fifths(double cells) {
  const double fifths = trunc((cells != cells ? 0.0 : cells) * kFifths + 0.5);
  return smaller(larger(fifths, -kFarthest), kFarthest);
}

template <class T>
HOST_DEVICE GridPoint grid_point(const T* xy, const Crop& crop) {
  const double x = (static_cast<double>(xy[0]) - crop.x) * crop.scale_x;
  const double y = (static_cast<double>(xy[1]) - crop.y) * crop.scale_y;
  return {to_fifths(x), to_fifths(y)};
}

// The first column whose middle lies past x, of `size`.
HOST_DEVICE int64_t column_past(double x, int64_t size) {
  const double last = static_cast<double>(size * kFifths);
  return static_cast<int64_t>(smaller(larger(0.0, x), last) + 2) / kFifths;
}

// y of the upper of the two steps at x = left and left + 1, in fifths.
HOST_DEVICE double flat_row(double left, const GridPoint& from, double slope) {
  const double step = left - from.x + (slope < 0 ? 1 : 0);
  return floor(step * slope + from.y + 0.5);
}

// y of the last step before x, rounded, passes from left to left + 1 or back, in fifths.
HOST_DEVICE double steep_row(double left, const GridPoint& from, double slope) {
  const double step = rint((left + 0.5 - from.x) / slope);
  const double x = step * slope + from.x + 0.5;
  const bool has_passed = slope > 0 ? x >= left + 1 : x < left + 1;
  return step - (has_passed ? 1 : 0) + from.y;
}

// Calls invert(column, row) for each column of [first, end) that the edge inverts below some row of the grid.
template <class Invert>
HOST_DEVICE void cross_columns(
    const GridPoint& a, const GridPoint& b, int64_t size, int64_t first, int64_t end, const Invert& invert) {
  const int64_t begin = larger(first, column_past(smaller(a.x, b.x), size));
  const int64_t stop = smaller(end, column_past(larger(a.x, b.x), size));
  if (begin >= stop) return;
  const double dx = fabs(b.x - a.x), dy = fabs(b.y - a.y);
  const bool is_flat = dx >= dy;
  const bool is_flipped = is_flat ? a.x > b.x : a.y > b.y;
  const GridPoint from = is_flipped ? b : a, to = is_flipped ? a : b;
  const double slope = is_flat ? (to.y - from.y) / dx : (to.x - from.x) / dy;
  for (int64_t column = begin; column < stop; ++column) {
    const double left = static_cast<double>(column * kFifths + 2);
    const double fifth = is_flat ? flat_row(left, from, slope) : steep_row(left, from, slope);
    const double row = larger(floor((fifth + 2) / kFifths), 0.0);
    if (row < static_cast<double>(size)) invert(column, static_cast<int64_t>(row));
  }
}

// Bits below an odd number of set bits of a word and of the words above it; `carry` is 0 or all ones.
HOST_DEVICE uint32_t filled_below(uint32_t inversions, uint32_t& carry) {
  inversions ^= inversions << 1;
  inversions ^= inversions << 2;
  inversions ^= inversions << 4;
  inversions ^= inversions << 8;
  inversions ^= inversions << 16;
  inversions ^= carry;
  carry = 0u - (inversions >> 31);
  return inversions;
}

}  // namespace cuda_ops
