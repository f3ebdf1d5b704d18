// What the CUDA kernels of RoIAlign share: how work is cut into blocks, and the cells and weights of a box, in shared
// memory where they fit.
#pragma once

#include "cuda_common.h"
#include "roi_align_levels.h"

namespace cuda_ops {

constexpr int kBlockBins = 64, kBlockChannels = 32;
constexpr int64_t kMaxTapBytes = 24 << 10;  // in shared memory
constexpr int64_t kScratchBlocks = 1024, kScratchBytes = 256 << 20;

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};

// Boxes [N, R, 4], float or double; each is aligned to its size.
struct Boxes {
  const void* data;
  bool is_double;
  int64_t per_image, count;
};

// A box in cells of its level, read at once.
template <class B>
__device__ __forceinline__ Roi<B> roi_at(const Boxes& boxes, int64_t box, const Pyramid& pyramid, Grid grid) {
  const auto corners = static_cast<const Pack<B, 4>*>(boxes.data)[box];
  return roi_of(Box<B>{corners.values[0], corners.values[1], corners.values[2], corners.values[3]}, pyramid, grid);
}

// Calls f with a box in cells of its level.
template <class F>
__device__ __forceinline__ void with_roi(
    const Boxes& boxes, int64_t box, const Pyramid& pyramid, Grid grid, const F& f) {
  if (boxes.is_double) {
    f(roi_at<double>(boxes, box, pyramid, grid));
  } else {
    f(roi_at<float>(boxes, box, pyramid, grid));
  }
}

// The part of the output that a block works on: bins of one box, [first_bin, first_bin + num_bins), as many as in the
// other parts of the box but for the last, and channels [first_channel, end_channel), kBlockChannels at a time.
struct Part {
  int64_t box, first_channel, end_channel;
  int first_bin, num_bins;
};

// What a block finds out of its box serves for as many of the channels as leave the device blocks enough.
struct Parts {
  Parts(int64_t num_boxes, int64_t channels, Grid grid, int64_t enough_blocks)
      : channels(channels),
        bins(int64_t{grid.output_size} * grid.output_size),
        bin_parts((bins + kBlockBins - 1) / kBlockBins),
        part_bins((bins + bin_parts - 1) / bin_parts) {
    const int64_t rounds = (channels + kBlockChannels - 1) / kBlockChannels;
    const int64_t rounds_of_block = std::clamp<int64_t>(num_boxes * bin_parts * rounds / enough_blocks, 1, rounds);
    block_channels = rounds_of_block * kBlockChannels;
    channel_parts = (rounds + rounds_of_block - 1) / rounds_of_block;
    count = num_boxes * bin_parts * channel_parts;
  }

  __device__ Part operator[](int64_t i) const {
    const int64_t first_bin = i / channel_parts % bin_parts * part_bins;
    const int64_t first_channel = i % channel_parts * block_channels;
    return {
        i / channel_parts / bin_parts, first_channel, smaller(first_channel + block_channels, channels),
        static_cast<int>(first_bin), static_cast<int>(smaller(bins - first_bin, part_bins))};
  }

  int64_t channels, bins, bin_parts, part_bins, block_channels, channel_parts, count;
};

// A multiprocessor holds eight blocks of kThreads at most. With sixteen times as many, the last ones to end keep the
// device waiting for little.
inline int64_t enough_blocks(const Tensor& tensor) {
  int multiprocessors = 1;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, tensor.get_device_index());
  return int64_t{multiprocessors} * 8 * 16;
}

// Cells and weights of all bins of one box, in memory of the block: taps [2, O, max_taps] for rows and columns, and how
// many a bin has.
template <class W>
struct BoxTaps {
  __device__ BoxTaps(unsigned char* memory, Grid grid)
      : per_bin(grid.max_taps()),
        taps(reinterpret_cast<Tap<W>*>(memory)),
        counts(reinterpret_cast<int*>(taps + 2 * grid.output_size * per_bin)) {}

