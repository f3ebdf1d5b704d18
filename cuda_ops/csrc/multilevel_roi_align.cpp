// RoIAlign over a feature pyramid: features of L levels, boxes [N, R, 4] → [N, R, C, O, O], channels-last in memory;
// and back. For several heads at once, each with boxes and an O of its own: back, their gradients meet in one pyramid.
//
// A bin is a sum over few rows and columns of cells, taken along one axis and then along the other, for many channels
// at once. Where the channels of a cell stand together in memory they are read so; where the cells of a row do, in
// planes, whole rows are summed and then turned. Both ways add in the same order in the forward pass, so they give the
// same bits.
#include "roi_align_levels.h"
#include "weighted_sum.h"

namespace cuda_ops {
namespace {

constexpr int64_t kLineChannels = 16;  // a cache line of floats, and few enough planes for the cache
constexpr int64_t kSliceChannels = 128;  // sums of one row of bins stay in the first cache
constexpr int64_t kGrainValues = 1 << 14;  // below this much output another thread costs more than it saves

// The cells of a plane's row that a box touches, widened to whole vectors where the row is long enough.
struct Window {
  int64_t first, length;
};

template <class W>
ALWAYS_INLINE Window window_of(const Axis<W>& columns, int64_t width) {
  int64_t first = width, last = -1;
  for (int32_t k = 0; k < columns.num_cells; ++k) {
    first = std::min<int64_t>(first, columns.cells[k]);
    last = std::max<int64_t>(last, columns.cells[k]);
  }
  if (last < 0) return {0, 0};
  constexpr int64_t kLanes = Lanes<W>::kCount;
  const int64_t length = std::min((last - first) / kLanes * kLanes + kLanes, width);
  return {std::min(first, width - length), length};
}

template <class W>
constexpr int64_t whole_vectors(int64_t count) {
  return (count + Lanes<W>::kCount - 1) / Lanes<W>::kCount * Lanes<W>::kCount;
}

// Buffers of one thread, for a slice of channels.
template <class W>
struct Scratch {
  std::vector<W> sums;           // forward [cells of a row, channels]; back the same, for planes [cells, O, channels]
  std::vector<W> lines;          // back to planes [O, cells of a row]
  std::vector<W> bins;           // back [O, O, channels], y first; for planes x first
  std::vector<int64_t> offsets;  // of a row's cells in sums
};

// Sums rows of planes and turns the result: sums[x * channels + c] for the cells x of the window.
template <class T, class W>
ALWAYS_INLINE void sum_planes(
    const Level<const T>& level, const T* image, const Axis<W>& rows, int bin, Window window, int64_t channels,
    W* sums) {
  constexpr int kLanes = Lanes<W>::kCount;
  const auto group = rows.group(bin);
  int64_t c = 0;
  for (; c + kLanes <= channels && kLanes <= window.length; c += kLanes) {
    for (int64_t next = 0; next < window.length; next += kLanes) {
      const int64_t x = std::min(next, window.length - kLanes);  // the last vector may overlap the one before it
      typename Lanes<W>::Vector lines[kLanes];
      for (int i = 0; i < kLanes; ++i) lines[i] = typename Lanes<W>::Vector{};
      for (const Tap<W>* tap = group.first; tap != group.last; ++tap) {
        const T* from = image + c * level.channel_stride + rows.cells[tap->idx] * level.row_stride + window.first + x;
        for (int i = 0; i < kLanes; ++i) {
          typename Lanes<W>::Vector values;
          load<W>(from + i * level.channel_stride, values);
          lines[i] += tap->weight * values;
        }
      }
      transpose<W>(lines);
      for (int i = 0; i < kLanes; ++i) store<W>(lines[i], sums + (x + i) * channels + c);
    }
  }
  for (; c < channels; ++c) {
    const T* plane = image + c * level.channel_stride + window.first;
    for (int64_t x = 0; x < window.length; ++x) {
      W sum = 0;
      for (const Tap<W>* tap = group.first; tap != group.last; ++tap) {
        sum += tap->weight * static_cast<W>(plane[rows.cells[tap->idx] * level.row_stride + x]);
      }
      sums[x * channels + c] = sum;
    }
  }
}

// Pools channels [0, channels) of one box: out[bin * out_stride + channel].
template <class T, class W>
ALWAYS_INLINE void pool_box(
    const Level<const T>& level, const T* image, const Axis<W>& rows, const Axis<W>& columns, Grid grid,
    int64_t channels, Scratch<W>& scratch, T* out, int64_t out_stride) {
  W* sums = scratch.sums.data();
  int64_t* offsets = scratch.offsets.data();
  const Window window = level.is_planar ? window_of(columns, level.width) : Window{};
  for (int32_t k = 0; k < columns.num_cells; ++k) {
    offsets[k] = (level.is_planar ? columns.cells[k] - window.first : k) * channels;
  }
  for (int row_bin = 0; row_bin < grid.output_size; ++row_bin) {
    if (level.is_planar) {
      sum_planes(level, image, rows, row_bin, window, channels, sums);
    } else {
      for (int32_t k = 0; k < columns.num_cells; ++k) {
        const T* column = image + columns.cells[k] * level.column_stride;
        const auto row_of = [&](int32_t idx) { return column + rows.cells[idx] * level.row_stride; };
        weighted_sum<false>(rows.group(row_bin), row_of, channels, sums + offsets[k]);
      }
    }
    for (int column_bin = 0; column_bin < grid.output_size; ++column_bin, out += out_stride) {
      const auto row_of = [&](int32_t idx) -> const W* { return sums + offsets[idx]; };
      weighted_sum<false>(columns.group(column_bin), row_of, channels, out);
    }
  }
}

// Adds a box's gradient, in scratch.bins, to that of its cells, where channels stand together: along y, then along x.
template <class W>
ALWAYS_INLINE void scatter_to_columns(
    const Level<W>& level, W* image, const Axis<W>& rows, const Axis<W>& columns, Grid grid, int64_t channels,
    Scratch<W>& scratch) {
  W* sums = scratch.sums.data();
  const W* bins = scratch.bins.data();
  const int64_t bins_stride = grid.output_size * channels;
  for (int32_t j = 0; j < rows.num_cells; ++j) {
    const auto bins_of = [&](int32_t idx) { return bins + idx * bins_stride; };
    weighted_sum<false>(rows.group(j), bins_of, bins_stride, sums);
    W* row = image + rows.cells[j] * level.row_stride;
    for (int32_t k = 0; k < columns.num_cells; ++k) {
      const auto sums_of = [&](int32_t idx) -> const W* { return sums + idx * channels; };
      weighted_sum<true>(columns.group(k), sums_of, channels, row + columns.cells[k] * level.column_stride);
    }
  }
}

// Turns sums [window, O, channels] of kLanes channels from c on into lines [kLanes, O, window].
template <class W>
ALWAYS_INLINE void turn_lines(
    const W* sums, int64_t output_size, int64_t window, int64_t channels, int64_t c, W* lines) {
  constexpr int kLanes = Lanes<W>::kCount;
  const int64_t stride = output_size * channels;
  for (int64_t y = 0; y < output_size; ++y) {
    for (int64_t x = 0; x < window; x += kLanes) {
      typename Lanes<W>::Vector cells[kLanes];
      for (int i = 0; i < kLanes; ++i) load<W>(sums + (x + i) * stride + y * channels + c, cells[i]);
      transpose<W>(cells);
      for (int i = 0; i < kLanes; ++i) store<W>(cells[i], lines + (i * output_size + y) * window + x);
    }
  }
}

// The same for planes: along x, turned, then along y for each channel. Scratch.bins holds whole vectors of channels.
template <class W>
ALWAYS_INLINE void scatter_to_planes(
    const Level<W>& level, W* image, const Axis<W>& rows, const Axis<W>& columns, Grid grid, int64_t channels,
    Scratch<W>& scratch) {
  constexpr int64_t kLanes = Lanes<W>::kCount;
  W *sums = scratch.sums.data(), *lines = scratch.lines.data();
  const W* bins = scratch.bins.data();
  const Window window = window_of(columns, level.width);
  const int64_t length = whole_vectors<W>(window.length), padded = whole_vectors<W>(channels);
  const int64_t bins_stride = grid.output_size * padded;
  std::fill_n(sums, length * bins_stride, W(0));
  for (int32_t k = 0; k < columns.num_cells; ++k) {
    const auto bins_of = [&](int32_t idx) { return bins + idx * bins_stride; };
    weighted_sum<true>(columns.group(k), bins_of, bins_stride, sums + (columns.cells[k] - window.first) * bins_stride);
  }
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t lane = c % kLanes;
    if (lane == 0) turn_lines(sums, grid.output_size, length, padded, c, lines);
    const auto lines_of = [&](int32_t idx) -> const W* { return lines + (lane * grid.output_size + idx) * length; };
    W* plane = image + c * level.channel_stride + window.first;
    for (int32_t j = 0; j < rows.num_cells; ++j) {
      weighted_sum<true>(rows.group(j), lines_of, window.length, plane + rows.cells[j] * level.row_stride);
    }
  }
}

#define ROI_ALIGN_POOL(T)                                                                                           \
  VECTORIZED void pool_box_of(                                                                                      \
      const Level<const T>& level, const T* image, const Axis<Accumulator<T>>& rows,                                \
      const Axis<Accumulator<T>>& columns, Grid grid, int64_t channels, Scratch<Accumulator<T>>& scratch, T* out,   \
      int64_t out_stride) {                                                                                         \
    pool_box(level, image, rows, columns, grid, channels, scratch, out, out_stride);                                \
  }
ROI_ALIGN_POOL(float)
ROI_ALIGN_POOL(double)
ROI_ALIGN_POOL(Half)
ROI_ALIGN_POOL(BFloat16)

#define ROI_ALIGN_SCATTER(W)                                                                                        \
  VECTORIZED void scatter_box_of(                                                                                   \
      const Level<W>& level, W* image, const Axis<W>& rows, const Axis<W>& columns, Grid grid, int64_t channels,    \
      Scratch<W>& scratch) {                                                                                        \
    if (level.is_planar) {                                                                                          \
      scatter_to_planes(level, image, rows, columns, grid, channels, scratch);                                      \
    } else {                                                                                                        \
      scatter_to_columns(level, image, rows, columns, grid, channels, scratch);                                     \
    }                                                                                                               \
  }
ROI_ALIGN_SCATTER(float)
ROI_ALIGN_SCATTER(double)

// Columns that the widest window of a plane has.
template <class T>
int64_t max_window(const Levels<T>& levels, const Pyramid& pyramid) {
  return levels.any_planar ? *std::max_element(pyramid.widths, pyramid.widths + kMaxLevels) : 0;
}

template <class T>
void pool(const Levels<const T>& levels, const Tensor& boxes, const Pyramid& pyramid, Grid grid, Tensor& out) {
  using W = Accumulator<T>;
  const Plan<W> plan(boxes, pyramid, grid, GroupBy::kBin);
  const int64_t num_bins = int64_t{grid.output_size} * grid.output_size, channels = out.size(2);
  const int64_t slice = std::min(channels, levels.any_planar ? kLineChannels : kSliceChannels);
  const int64_t num_slices = (channels + slice - 1) / slice, num_boxes = plan.num_boxes();
  T* result = mutable_data_of<T>(out);
  const int64_t grain = kGrainValues / (num_bins * slice) + 1;
  // A thread walks the boxes of an image for one slice, then for the next: what neighbours share stays in the cache.
  torch::stable::parallel_for(0, num_slices * num_boxes, grain, [&](int64_t begin, int64_t end) {
    Scratch<W> scratch;
    scratch.sums.resize(std::max(plan.max_cells(), max_window(levels, pyramid)) * slice);  // layouts may differ
    scratch.offsets.resize(plan.max_cells());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t box = plan.box_at(i % num_boxes), first = i / num_boxes * slice;
      const auto& level = levels.levels[plan.level(box)];
      const T* image = level.data + box / boxes.size(1) * level.image_stride + first * level.channel_stride;
      pool_box_of(
          level, image, plan.rows(box), plan.columns(box), grid, std::min(slice, channels - first), scratch,
          result + box * num_bins * channels + first, channels);
    }
  });
}

