// Instances cut out by boxes and filled: boxes [N, R, 4], rows of instances [N, R], polygons → [N, R, M, M] float32.
#include <algorithm>

#include "polygons.h"

namespace cuda_ops {
namespace {

constexpr int64_t kGrainRois = 8;

// Columns of the grid as bits, row 0 lowest, [words, M]: of the part at hand, and of all parts so far.
struct Columns {
  explicit Columns(int64_t size)
      : size(size),
        words((size + kWordBits - 1) / kWordBits),
        inversions(size * words),
        filled(size * words),
        carries(size) {}

  int64_t size, words;
  std::vector<uint32_t> inversions, filled, carries;
};

inline void unite_part(Columns& columns) {
  std::fill(columns.carries.begin(), columns.carries.end(), 0);
  for (int64_t word = 0; word < columns.words; ++word) {
    uint32_t* inversions = columns.inversions.data() + word * columns.size;
    uint32_t* filled = columns.filled.data() + word * columns.size;
    uint32_t* carries = columns.carries.data();
    for (int64_t column = 0; column < columns.size; ++column) {
      filled[column] |= filled_below(inversions[column], carries[column]);
      inversions[column] = 0;
    }
  }
}

inline void write_mask(const Columns& columns, float* mask) {
  for (int64_t row = 0; row < columns.size; ++row) {
    const uint32_t* words = columns.filled.data() + row / kWordBits * columns.size;
    for (int64_t column = 0; column < columns.size; ++column) {
      const auto bit = static_cast<int32_t>(words[column] >> row % kWordBits & 1);  // AVX2 converts what is signed
      mask[row * columns.size + column] = static_cast<float>(bit);
    }
  }
}

template <class T>
inline void rasterize(const Box<T>& box, const Polygons<T>& polygons, Parts parts, Columns& columns, float* mask) {
  if (parts.first == parts.end) {
    std::fill_n(mask, columns.size * columns.size, 0.0f);
    return;
  }
  std::fill(columns.filled.begin(), columns.filled.end(), 0);
  const Crop crop = crop_of(box, columns.size);
  const auto invert = [&columns](int64_t column, int64_t row) {
    columns.inversions[row / kWordBits * columns.size + column] ^= 1u << row % kWordBits;
  };
  for (int32_t part = parts.first; part < parts.end; ++part) {
    const int32_t begin = polygons.part_offsets[part], end = polygons.part_offsets[part + 1];
    if (begin == end) continue;
    GridPoint from = grid_point(polygons.xy + 2 * (end - 1), crop);
    for (int32_t vertex = begin; vertex < end; ++vertex) {
      const GridPoint to = grid_point(polygons.xy + 2 * vertex, crop);
      cross_columns(from, to, columns.size, 0, columns.size, invert);
      from = to;
    }
    unite_part(columns);
  }
  write_mask(columns, mask);
}

[[gnu::flatten]] VECTORIZED void rasterize_of(
    const Box<float>& box, const Polygons<float>& polygons, Parts parts, Columns& columns, float* mask) {
  rasterize(box, polygons, parts, columns, mask);
}

[[gnu::flatten]] VECTORIZED void rasterize_of(
    const Box<double>& box, const Polygons<double>& polygons, Parts parts, Columns& columns, float* mask) {
  rasterize(box, polygons, parts, columns, mask);
}

Tensor rasterize_polygons_cpu(
    const Tensor& boxes, const Tensor& instance_idxs, const Tensor& xy, const Tensor& part_offsets,
    const Tensor& instance_offsets, int64_t size) {
  const auto box = torch::stable::contiguous(boxes), idxs = torch::stable::contiguous(instance_idxs);
  const auto vertices = torch::stable::contiguous(xy), parts = torch::stable::contiguous(part_offsets);
  const auto instances = torch::stable::contiguous(instance_offsets);
  const int64_t num_images = box.size(0), num_boxes = box.size(1);
  auto masks = torch::stable::new_empty(box, {num_images, num_boxes, size, size}, ScalarType::Float);
  if (masks.numel() == 0) return masks;
  if (vertices.numel() == 0) return torch::stable::zero_(masks);
  const int64_t per_image = (instances.numel() - 1) / num_images;
  dispatch_float(box.scalar_type(), "rasterize_polygons", [&](auto zero) {
    using T = decltype(zero);
    const auto* crops = reinterpret_cast<const Box<T>*>(box.const_data_ptr());
    const Polygons<T> polygons{data_of<T>(vertices), data_of<int32_t>(parts), data_of<int32_t>(instances), per_image};
    const auto* rows = data_of<int64_t>(idxs);
    float* out = mutable_data_of<float>(masks);
    torch::stable::parallel_for(0, num_images * num_boxes, kGrainRois, [&](int64_t begin, int64_t end) {
      Columns columns(size);
      for (int64_t roi = begin; roi < end; ++roi) {
        const Parts of_row = parts_of(polygons, roi / num_boxes, rows[roi]);
        rasterize_of(crops[roi], polygons, of_row, columns, out + roi * size * size);
      }
    });
  });
  return masks;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, m) {
  m.def(
      "rasterize_polygons(Tensor boxes, Tensor instance_idxs, Tensor xy, Tensor part_offsets, Tensor instance_offsets, "
      "int size) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CPU, m) {
  m.impl("rasterize_polygons", TORCH_BOX(&rasterize_polygons_cpu));
}

}  // namespace cuda_ops
