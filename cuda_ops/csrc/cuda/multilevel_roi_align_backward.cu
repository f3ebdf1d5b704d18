// The way back of RoIAlign: gradients of the heads' outputs [N, R, C, O, O] → of the features of each level.
//
// Heads add atomically, in a launch each, to one pyramid; or, if results must repeat, a block takes a tile of cells and
// walks the boxes of its image in order, head by head, so that every cell is written once and by one thread.
#include "roi_align_cuda.h"

namespace cuda_ops {
namespace {

constexpr int kTile = 8;  // cells of a tile on either axis; a warp takes a row of them, a lane a channel
constexpr int kWarp = 32;
constexpr int64_t kMaxWeightBytes = 47 << 10;  // of the 48 KiB of shared memory that every device has
static_assert(kThreads == kTile * kWarp && kBlockChannels == kWarp);

template <class W, int kCount>
__device__ __forceinline__ void atomic_add(W* to, const W (&values)[kCount], W weight) {
#pragma unroll
  for (int c = 0; c < kCount; ++c) atomicAdd(to + c, weight * values[c]);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
template <>
__device__ __forceinline__ void atomic_add(float* to, const float (&values)[4], float weight) {
  const float4 sum = make_float4(weight * values[0], weight * values[1], weight * values[2], weight * values[3]);
  atomicAdd(reinterpret_cast<float4*>(to), sum);
}
#endif

// grad: [N, R, O, O, C]; levels are 0 beforehand.
template <class T, class W, int kCount, bool kIsUsual>
__global__ void __launch_bounds__(kThreads) scatter_kernel(
    const T* grad, const __grid_constant__ Levels<W> levels, const __grid_constant__ Pyramid pyramid, Boxes boxes,
    Grid grid, int64_t channels, Parts parts, Scratch scratch) {
  __shared__ W turned[kBlockBins][kBlockChannels + 1];
  __shared__ int level_row;
  BoxTaps<W> taps(tap_memory<kIsUsual>(scratch), grid);
  for (int64_t i = blockIdx.x; i < parts.count; i += gridDim.x) {
    const Part part = parts[i];
    taps.fill(boxes, part.box, pyramid, grid, &level_row);
    __syncthreads();
    const Level<W>& level = levels.levels[level_row];
    W* image = level.data + part.box / boxes.per_image * level.image_stride;
    const T* bins = grad + (part.box * parts.bins + part.first_bin) * channels;
    for (int64_t first = part.first_channel; first < part.end_channel; first += kBlockChannels) {
      const int num_channels = static_cast<int>(smaller<int64_t>(part.end_channel - first, kBlockChannels));
      W* cells = image + first * level.channel_stride;
      const T* from = bins + first;
      if (level.is_planar) {
        for (int item = threadIdx.x; item < part.num_bins * kBlockChannels; item += blockDim.x) {
          const int bin = item / kBlockChannels, channel = item % kBlockChannels;
          turned[bin][channel] = channel < num_channels ? static_cast<W>(from[bin * channels + channel]) : W(0);
        }
        __syncthreads();
        for (int item = threadIdx.x; item < part.num_bins * kBlockChannels; item += blockDim.x) {
          const int bin = item % part.num_bins, channel = item / part.num_bins;
          const W value = turned[bin][channel];
          if (value == 0) continue;
          W* plane = cells + channel * level.channel_stride;
          taps.template for_each_cell<Offset<kIsUsual>>(level, part.first_bin + bin, grid, [&](auto cell, W weight) {
            atomicAdd(plane + cell, weight * value);
          });
        }
      } else {
        constexpr int kPacks = kBlockChannels / kCount;
        for (int item = threadIdx.x; item < part.num_bins * kPacks; item += blockDim.x) {
          const int bin = item / kPacks, channel = item % kPacks * kCount;
          if (channel >= num_channels) continue;
          const auto pack = *reinterpret_cast<const Pack<T, kCount>*>(from + bin * channels + channel);
          W values[kCount];
          bool any = false;
#pragma unroll
          for (int c = 0; c < kCount; ++c) {
            values[c] = static_cast<W>(pack.values[c]);
            any |= values[c] != 0;
          }
          if (!any) continue;
          taps.template for_each_cell<Offset<kIsUsual>>(level, part.first_bin + bin, grid, [&](auto cell, W weight) {
            atomic_add(cells + (cell + channel), values, weight);
          });
        }
      }
      __syncthreads();
    }
  }
}

// Cells [first_row, first_row + kTile) × [first_column, first_column + kTile) of one level of one image.
struct Tile {
  int level, first_row, first_column;
  int64_t image;
};

// Tiles of all levels, one level after another; within a level by image, row and column, and last by channels.
struct Tiles {
  Tiles(const Pyramid& pyramid, int64_t num_images, int64_t channels)
      : channel_parts((channels + kBlockChannels - 1) / kBlockChannels) {
    for (int l = 0; l < pyramid.num_levels; ++l) {
      rows[l] = (pyramid.heights[l] + kTile - 1) / kTile;
      columns[l] = (pyramid.widths[l] + kTile - 1) / kTile;
      ends[l] = count += num_images * rows[l] * columns[l] * channel_parts;
    }
  }

  __device__ Tile operator[](int64_t i) const {
    int l = 0;
    while (i >= ends[l]) ++l;
    const int64_t tile = (i - (l > 0 ? ends[l - 1] : 0)) / channel_parts;
    return {
        l, static_cast<int>(tile / columns[l] % rows[l]) * kTile, static_cast<int>(tile % columns[l]) * kTile,
        tile / columns[l] / rows[l]};
  }

  int64_t channel_parts, count = 0;
  int64_t ends[kMaxLevels] = {};
  int32_t rows[kMaxLevels] = {}, columns[kMaxLevels] = {};
};

// Whether bins from start on, or back from it where the box is turned inside out, reach cells [first, first + kTile);
// one cell too many does no harm.
template <class B>
__device__ __forceinline__ bool reaches(B start, B bin_size, Grid grid, int64_t first) {
  const B end = start + B(grid.output_size) * bin_size;
  return smaller(start, end) - 1 <= first + kTile && larger(start, end) + 2 >= first;
}

// The weights that one bin gives to the kTile cells from `first` on.
template <class W, class B>
__device__ __forceinline__ void set_weights(
    B start, B bin_size, int bin, int num_samples, int32_t size, int32_t first, W* weights) {
  for (int cell = 0; cell < kTile; ++cell) weights[cell] = 0;
  for (int i = 0; i < num_samples; ++i) {
    const Sample<B> sample = sample_of(start, bin_size, bin, i, num_samples, size);
    if (!sample.is_inside) continue;
    const int32_t low = sample.low - first, high = sample.high - first;
    if (0 <= low && low < kTile) weights[low] += static_cast<W>(sample.low_weight);
    if (0 <= high && high < kTile) weights[high] += static_cast<W>(sample.high_weight);
  }
}

// Adds one box's gradient of one channel to that of a row of cells; weights: [2, O, kTile].
template <class T, class W>
__device__ __forceinline__ void add_box(
    const T* bins, int64_t stride, const W* weights, int row, Grid grid, W (&sums)[kTile]) {
  const W* columns = weights + grid.output_size * kTile;
  for (int y = 0; y < grid.output_size; ++y) {
    const W row_weight = weights[y * kTile + row];
    if (row_weight == 0) continue;  // for the whole warp
    for (int x = 0; x < grid.output_size; ++x) {
      W column_weights[kTile];
      bool any = false;
#pragma unroll
      for (int cell = 0; cell < kTile; ++cell) {
        column_weights[cell] = columns[x * kTile + cell];
        any |= column_weights[cell] != 0;
      }
      if (!any) continue;
      const W value = row_weight * static_cast<W>(bins[(y * grid.output_size + x) * stride]);
#pragma unroll
      for (int cell = 0; cell < kTile; ++cell) sums[cell] = fma(column_weights[cell], value, sums[cell]);
    }
  }
}

// One head's gradient [N, R, O, O, C] and what it pooled.
template <class T>
struct Head {
  const T* grad;
  Boxes boxes;
  Grid grid;
};

template <class T>
struct Heads {
  Head<T> heads[kMaxHeads];
  int count;
};

// Adds the gradients of a head's boxes to those of a row of cells, for one channel, in the order of the boxes.
template <class T, class W>
__device__ __forceinline__ void add_head(
    const Head<T>& head, const Pyramid& pyramid, const Tile& tile, int64_t channels, int64_t channel, unsigned* near,
    W (&sums)[kTile]) {
  const Boxes& boxes = head.boxes;
  const Grid grid = head.grid;
  W *weights = reinterpret_cast<W*>(shared_memory), *column_weights = weights + grid.output_size * kTile;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first_box = tile.image * boxes.per_image, num_bins = int64_t{grid.output_size} * grid.output_size;
  for (int64_t base = 0; base < boxes.per_image; base += kThreads) {
    bool is_near = false;
    if (base + threadIdx.x < boxes.per_image) {
      with_roi(boxes, first_box + base + threadIdx.x, pyramid, grid, [&](const auto& roi) {
        is_near = roi.level == tile.level && reaches(roi.y, roi.bin_height, grid, tile.first_row) &&
            reaches(roi.x, roi.bin_width, grid, tile.first_column);
      });
    }
    const unsigned votes = __ballot_sync(0xffffffffu, is_near);
    if (lane == 0) near[warp] = votes;
    __syncthreads();
    for (int part = 0; part < kTile; ++part) {
      for (unsigned left = near[part]; left != 0; left &= left - 1) {
        const int64_t box = first_box + base + part * kWarp + __ffs(left) - 1;
        for (int bin = threadIdx.x; bin < 2 * grid.output_size; bin += blockDim.x) {
          with_roi(boxes, box, pyramid, grid, [&](const auto& roi) {
            if (bin < grid.output_size) {
              set_weights(
                  roi.y, roi.bin_height, bin, roi.samples_y, pyramid.heights[roi.level], tile.first_row,
                  weights + bin * kTile);
            } else {
              const int x = bin - grid.output_size;
              set_weights(
                  roi.x, roi.bin_width, x, roi.samples_x, pyramid.widths[roi.level], tile.first_column,
                  column_weights + x * kTile);
            }
          });
        }
        __syncthreads();
        if (channel < channels) {
          add_box(head.grad + box * num_bins * channels + channel, channels, weights, warp, grid, sums);
        }
        __syncthreads();
      }
    }
    __syncthreads();
  }
}

// Every cell of the levels is written. Shared memory: weights [2, O, kTile], of rows and of columns, for the largest O.
template <class T, class W>
__global__ void __launch_bounds__(kThreads) gather_kernel(
    const __grid_constant__ Heads<T> heads, const __grid_constant__ Levels<T> levels,
    const __grid_constant__ Pyramid pyramid, int64_t channels, const __grid_constant__ Tiles tiles) {
  __shared__ unsigned near[kTile];  // a bit for each of the kThreads boxes at hand
  for (int64_t i = blockIdx.x; i < tiles.count; i += gridDim.x) {
    const Tile tile = tiles[i];
    const Level<T>& level = levels.levels[tile.level];
    const int64_t channel = i % tiles.channel_parts * kBlockChannels + threadIdx.x % kWarp;
    W sums[kTile] = {};
    for (int h = 0; h < heads.count; ++h) add_head(heads.heads[h], pyramid, tile, channels, channel, near, sums);
    const int row = tile.first_row + threadIdx.x / kWarp;
    if (channel < channels && row < level.height) {
      T* to = level.data + tile.image * level.image_stride + channel * level.channel_stride + row * level.row_stride;
#pragma unroll
      for (int x = 0; x < kTile; ++x) {
        const int column = tile.first_column + x;
        if (column < level.width) to[column * level.column_stride] = static_cast<T>(sums[x]);
      }
    }
  }
}

template <class T>
Heads<T> heads_of(
    const std::vector<Tensor>& grads, const std::vector<Tensor>& boxes, int64_t sampling_ratio, bool aligned,
    const Pyramid& pyramid) {
  Heads<T> result{{}, static_cast<int>(grads.size())};
  for (size_t h = 0; h < grads.size(); ++h) {
    const Grid grid = grid_of(grads[h].size(2), sampling_ratio, aligned, pyramid);
    result.heads[h] = {data_of<T>(grads[h]), boxes_of(boxes[h]), grid};
  }
  return result;
}

template <class T, class W>
void scatter_head(
    const Head<T>& head, const Levels<W>& levels, const Pyramid& pyramid, int64_t channels, const Tensor& like,
    cudaStream_t stream) {
  constexpr int kPack = 16 / sizeof(W);
  const Parts parts(head.boxes.count, channels, head.grid, enough_blocks(like));
  if (parts.count == 0) return;
  const bool packs = can_pack(levels, pyramid.num_levels, channels, kPack) &&
      reinterpret_cast<uintptr_t>(head.grad) % (kPack * sizeof(T)) == 0;
  const TapPlace<W> place(head.grid, parts.count, has_short_offsets(levels, pyramid.num_levels), like);
  const auto kernel = !place.is_usual() ? scatter_kernel<T, W, 1, false>
      : packs                            ? scatter_kernel<T, W, kPack, true>
                                         : scatter_kernel<T, W, 1, true>;
  kernel<<<place.blocks, kThreads, place.shared_bytes, stream>>>(
      head.grad, levels, pyramid, head.boxes, head.grid, channels, parts, place.scratch);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Gradients in the type of the sums, in which all heads meet.
template <class T>
std::vector<Tensor> scatter(
    const Heads<T>& heads, const Tensor& like, int64_t channels, const Pyramid& pyramid,
    const std::vector<bool>& channels_last, cudaStream_t stream) {
  using W = Accumulator<T>;
  auto result = new_levels(like, channels, pyramid, channels_last, kAccumulatorType<T>);
  for (auto& level : result) torch::stable::zero_(level);
  const auto levels = levels_of<W>(result);
  for (int h = 0; h < heads.count; ++h) scatter_head(heads.heads[h], levels, pyramid, channels, like, stream);
  return result;
}

// Gradients in the type of the features, the same bits every time.
template <class T>
std::vector<Tensor> gather(
    const Heads<T>& heads, const Tensor& like, int64_t channels, const Pyramid& pyramid,
    const std::vector<bool>& channels_last, cudaStream_t stream) {
  using W = Accumulator<T>;
  auto result = new_levels(like, channels, pyramid, channels_last, like.scalar_type());
  const Tiles tiles(pyramid, like.size(0), channels);
  if (tiles.count == 0) return result;
  int output_size = 0;
  for (int h = 0; h < heads.count; ++h) output_size = std::max(output_size, heads.heads[h].grid.output_size);
  const int64_t bytes_of_bin = 2 * kTile * sizeof(W), most = kMaxWeightBytes / bytes_of_bin;
  STD_TORCH_CHECK(
      output_size <= most, "multilevel_roi_align: output_size must be at most ", most,
      " on CUDA where results must repeat, got ", output_size);
  gather_kernel<T, W><<<blocks_of(tiles.count), kThreads, output_size * bytes_of_bin, stream>>>(
      heads, levels_of<T>(result), pyramid, channels, tiles);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

std::vector<Tensor> multilevel_roi_align_backward_cuda(
    const std::vector<Tensor>& grads, const std::vector<Tensor>& boxes, const std::vector<int64_t>& sizes,
    const std::vector<bool>& channels_last, const std::vector<double>& scales, int64_t sampling_ratio, bool aligned,
    bool deterministic) {
  require_heads(boxes.size(), grads.size());
  const OnDeviceOf device(grads[0]);
  const auto pyramid = pyramid_of(scales, sizes);
  const int64_t channels = grads[0].size(2);
  std::vector<Tensor> bins, rows;
  for (size_t h = 0; h < grads.size(); ++h) {
    // [N, R, O, O, C], which is how the gradient of a channels-last output usually comes
    const auto turned = torch::stable::transpose(torch::stable::transpose(grads[h], 3, 4), 2, 4);
    bins.push_back(torch::stable::contiguous(turned));
    rows.push_back(readable_boxes(boxes[h]));
  }
  std::vector<Tensor> result;
  dispatch_features(grads[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto heads = heads_of<T>(bins, rows, sampling_ratio, aligned, pyramid);
    if (deterministic) {
      result = gather(heads, bins[0], channels, pyramid, channels_last, device.stream());
      return;
    }
    result = scatter(heads, bins[0], channels, pyramid, channels_last, device.stream());
    if constexpr (!std::is_same_v<T, Accumulator<T>>) {
      for (auto& level : result) level = torch::stable::to(level, bins[0].scalar_type());
    }
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA, m) {
  m.impl("multilevel_roi_align_backward", TORCH_BOX(&multilevel_roi_align_backward_cuda));
}

}  // namespace cuda_ops
