// Non-maximum suppression: what the CPU and the CUDA kernel decide alike.
#pragma once

#include <cmath>

#include "boxes.h"

namespace cuda_ops {

// The score of boxes that are never kept.
template <class T>
constexpr T kMarked = -std::numeric_limits<T>::infinity();

// The largest T that is ≤ threshold: torchvision compares a float32 IoU with a float64 threshold, and rounding up
// would let an IoU of just that pass.
template <class T>
T comparable(double threshold) {
  const T rounded = static_cast<T>(threshold);
  return static_cast<double>(rounded) <= threshold ? rounded : std::nextafter(rounded, T(-1));
}

// Boxes that are no numbers have an IoU that is none: they neither suppress nor are suppressed.
template <class T>
HOST_DEVICE bool suppresses(const Box<T>& kept, T kept_area, const Box<T>& box, T area, T threshold) {
  return box_iou(kept, kept_area, box, area) > threshold;
}

}  // namespace cuda_ops
