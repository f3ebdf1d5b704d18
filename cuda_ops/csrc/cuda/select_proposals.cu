// Of each level the boxes with the highest objectness, decoded and clipped, in two launches. One block for each chunk
// of a level finds the best of the chunk; then one block for each level of an image selects among those, sorts,
// decodes, clips and marks. Keys hold logit and index: no two are equal, so there is one answer, that of the CPU.
#include <algorithm>
#include <bit>

#include "cuda_common.h"
#include "proposals.h"

namespace cuda_ops {
namespace {

constexpr int kBlock = 1024;
constexpr int kItems = 16;  // anchors of a thread, in registers
constexpr int kLoads = 8;   // candidates that a thread asks for before it waits for one
constexpr int kChunk = kBlock * kItems;
constexpr int kWarp = 32, kWarps = kBlock / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kDigitBits = 11;  // two bins a thread
constexpr int kBins = 1 << kDigitBits;
constexpr unsigned kSharedKeys = 4096;  // more are sorted in global memory
constexpr int kMaxLevels = 32;
constexpr int64_t kMaxAnchors = int64_t(1) << 30;

struct Level {
  int64_t first, size;  // anchors
  int64_t first_candidate, num_candidates;
  int first_chunk;
};

// Levels and what is found of them in the first launch, as one argument of a kernel. Places count within an image.
struct Levels {
  Level levels[kMaxLevels];
  int num_levels, num_chunks;
  int64_t num_anchors, num_candidates, num_slots;
};

template <class T>
struct Problem {
  const float* logits;      // [N, A]
  const Deltas<T>* deltas;  // [N, A]
  const Box<T>* anchors;    // [A]
  const T* image_sizes;     // [N, 2]
  T min_size;
  Box<T>* boxes;  // [N, L, K]
  T* scores;      // [N, L, K]
};

// Keys from a bound on: those whose digits under the mask are not below it.
struct Bound {
  uint64_t mask, digits;

  // Of the same order as the key, without a sign.
  __device__ static uint64_t ordered(int64_t key) {
    return static_cast<uint64_t>(key) ^ (uint64_t(1) << 63);
  }

  __device__ bool takes(int64_t key) const {
    return (ordered(key) & mask) >= digits;
  }

  __device__ bool agrees(int64_t key) const {
    return (ordered(key) & mask) == digits;
  }
};

// Shared by the threads of a block while they select.
struct Selection {
  unsigned bins[kBins], sums_of_warps[kWarps];
  unsigned bin, num_above, num_inside;  // where the last key of the selection falls
  unsigned num_taken;
};

// Finds the bin in which, counted from the highest, the key number `wanted` falls. All threads must call it.
__device__ void find_bin(Selection& shared, unsigned wanted) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int upper = kBins - 1 - 2 * static_cast<int>(threadIdx.x);
  const unsigned in_upper = shared.bins[upper], own = in_upper + shared.bins[upper - 1];
  unsigned sum = own;  // of this lane and those before it
  for (int by = 1; by < kWarp; by *= 2) {
    const unsigned other = __shfl_up_sync(kAllLanes, sum, by);
    sum += lane >= by ? other : 0;
  }
  if (lane == kWarp - 1) shared.sums_of_warps[warp] = sum;
  __syncthreads();
  unsigned before = lane < warp ? shared.sums_of_warps[lane] : 0;
  for (int by = kWarp / 2; by > 0; by /= 2) before += __shfl_xor_sync(kAllLanes, before, by);
  before += sum - own;
  if (before < wanted && wanted <= before + own) {
    const bool is_upper = wanted <= before + in_upper;
    shared.bin = is_upper ? upper : upper - 1;
    shared.num_above = is_upper ? before : before + in_upper;
    shared.num_inside = is_upper ? in_upper : own - in_upper;
  }
  __syncthreads();
}

// The next digit: of the rank, then of the index, whose bits from index_bits on are the same in all keys.
__device__ int next_shift(int shift, int index_bits) {
  return shift > 32 ? shift - kDigitBits : larger(smaller(shift, index_bits) - kDigitBits, 0);
}

// The bound of the `wanted` greatest of num_keys keys, digit by digit. for_each_key(visit) visits those of this thread.
// All threads must call it.
template <class ForEachKey>
__device__ __forceinline__ Bound bound_of(
    Selection& shared, unsigned num_keys, unsigned wanted, int index_bits, const ForEachKey& for_each_key) {
  Bound bound{0, 0};
  if (num_keys <= wanted) return bound;
  for (int shift = 64 - kDigitBits;; shift = next_shift(shift, index_bits)) {
    for (int i = threadIdx.x; i < kBins; i += kBlock) shared.bins[i] = 0;
    __syncthreads();
    for_each_key([&](int64_t key) {
      if (bound.agrees(key)) atomicAdd(&shared.bins[Bound::ordered(key) >> shift & (kBins - 1)], 1u);
    });
    __syncthreads();
    find_bin(shared, wanted);
    wanted -= shared.num_above;
    bound.mask |= uint64_t(kBins - 1) << shift;
    bound.digits |= uint64_t(shared.bin) << shift;
    if (wanted == shared.num_inside) return bound;  // at the latest with the last digit, as no two keys are equal
  }
}

// Writes the keys that the bound takes, in any order. All threads must call it.
template <class ForEachKey>
__device__ __forceinline__ void write_taken(
    Selection& shared, const Bound& bound, const ForEachKey& for_each_key, int64_t* taken) {
  if (threadIdx.x == 0) shared.num_taken = 0;
  __syncthreads();
  for_each_key([&](int64_t key) {
    if (bound.takes(key)) taken[atomicAdd(&shared.num_taken, 1u)] = key;
  });
}

// Bits of the numbers below size > 0.
__device__ int bits_of(int64_t size) {
  return 64 - __clzll(size - 1);
}

// One block a chunk of an image. candidates [N, num_candidates]: keys of the best of each chunk, indices counted in the
// level.
__global__ void __launch_bounds__(kBlock) shorten_kernel(Levels in, const float* logits, int64_t* candidates) {
  __shared__ Selection shared;
  const int64_t image = blockIdx.x / in.num_chunks;
  const int chunk = blockIdx.x % in.num_chunks;
  int l = 0;
  while (l + 1 < in.num_levels && in.levels[l + 1].first_chunk <= chunk) ++l;
  const Level& level = in.levels[l];
  const int64_t first = static_cast<int64_t>(chunk - level.first_chunk) * kChunk;
  const int size = static_cast<int>(smaller<int64_t>(kChunk, level.size - first));
  const int most = static_cast<int>(smaller<int64_t>(kChunk, in.num_slots));
  const float* own = logits + image * in.num_anchors + level.first + first;
  int32_t ranks[kItems];
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int i = k * kBlock + threadIdx.x;
    ranks[k] = rank_of(own[smaller(i, size - 1)]);  // no branch, so that all loads are under way at once
  }
  const auto for_each_key = [&](const auto& visit) {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int i = k * kBlock + threadIdx.x;
      if (i < size) visit(key_of(ranks[k], first + i));
    }
  };
  const Bound bound = bound_of(shared, size, most, bits_of(level.size), for_each_key);
  int64_t* best = candidates + image * in.num_candidates + level.first_candidate;
  write_taken(shared, bound, for_each_key, best + static_cast<int64_t>(chunk - level.first_chunk) * most);
}

