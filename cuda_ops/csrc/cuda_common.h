// What every CUDA kernel shares: the current stream, launches, one thread an item.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "common.h"

namespace cuda_ops {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 65535;

// Work on a tensor's device, on the stream that is current there.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const {
    return stream_;
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline unsigned blocks_for(int64_t items, int threads = kThreads) {
  return static_cast<unsigned>(std::min((items + threads - 1) / threads, kMaxBlocks));
}

// Items i of [0, count) that this thread handles, however many blocks there are.
#define FOR_EACH_ITEM(i, count)                                                                       \
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < (count); \
       i += static_cast<int64_t>(gridDim.x) * blockDim.x)

}  // namespace cuda_ops
