// Which ground truth each box should learn: one lane a box, so a warp has 32 neighbours. Each of its lanes looks at
// another ground-truth row, and the warp then compares its boxes only with rows that do not lie apart from all of them.
// Low-quality matches need the best IoU of each row first, from a launch of its own; the second computes the same bits
// again.
#include "cuda_common.h"
#include "matching.h"

namespace cuda_ops {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
struct Task {
  const Box<T>* boxes;
  const Box<T>* gt_boxes;
  const void* num_gt;
  bool has_long_counts, is_shared;
  int64_t num_boxes, num_rows;
  unsigned num_chunks;  // of an image
  T fg_iou, bg_iou;
};

// The bits of an IoU as an integer: of numbers from 0 on it has their order, and nan is made greater than all.
__device__ __forceinline__ int order_of(float iou) {
  return iou != iou ? 0x7fffffff : __float_as_int(iou);
}

__device__ __forceinline__ long long order_of(double iou) {
  return iou != iou ? 0x7fffffffffffffffLL : __double_as_longlong(iou);
}

__device__ __forceinline__ float iou_of(int order) {
  return __int_as_float(order);
}

__device__ __forceinline__ double iou_of(long long order) {
  return __longlong_as_double(order);
}

template <class T>
using Order = decltype(order_of(T{}));

template <class T>
__device__ __forceinline__ Box<T> bounds_of_warp(const Box<T>& box) {
  Box<T> bounds = box;
  for (int step = kWarp / 2; step > 0; step /= 2) {
    bounds.x1 = smaller(bounds.x1, __shfl_xor_sync(kAllLanes, bounds.x1, step));
    bounds.y1 = smaller(bounds.y1, __shfl_xor_sync(kAllLanes, bounds.y1, step));
    bounds.x2 = larger(bounds.x2, __shfl_xor_sync(kAllLanes, bounds.x2, step));
    bounds.y2 = larger(bounds.y2, __shfl_xor_sync(kAllLanes, bounds.y2, step));
  }
  return __all_sync(kAllLanes, is_tame(box)) ? bounds : everywhere<T>();
}

// Calls visit(row, iou) for every row that may overlap a box of the warp, in ascending order, with all lanes together.
template <class T, class F>
__device__ __forceinline__ void for_each_row(const Box<T>& box, const Box<T>* gt_boxes, int num_rows, const F& visit) {
  const Box<T> bounds = bounds_of_warp(box);
  const T area = box_area(box);
  const int lane = threadIdx.x % kWarp;
  for (int first = 0; first < num_rows; first += kWarp) {
    bool is_near = false;
    if (first + lane < num_rows) {
      const Box<T> gt = gt_boxes[first + lane];
      is_near = !is_tame(gt) || !is_apart(bounds, gt);
    }
    for (unsigned near = __ballot_sync(kAllLanes, is_near); near != 0; near &= near - 1) {
      const int row = first + __ffs(near) - 1;
      const Box<T> gt = gt_boxes[row];
      visit(row, box_iou(gt, box_area(gt), box, area));
    }
  }
}

// What a warp works on: 32 boxes of one image. Lanes past the last box repeat it, which changes no maximum.
template <class T>
struct Chunk {
  int64_t image, idx;
  int num_rows;
  bool is_box;
  Box<T> box;
  const Box<T>* gt_boxes;

