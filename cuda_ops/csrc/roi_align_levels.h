// Features and gradients of a pyramid as pointers and strides, whatever their layout; no level is copied that stands in
// memory as planes (NCHW) or channels-last.
#pragma once

#include <algorithm>

#include "roi_align.h"

namespace cuda_ops {

// One level [N, C, H, W]. Planar: cells of a row stand together, else the channels of a cell do.
template <class T>
struct Level {
  T* data;
  int64_t image_stride, channel_stride, row_stride, column_stride;
  int32_t height, width;
  bool is_planar;
};

// As one argument of a kernel.
template <class T>
struct Levels {
  Level<T> levels[kMaxLevels];
  bool any_planar = false;
};

// sizes: height and width of each level, one after another.
inline Pyramid pyramid_of(const std::vector<double>& scales, const std::vector<int64_t>& sizes) {
  const auto num_levels = static_cast<int>(scales.size());
  STD_TORCH_CHECK(
      0 < num_levels && num_levels <= kMaxLevels, "multilevel_roi_align: features must be 1 to ", kMaxLevels,
      " levels, got ", num_levels);
  Pyramid pyramid;
  pyramid.num_levels = num_levels;
  pyramid.finest = static_cast<int>(-std::log2(scales.front()));
  pyramid.coarsest = static_cast<int>(-std::log2(scales.back()));
  STD_TORCH_CHECK(sizes.size() == 2 * scales.size(), "multilevel_roi_align: scales must be one a level");
  for (int l = 0; l < num_levels; ++l) {
    pyramid.scales[l] = scales[l];
    pyramid.heights[l] = static_cast<int32_t>(sizes[2 * l]);
    pyramid.widths[l] = static_cast<int32_t>(sizes[2 * l + 1]);
  }
  return pyramid;
}

// Heads pool from one pyramid, each boxes of its own.
constexpr size_t kMaxHeads = 4;

inline void require_heads(size_t num_boxes, size_t num_outputs) {
  STD_TORCH_CHECK(
      0 < num_boxes && num_boxes <= kMaxHeads && num_boxes == num_outputs, "multilevel_roi_align: heads must be 1 to ",
      kMaxHeads, ", with boxes and an output each, got ", num_boxes, " and ", num_outputs);
}

inline std::vector<int64_t> sizes_of(const std::vector<Tensor>& features) {
  std::vector<int64_t> sizes;
  for (const auto& level : features) sizes.insert(sizes.end(), {level.size(2), level.size(3)});
  return sizes;
}

// The stride of a dimension of size 1 says nothing: a row of one cell is dense, whatever it is.
inline bool is_planar(const Tensor& level) {
  return level.stride(3) == 1 || (level.size(3) == 1 && level.stride(1) != 1);
}

// The features themselves; copied are those whose neither rows nor channels are dense.
inline std::vector<Tensor> readable(const std::vector<Tensor>& features) {
  std::vector<Tensor> levels;
  for (const auto& level : features) {
    levels.push_back(is_planar(level) || level.stride(1) == 1 ? level : torch::stable::contiguous(level));
  }
  return levels;
}

// [N, C, H, W] of each level, uninitialised; channels-last in memory where asked. N and the device are those of grad.
inline std::vector<Tensor> new_levels(
    const Tensor& grad, int64_t channels, const Pyramid& pyramid, const std::vector<bool>& channels_last,
    ScalarType dtype) {
  std::vector<Tensor> levels;
  for (int l = 0; l < pyramid.num_levels; ++l) {
    const int64_t images = grad.size(0), height = pyramid.heights[l], width = pyramid.widths[l];
    if (channels_last[l]) {
      const auto cells = torch::stable::new_empty(grad, {images, height, width, channels}, dtype);
      levels.push_back(torch::stable::transpose(torch::stable::transpose(cells, 1, 3), 2, 3));
    } else {
      levels.push_back(torch::stable::new_empty(grad, {images, channels, height, width}, dtype));
    }
  }
  return levels;
}

// [N, R, C, O, O] uninitialised, channels-last in memory.
inline Tensor new_output(const Tensor& like, const Tensor& boxes, int64_t channels, int64_t output_size) {
  const auto bins = torch::stable::new_empty(like, {boxes.size(0), boxes.size(1), output_size, output_size, channels});
  return torch::stable::transpose(torch::stable::transpose(bins, 2, 4), 3, 4);
}

template <class T>
Level<T> level_of(const Tensor& level) {
  T* data;
  if constexpr (std::is_const_v<T>) {
    data = static_cast<T*>(level.const_data_ptr());
  } else {
    data = static_cast<T*>(level.mutable_data_ptr());
  }
  return {
      data, level.stride(0), level.stride(1), level.stride(2), level.stride(3),
      static_cast<int32_t>(level.size(2)), static_cast<int32_t>(level.size(3)), is_planar(level)};
}

template <class T>
Levels<T> levels_of(const std::vector<Tensor>& tensors) {
  Levels<T> result;
  for (size_t l = 0; l < tensors.size(); ++l) {
    result.levels[l] = level_of<T>(tensors[l]);
    result.any_planar |= result.levels[l].is_planar;
  }
  return result;
}

}  // namespace cuda_ops
