// Kernels with one mistake each, and their corrections: the emulator must report the former and not the latter.
#include <cassert>
#include <map>
#include <string>

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

__global__ void parted_kernel(const float* values, float* sum) {
  if (threadIdx.x < kBlock / 2) {
    __syncthreads();
    if (threadIdx.x == 0) *sum = values[0];
  } else {
    __syncthreads();
  }
}

// Votes of a warp whose lanes stand in two lines, or give two masks, or one that leaves them out.
__global__ void votes_apart_kernel(float* sum) {
  const unsigned all = 0xffffffffu;
  if (threadIdx.x % 2 == 0) {
    if (__any_sync(all, 1)) *sum = 1;
  } else {
    __any_sync(all, 0);
  }
}

__global__ void vote_kernel(unsigned mask_of_first, unsigned mask_of_last, float* sum) {
  const int vote = __any_sync(threadIdx.x < 16 ? mask_of_first : mask_of_last, 1);
  if (threadIdx.x == 0) *sum = float(vote);
}

__global__ void absent_shuffle_kernel(const float* values, float* sum) {
  if (threadIdx.x >= 16) return;
  const float other = __shfl_sync(0xffffu, values[threadIdx.x], 20);
  if (threadIdx.x == 0) *sum = other;
}

// All read, and then the last one writes.
__global__ void late_write_kernel(float* sum) {
  if (*sum != 0) return;
  if (threadIdx.x + blockIdx.x == 3) *sum = 1;
}

__global__ void half_atomic_kernel(float* sum) {
  if (threadIdx.x == 0) {
    *sum = 1;
  } else {
    atomicAdd(sum, 1.0f);
  }
}

__global__ void foreign_shared_kernel(const float* values, float* sum) {
  __shared__ float copies[kBlock];
  if (blockIdx.x == 0) copies[threadIdx.x] = values[threadIdx.x];
  __syncthreads();
  atomicAdd(sum, copies[threadIdx.x]);
}

// Packs that begin within what may be touched, and end outside.
struct Six {
  float values[6];
};

template <class Pack>
__global__ void copy_pack_kernel(const float* from, float* to) {
  *reinterpret_cast<Pack*>(to) = *reinterpret_cast<const Pack*>(from);
}

__global__ void copy_into_shared_kernel(const float* values, float* sum) {
  __shared__ float copies[kBlock - 1];
  reinterpret_cast<float4*>(copies)[15] = *reinterpret_cast<const float4*>(values);
  *sum = copies[60];
}

float latest;  // of the library, no memory of the device

__global__ void remember_kernel(const float* values, float* sum) {
  *sum = latest;
  latest = values[0];
}

__global__ void last_kernel(float* sum) {
  atomicExch(sum, float(blockIdx.x * blockDim.x + threadIdx.x));
}

