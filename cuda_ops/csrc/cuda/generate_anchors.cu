// Anchors of every cell of a pyramid: one thread a cell, one launch a level and ratio. They are made once a shape.
#include "anchors.h"
#include "cuda_common.h"

namespace cuda_ops {
namespace {

template <class T>
__global__ void generate_anchors_kernel(
    Box<T> box, T stride_y, T stride_x, int64_t width, int64_t cells, int64_t num_ratios, Box<T>* out) {
  FOR_EACH_ITEM(i, cells) {
    out[i * num_ratios] = shifted(box, T(i % width) * stride_x, T(i / width) * stride_y);
  }
}

Tensor generate_anchors_cuda(
    const Tensor& like, std::vector<int64_t> feature_sizes, std::vector<int64_t> image_size, std::vector<double> sizes,
    std::vector<double> aspect_ratios) {
  const OnDeviceOf device(like);
  const auto levels = pyramid(feature_sizes, image_size);
  const auto num_ratios = static_cast<int64_t>(aspect_ratios.size());
  auto anchors = torch::stable::new_empty(like, {num_cells(levels) * num_ratios, 4});
  dispatch_float(like.scalar_type(), "generate_anchors", [&](auto zero) {
    using T = decltype(zero);
    auto* out = reinterpret_cast<Box<T>*>(anchors.mutable_data_ptr());
    for (size_t i = 0; i < levels.size(); ++i) {
      const Level& level = levels[i];
      for (int64_t ratio = 0; ratio < num_ratios; ++ratio) {
        generate_anchors_kernel<T><<<blocks_for(level.cells()), kThreads, 0, device.stream()>>>(
            cell_anchor<T>(sizes[i], aspect_ratios[ratio]), T(level.stride_y), T(level.stride_x), level.width,
            level.cells(), num_ratios, out + ratio);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
      out += level.cells() * num_ratios;
    }
  });
  return anchors;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA, m) {
  m.impl("generate_anchors", TORCH_BOX(&generate_anchors_cuda));
}

}  // namespace cuda_ops