// A bitonic network; size is a power of two. All threads must call it, after a barrier.
__device__ __forceinline__ void sort_descending(int64_t* keys, unsigned size) {
  for (unsigned run = 2; run <= size; run *= 2) {
    for (unsigned step = run / 2; step > 0; step /= 2) {
      for (unsigned pair = threadIdx.x; pair < size / 2; pair += kBlock) {
        const unsigned one = 2 * pair - (pair & (step - 1)), other = one + step;
        const int64_t a = keys[one], b = keys[other];
        if ((a < b) == ((one & run) == 0)) {
          keys[one] = b;
          keys[other] = a;
        }
      }
      __syncthreads();
    }
  }
}

// Selects the num_keys best candidates of a level, sorted; `best` has room for a power of two. All threads must call
// it.
__device__ __forceinline__ void sort_best(
    Selection& shared, const int64_t* candidates, const Level& level, unsigned num_keys, int64_t* best) {
  if (num_keys == 0) return;
  const auto num_candidates = static_cast<unsigned>(level.num_candidates);
  const auto for_each_key = [&](const auto& visit) {
    for (unsigned first = threadIdx.x; first < num_candidates; first += kLoads * kBlock) {
      int64_t keys[kLoads];
#pragma unroll
      for (int k = 0; k < kLoads; ++k) keys[k] = candidates[smaller(first + k * kBlock, num_candidates - 1)];
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        if (first + k * kBlock < num_candidates) visit(keys[k]);
      }
    }
  };
  const Bound bound = bound_of(shared, num_candidates, num_keys, bits_of(level.size), for_each_key);
  write_taken(shared, bound, for_each_key, best);
  const unsigned room = 1u << bits_of(num_keys);
  for (unsigned i = num_keys + threadIdx.x; i < room; i += kBlock) best[i] = std::numeric_limits<int64_t>::min();
  __syncthreads();
  sort_descending(best, room);
}

template <class T>
__device__ __forceinline__ void write_best(
    const Problem<T>& in, const Levels& levels, const int64_t* keys, unsigned num_keys) {
  const int64_t image = blockIdx.x / levels.num_levels, first = levels.levels[blockIdx.x % levels.num_levels].first;
  for (int64_t slot = threadIdx.x; slot < levels.num_slots; slot += kBlock) {
    Proposal<T> proposal = no_proposal<T>();
    if (slot < num_keys) {
      const int64_t anchor = first + index_of(keys[slot]), row = image * levels.num_anchors + anchor;
      proposal = make_proposal(
          in.logits[row], in.deltas[row], in.anchors[anchor], in.image_sizes[2 * image], in.image_sizes[2 * image + 1],
          in.min_size);
    }
    const int64_t out = blockIdx.x * levels.num_slots + slot;
    in.boxes[out] = proposal.box;
    in.scores[out] = proposal.score;
  }
}

