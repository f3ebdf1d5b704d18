// Of each level the boxes with the highest objectness, decoded and clipped: objectness [N, A] → boxes [N, L, K, 4] and
// scores [N, L, K].
//
// The best of short runs of anchors tell a bound that at least K logits reach, so that few anchors are looked at twice.
#include <algorithm>
#include <functional>

#include "proposals.h"

namespace cuda_ops {
namespace {

constexpr int64_t kRun = 16;  // anchors of which the best is taken to find the bound

// The best rank of each whole run.
VECTORIZED void rank_runs(const float* logits, int64_t num_runs, int32_t* best) {
  for (int64_t run = 0; run < num_runs; ++run) {
    int32_t highest = rank_of(logits[run * kRun]);
    for (int64_t i = 1; i < kRun; ++i) highest = std::max(highest, rank_of(logits[run * kRun + i]));
    best[run] = highest;
  }
}

// Keys of the top_n best of a level, best first; top_n ≤ size. Indices count from first.
std::vector<int64_t> select_best(const float* logits, int64_t size, int64_t top_n, int64_t first) {
  if (top_n == 0) return {};
  const int64_t num_runs = size / kRun;
  std::vector<int32_t> best(num_runs);
  rank_runs(logits, num_runs, best.data());
  int32_t bound = std::numeric_limits<int32_t>::min();
  if (num_runs > top_n) {
    std::vector<int32_t> ranks = best;
    std::nth_element(ranks.begin(), ranks.begin() + (top_n - 1), ranks.end(), std::greater<>());
    bound = ranks[top_n - 1];
  }
  std::vector<int64_t> keys;
  const auto add_run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int32_t rank = rank_of(logits[i]);
      if (rank >= bound) keys.push_back(key_of(rank, first + i));
    }
  };
  for (int64_t run = 0; run < num_runs; ++run) {
    if (best[run] >= bound) add_run(run * kRun, (run + 1) * kRun);
  }
  add_run(num_runs * kRun, size);
  std::nth_element(keys.begin(), keys.begin() + (top_n - 1), keys.end(), std::greater<>());
  keys.resize(top_n);
  std::sort(keys.begin(), keys.end(), std::greater<>());
  return keys;
}

// Everything of one image.
template <class T>
struct Image {
  const float* logits;
  const Deltas<T>* deltas;
  const Box<T>* anchors;  // shared by all images
  T height, width;
};

template <class T>
void write_level(
    const Image<T>& image, const std::vector<int64_t>& keys, int64_t num_slots, T min_size, Box<T>* boxes, T* scores) {
  const int64_t num_keys = keys.size();
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    Proposal<T> proposal = no_proposal<T>();
    if (slot < num_keys) {
      const int64_t idx = index_of(keys[slot]);
      proposal = make_proposal(
          image.logits[idx], image.deltas[idx], image.anchors[idx], image.height, image.width, min_size);
    }
    boxes[slot] = proposal.box;
    scores[slot] = proposal.score;
  }
}

std::tuple<Tensor, Tensor> select_proposals_cpu(
    const Tensor& objectness, const Tensor& box_deltas, const Tensor& anchors, const Tensor& image_sizes,
    std::vector<int64_t> level_sizes, int64_t pre_nms_top_n, double min_size) {
  const auto logits = torch::stable::contiguous(objectness), deltas = torch::stable::contiguous(box_deltas);
  const auto all_anchors = torch::stable::contiguous(anchors), sizes = torch::stable::contiguous(image_sizes);
  const int64_t num_images = logits.size(0), num_anchors = logits.size(1), num_levels = level_sizes.size();
  const int64_t num_slots = std::min(pre_nms_top_n, *std::max_element(level_sizes.begin(), level_sizes.end()));
  auto boxes = torch::stable::new_empty(all_anchors, {num_images, num_levels, num_slots, 4});
  auto scores = torch::stable::new_empty(all_anchors, {num_images, num_levels, num_slots});
  STD_TORCH_CHECK(num_anchors <= 0xffffffff, "select_proposals: more than 2^32 anchors an image");
  std::vector<int64_t> first_anchors(num_levels, 0);
  for (int64_t level = 1; level < num_levels; ++level) {
    first_anchors[level] = first_anchors[level - 1] + level_sizes[level - 1];
  }
  dispatch_float(all_anchors.scalar_type(), "select_proposals", [&](auto zero) {
    using T = decltype(zero);
    auto* out_boxes = reinterpret_cast<Box<T>*>(boxes.mutable_data_ptr());
    T* out_scores = mutable_data_of<T>(scores);
    torch::stable::parallel_for(0, num_images * num_levels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t n = row / num_levels, level = row % num_levels, first = first_anchors[level];
        const Image<T> image{
            data_of<float>(logits) + n * num_anchors,
            reinterpret_cast<const Deltas<T>*>(deltas.const_data_ptr()) + n * num_anchors,
            reinterpret_cast<const Box<T>*>(all_anchors.const_data_ptr()),
            data_of<T>(sizes)[2 * n],
            data_of<T>(sizes)[2 * n + 1],
        };
        const int64_t top_n = std::min(num_slots, level_sizes[level]);
        const auto keys = select_best(image.logits + first, level_sizes[level], top_n, first);
        write_level(image, keys, num_slots, T(min_size), out_boxes + row * num_slots, out_scores + row * num_slots);
      }
    });
  });
  return {boxes, scores};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, m) {
  m.def(
      "select_proposals(Tensor objectness, Tensor box_deltas, Tensor anchors, Tensor image_sizes, int[] level_sizes,"
      " int pre_nms_top_n, float min_size) -> (Tensor boxes, Tensor scores)");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CPU, m) {
  m.impl("select_proposals", TORCH_BOX(&select_proposals_cpu));
}

}  // namespace cuda_ops
