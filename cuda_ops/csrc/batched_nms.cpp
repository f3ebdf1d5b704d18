// Greedy non-maximum suppression of each row: boxes [R, K, 4], scores [R, K] → indices [R, max_output], counts [R].
//
// Each box, best first, is compared with the boxes kept so far of its group. What is kept is little and lies together
// in cache; what is suppressed leaves at its first suppressor; and nothing is done after max_output boxes are kept.
#include <algorithm>
#include <optional>
#include <unordered_map>

#include "nms.h"

namespace cuda_ops {
namespace {

constexpr int kLanes = 64;             // kept boxes compared at once
constexpr int64_t kBlock = 1024;       // boxes of a row that threads share out between two sequential steps
constexpr int64_t kGrainLanes = 8192;  // comparisons with kLanes boxes that are worth another thread: some 0.2 ms
constexpr int64_t kGrainBoxes = 1024;  // boxes of short rows that are worth another thread

template <class T>
struct KeptLanes {
  T x1[kLanes], y1[kLanes], x2[kLanes], y2[kLanes], area[kLanes];
};

template <class T>
inline bool any_suppresses(const KeptLanes<T>* kept, int64_t count, const Box<T>& box, T threshold) {
  const T area = box_area(box);
  for (int64_t i = 0; i < count; ++i) {
    int hits = 0;
    for (int k = 0; k < kLanes; ++k) {
      const Box<T> other{kept[i].x1[k], kept[i].y1[k], kept[i].x2[k], kept[i].y2[k]};
      hits |= suppresses(other, kept[i].area[k], box, area, threshold);
    }
    if (hits) return true;
  }
  return false;
}

VECTORIZED bool any_of_suppresses(const KeptLanes<float>* kept, int64_t count, const Box<float>& box, float threshold) {
  return any_suppresses(kept, count, box, threshold);
}

VECTORIZED bool any_of_suppresses(
    const KeptLanes<double>* kept, int64_t count, const Box<double>& box, double threshold) {
  return any_suppresses(kept, count, box, threshold);
}

// The boxes kept of one group.
template <class T>
class KeptBoxes {
 public:
  void add(const Box<T>& box) {
    const int64_t lane = size_++ % kLanes;
    if (lane == 0) lanes_.push_back(overlapping_none());
    KeptLanes<T>& last = lanes_.back();
    last.x1[lane] = box.x1, last.y1[lane] = box.y1, last.x2[lane] = box.x2, last.y2[lane] = box.y2;
    last.area[lane] = box_area(box);
  }

  bool suppress(const Box<T>& box, T threshold, int64_t first_lanes = 0) const {
    return any_of_suppresses(lanes_.data() + first_lanes, lanes_.size() - first_lanes, box, threshold);
  }

  // Lanes that no further box will enter.
  int64_t num_full() const {
    return size_ / kLanes;
  }

 private:
  static KeptLanes<T> overlapping_none() {
    KeptLanes<T> lanes;
    constexpr T infinity = std::numeric_limits<T>::infinity();
    for (auto* start : {lanes.x1, lanes.y1}) std::fill_n(start, kLanes, infinity);
    for (auto* end : {lanes.x2, lanes.y2}) std::fill_n(end, kLanes, -infinity);
    std::fill_n(lanes.area, kLanes, std::numeric_limits<T>::min());
    return lanes;
  }

