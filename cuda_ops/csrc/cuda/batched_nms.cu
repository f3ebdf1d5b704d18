// Greedy non-maximum suppression of each row, its boxes sorted by score. They are taken in panels of kPanel boxes, two
// launches each: all pairs are compared by the whole device, then one block a row decides. Memory grows with rows, not
// with boxes², and rows that have max_output boxes take no further part. The number of launches follows from the shape
// alone.
#include <array>
#include <limits>
#include <optional>

#include "cuda_common.h"
#include "nms.h"

namespace cuda_ops {
namespace {

constexpr int kWord = 64;
constexpr int kHalfWarp = 16;
constexpr int kPanel = kHalfWarp * kWord;  // half a warp decides a box, a lane for each word of the panel
constexpr int kDecideThreads = kWord * kHalfWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

// What an IoU must exceed. Most pairs are decided without a division, by their intersection as a share of both areas:
// below `low` the IoU does not exceed the threshold, above `high` it does, however both were rounded; nan decides none.
template <class T>
struct Threshold {
  T iou, low, high;

  explicit Threshold(double threshold) : iou(comparable<T>(threshold)), low(NAN), high(NAN) {
    constexpr T epsilon = std::numeric_limits<T>::epsilon();  // five roundings are less than three of it
    if (iou < epsilon) return;
    const T share = iou / (1 + iou);
    low = share * (1 - 16 * epsilon);
    high = share * (1 + 16 * epsilon);
  }
};

template <class T>
struct Problem {
  const Box<T>* boxes;         // [R, K]
  const int64_t* order;        // [R, K]: row of boxes, best first
  const int64_t* groups;       // [R, K] or null
  const int64_t* num_ranked;   // [R]: how many of order have a score above -inf
  int64_t num_rows, num_boxes, max_output;
  int64_t num_words;  // W of a panel; less than half a warp where all boxes of a row are fewer than a panel
  Threshold<T> threshold;
  int64_t* indices;       // [R, max_output]: kept so far
  int64_t* counts;        // [R]
  unsigned* suppressed;   // [R, W, 2]: one bit for each box of the panel that a box kept before it suppresses
  uint64_t* suppressors;  // [R, W, kWord, W]: one bit for each better box of the panel that would suppress this one
};

// Marked scores are the last of a sorted row.
template <class S>
__global__ void count_ranked_kernel(const S* scores, int64_t num_rows, int64_t num_boxes, int64_t* num_ranked) {
  FOR_EACH_ITEM(row, num_rows) {
    int64_t low = 0, high = num_boxes;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (scores[row * num_boxes + middle] != kMarked<S>) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    num_ranked[row] = low;
  }
}

// As `suppresses` of nms.h decides, which is asked where boxes are no numbers: then areas are none, or infinite.
template <class T>
__device__ __forceinline__ bool suppresses(
    const Box<T>& kept, T kept_area, const Box<T>& box, T area, const Threshold<T>& threshold) {
  const T width = fmax(fmin(kept.x2, box.x2) - fmax(kept.x1, box.x1), T(0));
  const T height = fmin(kept.y2, box.y2) - fmax(kept.y1, box.y1);
  const T inter = width * height, areas = kept_area + area;
  if (inter < threshold.low * areas) return false;
  if (inter > threshold.high * areas) return true;
  return suppresses(kept, kept_area, box, area, threshold.iou);
}

// One block compares the 64 boxes of a word of the panel, a thread each, with 64 better ones: those of a word of the
// panel (source < W), or 64 of those kept before it. Whether a block returns early is the same for all its threads.
template <class T, bool kHasGroups>
__global__ void __launch_bounds__(kWord) compare_kernel(Problem<T> in, int start, unsigned num_sources) {
  const unsigned tile = blockIdx.x / num_sources, num_words = in.num_words;
  const int source = blockIdx.x % num_sources, word = tile % num_words;
  const int64_t row = tile / num_words, first_box = row * in.num_boxes, num_kept = in.counts[row];
  const int first = start + word * kWord, num_ranked = static_cast<int>(in.num_ranked[row]);
  const bool is_panel = source < static_cast<int>(num_words);
  const int first_other = is_panel ? start + source * kWord : (source - static_cast<int>(num_words)) * kWord;
  const int end_other = is_panel ? num_ranked : static_cast<int>(num_kept);
  if (first >= num_ranked || num_kept >= in.max_output) return;
  if (first_other >= end_other || (is_panel && source > word)) return;

  __shared__ Box<T> others[kWord];
  __shared__ T other_areas[kWord];
  __shared__ int64_t other_groups[kWord];
  const int lane = threadIdx.x, num_others = smaller(kWord, end_other - first_other);
  if (lane < num_others) {
    const int64_t* others_of = is_panel ? in.order + first_box : in.indices + row * in.max_output;
    const int64_t idx = first_box + others_of[first_other + lane];
    others[lane] = in.boxes[idx];
    other_areas[lane] = box_area(others[lane]);
    if (kHasGroups) other_groups[lane] = in.groups[idx];
  }
  __syncthreads();

  uint64_t bits = 0;
  if (first + lane < num_ranked) {
    const int64_t idx = first_box + in.order[first_box + first + lane];
    const Box<T> box = in.boxes[idx];
    const T area = box_area(box);
    const int64_t group = kHasGroups ? in.groups[idx] : 0;
    const int num_better = is_panel && source == word ? lane : num_others;
    for (int i = num_better - 1; i >= 0; --i) {
      const bool is_rival = !kHasGroups || other_groups[i] == group;
      const bool is_hit = is_rival && suppresses(others[i], other_areas[i], box, area, in.threshold);
      bits = 2 * bits + is_hit;
    }
    if (is_panel) in.suppressors[(static_cast<int64_t>(tile) * kWord + lane) * num_words + source] = bits;
  }
  if (!is_panel) {
    const unsigned votes = __ballot_sync(kAllLanes, bits != 0);
    if (lane % 32 == 0 && votes) atomicOr(&in.suppressed[tile * 2 + lane / 32], votes);
  }
}

// Bits 0 to 31 are the votes of the lanes of a warp on `first`, the others those on `second`.
__device__ uint64_t ballot(bool first, bool second) {
  const uint64_t low = __ballot_sync(kAllLanes, first), high = __ballot_sync(kAllLanes, second);
  return high << 32 | low;
}

// Which of 64 boxes, best first, are kept: one bit each, `room` of them at most. A box is kept if all that would
// suppress it are dead, and dead if one of them is kept; each round decides at least the best that is undecided.
// is_dead: suppressed by a box before these; suppressors: bit j of word i says that box j < i would suppress box i.
// All lanes of a warp must call it.
__device__ uint64_t decide_word(const bool* is_dead, const uint64_t* suppressors, int64_t room) {
  const int one = threadIdx.x % 32, other = one + 32;
  const uint64_t of_one = suppressors[one], of_other = suppressors[other];
  uint64_t dead = ballot(is_dead[one], is_dead[other]), kept = 0;
  while ((kept | dead) != ~uint64_t(0)) {
    kept = ballot((of_one & ~dead) == 0, (of_other & ~dead) == 0) & ~dead;
    dead |= ballot((of_one & kept) != 0, (of_other & kept) != 0);
  }
  const auto has_room = [&](int box) { return __popcll(kept & ((uint64_t(1) << box) - 1)) < room; };
  return kept & ballot(has_room(one), has_room(other));
}

// One block a row walks the words of the panel: half a warp for each of 64 boxes looks whether a box kept earlier in
// the panel suppresses it, then one warp decides among the 64, while the others ask for what the next word needs.
template <class T>
__global__ void __launch_bounds__(kDecideThreads) decide_kernel(Problem<T> in, int start) {
  __shared__ uint64_t kept[kHalfWarp];
  __shared__ uint64_t own_suppressors[kWord];
  __shared__ bool is_dead[kWord];
  const int num_words = static_cast<int>(in.num_words);
  const int64_t row = blockIdx.x, num_ranked = in.num_ranked[row], count_before = in.counts[row];
  const int box = threadIdx.x / kHalfWarp, lane = threadIdx.x % kHalfWarp;
  const auto position = [&](int word) { return start + word * kWord + box; };
  const auto suppressors_of = [&](int word) -> uint64_t {
    if (word >= num_words || lane > word || position(word) >= num_ranked) return 0;
    return in.suppressors[((row * num_words + word) * kWord + box) * num_words + lane];
  };
  const auto is_lost_before = [&](int word) {  // to a box before the panel, or for want of a box
    if (word >= num_words || lane != 0 || position(word) >= num_ranked) return true;
    return (in.suppressed[(row * num_words + word) * 2 + box / 32] >> (box % 32) & 1u) != 0;
  };
  int64_t count = count_before;
  if (count >= in.max_output) return;
  uint64_t suppressors = suppressors_of(0);
  bool is_lost = is_lost_before(0);
  for (int word = 0; word < num_words && count < in.max_output && start + word * kWord < num_ranked; ++word) {
    const bool is_hit = lane < word && (suppressors & kept[lane]);
    const unsigned votes = __ballot_sync(kAllLanes, is_hit) >> (threadIdx.x & kHalfWarp) & 0xffffu;
    if (lane == 0) is_dead[box] = is_lost || votes;
    if (lane == word) own_suppressors[box] = suppressors;
    suppressors = suppressors_of(word + 1);
    is_lost = is_lost_before(word + 1);
    __syncthreads();
    if (threadIdx.x < 32) {
      const uint64_t decided = decide_word(is_dead, own_suppressors, in.max_output - count);
      if (threadIdx.x == 0) kept[word] = decided;
    }
    __syncthreads();
    const uint64_t decided = kept[word];
    if (lane == 0 && (decided >> box & 1)) {
      const int64_t slot = count + __popcll(decided & ((uint64_t(1) << box) - 1));
      in.indices[row * in.max_output + slot] = in.order[row * in.num_boxes + position(word)];
    }
    count += __popcll(decided);
  }
  if (threadIdx.x == 0 && count > count_before) in.counts[row] = count;
}

// Called through the dispatcher, since stable/ops.h has had it only from torch 2.15 on.
std::tuple<Tensor, Tensor> sort_descending(const Tensor& scores) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(scores), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t(1)), torch::stable::detail::from(true)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

template <class T>
void launch_panels(const Problem<T>& problem, cudaStream_t stream) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(problem.num_boxes <= kMost - kPanel, "batched_nms: more than 2^31 boxes a row");
  const auto compare = problem.groups ? compare_kernel<T, true> : compare_kernel<T, false>;
  for (int start = 0; start < problem.num_boxes; start += kPanel) {
    const int64_t most_kept = std::min<int64_t>(start, problem.max_output);
    const int64_t num_sources = problem.num_words + (most_kept + kWord - 1) / kWord;
    const int64_t num_tiles = problem.num_rows * problem.num_words, num_blocks = num_tiles * num_sources;
    STD_TORCH_CHECK(num_blocks <= kMost, "batched_nms: too many boxes for one call");
    STD_CUDA_CHECK(cudaMemsetAsync(problem.suppressed, 0, num_tiles * sizeof(uint64_t), stream));
    compare<<<static_cast<unsigned>(num_blocks), kWord, 0, stream>>>(problem, start, num_sources);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    decide_kernel<T><<<static_cast<unsigned>(problem.num_rows), kDecideThreads, 0, stream>>>(problem, start);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

std::tuple<Tensor, Tensor> batched_nms_cuda(
    const Tensor& boxes, const Tensor& scores, double iou_threshold, int64_t max_output,
    const std::optional<Tensor>& groups) {
  const OnDeviceOf device(boxes);
  const auto rows = torch::stable::contiguous(boxes);
  const auto row_groups = groups ? torch::stable::contiguous(*groups) : rows;
  const int64_t num_rows = rows.size(0), num_boxes = rows.size(1);
  auto indices = torch::stable::new_zeros(rows, {num_rows, max_output}, ScalarType::Long);
  auto counts = torch::stable::new_zeros(rows, {num_rows}, ScalarType::Long);
  if (rows.numel() == 0 || max_output == 0) return {indices, counts};

  const auto [sorted, order] = sort_descending(torch::stable::contiguous(scores));
  const int64_t num_words = (std::min<int64_t>(num_boxes, kPanel) + kWord - 1) / kWord;
  auto num_ranked = torch::stable::new_empty(rows, {num_rows}, ScalarType::Long);
  auto suppressed = torch::stable::new_empty(rows, {num_rows, num_words}, ScalarType::Long);
  auto suppressors = torch::stable::new_empty(rows, {num_rows, num_words, kWord, num_words}, ScalarType::Long);
  const auto sorted_rows = torch::stable::contiguous(sorted), order_rows = torch::stable::contiguous(order);
  dispatch_float(sorted_rows.scalar_type(), "batched_nms", [&](auto zero) {
    count_ranked_kernel<<<blocks_for(num_rows), kThreads, 0, device.stream()>>>(
        data_of<decltype(zero)>(sorted_rows), num_rows, num_boxes, mutable_data_of<int64_t>(num_ranked));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  dispatch_float(rows.scalar_type(), "batched_nms", [&](auto zero) {
    using T = decltype(zero);
    launch_panels<T>(
        {reinterpret_cast<const Box<T>*>(rows.const_data_ptr()), data_of<int64_t>(order_rows),
         groups ? data_of<int64_t>(row_groups) : nullptr, data_of<int64_t>(num_ranked), num_rows, num_boxes, max_output,
         num_words, Threshold<T>(iou_threshold), mutable_data_of<int64_t>(indices), mutable_data_of<int64_t>(counts),
         reinterpret_cast<unsigned*>(suppressed.mutable_data_ptr()),
         reinterpret_cast<uint64_t*>(suppressors.mutable_data_ptr())},
        device.stream());
  });
  return {indices, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA, m) {
  m.impl("batched_nms", TORCH_BOX(&batched_nms_cuda));
}

}  // namespace cuda_ops
