// Of each level the boxes with the highest objectness, decoded and clipped. torch's top-k works on keys that hold
// logit and index, so its answer is that of the CPU on ties too; one launch a level gathers, decodes, clips and marks.
#include <algorithm>
#include <array>

#include "cuda_common.h"
#include "proposals.h"

namespace cuda_ops {
namespace {

__global__ void keys_kernel(const float* logits, int64_t num_anchors, int64_t total, int64_t* keys) {
  FOR_EACH_ITEM(i, total) {
    keys[i] = key_of(rank_of(logits[i]), i % num_anchors);
  }
}

template <class T>
struct Problem {
  const float* logits;      // [N, A]
  const Deltas<T>* deltas;  // [N, A]
  const Box<T>* anchors;    // [A]
  const T* image_sizes;     // [N, 2]
  int64_t num_images, num_anchors, num_levels, num_slots;
  T min_size;
  Box<T>* boxes;  // [N, L, K]
  T* scores;      // [N, L, K]
};

template <class T>
__global__ void write_level_kernel(Problem<T> in, const int64_t* keys, int64_t num_keys, int64_t level) {
  FOR_EACH_ITEM(i, in.num_images * in.num_slots) {
    const int64_t image = i / in.num_slots, slot = i % in.num_slots;
    Proposal<T> proposal = no_proposal<T>();
    if (slot < num_keys) {
      const int64_t anchor = index_of(keys[image * num_keys + slot]), row = image * in.num_anchors + anchor;
      proposal = make_proposal(
          in.logits[row], in.deltas[row], in.anchors[anchor], in.image_sizes[2 * image], in.image_sizes[2 * image + 1],
          in.min_size);
    }
    const int64_t out = (image * in.num_levels + level) * in.num_slots + slot;
    in.boxes[out] = proposal.box;
    in.scores[out] = proposal.score;
  }
}

// The top_n greatest of each row, descending.
Tensor top_keys(const Tensor& keys, int64_t top_n) {
  std::array<StableIValue, 5> stack{
      torch::stable::detail::from(keys), torch::stable::detail::from(top_n), torch::stable::detail::from(int64_t(1)),
      torch::stable::detail::from(true), torch::stable::detail::from(true)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::topk", "", stack.data(), TORCH_ABI_VERSION));
  const auto idxs = torch::stable::detail::to<Tensor>(stack[1]);  // owned by the stack until taken
  return torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]));
}

std::tuple<Tensor, Tensor> select_proposals_cuda(
    const Tensor& objectness, const Tensor& box_deltas, const Tensor& anchors, const Tensor& image_sizes,
    std::vector<int64_t> level_sizes, int64_t pre_nms_top_n, double min_size) {
  const OnDeviceOf device(objectness);
  const auto logits = torch::stable::contiguous(objectness), deltas = torch::stable::contiguous(box_deltas);
  const auto all_anchors = torch::stable::contiguous(anchors), sizes = torch::stable::contiguous(image_sizes);
  const int64_t num_images = logits.size(0), num_anchors = logits.size(1), num_levels = level_sizes.size();
  const int64_t num_slots = std::min(pre_nms_top_n, *std::max_element(level_sizes.begin(), level_sizes.end()));
  auto boxes = torch::stable::new_empty(all_anchors, {num_images, num_levels, num_slots, 4});
  auto scores = torch::stable::new_empty(all_anchors, {num_images, num_levels, num_slots});
  if (scores.numel() == 0) return {boxes, scores};
  STD_TORCH_CHECK(num_anchors <= 0xffffffff, "select_proposals: more than 2^32 anchors an image");
  auto keys = torch::stable::new_empty(logits, {num_images, num_anchors}, ScalarType::Long);
  const int64_t total = num_images * num_anchors;
  keys_kernel<<<blocks_for(total), kThreads, 0, device.stream()>>>(
      data_of<float>(logits), num_anchors, total, mutable_data_of<int64_t>(keys));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  dispatch_float(all_anchors.scalar_type(), "select_proposals", [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> problem{
        data_of<float>(logits),
        reinterpret_cast<const Deltas<T>*>(deltas.const_data_ptr()),
        reinterpret_cast<const Box<T>*>(all_anchors.const_data_ptr()),
        data_of<T>(sizes),
        num_images,
        num_anchors,
        num_levels,
        num_slots,
        T(min_size),
        reinterpret_cast<Box<T>*>(boxes.mutable_data_ptr()),
        mutable_data_of<T>(scores),
    };
    int64_t first = 0;
    for (int64_t level = 0; level < num_levels; ++level) {
      const int64_t size = level_sizes[level], top_n = std::min(num_slots, size);
      auto of_level = torch::stable::narrow(keys, 1, first, size);
      const auto best = top_keys(of_level, top_n);
      write_level_kernel<T><<<blocks_for(num_images * num_slots), kThreads, 0, device.stream()>>>(
          problem, data_of<int64_t>(best), top_n, level);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      first += size;
    }
  });
  return {boxes, scores};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA, m) {
  m.impl("select_proposals", TORCH_BOX(&select_proposals_cuda));
}

}  // namespace cuda_ops
