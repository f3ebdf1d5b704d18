// Masks resized to the pixels of their boxes, but only as far as a threshold needs: most pixels lie between cells that
// are all above it, or all below.
//
// Cells are those of the mask with a border of zeros, S × S, columns one after another, as in
// operators/encode_masks.py. An exact mask is sampled where the centres of pixels lie in its box, as in Detectron2; a
// rounded one is stretched over whole pixels as in torchvision, bit for bit as torch's CPU kernel of bilinear
// interpolation does it.
#pragma once

#include <cmath>

#include "boxes.h"

namespace cuda_ops {

// Where a build of torch fuses multiplication and addition into one rounding: it depends on compiler and processor.
struct Rounding {
  bool fuses_index, fuses_value;
};

// torch has one kernel for frames of at most kSmallFrame pixels, width and height added, and one for others.
struct Roundings {
  Rounding small, large;
};
constexpr int64_t kSmallFrame = 128;

Roundings torch_roundings(ScalarType dtype);

// Masks [D, M, M] with their border, columns one after another: [D, S, S].
inline Tensor padded_cells(const Tensor& mask_probs) {
  return torch::stable::contiguous(torch::stable::pad(torch::stable::transpose(mask_probs, 1, 2), {1, 1, 1, 1}));
}

// The rows or columns of the image that a mask may set, [begin, end), and where they lie in its `cells`.
template <class T>
struct Axis {
  int64_t cells, extent, begin, end;
  T scale;         // cells a pixel
  bool is_exact;   // whether the mask starts at `low`; else it covers `size` whole pixels from `origin` on
  T low;
  int64_t origin, size;

  HOST_DEVICE bool is_copy() const {
    return !is_exact && size == cells;
  }