__global__ void grid_kernel(float* sum) {
  if (blockIdx.x == 0) *sum = float(gridDim.x);
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
  if (lane < 8) right += (__ballot_sync(0xffu, 1) == 0xffu) + __all_sync(0xffu, 1);  // where only these lanes come
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

// What a launch is given: values [64], a sum [1], a copy [64], the stream.
struct Call {
  const float* from;
  float *to, *copy;
  cudaStream_t stream;
};

const std::map<std::string, void (*)(const Call&)> kLaunches{
    {"none: barriers", [](const Call& in) { sum_kernel<Barriers::kAll><<<1, kBlock, 0, in.stream>>>(in.from, in.to); }},
    {"none: primitives", [](const Call& in) { primitives_kernel<<<1, dim3(16, 4), 0, in.stream>>>(in.to); }},
    {"none: the last thread", [](const Call& in) { last_kernel<<<4, 16, 0, in.stream>>>(in.to); }},
    {"none: the size of the grid", [](const Call& in) { grid_kernel<<<4, 1, 0, in.stream>>>(in.to); }},
    {"none: atomics", [](const Call& in) { add_kernel<<<4, 16, 0, in.stream>>>(in.from, in.to, kBlock, true); }},
    {"none: filled", [](const Call& in) { add_kernel<<<1, kBlock, 0, in.stream>>>(in.copy, in.to, kBlock, true); }},
    {"none: copied", [](const Call& in) { add_kernel<<<1, kBlock, 0, in.stream>>>(in.copy, in.to, kBlock, true); }},
    {"a barrier that some threads miss",
     [](const Call& in) { sum_kernel<Barriers::kSome><<<1, kBlock, 0, in.stream>>>(in.from, in.to); }},
    {"barriers in two places", [](const Call& in) { parted_kernel<<<1, kBlock, 0, in.stream>>>(in.from, in.to); }},
    {"no barrier", [](const Call& in) { sum_kernel<Barriers::kNone><<<1, kBlock, 0, in.stream>>>(in.from, in.to); }},
    {"a vote that half the warp misses",
     [](const Call& in) { ballot_kernel<<<1, kBlock, 0, in.stream>>>(in.from, in.to); }},
    {"votes in two places", [](const Call& in) { votes_apart_kernel<<<1, 32, 0, in.stream>>>(in.to); }},
    {"votes of two masks",
     [](const Call& in) { vote_kernel<<<1, 32, 0, in.stream>>>(0xffffffffu, 0xffff0000u, in.to); }},
    {"a vote by a lane that its mask leaves out",
     [](const Call& in) { vote_kernel<<<1, 32, 0, in.stream>>>(0xfffffffeu, 0xfffffffeu, in.to); }},
    {"a shuffle by 32 lanes", [](const Call& in) { far_shuffle_kernel<<<1, kBlock, 0, in.stream>>>(in.from, in.to); }},
    {"a shuffle from a lane that its mask leaves out",
     [](const Call& in) { absent_shuffle_kernel<<<1, 32, 0, in.stream>>>(in.from, in.to); }},
    {"sum of what was not zeroed",
     [](const Call& in) { add_kernel<<<4, 16, 0, in.stream>>>(in.from, in.to, kBlock, true); }},
    {"shared memory that was not written",
     [](const Call& in) { forgetful_sum_kernel<<<1, kBlock, 0, in.stream>>>(in.from, in.to); }},
    {"shared memory that another block wrote",
     [](const Call& in) { foreign_shared_kernel<<<2, kBlock, 0, in.stream>>>(in.from, in.to); }},
    {"blocks that add without atomics",
     [](const Call& in) { add_block_kernel<<<kBlock, 1, 0, in.stream>>>(in.from, in.to); }},
    {"threads that add without atomics",
     [](const Call& in) { add_kernel<<<1, kBlock, 0, in.stream>>>(in.from, in.to, kBlock, false); }},
    {"a thread that writes what others read", [](const Call& in) { late_write_kernel<<<1, 4, 0, in.stream>>>(in.to); }},
    {"a block that writes what others read", [](const Call& in) { late_write_kernel<<<4, 1, 0, in.stream>>>(in.to); }},
    {"an addition beside atomic ones", [](const Call& in) { half_atomic_kernel<<<1, 4, 0, in.stream>>>(in.to); }},
    {"a read past the end",
     [](const Call& in) { add_kernel<<<1, 16, 0, in.stream>>>(in.from, in.to, kBlock + 1, true); }},
    {"a write past the end", [](const Call& in) { copy_kernel<<<1, 2, 0, in.stream>>>(in.from, in.to, 2); }},
    {"a write past the end of a shared variable",
     [](const Call& in) { outside_shared_kernel<<<1, kBlock, 0, in.stream>>>(in.from, in.to); }},
    {"a pack that is read past the end",
     [](const Call& in) { copy_pack_kernel<float2><<<1, 1, 0, in.stream>>>(in.to, in.copy); }},
    {"a struct that is read past the end",
     [](const Call& in) { copy_pack_kernel<Six><<<1, 1, 0, in.stream>>>(in.from + 60, in.copy); }},
    {"a struct that is written past the end",
     [](const Call& in) { copy_pack_kernel<Six><<<1, 1, 0, in.stream>>>(in.from, in.copy + 60); }},
    {"a pack that is written past the end of a shared variable",
     [](const Call& in) { copy_into_shared_kernel<<<1, 1, 0, in.stream>>>(in.from, in.to); }},
    {"a write to a variable of the library", [](const Call& in) { remember_kernel<<<1, 1, 0, in.stream>>>(in.from, in.to); }},
    {"a pack at an odd address", [](const Call& in) { packed_kernel<<<1, 1, 0, in.stream>>>(in.from, in.to); }},
    {"an integer divided by 0", [](const Call& in) { divide_kernel<<<1, 1, 0, in.stream>>>(in.from, in.to); }},
    {"an assertion that does not hold", [](const Call& in) { assert_kernel<<<2, 2, 0, in.stream>>>(in.from, in.to); }},
    {"a loop without an end", [](const Call& in) { endless_kernel<<<4, 32, 0, in.stream>>>(in.from, in.to); }},
    {"a loop without an end that touches no memory",
     [](const Call& in) { endless_search_kernel<<<4, 32, 0, in.stream>>>(in.from, in.to); }},
    {"no blocks", [](const Call& in) { add_kernel<<<0, kBlock, 0, in.stream>>>(in.from, in.to, kBlock, true); }},
    {"2^32 blocks",
     [](const Call& in) { copy_kernel<<<dim3(1 << 16, 1 << 15, 2), 1, 0, in.stream>>>(in.from, in.to, 1); }},
    {"too many blocks along y",
     [](const Call& in) { copy_kernel<<<dim3(1, 65536), 1, 0, in.stream>>>(in.from, in.to, 1); }},
    {"too many blocks along z",
     [](const Call& in) { copy_kernel<<<dim3(1, 1, 65536), 1, 0, in.stream>>>(in.from, in.to, 1); }},
    {"more threads than a block may have",
     [](const Call& in) { add_kernel<<<1, 1025, 0, in.stream>>>(in.from, in.to, kBlock, true); }},
    {"more threads along z than a block may have",
     [](const Call& in) { add_kernel<<<1, dim3(1, 1, 65), 0, in.stream>>>(in.from, in.to, kBlock, true); }},
    {"more threads than __launch_bounds__",
     [](const Call& in) { bounded_kernel<<<1, kBlock, 0, in.stream>>>(in.from, in.to); }},
    {"more shared memory than a block may have",
     [](const Call& in) { add_kernel<<<1, kBlock, (48 << 10) + 1, in.stream>>>(in.from, in.to, kBlock, true); }},
    {"more shared memory with the kernel's own",
     [](const Call& in) { sum_kernel<Barriers::kAll><<<1, kBlock, 48 << 10, in.stream>>>(in.from, in.to); }},
    {"a memset past the end", [](const Call& in) { STD_CUDA_CHECK(cudaMemsetAsync(in.to, 0, 8, in.stream)); }},
};

// values: [64] float32, whose sum is returned if nothing is wrong.
Tensor mistake(const Tensor& values, std::string name) {
  const OnDeviceOf device(values);
  auto sum = torch::stable::new_empty(values, {1}), copy = torch::stable::new_empty(values, {kBlock});
  const Call call{data_of<float>(values), mutable_data_of<float>(sum), mutable_data_of<float>(copy), device.stream()};
  if (name != "sum of what was not zeroed") torch::stable::zero_(sum);
  if (name == "none: filled") torch::stable::fill_(copy, 2.0);
  if (name == "none: copied") torch::stable::copy_(copy, values);
  const auto found = kLaunches.find(name);
  STD_TORCH_CHECK(found != kLaunches.end(), "no kernel has this mistake: ", name);
  found->second(call);
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
