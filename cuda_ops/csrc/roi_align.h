// RoIAlign over a pyramid: which level a box belongs to, and what its bins sample along one axis. The order of
// operations is that of roi_sampling.py, so levels, cells and weights agree with it in every bit.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "boxes.h"

namespace cuda_ops {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kMaxLevels = 8;

// Weights and sums: in float for features of half the width, else in the type of the features.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr ScalarType kAccumulatorType = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

struct Pyramid {
  int num_levels = 0;
  int finest = 0, coarsest = 0;  // -log2 of the scales
  double scales[kMaxLevels] = {};
  int32_t heights[kMaxLevels] = {}, widths[kMaxLevels] = {};
};

// A box in cells of its level.
template <class B>
struct Roi {
  int level;
  B y, x, bin_height, bin_width;
  int samples_y, samples_x;  // of a bin
};

// A sample lies between two cells, the same one at a border.
template <class B>
struct Sample {
  bool is_inside;
  int32_t low, high;
  B low_weight, high_weight;
};

// O × O bins of S × S samples; S = 0 is adaptive: as many as a bin has cells, rounded up, but max_samples at most.
struct Grid {
  int output_size, sampling_ratio;
  bool aligned;     // a cell's centre, not its corner, lies at its index; if not, boxes are a cell wide or more
  int max_samples;  // of a bin on one axis

  // Cells of a bin on one axis, at most: two a sample.
  HOST_DEVICE int max_taps() const {
    return 2 * max_samples;
  }
};

// A box within its image spans no more than its level, so of such boxes the limit of adaptive samples cuts none.
inline Grid grid_of(int64_t output_size, int64_t sampling_ratio, bool aligned, const Pyramid& pyramid) {
  int32_t longest = 1;
  for (int l = 0; l < pyramid.num_levels; ++l) {
    longest = std::max({longest, pyramid.heights[l], pyramid.widths[l]});
  }
  const auto size = static_cast<int>(output_size);
  const int adaptive = (longest + size - 1) / size;
  const auto fixed = static_cast<int>(sampling_ratio);
  return {size, fixed, aligned, fixed > 0 ? fixed : adaptive};
}

// A cell, or whatever else idx counts, and its weight in a bin.
template <class W>
struct Tap {
  int32_t idx;
  W weight;
};

// torch.nan_to_num of a coordinate.
template <class B>
HOST_DEVICE B finite(B value) {
  const B largest = std::is_same_v<B, double> ? B(1.7976931348623157e308) : B(3.40282347e38);
  if (value != value) return 0;
  return value > largest ? largest : value < -largest ? -largest : value;
}

template <class B>
HOST_DEVICE int assign_level(const Box<B>& box, const Pyramid& pyramid) {
  const B area = (box.x2 - box.x1) * (box.y2 - box.y1);
  const B size = std::sqrt(area < 0 ? B(0) : area);
  B level = std::floor(B(4) + std::log2(size / B(224)) + B(1e-6));
  if (!(level >= pyramid.finest)) level = B(pyramid.finest);
  if (level > pyramid.coarsest) level = B(pyramid.coarsest);
  const int row = static_cast<int>(level) - pyramid.finest;
  return row >= 0 && row < pyramid.num_levels ? row : 0;
}

// Samples of a bin on one axis; a box turned inside out has none, and pools to 0.
template <class B>
HOST_DEVICE int samples_of(B bin_size, Grid grid) {
  if (grid.sampling_ratio > 0) return grid.sampling_ratio;
  const B samples = std::ceil(bin_size);
  return samples > grid.max_samples ? grid.max_samples : samples > 0 ? static_cast<int>(samples) : 0;
}

template <class B>
HOST_DEVICE Roi<B> roi_of(const Box<B>& raw, const Pyramid& pyramid, Grid grid) {
  const Box<B> box{finite(raw.x1), finite(raw.y1), finite(raw.x2), finite(raw.y2)};
  const int level = assign_level(box, pyramid);
  const B scale = static_cast<B>(pyramid.scales[level]);
  const B offset = grid.aligned ? B(0.5) : B(0);
  const B x1 = box.x1 * scale - offset, y1 = box.y1 * scale - offset;
  const B width = box.x2 * scale - offset - x1, height = box.y2 * scale - offset - y1;
  const B bins = static_cast<B>(grid.output_size);
  const B bin_width = (!grid.aligned && width < 1 ? B(1) : width) / bins;
  const B bin_height = (!grid.aligned && height < 1 ? B(1) : height) / bins;
  return {level, y1, x1, bin_height, bin_width, samples_of(bin_height, grid), samples_of(bin_width, grid)};
}

// A sample outside -1 … size counts as 0; one nearer is moved onto the border.
template <class B>
HOST_DEVICE Sample<B> sample_of(B start, B bin_size, int bin, int sample, int num_samples, int32_t size) {
  B at = start + B(bin) * bin_size + (B(sample) + B(0.5)) * bin_size / B(num_samples);
  if (!(at >= -1 && at <= size) || size == 0) return {false, 0, 0, B(0), B(0)};  // nan too
  const B share = B(1) / B(num_samples);
  const int32_t last = size - 1;
  at = at < 0 ? B(0) : at > last ? B(last) : at;
  const int32_t low = static_cast<int32_t>(at);
  const B high_weight = at - B(low);
  return {true, low, low < last ? low + 1 : last, (1 - high_weight) * share, high_weight * share};
}

// Adds one tap of a sample to those of its bin, of which there are num_taps; samples that share a cell are added up.
// Samples go from one end to the other, so a known cell is among the last ones; to list one twice would be no error.
template <class W>
HOST_DEVICE void add_tap(Tap<W> tap, Tap<W>* taps, int& num_taps) {
  const int first = num_taps > 4 ? num_taps - 4 : 0;
  int t = num_taps - 1;
  while (t >= first && taps[t].idx != tap.idx) --t;
  if (t >= first) {
    taps[t].weight += tap.weight;
  } else {
    taps[num_taps++] = tap;
  }
}

// The cells that a bin touches along one axis, at most Grid::max_taps.
template <class W, class B>
HOST_DEVICE int taps_of(B start, B bin_size, int bin, int num_samples, int32_t size, Tap<W>* taps) {
  int num_taps = 0;
  for (int i = 0; i < num_samples; ++i) {
    const Sample<B> sample = sample_of(start, bin_size, bin, i, num_samples, size);
    if (!sample.is_inside) continue;
    add_tap({sample.low, static_cast<W>(sample.low_weight)}, taps, num_taps);
    add_tap({sample.high, static_cast<W>(sample.high_weight)}, taps, num_taps);
  }
  return num_taps;
}

// Calls f with a zero of the C++ type of the features.
template <class F>
void dispatch_features(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Half:
      return f(Half{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    default:
      STD_TORCH_CHECK(false, "multilevel_roi_align: features must be float16, bfloat16, float32 or float64");
  }
}

}  // namespace cuda_ops
