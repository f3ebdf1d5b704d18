// Anchors of one cell. The order of operations is that of reference/anchors.py, so results agree in every bit. Both
// kernels get them from the host: there are a dozen.
#pragma once

#include <cmath>

#include "boxes.h"

namespace cuda_ops {

// Centred on 0, corners rounded to whole pixels, halves to even; ratio is height / width.
template <class T>
inline Box<T> cell_anchor(double size, double ratio) {
  const T h_ratio = std::sqrt(static_cast<T>(ratio));
  const T height = h_ratio * static_cast<T>(size), width = T(1) / h_ratio * static_cast<T>(size);
  const T x = std::nearbyint(width / 2), y = std::nearbyint(height / 2);
  return {-x, -y, x, y};
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

// feature_sizes: height and width of each level, one after the other.
inline std::vector<Level> pyramid(const std::vector<int64_t>& feature_sizes, const std::vector<int64_t>& image_size) {
  std::vector<Level> levels;
  for (size_t i = 0; i < feature_sizes.size(); i += 2) {
    const int64_t height = feature_sizes[i], width = feature_sizes[i + 1];
    levels.push_back({height, width, image_size[0] / height, image_size[1] / width});
  }
  return levels;
}

inline int64_t num_cells(const std::vector<Level>& levels) {
  int64_t cells = 0;
  for (const Level& level : levels) cells += level.cells();
  return cells;
}

}  // namespace cuda_ops
