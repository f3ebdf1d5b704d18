// Kernels with one mistake each, and their corrections: the emulator must report the former and not the latter.
#include <cassert>

#include "cuda_common.h"

namespace cuda_ops {
namespace {

constexpr int kBlock = 64;

// Sum of a block's values. A tree whose last barriers only some threads reach, or whose barriers are left out.
enum class Barriers { kAll, kSome, kNone };

template <Barriers kBarriers>
__global__ void sum_kernel(const float* values, float* sum) {
  __shared__ float sums[kBlock];
  const unsigned thread = threadIdx.x;
  sums[thread] = values[thread];
  for (unsigned half = kBlock / 2; half > 0; half /= 2) {
    if (kBarriers == Barriers::kSome && thread >= 2 * half) return;
    if (kBarriers != Barriers::kNone) __syncthreads();
    if (thread < half) sums[thread] += sums[thread + half];
  }
  if (thread == 0) *sum = sums[0];
}

__global__ void forgetful_sum_kernel(const float* values, float* sum) {
  __shared__ float sums[kBlock + 1];  // the last one is never written
  sums[threadIdx.x] = values[threadIdx.x];
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0;
  for (int i = 0; i <= kBlock; ++i) total += sums[i];
  *sum = total;
}

__global__ void ballot_kernel(const float* values, float* sum) {
  if (threadIdx.x % 2 == 0 && __ballot_sync(0xffffffffu, values[threadIdx.x] > 0)) *sum = 1;
}

__global__ void add_kernel(const float* values, float* sum, int64_t count, bool is_atomic) {
  FOR_EACH_ITEM(i, count) {
    if (is_atomic) {
      atomicAdd(sum, values[i]);
    } else {
      *sum += values[i];
    }
  }
}

__global__ void add_block_kernel(const float* values, float* sum) {
  *sum += values[blockIdx.x];
}

__global__ void copy_kernel(const float* from, float* to, int64_t count) {
  FOR_EACH_ITEM(i, count) {
    to[i] = from[i];
  }
}

__global__ void outside_shared_kernel(const float* values, float* sum) {
  __shared__ float copies[kBlock];
  copies[threadIdx.x + 1] = values[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) *sum = copies[1];
}

__global__ void packed_kernel(const float* values, float* sum) {
  const float4 four = *reinterpret_cast<const float4*>(values + 1);
  *sum = four.x;
}

__global__ void endless_kernel(const float* values, float* sum) {
  while (values[0] == values[0]) *sum += 1;
}

// Bisects without an end, in registers alone.
__global__ void endless_search_kernel(const float* values, float* sum) {
  int low = int(values[2]), high = int(values[3]);
  while (low < high) {
    const int middle = (low + high) / 2;
    (middle > 40 ? high : low) = middle;
  }
  *sum = float(low);
}

__global__ void far_shuffle_kernel(const float* values, float* sum) {
  const float other = __shfl_xor_sync(0xffffffffu, values[threadIdx.x], 32) +
                      __shfl_down_sync(0xffffffffu, values[threadIdx.x], unsigned(-1));
  if (threadIdx.x == 0) *sum = other;
}

__global__ void divide_kernel(const float* values, float* sum) {
  *sum = float(7 / int(values[0]));
}

__global__ void assert_kernel(const float* values, float* sum) {
  assert(values[0] == 1);
}

__global__ void __launch_bounds__(kBlock / 2) bounded_kernel(const float* values, float* sum) {
  if (threadIdx.x == 0) *sum = values[63];
}

// Adds 1 for each thread and primitive whose result is what CUDA says.
__global__ void primitives_kernel(float* sum) {
  const int thread = threadIdx.x + blockDim.x * threadIdx.y, lane = thread % 32;
  const unsigned all = 0xffffffffu;
  int right = __shfl_sync(all, thread, 5) == thread - lane + 5;
  right += __shfl_xor_sync(all, thread, 3) == (thread ^ 3);
  right += __shfl_up_sync(all, double(thread), 2) == thread - (lane < 2 ? 0 : 2);
  right += __shfl_down_sync(all, thread, 2) == thread + (lane > 29 ? 0 : 2);
  right += __ballot_sync(all, lane % 2) == 0xaaaaaaaau && __any_sync(all, lane == 9) && !__all_sync(all, lane < 31);
  if (lane < 8) right += __ballot_sync(0xffu, 1) == 0xffu;  // where only these lanes come
  right += __syncthreads_count(thread < 40) == 40;
  right += __syncthreads_or(thread == 1) && !__syncthreads_or(thread < 0);
  right += __syncthreads_and(thread < 64) && !__syncthreads_and(thread < 63);
  __shared__ int cells[8];
  if (thread < 8) cells[thread] = thread == 3 || thread == 4 ? 255 : 0;
  __syncthreads();
  atomicAdd(cells, thread);
  atomicSub(cells + 1, thread);
  atomicMax(cells + 2, thread);
  atomicMin(cells + 3, thread);
  atomicAnd(cells + 4, thread | 64);
  atomicOr(cells + 5, thread);
  atomicXor(cells + 6, 1 << thread % 31);
  if (atomicCAS(cells + 7, 0, thread + 1) == 0) ++right;
  __syncthreads();
  const int expected[] = {2016, -2016, 63, 0, 64, 63, 3};  // the last: all bits twice, but those of threads 62 and 63
  for (int i = 0; i < 7; ++i) right += cells[i] == expected[i];
  atomicAdd(sum, float(right));
}

// values: [64] float32, whose sum is returned if nothing is wrong.
Tensor mistake(const Tensor& values, std::string name) {
  const OnDeviceOf device(values);
  auto sum = torch::stable::new_empty(values, {1});
  const float* from = data_of<float>(values);
  float* to = mutable_data_of<float>(sum);
  if (name != "sum of what was not zeroed") torch::stable::zero_(sum);
  const auto stream = device.stream();
  if (name == "none: barriers") {
    sum_kernel<Barriers::kAll><<<1, kBlock, 0, stream>>>(from, to);
  } else if (name == "none: primitives") {
    primitives_kernel<<<1, dim3(16, 4), 0, stream>>>(to);
  } else if (name == "a barrier that some threads miss") {
    sum_kernel<Barriers::kSome><<<1, kBlock, 0, stream>>>(from, to);
  } else if (name == "no barrier") {
    sum_kernel<Barriers::kNone><<<1, kBlock, 0, stream>>>(from, to);
  } else if (name == "shared memory that was not written") {
    forgetful_sum_kernel<<<1, kBlock, 0, stream>>>(from, to);
  } else if (name == "a vote that half the warp misses") {
    ballot_kernel<<<1, kBlock, 0, stream>>>(from, to);
  } else if (name == "none: atomics" || name == "sum of what was not zeroed") {
    add_kernel<<<4, 16, 0, stream>>>(from, to, kBlock, true);
  } else if (name == "blocks that add without atomics") {
    add_block_kernel<<<kBlock, 1, 0, stream>>>(from, to);
  } else if (name == "threads that add without atomics") {
    add_kernel<<<1, kBlock, 0, stream>>>(from, to, kBlock, false);
  } else if (name == "a read past the end") {
    add_kernel<<<1, 16, 0, stream>>>(from, to, kBlock + 1, true);
  } else if (name == "a write past the end") {
    copy_kernel<<<1, 2, 0, stream>>>(from, to, 2);
  } else if (name == "a write past the end of a shared variable") {
    outside_shared_kernel<<<1, kBlock, 0, stream>>>(from, to);
  } else if (name == "a pack at an odd address") {
    packed_kernel<<<1, 1, 0, stream>>>(from, to);
  } else if (name == "more threads than a block may have") {
    add_kernel<<<1, 1025, 0, stream>>>(from, to, kBlock, true);
  } else if (name == "no blocks") {
    add_kernel<<<0, kBlock, 0, stream>>>(from, to, kBlock, true);
  } else if (name == "more shared memory than a block may have") {
    add_kernel<<<1, kBlock, (48 << 10) + 1, stream>>>(from, to, kBlock, true);
  } else if (name == "a loop without an end") {
    endless_kernel<<<4, 32, 0, stream>>>(from, to);
  } else if (name == "a loop without an end that touches no memory") {
    endless_search_kernel<<<4, 32, 0, stream>>>(from, to);
  } else if (name == "a shuffle by 32 lanes") {
    far_shuffle_kernel<<<1, kBlock, 0, stream>>>(from, to);
  } else if (name == "an integer divided by 0") {
    divide_kernel<<<1, 1, 0, stream>>>(from, to);
  } else if (name == "an assertion that does not hold") {
    assert_kernel<<<2, 2, 0, stream>>>(from, to);
  } else if (name == "more threads than __launch_bounds__") {
    bounded_kernel<<<1, kBlock, 0, stream>>>(from, to);
  } else if (name == "2^32 blocks") {
    copy_kernel<<<dim3(1 << 16, 1 << 15, 2), 1, 0, stream>>>(from, to, 1);
  } else if (name == "a memset past the end") {
    STD_CUDA_CHECK(cudaMemsetAsync(to, 0, 8, stream));
  } else if (name == "none: filled" || name == "none: copied") {
    auto copy = torch::stable::new_empty(values, {kBlock});
    if (name == "none: filled") {
      torch::stable::fill_(copy, 2.0);
    } else {
      torch::stable::copy_(copy, values);
    }
    add_kernel<<<1, kBlock, 0, stream>>>(data_of<float>(copy), to, kBlock, true);
  } else {
    STD_TORCH_CHECK(false, "no kernel has this mistake: ", name);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return sum;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, m) {
  m.def("mistake(Tensor values, str name) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA, m) {
  m.impl("mistake", TORCH_BOX(&mistake));
}

}  // namespace cuda_ops
