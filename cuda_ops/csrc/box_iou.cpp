// Intersection over union of every pair of boxes: [P, A, 4], [P, B, 4] → [P, A, B].
#include "boxes.h"

namespace cuda_ops {
namespace {

constexpr int64_t kGrainPairs = 1 << 15;  // below this much work another thread costs more than it saves

template <class T>
ALWAYS_INLINE void iou_row(const Box<T>& one, const Box<T>* others, const T* other_areas, int64_t num_others, T* out) {
  const T area = box_area(one);
  for (int64_t b = 0; b < num_others; ++b) {
    out[b] = box_iou(one, area, others[b], other_areas[b]);
  }
}

VECTORIZED void iou_row_float(
    const Box<float>& one, const Box<float>* others, const float* other_areas, int64_t num_others, float* out) {
  iou_row(one, others, other_areas, num_others, out);
}

void iou_row_of(const Box<float>& one, const Box<float>* others, const float* areas, int64_t count, float* out) {
  iou_row_float(one, others, areas, count, out);
}

void iou_row_of(const Box<double>& one, const Box<double>* others, const double* areas, int64_t count, double* out) {
  iou_row(one, others, areas, count, out);
}

Tensor box_iou_cpu(const Tensor& boxes1, const Tensor& boxes2) {
  const auto one = torch::stable::contiguous(boxes1), two = torch::stable::contiguous(boxes2);
  const int64_t pairs = one.size(0), num_one = one.size(1), num_two = two.size(1);
  auto out = torch::stable::new_empty(one, {pairs, num_one, num_two});
  if (out.numel() == 0) return out;
  dispatch_float(one.scalar_type(), "box_iou", [&](auto zero) {
    using T = decltype(zero);
    const auto* ones = reinterpret_cast<const Box<T>*>(one.const_data_ptr());
    const auto* twos = reinterpret_cast<const Box<T>*>(two.const_data_ptr());
    T* result = mutable_data_of<T>(out);
    std::vector<T> areas(pairs * num_two);
    for (int64_t i = 0; i < pairs * num_two; ++i) areas[i] = box_area(twos[i]);
    torch::stable::parallel_for(0, pairs * num_one, kGrainPairs / num_two + 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row / num_one * num_two;
        iou_row_of(ones[row], twos + first, areas.data() + first, num_two, result + row * num_two);
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, m) {
  m.def("box_iou(Tensor boxes1, Tensor boxes2) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CPU, m) {
  m.impl("box_iou", TORCH_BOX(&box_iou_cpu));
}

}  // namespace cuda_ops