  HOST_DEVICE int64_t after(int64_t cell) const {
    return is_copy() || cell + 1 == cells ? cell : cell + 1;
  }
};

// What a pixel takes from the cell at or before it, and from the next one.
template <class T>
struct Sample {
  int64_t cell;
  T weight, next_weight;
};

// Values of two cells of a row mixed by the weights of a column, and how large they are.
template <class T>
struct Mix {
  T value, magnitude;
};

enum Certainty : uint8_t { kNeither = 0, kAbove = 1, kBelow = 2 };

template <class T>
struct ResizedMask {
  const T* cells;
  Axis<T> x, y;
  Rounding rounding;
  bool is_small;
  T threshold;
};

template <class T>
HOST_DEVICE T multiply_add(T a, T b, T c, bool is_fused) {
  return is_fused ? std::fma(a, b, c) : a * b + c;
}

// A coordinate cut to a whole pixel; what is far from any image, to a pixel far from any image.
template <class T>
HOST_DEVICE int64_t whole_pixel(T coordinate) {
  constexpr T farthest = static_cast<T>(int64_t{1} << 40);
  return static_cast<int64_t>(smaller(larger(-farthest, coordinate), farthest));
}

// Whether a box has an area, and no corner that is no number or infinite; others have no pixels.
template <class T>
HOST_DEVICE bool has_pixels(const Box<T>& box) {
  constexpr T farthest = std::numeric_limits<T>::max();
  return box.x1 >= -farthest && box.y1 >= -farthest && box.x2 <= farthest && box.y2 <= farthest && box.x1 <= box.x2 &&
         box.y1 <= box.y2;
}

// The place of a pixel's centre among the cells, that of the first cell being 0.
template <class T>
HOST_DEVICE T exact_place(const Axis<T>& axis, int64_t pixel) {
  return (static_cast<T>(pixel) + T(0.5) - axis.low) * axis.scale + T(0.5);
}

// The first of [low, high) for which is_before does not hold, which holds up to some place; else high.
template <class IsBefore>
HOST_DEVICE int64_t first_beyond(int64_t low, int64_t high, const IsBefore& is_before) {
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (is_before(middle)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class T>
HOST_DEVICE Axis<T> exact_axis(T low, T high, int64_t cells, int64_t extent) {
  Axis<T> axis{cells, extent, 0, 0, static_cast<T>(cells - 2) / (high - low), true, low, 0, 0};
  if (high > low) {
    axis.begin = first_beyond(0, extent, [&](int64_t pixel) { return exact_place(axis, pixel) < T(0); });
    axis.end = first_beyond(
        axis.begin, extent, [&](int64_t pixel) { return exact_place(axis, pixel) < static_cast<T>(cells - 1); });
  }
  return axis;
}

template <class T>
HOST_DEVICE Axis<T> rounded_axis(T low, T high, int64_t cells, int64_t extent) {
  const double growth = static_cast<double>(cells) / static_cast<double>(cells - 2);  // by the border of the mask
  const T half_size = (high - low) * T(0.5) * static_cast<T>(growth);
  const T centre = (high + low) * T(0.5);
  const int64_t origin = whole_pixel(centre - half_size), last = whole_pixel(centre + half_size);
  const int64_t size = larger<int64_t>(last - origin + 1, 1);
  const int64_t begin = larger<int64_t>(origin, 0), end = larger(begin, smaller(origin + size, extent));
  return {cells, extent, begin, end, static_cast<T>(cells) / size, false, T(0), origin, size};
}

// What the pixels of a mask are compared with: exact ones of just the threshold are set too.
template <class T>
T exclusive_threshold(double threshold, bool is_exact) {
  const auto value = static_cast<T>(threshold);
  return is_exact ? std::nextafter(value, -std::numeric_limits<T>::infinity()) : value;
}

// threshold: a pixel is set where its value is greater.
template <class T>
HOST_DEVICE ResizedMask<T> resized_mask(
    const T* cells, const Box<T>& box, int64_t side, int64_t height, int64_t width, T threshold, bool is_exact,
    const Roundings& roundings) {
  if (!has_pixels(box)) return {cells, {side, width, 0, 0}, {side, height, 0, 0}, {}, false, threshold};
  if (is_exact) {
    const Axis<T> x = exact_axis(box.x1, box.x2, side, width), y = exact_axis(box.y1, box.y2, side, height);
    return {cells, x, y, {false, false}, false, threshold};
  }
  const Axis<T> x = rounded_axis(box.x1, box.x2, side, width), y = rounded_axis(box.y1, box.y2, side, height);
  const bool is_small = x.size + y.size <= kSmallFrame;
  return {cells, x, y, is_small ? roundings.small : roundings.large, is_small, threshold};
}

template <class T>
HOST_DEVICE T rounded_place(const Axis<T>& axis, int64_t pixel, bool fuses_index) {
  const T i = static_cast<T>(pixel - axis.origin);
  return larger(multiply_add(axis.scale, i + T(0.5), T(-0.5), fuses_index), T(0));
}

template <class T>
HOST_DEVICE Sample<T> sample(const Axis<T>& axis, int64_t pixel, bool fuses_index) {
  if (axis.is_copy()) return {pixel - axis.origin, 1, 0};
  const T place = axis.is_exact ? exact_place(axis, pixel) : rounded_place(axis, pixel, fuses_index);
  const auto floored = axis.is_exact ? static_cast<int64_t>(place)
                                     : static_cast<int64_t>(static_cast<float>(place));  // as torch does
  const int64_t cell = smaller(floored, axis.cells - 1);
  const T next_weight = smaller(larger(place - static_cast<T>(cell), T(0)), T(1));
  return {cell, T(1) - next_weight, next_weight};
}

// The first row in the image that takes from this cell or a later one.
template <class T>
HOST_DEVICE int64_t first_row(const Axis<T>& y, int64_t cell, bool fuses_index) {
  return first_beyond(y.begin, y.end, [&](int64_t row) { return sample(y, row, fuses_index).cell < cell; });
}

template <class T>
HOST_DEVICE T blend(T a, T weight, T b, T next_weight, bool is_fused) {
  return multiply_add(a, weight, b * next_weight, is_fused);
}

template <class T>
HOST_DEVICE Mix<T> mix(T a, T b, const Sample<T>& column, bool is_fused) {
  return {blend(a, column.weight, b, column.next_weight, is_fused), std::abs(a) + std::abs(b)};
}

template <class T>
HOST_DEVICE Mix<T> mix_at(const ResizedMask<T>& mask, const Sample<T>& column, int64_t row) {
  const T* left = mask.cells + column.cell * mask.y.cells;
  const T* right = mask.cells + mask.x.after(column.cell) * mask.y.cells;
  return mix(left[row], right[row], column, mask.rounding.fuses_value);
}

// On which side of the threshold all pixels lie between this mix and another one as certain, whatever is rounded.
template <class T>
HOST_DEVICE uint8_t certainty(const Mix<T>& mix, T threshold) {
  const T slack = mix.magnitude * T(1.9e-6);  // rounding takes less than 1e-6 of it
  return (mix.value - slack > threshold ? kAbove : kNeither) | (mix.value + slack < threshold ? kBelow : kNeither);
}

template <class T>
HOST_DEVICE T small_pixel(const ResizedMask<T>& mask, const Sample<T>& column, const Sample<T>& row) {
  const T* left = mask.cells + column.cell * mask.y.cells;
  const T* right = mask.cells + mask.x.after(column.cell) * mask.y.cells;
  const int64_t next = mask.y.after(row.cell);
  const bool is_fused = mask.rounding.fuses_value;
  const T upper = blend(
      left[row.cell], row.weight * column.weight, right[row.cell], row.weight * column.next_weight, is_fused);
  const T three = multiply_add(left[next], row.next_weight * column.weight, upper, is_fused);
  return multiply_add(right[next], row.next_weight * column.next_weight, three, is_fused);
}

template <class T>
HOST_DEVICE T large_pixel(const ResizedMask<T>& mask, const Mix<T>& upper, const Mix<T>& lower, const Sample<T>& row) {
  return blend(upper.value, row.weight, lower.value, row.next_weight, mask.rounding.fuses_value);
}

template <class T>
HOST_DEVICE T pixel(const ResizedMask<T>& mask, const Sample<T>& column, const Sample<T>& row) {
  if (mask.is_small) return small_pixel(mask, column, row);
  return large_pixel(mask, mix_at(mask, column, row.cell), mix_at(mask, column, mask.y.after(row.cell)), row);
}

template <class T>
HOST_DEVICE bool is_visible(const ResizedMask<T>& mask) {
  return mask.x.begin < mask.x.end && mask.y.begin < mask.y.end;
}

// Past the last column in which the mask can change: it ends at the top of the column after its own.
template <class T>
HOST_DEVICE int64_t end_of_changes(const ResizedMask<T>& mask) {
  return smaller(mask.x.end + 1, mask.x.extent);
}

// Calls put(row, is_set) at every row of a column at which the mask may change.
//
// first_rows: of each cell, and the end. column.certainty(cell) is that of its mix, column.is_set(cell, next, row) a
// pixel.
template <class T, class Column, class Put>
HOST_DEVICE void walk_column(const Axis<T>& y, const int64_t* first_rows, const Column& column, const Put& put) {
  for (int64_t cell = 0; cell < y.cells; ++cell) {
    const int64_t begin = first_rows[cell], end = first_rows[cell + 1], next = y.after(cell);
    if (begin == end) continue;
    if (const uint8_t side = column.certainty(cell) & column.certainty(next); side != kNeither) {
      put(begin, side == kAbove);
    } else {
      for (int64_t row = begin; row < end; ++row) put(row, column.is_set(cell, next, row));
    }
  }
}

// Calls record(place) where column x differs from the pixel before, in column-major order; returns its last pixel.
//
// `is_set`: the pixel before the column.
template <class T, class Column, class Record>
HOST_DEVICE bool record_changes(
    const ResizedMask<T>& mask, const int64_t* first_rows, int64_t x, bool is_set, const Column& column,
    const Record& record) {
  const int64_t height = mask.y.extent;
  const auto put = [&](int64_t row, bool value) {
    if (value != is_set) record(x * height + row);
    is_set = value;
  };
  if (x == mask.x.end) {
    put(0, false);
    return false;
  }
  if (mask.y.begin > 0) put(0, false);
  walk_column(mask.y, first_rows, column, put);
  if (mask.y.end < height) put(mask.y.end, false);
  return is_set;
}

}  // namespace cuda_ops
