// Proposals: how anchors are ranked, moved, clipped and marked. The order of operations is that of
// operators/select_proposals.py and boxes.py; exp may differ from torch's in the last bit.
#pragma once

#include <cmath>
#include <cstring>

#include "nms.h"

namespace cuda_ops {

// An integer that orders logits as floats are ordered; -0 is 0, and no number is above all, as in torch.
HOST_DEVICE int32_t rank_of(float logit) {
  const float value = logit + 0.0f;
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const int32_t rank = bits ^ ((bits >> 31) & 0x7fffffff);
  return value == value ? rank : 0x7fffffff;
}

// Greater is better: by rank, of equals the lower index, which can be read back. So top-k has one answer, on any
// device.
HOST_DEVICE int64_t key_of(int32_t rank, int64_t idx) {
  return static_cast<int64_t>(rank) * (int64_t(1) << 32) + (0xffffffff - idx);
}

HOST_DEVICE int64_t index_of(int64_t key) {
  return 0xffffffff - (key & 0xffffffff);
}

template <class T>
struct Deltas {
  T dx, dy, dw, dh;
};

template <class T>
struct Proposal {
  Box<T> box;
  T score;
};

template <class T>
HOST_DEVICE Box<T> decode_box(const Deltas<T>& deltas, const Box<T>& anchor) {
  constexpr T kMaxLogScale = T(4.135166556742356);  // log(1000 / 16)
  const T width = anchor.x2 - anchor.x1, height = anchor.y2 - anchor.y1;
  const T x = deltas.dx * width + (anchor.x1 + T(0.5) * width);
  const T y = deltas.dy * height + (anchor.y1 + T(0.5) * height);
  const T half_width = std::exp(smaller(deltas.dw, kMaxLogScale)) * width * T(0.5);
  const T half_height = std::exp(smaller(deltas.dh, kMaxLogScale)) * height * T(0.5);
  return {x - half_width, y - half_height, x + half_width, y + half_height};
}

// As torch.minimum does it: where the limit is no number, neither is the result.
template <class T>
HOST_DEVICE T clip(T value, T limit) {
  return limit != limit ? limit : smaller(larger(value, T(0)), limit);
}

template <class T>
HOST_DEVICE Proposal<T> make_proposal(
    float logit, const Deltas<T>& deltas, const Box<T>& anchor, T image_height, T image_width, T min_size) {
  const Box<T> box = decode_box(deltas, anchor);
  const Box<T> clipped{
      clip(box.x1, image_width), clip(box.y1, image_height), clip(box.x2, image_width), clip(box.y2, image_height)};
  const bool is_large = clipped.x2 - clipped.x1 >= min_size && clipped.y2 - clipped.y1 >= min_size;
  return {clipped, is_large ? T(1) / (T(1) + std::exp(-T(logit))) : kMarked<T>};
}

template <class T>
HOST_DEVICE Proposal<T> no_proposal() {
  return {{T(0), T(0), T(0), T(0)}, kMarked<T>};
}

}  // namespace cuda_ops
