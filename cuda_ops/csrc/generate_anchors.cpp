// Anchors of every cell of a pyramid → [A, 4], ordered by level, y, x, ratio.
#include "anchors.h"

namespace cuda_ops {
namespace {

constexpr int64_t kGrainAnchors = 1 << 15;  // below this much work another thread costs more than it saves

template <class T>
Box<T>* write_level(const Level& level, const std::vector<Box<T>>& cell, Box<T>* out) {
  const int64_t row = level.width * cell.size();
  torch::stable::parallel_for(0, level.height, kGrainAnchors / row + 1, [&](int64_t begin, int64_t end) {
    Box<T>* anchor = out + begin * row;
    for (int64_t y = begin; y < end; ++y) {
      for (int64_t x = 0; x < level.width; ++x) {
        for (const Box<T>& box : cell) *anchor++ = shifted(box, T(x) * T(level.stride_x), T(y) * T(level.stride_y));
      }
    }
  });
  return out + level.height * row;
}

Tensor generate_anchors_cpu(
    const Tensor& like, std::vector<int64_t> feature_sizes, std::vector<int64_t> image_size, std::vector<double> sizes,
    std::vector<double> aspect_ratios) {
  const auto levels = pyramid(feature_sizes, image_size);
  const auto num_ratios = static_cast<int64_t>(aspect_ratios.size());
  auto anchors = torch::stable::new_empty(like, {num_cells(levels) * num_ratios, 4});
  dispatch_float(like.scalar_type(), "generate_anchors", [&](auto zero) {
    using T = decltype(zero);
    auto* out = reinterpret_cast<Box<T>*>(anchors.mutable_data_ptr());
    for (size_t i = 0; i < levels.size(); ++i) {
      std::vector<Box<T>> cell;
      for (const double ratio : aspect_ratios) cell.push_back(cell_anchor<T>(sizes[i], ratio));
      out = write_level(levels[i], cell, out);
    }
  });
  return anchors;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, m) {
  // `like` has no elements: it tells the device, by which torch chooses the kernel, and the dtype.
  m.def(
      "generate_anchors(Tensor like, int[] feature_sizes, int[] image_size, float[] sizes, float[] aspect_ratios) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CPU, m) {
  m.impl("generate_anchors", TORCH_BOX(&generate_anchors_cpu));
}

}  // namespace cuda_ops
