// Boxes (x1, y1, x2, y2): area and overlap. The order of operations is that of operators/box_iou.py, so results agree
// in every bit.
#pragma once

#include <limits>

#include "common.h"

namespace cuda_ops {

template <class T>
struct Box {
  T x1, y1, x2, y2;
};

template <class T>
HOST_DEVICE T smaller(T a, T b) {
  return b < a ? b : a;
}

template <class T>
HOST_DEVICE T larger(T a, T b) {
  return a < b ? b : a;
}

// At least the smallest normal number, so that the IoU of two boxes without area is 0, not 0 / 0.
HOST_DEVICE float box_area(const Box<float>& box) {
  return larger((box.x2 - box.x1) * (box.y2 - box.y1), 1.17549435e-38f);
}

HOST_DEVICE double box_area(const Box<double>& box) {
  return larger((box.x2 - box.x1) * (box.y2 - box.y1), 2.2250738585072014e-308);
}

template <class T>
HOST_DEVICE T box_iou(const Box<T>& one, T one_area, const Box<T>& two, T two_area) {
  const T width = larger(smaller(one.x2, two.x2) - larger(one.x1, two.x1), T(0));
  const T height = larger(smaller(one.y2, two.y2) - larger(one.y1, two.y1), T(0));
  const T inter = width * height;
  return inter / (one_area + two_area - inter);
}

}  // namespace cuda_ops
