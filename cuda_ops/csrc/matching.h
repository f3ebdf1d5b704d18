// Matching of boxes to ground truth: what the CPU and the CUDA kernels must decide alike, nan included, and as
// operators/match_boxes.py does.
#pragma once

#include "boxes.h"

namespace cuda_ops {

constexpr int64_t kBackground = -1;
constexpr int64_t kIgnore = -2;

// torch.maximum: nan once, nan for good.
template <class T>
HOST_DEVICE T larger_or_nan(T a, T b) {
  return (b > a || b != b) ? b : a;
}

// What a box learns if it is not marked as the best of some ground truth. Comparisons with nan are false, as in torch.
template <class T, class Index>
HOST_DEVICE Index verdict(T best, Index idx, T fg_iou, T bg_iou) {
  return best < bg_iou ? Index(kBackground) : best < fg_iou ? Index(kIgnore) : idx;
}

// Whether a box of this IoU with a ground truth learns however low it is. Of a row without overlap, or with nan: none.
template <class T>
HOST_DEVICE bool is_best_of_gt(T iou, T best_of_gt) {
  return iou == best_of_gt && best_of_gt > T(0);
}

// Below it no sum or product of box_iou overflows, so boxes that lie apart have IoU 0 and need not be compared.
HOST_DEVICE float tame_limit(float) {
  return 1e18f;
}

HOST_DEVICE double tame_limit(double) {
  return 1e153;
}

template <class T>
HOST_DEVICE bool is_tame(T x) {
  return x >= -tame_limit(x) && x <= tame_limit(x);
}

template <class T>
HOST_DEVICE bool is_tame(const Box<T>& box) {
  return is_tame(box.x1) && is_tame(box.y1) && is_tame(box.x2) && is_tame(box.y2);
}

// The bounds of boxes that are not tame: apart from nothing that is tame, nor from itself.
template <class T>
HOST_DEVICE Box<T> everywhere() {
  const T beyond = 2 * tame_limit(T(0));
  return {-beyond, -beyond, beyond, beyond};
}

template <class T>
HOST_DEVICE bool is_apart(const Box<T>& one, const Box<T>& two) {
  return one.x2 <= two.x1 || two.x2 <= one.x1 || one.y2 <= two.y1 || two.y2 <= one.y1;
}

// Ground-truth rows that count; the rest is padding.
HOST_DEVICE int64_t rows_of(int64_t num_gt, int64_t num_rows) {
  return num_gt < 0 ? 0 : num_gt < num_rows ? num_gt : num_rows;
}

}  // namespace cuda_ops
