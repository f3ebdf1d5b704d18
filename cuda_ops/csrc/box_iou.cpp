// Intersection over union of every pair of boxes: [P, A, 4], [P, B, 4] → [P, A, B].
#include "boxes.h"

namespace cuda_ops {
namespace {

constexpr int64_t kGrainPairs = 1 << 15;  // below this much work another thread costs more than it saves

template <class T>
struct Task {
  const Box<T>* ones;
  std::vector<T> twos;  // [P, 5, B]: x1, y1, x2, y2 and area, each a plane, so that the loop over B vectorises
  int64_t num_one, num_two;
  T* out;
};

template <class T>
std::vector<T> planes(const Box<T>* boxes, int64_t pairs, int64_t count) {
  std::vector<T> out(pairs * 5 * count);
  for (int64_t i = 0; i < pairs * count; ++i) {
    const Box<T>& box = boxes[i];
    T* value = out.data() + i / count * 5 * count + i % count;
    for (const T plane : {box.x1, box.y1, box.x2, box.y2, box_area(box)}) {
      *value = plane;
      value += count;
    }
  }
  return out;
}

template <class T>
ALWAYS_INLINE void iou_rows(const Task<T>& task, int64_t begin, int64_t end) {
  const int64_t count = task.num_two;
  for (int64_t row = begin; row < end; ++row) {
    const Box<T> one = task.ones[row];
    const T area = box_area(one);
    const T* x1 = task.twos.data() + row / task.num_one * 5 * count;
    const T *y1 = x1 + count, *x2 = y1 + count, *y2 = x2 + count, *areas = y2 + count;
    T* __restrict out = task.out + row * count;
    for (int64_t b = 0; b < count; ++b) out[b] = box_iou(one, area, Box<T>{x1[b], y1[b], x2[b], y2[b]}, areas[b]);
  }
}

VECTORIZED void iou_rows_float(const Task<float>& task, int64_t begin, int64_t end) {
  iou_rows(task, begin, end);
}

void iou_rows_of(const Task<float>& task, int64_t begin, int64_t end) {
  iou_rows_float(task, begin, end);
}

void iou_rows_of(const Task<double>& task, int64_t begin, int64_t end) {
  iou_rows(task, begin, end);
}

Tensor box_iou_cpu(const Tensor& boxes1, const Tensor& boxes2) {
  const auto one = torch::stable::contiguous(boxes1), two = torch::stable::contiguous(boxes2);
  const int64_t pairs = one.size(0), num_one = one.size(1), num_two = two.size(1);
  auto out = torch::stable::new_empty(one, {pairs, num_one, num_two});
  if (out.numel() == 0) return out;
  dispatch_float(one.scalar_type(), "box_iou", [&](auto zero) {
    using T = decltype(zero);
    const Task<T> task{
        .ones = reinterpret_cast<const Box<T>*>(one.const_data_ptr()),
        .twos = planes(reinterpret_cast<const Box<T>*>(two.const_data_ptr()), pairs, num_two),
        .num_one = num_one,
        .num_two = num_two,
        .out = mutable_data_of<T>(out)};
    torch::stable::parallel_for(0, pairs * num_one, kGrainPairs / num_two + 1, [&](int64_t begin, int64_t end) {
      iou_rows_of(task, begin, end);
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