// Copies a box's gradient to bins[y * row + x * column + c], from any layout; whether any of it is not 0.
template <class T, class W>
bool load_bins(
    const T* from, const Tensor& grad, int64_t output_size, int64_t channels, W* bins, int64_t row, int64_t column) {
  const int64_t channel_stride = grad.stride(2), row_stride = grad.stride(3), column_stride = grad.stride(4);
  int any = 0;
  for (int64_t y = 0; y < output_size; ++y) {
    for (int64_t x = 0; x < output_size; ++x) {
      const T* bin = from + y * row_stride + x * column_stride;
      W* to = bins + y * row + x * column;
      if (channel_stride == 1) {
        for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<W>(bin[c]);
      } else {
        for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<W>(bin[c * channel_stride]);
      }
      for (int64_t c = 0; c < channels; ++c) any |= to[c] != 0 ? 1 : 0;
    }
  }
  return any != 0;
}

template <class W>
void zero_slice(const Level<W>& level, W* image, int64_t channels) {
  const int64_t cells = int64_t{level.height} * level.width;
  if (level.is_planar) {
    std::fill_n(image, channels * cells, W(0));
  } else {
    for (int64_t i = 0; i < cells; ++i) std::fill_n(image + i * level.column_stride, channels, W(0));
  }
}