  __device__ __forceinline__ Chunk(const Task<T>& task, unsigned item) {
    image = item / task.num_chunks;
    const int64_t lane_idx = static_cast<int64_t>(item % task.num_chunks) * kWarp + threadIdx.x % kWarp;
    is_box = lane_idx < task.num_boxes;
    idx = is_box ? lane_idx : task.num_boxes - 1;
    box = task.boxes[(task.is_shared ? 0 : image * task.num_boxes) + idx];
    gt_boxes = task.gt_boxes + image * task.num_rows;
    const int64_t count = task.has_long_counts ? static_cast<const int64_t*>(task.num_gt)[image]
                                               : static_cast<const int32_t*>(task.num_gt)[image];
    num_rows = static_cast<int>(rows_of(count, task.num_rows));
  }
};

// Chunks [0, count) that this warp handles. blockDim.x is a multiple of the warp, so its lanes stay together.
#define FOR_EACH_CHUNK(item, count)                                                       \
  for (unsigned item = (blockIdx.x * blockDim.x + threadIdx.x) / kWarp; item < (count); \
       item += gridDim.x * (blockDim.x / kWarp))

template <class T>
__global__ void best_of_gt_kernel(Task<T> task, unsigned num_items, Order<T>* best_of_gt) {
  FOR_EACH_CHUNK(item, num_items) {
    const Chunk<T> chunk(task, item);
    Order<T>* best_of_image = best_of_gt + chunk.image * task.num_rows;
    for_each_row(chunk.box, chunk.gt_boxes, chunk.num_rows, [&](int row, T iou) {
      Order<T> best = order_of(iou);
      for (int step = kWarp / 2; step > 0; step /= 2) best = max(best, __shfl_xor_sync(kAllLanes, best, step));
      if (threadIdx.x % kWarp == 0 && best > 0) atomicMax(best_of_image + row, best);
    });
  }
}

template <class T>
__global__ void match_boxes_kernel(Task<T> task, unsigned num_items, const Order<T>* best_of_gt, int64_t* matched) {
  FOR_EACH_CHUNK(item, num_items) {
    const Chunk<T> chunk(task, item);
    const Order<T>* best_of_image = best_of_gt == nullptr ? nullptr : best_of_gt + chunk.image * task.num_rows;
    T best = 0;
    int idx = 0;
    bool is_marked = false;
    for_each_row(chunk.box, chunk.gt_boxes, chunk.num_rows, [&](int row, T iou) {
      idx = iou > best ? row : idx;  // strictly greater: the lowest row wins a tie
      best = larger_or_nan(best, iou);
      if (best_of_image != nullptr) is_marked |= is_best_of_gt(iou, iou_of(best_of_image[row]));
    });
    if (!chunk.is_box) continue;
    const int learned = is_marked ? idx : verdict(best, idx, task.fg_iou, task.bg_iou);
    matched[chunk.image * task.num_boxes + chunk.idx] = chunk.num_rows == 0 ? kBackground : learned;
  }
}

Tensor match_boxes_cuda(
    const Tensor& boxes, const Tensor& gt_boxes, const Tensor& num_gt, double fg_iou, double bg_iou, bool low_quality) {
  const OnDeviceOf device(gt_boxes);
  const auto own = torch::stable::contiguous(boxes), gt = torch::stable::contiguous(gt_boxes);
  const auto counts = torch::stable::contiguous(num_gt);
  const int64_t num_images = gt.size(0), num_boxes = own.size(1), num_rows = gt.size(1);
  auto matched = torch::stable::new_empty(gt, {num_images, num_boxes}, ScalarType::Long);
  if (matched.numel() == 0) return matched;
  const int64_t num_chunks = (num_boxes + kWarp - 1) / kWarp, num_items = num_images * num_chunks;
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(num_items <= kMost && num_rows <= kMost - kWarp, "match_boxes: too many boxes for one call");
  dispatch_float(gt.scalar_type(), "match_boxes", [&](auto zero) {
    using T = decltype(zero);
    const Task<T> task{
        .boxes = reinterpret_cast<const Box<T>*>(own.const_data_ptr()),
        .gt_boxes = reinterpret_cast<const Box<T>*>(gt.const_data_ptr()),
        .num_gt = counts.const_data_ptr(),
        .has_long_counts = counts.scalar_type() == ScalarType::Long,
        .is_shared = own.size(0) != num_images,
        .num_boxes = num_boxes,
        .num_rows = num_rows,
        .num_chunks = static_cast<unsigned>(num_chunks),
        .fg_iou = static_cast<T>(fg_iou),  // torch compares in the dtype of the tensor
        .bg_iou = static_cast<T>(bg_iou)};
    const unsigned blocks = blocks_for(num_items * kWarp);
    Tensor best_of_gt;
    Order<T>* best = nullptr;
    if (low_quality && num_rows > 0) {
      best_of_gt = torch::stable::new_zeros(gt, {num_images, num_rows});  // the bits of 0 are those of the integer 0
      best = reinterpret_cast<Order<T>*>(best_of_gt.mutable_data_ptr());
      best_of_gt_kernel<T><<<blocks, kThreads, 0, device.stream()>>>(task, num_items, best);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    match_boxes_kernel<T><<<blocks, kThreads, 0, device.stream()>>>(
        task, num_items, best, mutable_data_of<int64_t>(matched));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return matched;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA, m) {
  m.impl("match_boxes", TORCH_BOX(&match_boxes_cuda));
}

}  // namespace cuda_ops
