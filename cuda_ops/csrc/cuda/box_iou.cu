// Intersection over union of every pair of boxes: one thread a pair.
#include "boxes.h"
#include "cuda_common.h"

namespace cuda_ops {
namespace {

// Index is as narrow as the pairs allow: a division of 64 bits costs more than all the rest.
template <class T, class Index>
__global__ void box_iou_kernel(
    const Box<T>* ones, const Box<T>* twos, Index num_one, Index num_two, int64_t total, T* out) {
  FOR_EACH_ITEM(i, total) {
    const Index pair = i, row = pair / num_two;
    const Box<T> one = ones[row], two = twos[row / num_one * num_two + pair % num_two];
    out[i] = box_iou(one, box_area(one), two, box_area(two));
  }
}

Tensor box_iou_cuda(const Tensor& boxes1, const Tensor& boxes2) {
  const OnDeviceOf device(boxes1);
  const auto one = torch::stable::contiguous(boxes1), two = torch::stable::contiguous(boxes2);
  const int64_t num_one = one.size(1), num_two = two.size(1);
  auto out = torch::stable::new_empty(one, {one.size(0), num_one, num_two});
  const int64_t total = out.numel();
  if (total == 0) return out;
  dispatch_float(one.scalar_type(), "box_iou", [&](auto zero) {
    using T = decltype(zero);
    const auto* ones = reinterpret_cast<const Box<T>*>(one.const_data_ptr());
    const auto* twos = reinterpret_cast<const Box<T>*>(two.const_data_ptr());
    const auto launch = [&](auto index) {
      using Index = decltype(index);
      box_iou_kernel<T, Index><<<blocks_for(total), kThreads, 0, device.stream()>>>(
          ones, twos, Index(num_one), Index(num_two), total, mutable_data_of<T>(out));
    };
    if (total <= std::numeric_limits<int32_t>::max()) {
      launch(uint32_t{});
    } else {
      launch(int64_t{});
    }
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA, m) {
  m.impl("box_iou", TORCH_BOX(&box_iou_cuda));
}

}  // namespace cuda_ops