// What one head sends back: its gradient [N, R, C, O, O], and the cells that its bins touch.
template <class T>
struct Head {
  Head(const Tensor& grad, const Tensor& boxes, const Pyramid& pyramid, Grid grid)
      : grad(grad), grid(grid), plan(torch::stable::contiguous(boxes), pyramid, grid, GroupBy::kCell) {}

  // The gradient's first channel of a box.
  const T* of_box(int64_t box) const {
    const int64_t per_image = grad.size(1);
    return data_of<T>(grad) + box / per_image * grad.stride(0) + box % per_image * grad.stride(1);
  }

  Tensor grad;
  Grid grid;
  Plan<Accumulator<T>> plan;
};

// Adds the gradients of the boxes in positions [position, end) of the plan that lie on level l to that of a slice of
// channels, [first, first + count); returns the position after them.
template <class T, class W>
int64_t scatter_boxes(
    const Head<T>& head, int64_t position, int64_t end, int l, const Level<W>& level, W* origin, int64_t first,
    int64_t count, Scratch<W>& scratch) {
  const Grid grid = head.grid;
  const int64_t width = level.is_planar ? whole_vectors<W>(count) : count, line = grid.output_size * width;
  const int64_t row = level.is_planar ? width : line, column = level.is_planar ? line : width;
  for (; position < end && head.plan.level(head.plan.box_at(position)) == l; ++position) {
    const int64_t box = head.plan.box_at(position);
    const T* from = head.of_box(box) + first * head.grad.stride(2);
    if (load_bins(from, head.grad, grid.output_size, count, scratch.bins.data(), row, column)) {
      scatter_box_of(level, origin, head.plan.rows(box), head.plan.columns(box), grid, count, scratch);
    }
  }
  return position;
}