  std::vector<KeptLanes<T>> lanes_;
  int64_t size_ = 0;
};

// Indices of the scores above -inf, best first, of equals the first; as in torch, no number is better than any.
template <class S>
std::vector<int64_t> best_first(const S* scores, int64_t num_boxes) {
  struct Ranked {
    S score;
    int32_t idx;
  };
  std::vector<Ranked> ranked;
  ranked.reserve(num_boxes);
  for (int64_t k = 0; k < num_boxes; ++k) {
    if (scores[k] != kMarked<S>) ranked.push_back({scores[k], static_cast<int32_t>(k)});
  }
  const auto is_better = [](const Ranked& one, const Ranked& two) {
    return one.score > two.score || (std::isnan(one.score) && !std::isnan(two.score));
  };
  if (!std::is_sorted(ranked.begin(), ranked.end(), is_better)) {
    std::stable_sort(ranked.begin(), ranked.end(), is_better);
  }
  std::vector<int64_t> order(ranked.size());
  std::transform(ranked.begin(), ranked.end(), order.begin(), [](const Ranked& box) { return box.idx; });
  return order;
}

// Writes the boxes kept of one row, returns their number.
template <class T>
int64_t suppress_row(
    const Box<T>* boxes, const int64_t* groups, const std::vector<int64_t>& order, T threshold, int64_t max_output,
    int64_t* out) {
  std::unordered_map<int64_t, KeptBoxes<T>> kept_of;
  const auto group_of = [&](int64_t idx) { return groups ? groups[idx] : 0; };
  const int64_t num_boxes = order.size();
  int64_t count = 0, num_compared[kBlock];
  bool is_dead[kBlock];
  for (int64_t start = 0; start < num_boxes; start += kBlock) {
    const int64_t size = std::min(kBlock, num_boxes - start);
    // Against what was kept before this block, in any order …
    const int64_t lanes_of_group = count / (kLanes * (kept_of.size() + 1));
    torch::stable::parallel_for(0, size, kGrainLanes / (lanes_of_group + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto kept = kept_of.find(group_of(order[start + i]));
        const bool is_first = kept == kept_of.end();
        num_compared[i] = is_first ? 0 : kept->second.num_full();
        is_dead[i] = !is_first && kept->second.suppress(boxes[order[start + i]], threshold);
      }
    });
    // … then against what is kept within it, one after another.
    for (int64_t i = 0; i < size; ++i) {
      if (is_dead[i]) continue;
      const int64_t idx = order[start + i];
      KeptBoxes<T>& kept = kept_of[group_of(idx)];
      if (kept.suppress(boxes[idx], threshold, num_compared[i])) continue;
      out[count++] = idx;
      if (count == max_output) return count;
      kept.add(boxes[idx]);
    }
  }
  return count;
}

std::tuple<Tensor, Tensor> batched_nms_cpu(
    const Tensor& boxes, const Tensor& scores, double iou_threshold, int64_t max_output,
    const std::optional<Tensor>& groups) {
  const auto rows = torch::stable::contiguous(boxes), row_scores = torch::stable::contiguous(scores);
  const auto row_groups = groups ? torch::stable::contiguous(*groups) : rows;
  const int64_t num_rows = rows.size(0), num_boxes = rows.size(1);
  auto indices = torch::stable::new_zeros(rows, {num_rows, max_output}, ScalarType::Long);
  auto counts = torch::stable::new_zeros(rows, {num_rows}, ScalarType::Long);
  if (rows.numel() == 0 || max_output == 0) return {indices, counts};
  STD_TORCH_CHECK(num_boxes <= std::numeric_limits<int32_t>::max(), "batched_nms: more than 2^31 boxes a row");
  int64_t *out = mutable_data_of<int64_t>(indices), *num_out = mutable_data_of<int64_t>(counts);
  const int64_t* ids = groups ? data_of<int64_t>(row_groups) : nullptr;
  dispatch_float(rows.scalar_type(), "batched_nms", [&](auto zero) {
    using T = decltype(zero);
    const auto* all = reinterpret_cast<const Box<T>*>(rows.const_data_ptr());
    dispatch_float(row_scores.scalar_type(), "batched_nms", [&](auto score) {
      const auto* all_scores = data_of<decltype(score)>(row_scores);
      torch::stable::parallel_for(0, num_rows, 1 + kGrainBoxes / num_boxes, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t first = row * num_boxes;
          num_out[row] = suppress_row(
              all + first, ids ? ids + first : nullptr, best_first(all_scores + first, num_boxes),
              comparable<T>(iou_threshold), max_output, out + row * max_output);
        }
      });
    });
  });
  return {indices, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, m) {
  m.def(
      "batched_nms(Tensor boxes, Tensor scores, float iou_threshold, int max_output, Tensor? groups=None)"
      " -> (Tensor indices, Tensor counts)");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CPU, m) {
  m.impl("batched_nms", TORCH_BOX(&batched_nms_cpu));
}

}  // namespace cuda_ops
