// Anchors of one cell. The order of operations is that of operators/generate_anchors.py, so results agree in every bit.
// Both kernels get them from the host: there are a dozen or so.
#pragma once

#include <cmath>

#include "boxes.h"

namespace cuda_ops {

// Centred on 0, corners rounded to whole pixels, halves to even; ratio is height / width. torchvision's.
template <class T>
inline Box<T> rounded_anchor(double size, double ratio) {
  const T h_ratio = std::sqrt(static_cast<T>(ratio));
  const T height = h_ratio * static_cast<T>(size), width = T(1) / h_ratio * static_cast<T>(size);
  const T x = std::nearbyint(width / 2), y = std::nearbyint(height / 2);
  return {-x, -y, x, y};
}

// Centred on 0, rounded to T alone. Detectron2's.
template <class T>
inline Box<T> exact_anchor(double size, double ratio) {
  const double width = std::sqrt(size * size / ratio), height = ratio * width;
  const T x = static_cast<T>(width / 2), y = static_cast<T>(height / 2);
  return {-x, -y, x, y};
}

// Of each size and ratio: by ratio, then size if they are rounded, else by size, then ratio.
template <class T>
std::vector<Box<T>> cell_anchors(const double* sizes, int64_t num_sizes, const std::vector<double>& ratios,
                                 bool rounded) {
  std::vector<Box<T>> anchors;
  const auto num_ratios = static_cast<int64_t>(ratios.size());
  for (int64_t i = 0; i < num_sizes * num_ratios; ++i) {
    anchors.push_back(
        rounded ? rounded_anchor<T>(sizes[i % num_sizes], ratios[i / num_sizes])
                : exact_anchor<T>(sizes[i / num_ratios], ratios[i % num_ratios]));
  }
  return anchors;
}

template <class T>
HOST_DEVICE Box<T> shifted(const Box<T>& box, T x, T y) {
  return {x + box.x1, y + box.y1, x + box.x2, y + box.y2};
}

struct Level {
  int64_t height, width, stride_y, stride_x;

  int64_t cells() const {
    return height * width;
  }
};

// feature_sizes and strides: height and width, or y and x, of each level, one after the other.
inline std::vector<Level> pyramid(const std::vector<int64_t>& feature_sizes, const std::vector<int64_t>& strides) {
  STD_TORCH_CHECK(
      feature_sizes.size() == strides.size(), "generate_anchors: strides must be two a level, as feature_sizes are");
  std::vector<Level> levels;
  for (size_t i = 0; i < feature_sizes.size(); i += 2) {
    levels.push_back({feature_sizes[i], feature_sizes[i + 1], strides[i], strides[i + 1]});
  }
  return levels;
}

inline int64_t num_cells(const std::vector<Level>& levels) {
  int64_t cells = 0;
  for (const Level& level : levels) cells += level.cells();
  return cells;
}

}  // namespace cuda_ops
