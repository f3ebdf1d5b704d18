// Which ground truth each box should learn: [N or 1, A, 4], [N, G, 4], [N] → [N, A].
//
// The IoU matrix never exists. Boxes go by tiles that stay in the first cache, one ground-truth row after the other; a
// row that lies apart from the whole tile is skipped. Low-quality matches need the best IoU of each row over all tiles,
// so a second pass repeats the few tiles where one was found; it computes the same bits.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "matching.h"

namespace cuda_ops {
namespace {

constexpr int kTile = 256;                // boxes; what is kept of them fits in the first cache
constexpr int64_t kGrainPairs = 1 << 16;  // below this much work another thread costs more than it saves

enum class Pass { kMatch, kMarkLowQuality };

template <class T>
struct GtRow {
  Box<T> box, reach;  // a box beyond whose reach the IoU is 0
  T area;
};

template <class T>
struct Task {
  const Box<T>* boxes;
  bool is_shared, low_quality;
  T fg_iou, bg_iou;
  int64_t num_images, num_boxes, num_rows, num_tiles;
  std::vector<int64_t> row_counts;  // of each image, without padding
  std::vector<GtRow<T>> rows;       // [N, G]
  std::vector<T> best_of_tile;      // [tiles, N, G]: greatest IoU of each row in the tile; empty without low quality
  std::vector<T> best_of_gt;        // [N, G]: over all tiles
  int64_t* matched;
};

template <class T>
struct Tile {
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // as wide as T, so that loops vectorise
  T x1[kTile], y1[kTile], x2[kTile], y2[kTile], area[kTile];
  T iou[kTile], best[kTile];
  Index idx[kTile], is_marked[kTile];
  Box<T> bounds;
};

// Combines the values by halving: unlike a running maximum, that vectorises without leave to reorder. Overwrites them.
template <auto kCombine, int kCount = kTile, class T>
ALWAYS_INLINE T fold(T* values) {
  if constexpr (kCount > 1) {
    for (int i = 0; i < kCount / 2; ++i) values[i] = kCombine(values[i], values[i + kCount / 2]);
    return fold<kCombine, kCount / 2>(values);
  }
  return values[0];
}

template <auto kCombine, class T>
ALWAYS_INLINE T fold_copy(const T* values, T* scratch) {
  std::copy_n(values, kTile, scratch);
  return fold<kCombine>(scratch);
}

template <class T>
ALWAYS_INLINE void load_tile(const Box<T>* boxes, int64_t count, Tile<T>& tile) {
  for (int64_t i = 0; i < count; ++i) {
    tile.x1[i] = boxes[i].x1;
    tile.y1[i] = boxes[i].y1;
    tile.x2[i] = boxes[i].x2;
    tile.y2[i] = boxes[i].y2;
  }
  // The last box again: it changes neither bounds nor maxima.
  for (T* corner : {tile.x1, tile.y1, tile.x2, tile.y2}) std::fill(corner + count, corner + kTile, corner[count - 1]);
  T* size = tile.iou;
  for (int i = 0; i < kTile; ++i) {
    tile.area[i] = box_area(Box<T>{tile.x1[i], tile.y1[i], tile.x2[i], tile.y2[i]});
    const T x = larger_or_nan(std::abs(tile.x1[i]), std::abs(tile.x2[i]));
    size[i] = larger_or_nan(x, larger_or_nan(std::abs(tile.y1[i]), std::abs(tile.y2[i])));
  }
  const bool is_all_tame = is_tame(fold<larger_or_nan<T>>(size));
  tile.bounds = everywhere<T>();
  if (is_all_tame) {
    tile.bounds = {fold_copy<smaller<T>>(tile.x1, tile.iou), fold_copy<smaller<T>>(tile.y1, tile.iou),
                   fold_copy<larger<T>>(tile.x2, tile.iou), fold_copy<larger<T>>(tile.y2, tile.iou)};
  }
}

template <class T>
ALWAYS_INLINE void match_row(const GtRow<T>& gt, typename Tile<T>::Index row, Tile<T>& tile) {
  for (int i = 0; i < kTile; ++i) {
    const T iou = box_iou(gt.box, gt.area, Box<T>{tile.x1[i], tile.y1[i], tile.x2[i], tile.y2[i]}, tile.area[i]);
    tile.iou[i] = iou;
    tile.idx[i] = iou > tile.best[i] ? row : tile.idx[i];  // strictly greater: the lowest row wins a tie
    tile.best[i] = larger_or_nan(tile.best[i], iou);
  }
}

template <class T>
ALWAYS_INLINE void match_tile(const Task<T>& task, int64_t item, Pass pass, Tile<T>& tile, T* best_of_tile) {
  std::fill_n(tile.best, kTile, T(0));
  std::fill_n(tile.idx, kTile, 0);
  std::fill_n(tile.is_marked, kTile, 0);
  const int64_t image = item % task.num_images, first = image * task.num_rows;
  for (int64_t row = 0; row < task.row_counts[image]; ++row) {
    const GtRow<T>& gt = task.rows[first + row];
    if (is_apart(tile.bounds, gt.reach)) continue;
    match_row(gt, row, tile);
    if (pass == Pass::kMarkLowQuality) {
      const T best = task.best_of_gt[first + row];
      for (int i = 0; i < kTile; ++i) tile.is_marked[i] |= is_best_of_gt(tile.iou[i], best);
    } else if (task.low_quality) {
      best_of_tile[row] = fold<larger_or_nan<T>>(tile.iou);
    }
  }
}

template <class T>
ALWAYS_INLINE void write_matches(T fg_iou, T bg_iou, int64_t count, Tile<T>& tile, int64_t* matched) {
  for (int i = 0; i < kTile; ++i) {
    const auto learned = verdict(tile.best[i], tile.idx[i], fg_iou, bg_iou);
    tile.idx[i] = tile.is_marked[i] ? tile.idx[i] : learned;
  }
  std::copy_n(tile.idx, count, matched);
}

template <class T>
ALWAYS_INLINE bool has_best_of_gt(const Task<T>& task, int64_t item) {
  const int64_t image = item % task.num_images;
  const T* best_of_tile = task.best_of_tile.data() + item * task.num_rows;
  const T* best_of_gt = task.best_of_gt.data() + image * task.num_rows;
  for (int64_t row = 0; row < task.row_counts[image]; ++row) {
    if (is_best_of_gt(best_of_tile[row], best_of_gt[row])) return true;
  }
  return false;
}

// Items are pairs of a tile and an image, images innermost: what images share of a tile is loaded once.
template <class T>
ALWAYS_INLINE void match_items(Task<T>& task, int64_t begin, int64_t end, Pass pass) {
  Tile<T> tile;
  int64_t loaded = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item % task.num_images, first = item / task.num_images * kTile;
    const int64_t count = std::min<int64_t>(kTile, task.num_boxes - first);
    int64_t* matched = task.matched + image * task.num_boxes + first;
    if (task.row_counts[image] == 0) {
      std::fill_n(matched, count, kBackground);
      continue;
    }
    if (pass == Pass::kMarkLowQuality && !has_best_of_gt(task, item)) continue;
    const int64_t source = (task.is_shared ? 0 : image * task.num_boxes) + first;
    if (source != loaded) load_tile(task.boxes + source, count, tile);
    loaded = source;
    match_tile(task, item, pass, tile, task.best_of_tile.data() + (task.low_quality ? item * task.num_rows : 0));
    write_matches(task.fg_iou, task.bg_iou, count, tile, matched);
  }
}

VECTORIZED void match_items_float(Task<float>& task, int64_t begin, int64_t end, Pass pass) {
  match_items(task, begin, end, pass);
}

void match_items_of(Task<float>& task, int64_t begin, int64_t end, Pass pass) {
  match_items_float(task, begin, end, pass);
}

void match_items_of(Task<double>& task, int64_t begin, int64_t end, Pass pass) {
  match_items(task, begin, end, pass);
}

template <class T>
void find_best_of_gt(Task<T>& task) {
  const int64_t num_rows = task.num_images * task.num_rows;
  task.best_of_gt.assign(num_rows, T(0));
  for (int64_t tile = 0; tile < task.num_tiles; ++tile) {
    const T* best_of_tile = task.best_of_tile.data() + tile * num_rows;
    for (int64_t i = 0; i < num_rows; ++i) task.best_of_gt[i] = larger_or_nan(task.best_of_gt[i], best_of_tile[i]);
  }
}

template <class T>
void match(Task<T>& task) {
  const int64_t items = task.num_tiles * task.num_images;
  const int64_t grain = kGrainPairs / (kTile * (task.num_rows + 1)) + 1;
  if (task.low_quality) task.best_of_tile.assign(items * task.num_rows, T(0));
  torch::stable::parallel_for(
      0, items, grain, [&](int64_t begin, int64_t end) { match_items_of(task, begin, end, Pass::kMatch); });
  if (!task.low_quality) return;
  find_best_of_gt(task);
  torch::stable::parallel_for(
      0, items, grain, [&](int64_t begin, int64_t end) { match_items_of(task, begin, end, Pass::kMarkLowQuality); });
}

template <class T>
std::vector<GtRow<T>> gt_rows(const Box<T>* gt_boxes, int64_t count) {
  std::vector<GtRow<T>> rows(count);
  for (int64_t i = 0; i < count; ++i) {
    rows[i] = {gt_boxes[i], is_tame(gt_boxes[i]) ? gt_boxes[i] : everywhere<T>(), box_area(gt_boxes[i])};
  }
  return rows;
}

std::vector<int64_t> row_counts(const Tensor& num_gt, int64_t num_rows) {
  std::vector<int64_t> counts(num_gt.numel());
  for (size_t n = 0; n < counts.size(); ++n) {
    const bool is_long = num_gt.scalar_type() == ScalarType::Long;
    counts[n] = rows_of(is_long ? data_of<int64_t>(num_gt)[n] : data_of<int32_t>(num_gt)[n], num_rows);
  }
  return counts;
}

Tensor match_boxes_cpu(
    const Tensor& boxes, const Tensor& gt_boxes, const Tensor& num_gt, double fg_iou, double bg_iou, bool low_quality) {
  const auto own = torch::stable::contiguous(boxes), gt = torch::stable::contiguous(gt_boxes);
  const auto counts = torch::stable::contiguous(num_gt);
  const int64_t num_images = gt.size(0), num_boxes = own.size(1), num_rows = gt.size(1);
  auto matched = torch::stable::new_empty(gt, {num_images, num_boxes}, ScalarType::Long);
  if (matched.numel() == 0) return matched;
  dispatch_float(gt.scalar_type(), "match_boxes", [&](auto zero) {
    using T = decltype(zero);
    Task<T> task{
        .boxes = reinterpret_cast<const Box<T>*>(own.const_data_ptr()),
        .is_shared = own.size(0) != num_images,
        .low_quality = low_quality,
        .fg_iou = static_cast<T>(fg_iou),  // torch compares in the dtype of the tensor
        .bg_iou = static_cast<T>(bg_iou),
        .num_images = num_images,
        .num_boxes = num_boxes,
        .num_rows = num_rows,
        .num_tiles = (num_boxes + kTile - 1) / kTile,
        .row_counts = row_counts(counts, num_rows),
        .rows = gt_rows(reinterpret_cast<const Box<T>*>(gt.const_data_ptr()), num_images * num_rows),
        .best_of_tile = {},
        .best_of_gt = {},
        .matched = mutable_data_of<int64_t>(matched)};
    match(task);
  });
  return matched;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, m) {
  m.def(
      "match_boxes(Tensor boxes, Tensor gt_boxes, Tensor num_gt, float fg_iou, float bg_iou, bool low_quality) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CPU, m) {
  m.impl("match_boxes", TORCH_BOX(&match_boxes_cpu));
}

}  // namespace cuda_ops
