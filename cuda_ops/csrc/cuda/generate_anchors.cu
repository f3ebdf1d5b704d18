// Anchors of every cell of a pyramid: one thread a cell, one launch a level and anchor of a cell. They are made once a
// shape.
#include "anchors.h"
#include "cuda_common.h"

namespace cuda_ops {
namespace {

template <class T>
__global__ void generate_anchors_kernel(
    Box<T> box, T stride_y, T stride_x, int64_t width, int64_t cells, int64_t per_cell, Box<T>* out) {
  FOR_EACH_ITEM(i, cells) {
    out[i * per_cell] = shifted(box, T(i % width) * stride_x, T(i / width) * stride_y);
  }
}

Tensor generate_anchors_cuda(
    const Tensor& like, std::vector<int64_t> feature_sizes, std::vector<int64_t> strides, std::vector<double> sizes,
    std::vector<double> aspect_ratios, bool rounded) {
  const OnDeviceOf device(like);
  const auto levels = pyramid(feature_sizes, strides);
  const auto num_sizes = static_cast<int64_t>(sizes.size() / levels.size());  // of a level
  const auto per_cell = num_sizes * static_cast<int64_t>(aspect_ratios.size());
  auto anchors = torch::stable::new_empty(like, {num_cells(levels) * per_cell, 4});
  dispatch_float(like.scalar_type(), "generate_anchors", [&](auto zero) {
    using T = decltype(zero);
    auto* out = reinterpret_cast<Box<T>*>(anchors.mutable_data_ptr());
    for (size_t i = 0; i < levels.size(); ++i) {
      const Level& level = levels[i];
      const auto cell = cell_anchors<T>(sizes.data() + i * num_sizes, num_sizes, aspect_ratios, rounded);
      for (int64_t k = 0; k < per_cell; ++k) {
        generate_anchors_kernel<T><<<blocks_for(level.cells()), kThreads, 0, device.stream()>>>(
            cell[k], T(level.stride_y), T(level.stride_x), level.width, level.cells(), per_cell, out + k);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
      out += level.cells() * per_cell;
    }
  });
  return anchors;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA, m) {
  m.impl("generate_anchors", TORCH_BOX(&generate_anchors_cuda));
}

}  // namespace cuda_ops