  // Called by all threads of a block, one barrier at least after they read; they may read after the next one.
  __device__ __forceinline__ void fill(const Boxes& boxes, int64_t box, const Pyramid& pyramid, Grid grid, int* level) {
    if (boxes.is_double) {
      fill_of<double>(boxes, box, pyramid, grid, level);
    } else {
      fill_of<float>(boxes, box, pyramid, grid, level);
    }
  }

  // One thread finds out where the box lies, each takes one of its samples, and one a bin adds up what they touch.
  template <class B>
  __device__ void fill_of(const Boxes& boxes, int64_t box, const Pyramid& pyramid, Grid grid, int* level) {
    __shared__ Roi<B> roi;
    if (threadIdx.x == 0) {
      roi = roi_at<B>(boxes, box, pyramid, grid);
      *level = roi.level;
    }
    __syncthreads();
    const int row_samples = grid.output_size * roi.samples_y;
    const int num_samples = row_samples + grid.output_size * roi.samples_x;
    for (int i = threadIdx.x; i < num_samples; i += blockDim.x) {
      if (i < row_samples) {
        const int bin = i / roi.samples_y, sample = i % roi.samples_y;
        set_sample(
            sample_of(roi.y, roi.bin_height, bin, sample, roi.samples_y, pyramid.heights[roi.level]),
            taps + bin * per_bin + 2 * sample);
      } else {
        const int bin = (i - row_samples) / roi.samples_x, sample = (i - row_samples) % roi.samples_x;
        set_sample(
            sample_of(roi.x, roi.bin_width, bin, sample, roi.samples_x, pyramid.widths[roi.level]),
            taps + (grid.output_size + bin) * per_bin + 2 * sample);
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * grid.output_size; i += blockDim.x) {
      counts[i] = add_samples(taps + i * per_bin, i < grid.output_size ? roi.samples_y : roi.samples_x);
    }
  }

  // Where a sample lies outside, its first cell is kNone.
  template <class B>
  __device__ __forceinline__ static void set_sample(const Sample<B>& sample, Tap<W>* pair) {
    pair[0] = {sample.is_inside ? sample.low : kNone, static_cast<W>(sample.low_weight)};
    pair[1] = {sample.high, static_cast<W>(sample.high_weight)};
  }

  // The taps of a bin instead of the pairs of its samples, in their place.
  __device__ __forceinline__ static int add_samples(Tap<W>* pairs, int num_samples) {
    int num_taps = 0;
    for (int i = 0; i < num_samples; ++i) {
      const Tap<W> low = pairs[2 * i], high = pairs[2 * i + 1];
      if (low.idx == kNone) continue;
      add_tap(low, pairs, num_taps);
      add_tap(high, pairs, num_taps);
    }
    return num_taps;
  }

  // Calls f with the offset of each cell of a bin, from the first cell of a plane, and its weight.
  template <class Offset, class L, class F>
  __device__ __forceinline__ void for_each_cell(const L& level, int bin, Grid grid, const F& f) const {
    const auto row_stride = static_cast<Offset>(level.row_stride);
    const auto column_stride = static_cast<Offset>(level.column_stride);
    const int row_bin = bin / grid.output_size, column_bin = grid.output_size + bin % grid.output_size;
    const Tap<W>*rows = taps + row_bin * per_bin, *columns = taps + column_bin * per_bin;
    for (int j = 0; j < counts[row_bin]; ++j) {
      const Offset row = rows[j].idx * row_stride;
      for (int k = 0; k < counts[column_bin]; ++k) {
        f(row + columns[k].idx * column_stride, rows[j].weight * columns[k].weight);
      }
    }
  }

  static int64_t bytes(Grid grid) {
    return 2 * int64_t{grid.output_size} * (grid.max_taps() * int64_t{sizeof(Tap<W>)} + int64_t{sizeof(int)});
  }

  static constexpr int32_t kNone = -1;
  int per_bin;
  Tap<W>* taps;
  int* counts;
};

extern __shared__ __align__(16) unsigned char shared_memory[];

// Taps in memory of the device, `bytes` for each block.
struct Scratch {
  unsigned char* data;
  int64_t bytes;
};

// A launch is usual whose taps fit into shared memory and whose levels have cells at offsets of 32 bits.
template <bool kIsUsual>
using Offset = std::conditional_t<kIsUsual, int32_t, int64_t>;

template <bool kIsUsual>
__device__ __forceinline__ unsigned char* tap_memory(Scratch scratch) {
  return kIsUsual ? shared_memory : scratch.data + blockIdx.x * scratch.bytes;
}

template <class T>
bool is_aligned(const Level<T>& level, int64_t bytes) {
  const auto is_multiple = [&](int64_t stride) { return stride * static_cast<int64_t>(sizeof(T)) % bytes == 0; };
  return reinterpret_cast<uintptr_t>(level.data) % bytes == 0 && is_multiple(level.image_stride) &&
      is_multiple(level.row_stride) && is_multiple(level.column_stride);
}

// Whether 32 bits hold the offset of each cell from the first one of its plane, and of a block's channels besides.
template <class T>
bool has_short_offsets(const Levels<T>& levels, int num_levels) {
  bool is_short = true;
  for (int l = 0; l < num_levels; ++l) {
    const Level<T>& level = levels.levels[l];
    const int64_t farthest = level.height * level.row_stride + level.width * level.column_stride + kBlockChannels;
    is_short &= farthest <= std::numeric_limits<int32_t>::max();
  }
  return is_short;
}

// Whether channels can be read and written in packs of so many.
template <class T>
bool can_pack(const Levels<T>& levels, int num_levels, int64_t channels, int pack) {
  bool can = channels % pack == 0;
  for (int l = 0; l < num_levels; ++l) {
    can &= levels.levels[l].is_planar || is_aligned(levels.levels[l], pack * static_cast<int64_t>(sizeof(T)));
  }
  return can;
}

// Boxes as the kernels read them, one row after another; copied are those that lie otherwise, or not at a multiple of a
// row.
inline Tensor readable_boxes(const Tensor& boxes) {
  const auto rows = torch::stable::contiguous(boxes);
  const bool is_double = rows.scalar_type() == ScalarType::Double;
  const bool is_aligned = reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % (is_double ? 32 : 16) == 0;
  return is_aligned ? rows : torch::stable::clone(rows);
}

inline Boxes boxes_of(const Tensor& boxes) {
  const auto dtype = boxes.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double,
      "multilevel_roi_align: boxes must be float32 or float64");
  return {boxes.const_data_ptr(), dtype == ScalarType::Double, boxes.size(1), boxes.size(0) * boxes.size(1)};
}