// A thread owns slices of channels of images and walks their boxes in one order, head by head, so sums never depend on
// threads.
template <class T, class W>
void scatter(const std::vector<Head<T>>& heads, const Pyramid& pyramid, const Levels<W>& levels) {
  const int64_t num_images = heads[0].grad.size(0), channels = heads[0].grad.size(2);
  const int64_t share = num_images * channels / (2 * torch::stable::get_num_threads());
  const int64_t whole_lines = (share + kLineChannels - 1) / kLineChannels * kLineChannels;
  const int64_t slice = levels.any_planar ? kLineChannels : std::clamp(whole_lines, kLineChannels, kSliceChannels);
  const int64_t num_slices = (channels + slice - 1) / slice;
  int64_t output_size = 0;
  for (const auto& head : heads) output_size = std::max<int64_t>(output_size, head.grid.output_size);
  torch::stable::parallel_for(0, num_images * num_slices, 1, [&](int64_t begin, int64_t end) {
    Scratch<W> scratch;
    const int64_t padded = whole_vectors<W>(slice);
    const int64_t length = std::max<int64_t>(1, whole_vectors<W>(max_window(levels, pyramid)));
    scratch.sums.resize(length * output_size * padded);
    scratch.lines.resize(length * output_size * Lanes<W>::kCount);
    scratch.bins.resize(output_size * output_size * padded);
    std::vector<int64_t> positions(heads.size());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / num_slices, first = i % num_slices * slice, count = std::min(slice, channels - first);
      for (size_t h = 0; h < heads.size(); ++h) positions[h] = image * heads[h].grad.size(1);
      for (int l = 0; l < pyramid.num_levels; ++l) {
        const auto& level = levels.levels[l];
        W* origin = level.data + image * level.image_stride + first * level.channel_stride;
        zero_slice(level, origin, count);
        for (size_t h = 0; h < heads.size(); ++h) {
          const int64_t last = (image + 1) * heads[h].grad.size(1);
          positions[h] = scatter_boxes(heads[h], positions[h], last, l, level, origin, first, count, scratch);
        }
      }
    }
  });
}

