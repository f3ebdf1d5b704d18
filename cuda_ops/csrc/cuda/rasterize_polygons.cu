// Instances cut out by boxes and filled: one block a box, its threads share the edges of a part.
#include "cuda_common.h"
#include "polygons.h"

namespace cuda_ops {
namespace {

constexpr int kThreadsOfRoi = 64;
constexpr int64_t kMaxWords = 6144;  // of a tile: two bitsets of them take the 48 KiB of shared memory every device has

// Columns [first, first + columns) of the grid of one box; a grid too large for shared memory is several such tiles.
struct Tile {
  int64_t size, words, columns, tiles;
};

template <class T>
__device__ void invert_part(
    const Polygons<T>& polygons, int32_t part, const Crop& crop, const Tile& tile, int64_t first,
    uint32_t* inversions) {
  const int32_t begin = polygons.part_offsets[part], end = polygons.part_offsets[part + 1];
  const int64_t stop = smaller(first + tile.columns, tile.size);
  for (int32_t vertex = begin + static_cast<int32_t>(threadIdx.x); vertex < end; vertex += kThreadsOfRoi) {
    const int64_t next = vertex + 1 == end ? begin : vertex + 1;
    const GridPoint from = grid_point(polygons.xy + 2 * static_cast<int64_t>(vertex), crop);
    const GridPoint to = grid_point(polygons.xy + 2 * next, crop);
    cross_columns(from, to, tile.size, first, stop, [&](int64_t column, int64_t row) {
      atomicXor(inversions + row / kWordBits * tile.columns + (column - first), 1u << row % kWordBits);
    });
  }
}

// Each thread fills whole columns, so a carry stays with its thread.
__device__ void unite_part(const Tile& tile, uint32_t* inversions, uint32_t* filled) {
  for (int64_t column = threadIdx.x; column < tile.columns; column += kThreadsOfRoi) {
    uint32_t carry = 0;
    for (int64_t word = 0; word < tile.words; ++word) {
      const int64_t i = word * tile.columns + column;
      filled[i] |= filled_below(inversions[i], carry);
      inversions[i] = 0;
    }
  }
}

template <class T>
__global__ void rasterize_kernel(
    const Box<T>* boxes, const int64_t* idxs, Polygons<T> polygons, int64_t num_boxes, Tile tile, float* masks) {
  extern __shared__ uint32_t inversions[];  // [words, columns] of the part at hand, then of all parts so far
  const int64_t bits = tile.words * tile.columns;
  uint32_t* filled = inversions + bits;
  const int64_t roi = blockIdx.x / tile.tiles, first = blockIdx.x % tile.tiles * tile.columns;
  for (int64_t i = threadIdx.x; i < 2 * bits; i += kThreadsOfRoi) inversions[i] = 0;
  const Parts parts = parts_of(polygons, roi / num_boxes, idxs[roi]);
  const Crop crop = crop_of(boxes[roi], tile.size);
  __syncthreads();
  for (int32_t part = parts.first; part < parts.end; ++part) {
    invert_part(polygons, part, crop, tile, first, inversions);
    __syncthreads();
    unite_part(tile, inversions, filled);
    __syncthreads();
  }
  const int64_t columns = smaller(tile.columns, tile.size - first);
  float* mask = masks + roi * tile.size * tile.size + first;
  for (int64_t i = threadIdx.x; i < tile.size * columns; i += kThreadsOfRoi) {
    const int64_t row = i / columns, column = i % columns;
    const uint32_t word = filled[row / kWordBits * tile.columns + column];
    mask[row * tile.size + column] = static_cast<float>(word >> row % kWordBits & 1);
  }
}

Tensor rasterize_polygons_cuda(
    const Tensor& boxes, const Tensor& instance_idxs, const Tensor& xy, const Tensor& part_offsets,
    const Tensor& instance_offsets, int64_t size) {
  const OnDeviceOf device(boxes);
  const auto box = torch::stable::contiguous(boxes), idxs = torch::stable::contiguous(instance_idxs);
  const auto vertices = torch::stable::contiguous(xy), parts = torch::stable::contiguous(part_offsets);
  const auto instances = torch::stable::contiguous(instance_offsets);
  const int64_t num_images = box.size(0), num_boxes = box.size(1);
  auto masks = torch::stable::new_empty(box, {num_images, num_boxes, size, size}, ScalarType::Float);
  if (masks.numel() == 0) return masks;
  if (vertices.numel() == 0) return torch::stable::zero_(masks);
  const int64_t per_image = (instances.numel() - 1) / num_images;
  const int64_t words = (size + kWordBits - 1) / kWordBits;
  STD_TORCH_CHECK(
      words <= kMaxWords, "rasterize_polygons: size must be at most ", kMaxWords * kWordBits, ", got ", size);
  const int64_t columns = std::min(size, kMaxWords / words);
  const Tile tile{size, words, columns, (size + columns - 1) / columns};
  const auto blocks = static_cast<unsigned>(num_images * num_boxes * tile.tiles);
  dispatch_float(box.scalar_type(), "rasterize_polygons", [&](auto zero) {
    using T = decltype(zero);
    const Polygons<T> polygons{data_of<T>(vertices), data_of<int32_t>(parts), data_of<int32_t>(instances), per_image};
    rasterize_kernel<<<blocks, kThreadsOfRoi, 2 * words * columns * sizeof(uint32_t), device.stream()>>>(
        reinterpret_cast<const Box<T>*>(box.const_data_ptr()), data_of<int64_t>(idxs), polygons, num_boxes, tile,
        mutable_data_of<float>(masks));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return masks;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA, m) {
  m.impl("rasterize_polygons", TORCH_BOX(&rasterize_polygons_cuda));
}

}  // namespace cuda_ops