inline unsigned blocks_of(int64_t items) {
  return static_cast<unsigned>(std::min<int64_t>(items, std::numeric_limits<int32_t>::max()));
}

// Where the blocks of a launch have their taps. A level may be so long that those of adaptive sampling do not fit into
// shared memory, or so large that its offsets are long: fewer blocks then share out memory of the device.
template <class W>
struct TapPlace {
  TapPlace(Grid grid, int64_t num_parts, bool has_short_offsets, const Tensor& like) : blocks(blocks_of(num_parts)) {
    const int64_t bytes = (BoxTaps<W>::bytes(grid) + 15) / 16 * 16;
    if (bytes <= kMaxTapBytes && has_short_offsets) {
      shared_bytes = bytes;
      return;
    }
    blocks = blocks_of(std::min({num_parts, kScratchBlocks, std::max<int64_t>(1, kScratchBytes / bytes)}));
    owner = torch::stable::new_empty(like, {blocks * bytes}, ScalarType::Byte);
    scratch = {static_cast<unsigned char*>(owner.mutable_data_ptr()), bytes};
  }

  bool is_usual() const {
    return scratch.data == nullptr;
  }

  unsigned blocks;
  int64_t shared_bytes = 0;
  Tensor owner;
  Scratch scratch{};
};

}  // namespace cuda_ops
