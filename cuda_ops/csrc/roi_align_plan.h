// What the CPU kernels of RoIAlign know before they touch a feature: for each box its level, and for both axes the
// distinct cells that its bins touch with the weights, which factor into a row part and a column part. Samples that
// share a cell are added up.
#pragma once

#include <algorithm>
#include <numeric>

#include "roi_align.h"

namespace cuda_ops {

// The taps of a bin, whose idx are rows of `cells`; or of a cell, whose idx are bins.
template <class W>
struct Group {
  const Tap<W>*first, *last;
};

// One axis of one box; its groups are bins or cells.
template <class W>
struct Axis {
  int32_t num_cells;
  const int32_t* cells;
  const int32_t* begins;
  const Tap<W>* taps;

  Group<W> group(int64_t row) const {
    return {taps + begins[row], taps + begins[row + 1]};
  }
};

enum class GroupBy { kBin, kCell };

template <class W>
class Plan {
 public:
  // boxes: [N, R, 4], contiguous.
  Plan(const Tensor& boxes, const Pyramid& pyramid, Grid grid, GroupBy group_by)
      : boxes_per_image_(boxes.size(1)), max_taps_(int64_t{grid.output_size} * grid.max_taps()), group_by_(group_by) {
    const int64_t num_boxes = boxes.size(0) * boxes_per_image_;
    levels_.resize(num_boxes);
    num_cells_.resize(2 * num_boxes);
    cells_.resize(2 * num_boxes * max_taps_);
    taps_.resize(2 * num_boxes * max_taps_);
    begins_.resize(2 * num_boxes * (max_taps_ + 1));
    order_.resize(num_boxes);
    dispatch_float(boxes.scalar_type(), "multilevel_roi_align", [&](auto zero) {
      const auto* rows = reinterpret_cast<const Box<decltype(zero)>*>(boxes.const_data_ptr());
      constexpr int64_t kGrainBoxes = 64;
      torch::stable::parallel_for(0, num_boxes, kGrainBoxes, [&](int64_t begin, int64_t end) {
        for (int64_t box = begin; box < end; ++box) {
          const auto roi = roi_of(rows[box], pyramid, grid);
          levels_[box] = roi.level;
          const auto row_taps = [&](int bin, Tap<W>* taps) {
            return taps_of(roi.y, roi.bin_height, bin, roi.samples_y, pyramid.heights[roi.level], taps);
          };
          const auto column_taps = [&](int bin, Tap<W>* taps) {
            return taps_of(roi.x, roi.bin_width, bin, roi.samples_x, pyramid.widths[roi.level], taps);
          };
          add_axis(2 * box, grid.output_size, row_taps);
          add_axis(2 * box + 1, grid.output_size, column_taps);
        }
      });
    });
    sort();
  }

  int64_t num_boxes() const {
    return static_cast<int64_t>(levels_.size());
  }

  // Boxes of an image stand together; within it by level, then from top to bottom, so that neighbours meet in the
  // cache.
  int64_t box_at(int64_t position) const {
    return order_[position];
  }

  int level(int64_t box) const {
    return levels_[box];
  }

  // Cells that one axis of a box lists, at most: more than its level has, where a box turned inside out lists them
  // again.
  int64_t max_cells() const {
    return max_taps_;
  }

  Axis<W> rows(int64_t box) const {
    return axis(2 * box);
  }

  Axis<W> columns(int64_t box) const {
    return axis(2 * box + 1);
  }

 private:
  Axis<W> axis(int64_t row) const {
    return {
        num_cells_[row], cells_.data() + row * max_taps_, begins_.data() + row * (max_taps_ + 1),
        taps_.data() + row * max_taps_};
  }

  // taps_of_bin(bin, taps) writes the taps of a bin, whose idx are cells, and returns their number.
  template <class F>
  void add_axis(int64_t row, int output_size, const F& taps_of_bin) {
    int32_t* cells = cells_.data() + row * max_taps_;
    int32_t* begins = begins_.data() + row * (max_taps_ + 1);
    Tap<W>* taps = taps_.data() + row * max_taps_;
    int32_t num_cells = 0, num_taps = 0;
    for (int bin = 0; bin < output_size; ++bin) {
      begins[bin] = num_taps;
      num_taps += taps_of_bin(bin, taps + num_taps);
      for (int32_t t = begins[bin]; t < num_taps; ++t) {
        // Bins go from left to right, so a known cell is among the last ones; to list one twice would be no error.
        const int32_t cell = taps[t].idx;
        int32_t k = num_cells - 1;
        while (k >= 0 && cells[k] > cell) --k;
        if (k < 0 || cells[k] != cell) cells[k = num_cells++] = cell;
        taps[t].idx = k;
      }
    }
    begins[output_size] = num_taps;
    num_cells_[row] = num_cells;
    if (group_by_ == GroupBy::kCell) regroup(num_cells, output_size, begins, taps);
  }

  // From bins with their cells to cells with their bins.
  static void regroup(int32_t num_cells, int32_t output_size, int32_t* begins, Tap<W>* taps) {
    const std::vector<int32_t> bin_begins(begins, begins + output_size + 1);
    const std::vector<Tap<W>> of_bins(taps, taps + bin_begins.back());
    std::fill(begins, begins + num_cells + 1, 0);
    for (const auto& tap : of_bins) ++begins[tap.idx + 1];
    std::partial_sum(begins, begins + num_cells + 1, begins);
    std::vector<int32_t> next(begins, begins + num_cells);
    for (int32_t bin = 0; bin < output_size; ++bin) {
      for (int32_t i = bin_begins[bin]; i < bin_begins[bin + 1]; ++i) {
        taps[next[of_bins[i].idx]++] = {bin, of_bins[i].weight};
      }
    }
  }

  void sort() {
    const auto key = [this](int64_t box) {
      const int32_t first_row = num_cells_[2 * box] ? cells_[2 * box * max_taps_] : 0;
      return std::make_tuple(box / boxes_per_image_, levels_[box], first_row, box);
    };
    std::iota(order_.begin(), order_.end(), int64_t{0});
    std::sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return key(a) < key(b); });
  }

  int64_t boxes_per_image_, max_taps_;
  GroupBy group_by_;
  std::vector<int32_t> levels_, num_cells_, cells_, begins_;
  std::vector<Tap<W>> taps_;
  std::vector<int64_t> order_;
};

}  // namespace cuda_ops
