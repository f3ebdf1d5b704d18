// RoIAlign over a feature pyramid: features of L levels, boxes [N, R, 4] → [N, R, C, O, O], channels-last in memory.
//
// One launch a head for all levels, whatever their layouts: a block takes some bins and channels of one box.
#include "roi_align_cuda.h"

namespace cuda_ops {
namespace {

// out: [N, R, O, O, C].
template <class T, int kCount, bool kIsUsual>
__global__ void __launch_bounds__(kThreads) pool_kernel(
    const __grid_constant__ Levels<const T> levels, const __grid_constant__ Pyramid pyramid, Boxes boxes, Grid grid,
    int64_t channels, Parts parts, Scratch scratch, T* out) {
  using W = Accumulator<T>;
  __shared__ W turned[kBlockBins][kBlockChannels + 1];
  __shared__ int level_row;
  BoxTaps<W> taps(tap_memory<kIsUsual>(scratch), grid);
  for (int64_t i = blockIdx.x; i < parts.count; i += gridDim.x) {
    const Part part = parts[i];
    taps.fill(boxes, part.box, pyramid, grid, &level_row);
    __syncthreads();
    const Level<const T>& level = levels.levels[level_row];
    const T* image = level.data + part.box / boxes.per_image * level.image_stride;
    T* bins = out + (part.box * parts.bins + part.first_bin) * channels;
    for (int64_t first = part.first_channel; first < part.end_channel; first += kBlockChannels) {
      const int num_channels = static_cast<int>(smaller<int64_t>(part.end_channel - first, kBlockChannels));
      const T* cells = image + first * level.channel_stride;
      T* to = bins + first;
      if (level.is_planar) {
        for (int item = threadIdx.x; item < part.num_bins * kBlockChannels; item += blockDim.x) {
          const int bin = item % part.num_bins, channel = item / part.num_bins;
          if (channel >= num_channels) break;
          const T* plane = cells + channel * level.channel_stride;
          W sum = 0;
          taps.template for_each_cell<Offset<kIsUsual>>(level, part.first_bin + bin, grid, [&](auto cell, W weight) {
            sum = fma(weight, static_cast<W>(plane[cell]), sum);
          });
          turned[bin][channel] = sum;
        }
        __syncthreads();
        for (int item = threadIdx.x; item < part.num_bins * kBlockChannels; item += blockDim.x) {
          const int bin = item / kBlockChannels, channel = item % kBlockChannels;
          if (channel < num_channels) to[bin * channels + channel] = static_cast<T>(turned[bin][channel]);
        }
      } else {
        constexpr int kPacks = kBlockChannels / kCount;
        for (int item = threadIdx.x; item < part.num_bins * kPacks; item += blockDim.x) {
          const int bin = item / kPacks, channel = item % kPacks * kCount;
          if (channel >= num_channels) continue;
          W sums[kCount] = {};
          taps.template for_each_cell<Offset<kIsUsual>>(level, part.first_bin + bin, grid, [&](auto cell, W weight) {
            const auto pack = *reinterpret_cast<const Pack<T, kCount>*>(cells + (cell + channel));
#pragma unroll
            for (int c = 0; c < kCount; ++c) sums[c] = fma(weight, static_cast<W>(pack.values[c]), sums[c]);
          });
          Pack<T, kCount> result;
#pragma unroll
          for (int c = 0; c < kCount; ++c) result.values[c] = static_cast<T>(sums[c]);
          *reinterpret_cast<Pack<T, kCount>*>(to + bin * channels + channel) = result;
        }
      }
      __syncthreads();
    }
  }
}

template <class T>
void pool(
    const Levels<const T>& levels, const Tensor& boxes, const Pyramid& pyramid, Grid grid, Tensor& out,
    cudaStream_t stream) {
  constexpr int kPack = 16 / sizeof(T);
  const int64_t channels = out.size(2);
  const Parts parts(boxes.size(0) * boxes.size(1), channels, grid, enough_blocks(boxes));
  const bool packs = can_pack(levels, pyramid.num_levels, channels, kPack);
  const TapPlace<Accumulator<T>> place(grid, parts.count, has_short_offsets(levels, pyramid.num_levels), boxes);
  const auto kernel = !place.is_usual() ? pool_kernel<T, 1, false>
      : packs                            ? pool_kernel<T, kPack, true>
                                         : pool_kernel<T, 1, true>;
  kernel<<<place.blocks, kThreads, place.shared_bytes, stream>>>(
      levels, pyramid, boxes_of(boxes), grid, channels, parts, place.scratch, mutable_data_of<T>(out));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::vector<Tensor> multilevel_roi_align_cuda(
    const std::vector<Tensor>& features, const std::vector<Tensor>& boxes, const std::vector<double>& scales,
    const std::vector<int64_t>& output_sizes, int64_t sampling_ratio, bool aligned) {
  require_heads(boxes.size(), output_sizes.size());
  const OnDeviceOf device(boxes[0]);
  const auto tensors = readable(features);
  const auto pyramid = pyramid_of(scales, sizes_of(tensors));
  std::vector<Tensor> results;
  dispatch_features(tensors[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto levels = levels_of<const T>(tensors);
    for (size_t h = 0; h < boxes.size(); ++h) {
      auto out = new_output(tensors[0], boxes[h], tensors[0].size(1), output_sizes[h]);
      results.push_back(out);
      if (out.numel() == 0) continue;
      const Grid grid = grid_of(output_sizes[h], sampling_ratio, aligned, pyramid);
      pool(levels, readable_boxes(boxes[h]), pyramid, grid, out, device.stream());
    }
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA, m) {
  m.impl("multilevel_roi_align", TORCH_BOX(&multilevel_roi_align_cuda));
}

}  // namespace cuda_ops
