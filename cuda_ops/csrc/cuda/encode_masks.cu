// Run-length codes of masks: one block a mask, one thread a column. Changes are counted, then written where the counts
// say; the host waits for their number, then for the changes, and makes text of them.
#include "cuda_common.h"
#include "masks.h"
#include "run_lengths.h"

namespace cuda_ops {
namespace {

constexpr int64_t kMaxSide = 5120;  // rows of cells that shared memory holds on every device, beside the sums

template <class T>
struct Masks {
  const T* cells;
  const Box<T>* boxes;
  int64_t side, height, width;
  T threshold;
  bool is_exact;
  Roundings roundings;
};

// One column of pixels, each computed when it is asked for.
template <class T>
struct ComputedColumn {
  const ResizedMask<T>& mask;
  Sample<T> column;

  __device__ uint8_t certainty(int64_t cell) const {
    return cuda_ops::certainty(mix_at(mask, column, cell), mask.threshold);
  }

  __device__ bool is_set(int64_t /*cell*/, int64_t /*next*/, int64_t row) const {
    return pixel(mask, column, sample(mask.y, row, mask.rounding.fuses_index)) > mask.threshold;
  }
};

template <class T>
__device__ ComputedColumn<T> column_at(const ResizedMask<T>& mask, int64_t x) {
  return {mask, sample(mask.x, x, mask.rounding.fuses_index)};
}

// The mask of this block, and the first row of each of its cells in shared memory. All threads must call it.
template <class T>
__device__ ResizedMask<T> shared_mask(const Masks<T>& masks, int64_t* first_rows) {
  const int64_t d = blockIdx.x, side = masks.side;
  const auto mask = resized_mask(
      masks.cells + d * side * side, masks.boxes[d], side, masks.height, masks.width, masks.threshold, masks.is_exact,
      masks.roundings);
  for (int64_t cell = threadIdx.x; cell <= side; cell += blockDim.x) {
    first_rows[cell] = first_row(mask.y, cell, mask.rounding.fuses_index);
  }
  __syncthreads();
  return mask;
}

// Calls record(place) for each change in column x, top to bottom.
template <class T, class Record>
__device__ void record_column(const ResizedMask<T>& mask, const int64_t* first_rows, int64_t x, const Record& record) {
  const int64_t last_row = mask.y.extent - 1;
  const bool goes_on = x > mask.x.begin && mask.y.end > last_row;  // the pixel before is the last of the column before
  const bool is_set = goes_on && column_at(mask, x - 1).is_set(0, 0, last_row);
  record_changes(mask, first_rows, x, is_set, column_at(mask, smaller(x, mask.x.end - 1)), record);
}

// Sum of the values of the threads before this one in the block, and of all. All threads must call it.
__device__ int2 sum_before(int value, int* sums) {
  const unsigned thread = threadIdx.x;
  sums[thread] = value;
  __syncthreads();
  for (unsigned distance = 1; distance < kThreads; distance *= 2) {
    const int before = thread >= distance ? sums[thread - distance] : 0;
    __syncthreads();
    sums[thread] += before;
    __syncthreads();
  }
  const int2 result = make_int2(sums[thread] - value, sums[kThreads - 1]);
  __syncthreads();  // before the next call writes
  return result;
}

// column_starts [D, width]: changes of the mask before column x; totals [D].
template <class T>
__global__ void count_changes(Masks<T> masks, int* column_starts, int64_t* totals) {
  extern __shared__ int64_t first_rows[];
  __shared__ int sums[kThreads];
  const auto mask = shared_mask(masks, first_rows);
  const int64_t end = is_visible(mask) ? end_of_changes(mask) : mask.x.begin;
  int total = 0;
  for (int64_t first = mask.x.begin; first < end; first += kThreads) {
    const int64_t x = first + threadIdx.x;
    int count = 0;
    if (x < end) record_column(mask, first_rows, x, [&](int64_t) { ++count; });
    const int2 sum = sum_before(count, sums);
    if (x < end) column_starts[blockIdx.x * masks.width + x] = total + sum.x;
    total += sum.y;
  }
  if (threadIdx.x == 0) totals[blockIdx.x] = total;
}

// changes: those of mask d from offsets[d] on.
template <class T>
__global__ void write_changes(Masks<T> masks, const int* column_starts, const int64_t* offsets, int64_t* changes) {
  extern __shared__ int64_t first_rows[];
  const auto mask = shared_mask(masks, first_rows);
  const int64_t end = is_visible(mask) ? end_of_changes(mask) : mask.x.begin;
  for (int64_t x = mask.x.begin + threadIdx.x; x < end; x += kThreads) {
    int64_t* next = changes + offsets[blockIdx.x] + column_starts[blockIdx.x * masks.width + x];
    record_column(mask, first_rows, x, [&](int64_t place) { *next++ = place; });
  }
}

// Where each mask's changes begin: [D + 1] int64 on the host, from totals [D] on the device.
Tensor offsets_of(const Tensor& totals, const torch::stable::Device& host) {
  const auto counts = torch::stable::to(totals, host);
  const int64_t num_masks = counts.numel();
  auto offsets = torch::stable::new_empty(counts, {num_masks + 1});
  const auto* count = data_of<int64_t>(counts);
  auto* offset = mutable_data_of<int64_t>(offsets);
  offset[0] = 0;
  for (int64_t d = 0; d < num_masks; ++d) offset[d + 1] = offset[d] + count[d];
  return offsets;
}

template <class T>
std::vector<Text> texts_of(const Masks<T>& masks, const Tensor& cells, const OnDeviceOf& device) {
  const torch::stable::Device host(torch::headeronly::DeviceType::CPU);
  const int64_t num_masks = cells.size(0), width = masks.width;
  const size_t shared_bytes = (masks.side + 1) * sizeof(int64_t);
  const auto blocks = static_cast<unsigned>(num_masks);
  auto column_starts = torch::stable::new_empty(cells, {num_masks, width}, ScalarType::Int);
  auto totals = torch::stable::new_empty(cells, {num_masks}, ScalarType::Long);
  count_changes<<<blocks, kThreads, shared_bytes, device.stream()>>>(
      masks, mutable_data_of<int>(column_starts), mutable_data_of<int64_t>(totals));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const auto offsets = offsets_of(totals, host);
  const int64_t* offset = data_of<int64_t>(offsets);
  std::vector<Text> texts(num_masks);
  auto changes = torch::stable::new_empty(cells, {offset[num_masks]}, ScalarType::Long);
  if (changes.numel() > 0) {
    const auto offsets_there = torch::stable::to(offsets, cells.device());
    write_changes<<<blocks, kThreads, shared_bytes, device.stream()>>>(
        masks, data_of<int>(column_starts), data_of<int64_t>(offsets_there), mutable_data_of<int64_t>(changes));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const auto places = torch::stable::to(changes, host);
  torch::stable::parallel_for(0, num_masks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t d = begin; d < end; ++d) {
      texts[d] = text_of(data_of<int64_t>(places) + offset[d], offset[d + 1] - offset[d], masks.height * masks.width);
    }
  });
  return texts;
}

std::tuple<Tensor, Tensor> encode_masks_cuda(
    const Tensor& mask_probs, const Tensor& boxes, int64_t height, int64_t width, double threshold,
    bool is_exact) {
  const OnDeviceOf device(mask_probs);
  const auto cells = padded_cells(mask_probs), box = torch::stable::contiguous(boxes);
  if (cells.size(0) == 0) return joined({});
  const int64_t side = cells.size(1);
  STD_TORCH_CHECK(
      side <= kMaxSide, "encode_masks: mask_probs must have a side of at most ", kMaxSide - 2, ", got ", side - 2);
  std::vector<Text> texts;
  dispatch_float(cells.scalar_type(), "encode_masks", [&](auto zero) {
    using T = decltype(zero);
    const Masks<T> masks{
        data_of<T>(cells), reinterpret_cast<const Box<T>*>(box.const_data_ptr()), side, height, width,
        exclusive_threshold<T>(threshold, is_exact), is_exact,
        is_exact ? Roundings{} : torch_roundings(cells.scalar_type())};
    texts = texts_of(masks, cells, device);
  });
  return joined(texts);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA, m) {
  m.impl("encode_masks", TORCH_BOX(&encode_masks_cuda));
}

}  // namespace cuda_ops