// One block a level of an image. spare [N, L, room]: where keys are sorted that shared memory does not hold.
template <class T>
__global__ void __launch_bounds__(kBlock)
    write_levels_kernel(Problem<T> in, Levels levels, const int64_t* candidates, int64_t* spare, int64_t room) {
  __shared__ Selection shared;
  __shared__ int64_t shared_keys[kSharedKeys];
  const Level& level = levels.levels[blockIdx.x % levels.num_levels];
  const int64_t* own = candidates + blockIdx.x / levels.num_levels * levels.num_candidates + level.first_candidate;
  const auto num_keys = static_cast<unsigned>(smaller(level.size, levels.num_slots));
  if (num_keys <= kSharedKeys) {
    sort_best(shared, own, level, num_keys, shared_keys);
    write_best(in, levels, shared_keys, num_keys);
  } else {
    int64_t* keys = spare + blockIdx.x * room;
    sort_best(shared, own, level, num_keys, keys);
    write_best(in, levels, keys, num_keys);
  }
}

Levels levels_of(const std::vector<int64_t>& sizes, int64_t num_slots) {
  STD_TORCH_CHECK(
      sizes.size() <= kMaxLevels, "select_proposals: level_sizes must be at most ", kMaxLevels, " levels, got ",
      sizes.size());
  Levels levels{};
  levels.num_slots = num_slots;
  for (const int64_t size : sizes) {
    const int64_t num_chunks = (size + kChunk - 1) / kChunk, most = std::min<int64_t>(num_slots, kChunk);
    const int64_t num_candidates = size == 0 ? 0 : (num_chunks - 1) * most + std::min(most, (size - 1) % kChunk + 1);
    levels.levels[levels.num_levels++] = {
        levels.num_anchors, size, levels.num_candidates, num_candidates, levels.num_chunks};
    levels.num_anchors += size;
    levels.num_candidates += num_candidates;
    levels.num_chunks += static_cast<int>(num_chunks);
  }
  return levels;
}

unsigned blocks_of(int64_t count) {
  STD_TORCH_CHECK(count <= std::numeric_limits<int32_t>::max(), "select_proposals: too many images for one call");
  return static_cast<unsigned>(count);
}

std::tuple<Tensor, Tensor> select_proposals_cuda(
    const Tensor& objectness, const Tensor& box_deltas, const Tensor& anchors, const Tensor& image_sizes,
    std::vector<int64_t> level_sizes, int64_t pre_nms_top_n, double min_size) {
  const OnDeviceOf device(objectness);
  const auto logits = torch::stable::contiguous(objectness), deltas = torch::stable::contiguous(box_deltas);
  const auto all_anchors = torch::stable::contiguous(anchors), sizes = torch::stable::contiguous(image_sizes);
  const int64_t num_images = logits.size(0), num_levels = level_sizes.size();
  const int64_t num_slots = std::min(pre_nms_top_n, *std::max_element(level_sizes.begin(), level_sizes.end()));
  auto boxes = torch::stable::new_empty(all_anchors, {num_images, num_levels, num_slots, 4});
  auto scores = torch::stable::new_empty(all_anchors, {num_images, num_levels, num_slots});
  if (scores.numel() == 0) return {boxes, scores};
  STD_TORCH_CHECK(logits.size(1) <= kMaxAnchors, "select_proposals: more than 2^30 anchors an image");
  const Levels levels = levels_of(level_sizes, num_slots);
  auto candidates = torch::stable::new_empty(logits, {num_images, levels.num_candidates}, ScalarType::Long);
  shorten_kernel<<<blocks_of(num_images * levels.num_chunks), kBlock, 0, device.stream()>>>(
      levels, data_of<float>(logits), mutable_data_of<int64_t>(candidates));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const int64_t room = num_slots <= kSharedKeys ? 0 : std::bit_ceil(static_cast<uint64_t>(num_slots));
  auto spare = torch::stable::new_empty(logits, {num_images * num_levels, room}, ScalarType::Long);
  dispatch_float(all_anchors.scalar_type(), "select_proposals", [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> problem{
        data_of<float>(logits),
        reinterpret_cast<const Deltas<T>*>(deltas.const_data_ptr()),
        reinterpret_cast<const Box<T>*>(all_anchors.const_data_ptr()),
        data_of<T>(sizes),
        T(min_size),
        reinterpret_cast<Box<T>*>(boxes.mutable_data_ptr()),
        mutable_data_of<T>(scores),
    };
    write_levels_kernel<T><<<blocks_of(num_images * num_levels), kBlock, 0, device.stream()>>>(
        problem, levels, data_of<int64_t>(candidates), mutable_data_of<int64_t>(spare), room);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {boxes, scores};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA, m) {
  m.impl("select_proposals", TORCH_BOX(&select_proposals_cuda));
}

}  // namespace cuda_ops