std::vector<Tensor> multilevel_roi_align_cpu(
    const std::vector<Tensor>& features, const std::vector<Tensor>& boxes, const std::vector<double>& scales,
    const std::vector<int64_t>& output_sizes, int64_t sampling_ratio, bool aligned) {
  const auto levels = readable(features);
  const auto pyramid = pyramid_of(scales, sizes_of(levels));
  require_heads(boxes.size(), output_sizes.size());
  std::vector<Tensor> results;
  dispatch_features(levels[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    for (size_t h = 0; h < boxes.size(); ++h) {
      auto out = new_output(levels[0], boxes[h], levels[0].size(1), output_sizes[h]);
      results.push_back(out);
      if (out.numel() == 0) continue;
      const Grid grid = grid_of(output_sizes[h], sampling_ratio, aligned, pyramid);
      pool<T>(levels_of<const T>(levels), torch::stable::contiguous(boxes[h]), pyramid, grid, out);
    }
  });
  return results;
}

std::vector<Tensor> multilevel_roi_align_backward_cpu(
    const std::vector<Tensor>& grads, const std::vector<Tensor>& boxes, const std::vector<int64_t>& sizes,
    const std::vector<bool>& channels_last, const std::vector<double>& scales, int64_t sampling_ratio, bool aligned,
    bool) {
  const auto pyramid = pyramid_of(scales, sizes);
  require_heads(boxes.size(), grads.size());
  const Tensor& grad = grads[0];
  std::vector<Tensor> result;
  dispatch_features(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using W = Accumulator<T>;
    std::vector<Head<T>> heads;
    for (size_t h = 0; h < grads.size(); ++h) {
      heads.emplace_back(grads[h], boxes[h], pyramid, grid_of(grads[h].size(3), sampling_ratio, aligned, pyramid));
    }
    result = new_levels(grad, grad.size(2), pyramid, channels_last, kAccumulatorType<T>);
    if (grad.size(0) * grad.size(2) > 0) scatter(heads, pyramid, levels_of<W>(result));
    if constexpr (!std::is_same_v<T, W>) {
      for (auto& level : result) level = torch::stable::to(level, grad.scalar_type());
    }
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, m) {
  m.def(
      "multilevel_roi_align(Tensor[] features, Tensor[] boxes, float[] scales, int[] output_sizes, int sampling_ratio, "
      "bool aligned) -> Tensor[]");
  m.def(
      "multilevel_roi_align_backward(Tensor[] grads, Tensor[] boxes, SymInt[] sizes, bool[] channels_last, "
      "float[] scales, int sampling_ratio, bool aligned, bool deterministic) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CPU, m) {
  m.impl("multilevel_roi_align", TORCH_BOX(&multilevel_roi_align_cpu));
  m.impl("multilevel_roi_align_backward", TORCH_BOX(&multilevel_roi_align_backward_cpu));
}

}  // namespace cuda_ops
