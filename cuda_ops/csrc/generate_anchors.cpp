// Anchors of every cell of a pyramid → [A, 4], ordered by level, y, x, anchor of the cell.
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
    const Tensor& like, std::vector<int64_t> feature_sizes, std::vector<int64_t> strides, std::vector<double> sizes,
    std::vector<double> aspect_ratios, bool rounded) {
  const auto levels = pyramid(feature_sizes, strides);
  const auto num_sizes = static_cast<int64_t>(sizes.size() / levels.size());  // of a level
  const auto per_cell = num_sizes * static_cast<int64_t>(aspect_ratios.size());
  auto anchors = torch::stable::new_empty(like, {num_cells(levels) * per_cell, 4});
  dispatch_float(like.scalar_type(), "generate_anchors", [&](auto zero) {
    using T = decltype(zero);
    auto* out = reinterpret_cast<Box<T>*>(anchors.mutable_data_ptr());
    for (size_t i = 0; i < levels.size(); ++i) {
      const auto cell = cell_anchors<T>(sizes.data() + i * num_sizes, num_sizes, aspect_ratios, rounded);
      out = write_level(levels[i], cell, out);
    }
  });
  return anchors;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, m) {
  // `like` has no elements: it tells the device, by which torch chooses the kernel, and the dtype. Sizes: as many for
  // each level, one level after another.
  m.def(
      "generate_anchors(Tensor like, int[] feature_sizes, int[] strides, float[] sizes, float[] aspect_ratios, "
      "bool rounded) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CPU, m) {
  m.impl("generate_anchors", TORCH_BOX(&generate_anchors_cpu));
}

}  // namespace cuda_ops
