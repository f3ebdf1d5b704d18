// What every operator shares: names of the stable ABI, dtypes, and code for host and device alike.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

// torch 2.11 names it otherwise, and its launch check below uses this name.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

// What a VECTORIZED function calls in its loops: left to choose, the compiler may let both copies share one of the
// lesser.
#ifdef __GNUC__
#define ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define ALWAYS_INLINE inline
#endif

// Arithmetic that the CPU and the CUDA kernels share.
#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE ALWAYS_INLINE
#endif

// A function compiled twice, for AVX2 and for any x86-64; the processor decides at run time. Loops in it are vectorised
// by the compiler; contraction is off (setup.py), so both copies give the same bits. A sanitizer starts too late for
// the choice.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__CUDACC__)
#define VECTORIZED __attribute__((target_clones("avx2", "default")))
#else
#define VECTORIZED
#endif

namespace cuda_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls f with a zero of the C++ type that dtype names: f(float{}) or f(double{}).
template <class F>
void dispatch_float(ScalarType dtype, const char* op, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    default:
      STD_TORCH_CHECK(false, op, ": dtype must be float32 or float64");
  }
}

// The first element of a contiguous tensor.
template <class T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data_of(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace cuda_ops
