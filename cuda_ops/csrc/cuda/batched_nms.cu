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

constexpr int kHalfWarp = 16;
constexpr int kPanel = kHalfWarp * kWord;  // half a warp decides a box, a lane for each word of the panel
constexpr int kDecideThreads = kWord * kHalfWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
struct Problem {
  const Box<T>* boxes;         // [R, K]
  const int64_t* order;        // [R, K]: row of boxes, best first
  const int64_t* groups;       // [R, K] or null
  const int64_t* num_ranked;   // [R]: how many of order have a score above -inf
  int64_t num_rows, num_boxes, max_output;
  int64_t num_words;  // W of a panel; less than half a warp where all boxes of a row are fewer than a panel
  T threshold;
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

// One block compares the 64 boxes of a word of the panel, a thread each, with 64 better ones: those of a word of the
// panel (source < W), or 64 of those kept before it. Whether a block returns early is the same for all its threads.
template <class T>
__global__ void compare_kernel(Problem<T> in, int64_t start, int64_t num_sources) {
  const int64_t source = blockIdx.x % num_sources, tile = blockIdx.x / num_sources;
  const int64_t word = tile % in.num_words, row = tile / in.num_words, first_box = row * in.num_boxes;
  const int64_t first = start + word * kWord, num_ranked = in.num_ranked[row], num_kept = in.counts[row];
  const bool is_panel = source < in.num_words;
  const int64_t first_other = is_panel ? start + source * kWord : (source - in.num_words) * kWord;
  const int64_t end_other = is_panel ? num_ranked : num_kept;
  if (first >= num_ranked || num_kept >= in.max_output) return;
  if (first_other >= end_other || (is_panel && source > word)) return;

  __shared__ Box<T> others[kWord];
  __shared__ T other_areas[kWord];
  __shared__ int64_t other_groups[kWord];
  const int lane = threadIdx.x;
  const int num_others = static_cast<int>(smaller<int64_t>(kWord, end_other - first_other));
  if (lane < num_others) {
    const int64_t* others_of = is_panel ? in.order + first_box : in.indices + row * in.max_output;
    const int64_t idx = first_box + others_of[first_other + lane];
    others[lane] = in.boxes[idx];
    other_areas[lane] = box_area(others[lane]);
    other_groups[lane] = in.groups ? in.groups[idx] : 0;
  }
  __syncthreads();

  uint64_t bits = 0;
  if (first + lane < num_ranked) {
    const int64_t idx = first_box + in.order[first_box + first + lane];
    const Box<T> box = in.boxes[idx];
    const T area = box_area(box);
    const int64_t group = in.groups ? in.groups[idx] : 0;
    const int num_better = is_panel && source == word ? lane : num_others;
    for (int i = 0; i < num_better; ++i) {
      const bool is_rival = other_groups[i] == group;
      bits |= uint64_t(is_rival && suppresses(others[i], other_areas[i], box, area, in.threshold)) << i;
    }
    if (is_panel) in.suppressors[(tile * kWord + lane) * in.num_words + source] = bits;
  }
  if (!is_panel) {
    const unsigned votes = __ballot_sync(kAllLanes, bits != 0);
    if (lane % 32 == 0 && votes) atomicOr(&in.suppressed[tile * 2 + lane / 32], votes);
  }
}

// One block a row walks the words of the panel: half a warp for each of 64 boxes looks whether a box kept earlier in
// the panel suppresses it, then one thread decides among the 64.
template <class T>
__global__ void decide_kernel(Problem<T> in, int64_t start) {
  __shared__ uint64_t kept[kHalfWarp];
  __shared__ uint64_t own_suppressors[kWord];
  __shared__ bool is_dead[kWord];
  const int64_t row = blockIdx.x, num_ranked = in.num_ranked[row], count_before = in.counts[row];
  const int box = threadIdx.x / kHalfWarp, lane = threadIdx.x % kHalfWarp;
  int64_t count = count_before;
  for (int word = 0; word < in.num_words && count < in.max_output && start + word * kWord < num_ranked; ++word) {
    const int64_t position = start + word * kWord + box;
    const bool is_ranked = position < num_ranked;
    const uint64_t* suppressors = in.suppressors + ((row * in.num_words + word) * kWord + box) * in.num_words;
    const bool is_hit = is_ranked && lane < word && (suppressors[lane] & kept[lane]);
    const unsigned votes = __ballot_sync(kAllLanes, is_hit) >> (threadIdx.x & kHalfWarp) & 0xffffu;
    if (lane == 0) {
      const unsigned was_suppressed = in.suppressed[(row * in.num_words + word) * 2 + box / 32] >> (box % 32) & 1u;
      is_dead[box] = !is_ranked || votes || was_suppressed;
      own_suppressors[box] = is_ranked ? suppressors[word] : 0;
    }
    __syncthreads();
    if (threadIdx.x == 0) kept[word] = decide_word(is_dead, own_suppressors, in.max_output - count);
    __syncthreads();
    const uint64_t decided = kept[word];
    if (lane == 0 && (decided >> box & 1)) {
      const int64_t slot = count + __popcll(decided & ((uint64_t(1) << box) - 1));
      in.indices[row * in.max_output + slot] = in.order[row * in.num_boxes + position];
    }
    count += __popcll(decided);
  }
  if (count == count_before) return;
  if (threadIdx.x == 0) in.counts[row] = count;
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
  for (int64_t start = 0; start < problem.num_boxes; start += kPanel) {
    const int64_t most_kept = std::min(start, problem.max_output);
    const int64_t num_sources = problem.num_words + (most_kept + kWord - 1) / kWord;
    const int64_t num_tiles = problem.num_rows * problem.num_words, num_blocks = num_tiles * num_sources;
    STD_TORCH_CHECK(num_blocks <= std::numeric_limits<int32_t>::max(), "batched_nms: too many boxes for one call");
    STD_CUDA_CHECK(cudaMemsetAsync(problem.suppressed, 0, num_tiles * sizeof(uint64_t), stream));
    compare_kernel<T><<<static_cast<unsigned>(num_blocks), kWord, 0, stream>>>(problem, start, num_sources);
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
         num_words, comparable<T>(iou_threshold), mutable_data_of<int64_t>(indices), mutable_data_of<int64_t>(counts),
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
