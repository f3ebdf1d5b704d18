// The CUDA that kernels are written in, for a C++ compiler: `#include <cuda_runtime.h>` finds this file. Blocks run one
// after another, the threads of a block as fibers that change places at barriers and at the primitives of a warp
// (machine.cpp), and every access of a kernel is looked at (memory.cpp). What is not here, kernels do not use yet: they
// then fail to compile.
#pragma once

#include <math.h>  // overloads for float in the global namespace, as CUDA has them

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (emulator::now.thread)
#define blockIdx (emulator::now.block)
#define blockDim (emulator::now.block_size)
#define gridDim (emulator::now.grid)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define VECTOR_TYPE(name, T, bytes, list, ...) \
  struct alignas(bytes) name {                 \
    T __VA_ARGS__;                             \
  };                                           \
  inline name make_##name list {               \
    return {__VA_ARGS__};                      \
  }
VECTOR_TYPE(int2, int, 8, (int x, int y), x, y)
VECTOR_TYPE(uint2, unsigned, 8, (unsigned x, unsigned y), x, y)
VECTOR_TYPE(float2, float, 8, (float x, float y), x, y)
VECTOR_TYPE(double2, double, 16, (double x, double y), x, y)
VECTOR_TYPE(int4, int, 16, (int x, int y, int z, int w), x, y, z, w)
VECTOR_TYPE(uint4, unsigned, 16, (unsigned x, unsigned y, unsigned z, unsigned w), x, y, z, w)
VECTOR_TYPE(float4, float, 16, (float x, float y, float z, float w), x, y, z, w)
#undef VECTOR_TYPE

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9;
cudaError_t cudaGetLastError();

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t);

namespace emulator {

using Place = std::source_location;

// Kernels that read it go through their items in strides, so they may be given fewer blocks than they were launched
// with.
struct GridAxis {
  unsigned value;
  operator unsigned() const;
};

struct GridSize {
  GridAxis x, y, z;
};

// Where the thread that runs stands.
struct Now {
  dim3 thread, block, block_size;
  GridSize grid;
};
extern Now now;
extern unsigned char shared_memory[];

void run(
    const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*), const void* arguments);
void* shared_variable(const void* declaration, size_t bytes);
unsigned synchronize(bool vote, Place place);  // threads that voted for it
uint64_t shuffle(unsigned mask, uint64_t bits, unsigned from, const char* what, Place place);  // what that lane gave
unsigned ballot(unsigned mask, bool vote, const char* what, Place place);  // lanes that voted for it
void at_most(unsigned threads, unsigned = 0, unsigned = 0);  // what the kernel's __launch_bounds__ says
void access(const void* address, size_t bytes, bool is_write, bool is_atomic, const void* code);

// launch(…)(arguments) is kernel<<<…>>>(arguments). Arguments are copied once, as a launch copies them.
template <class Kernel>
auto launch(
    const char* name, const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes = 0, cudaStream_t = nullptr) {
  return [=](auto... args) {
    const auto body = [&] { kernel(args...); };
    run(name, grid, block, shared_bytes, [](const void* it) { (*static_cast<decltype(&body)>(it))(); }, &body);
  };
}

// The variable that kDeclaration declares __shared__ in the kernel that runs.
template <class T, int kDeclaration>
T& shared() {
  static const char declaration = 0;
  return *static_cast<T*>(shared_variable(&declaration, sizeof(T)));
}

template <class T, class Change>
__attribute__((noinline, no_sanitize_thread)) T atomically(T* at, const Change& change) {
  access(at, sizeof(T), true, true, __builtin_return_address(0));
  const T old = *at;
  *at = change(old);
  return old;
}

template <class T>
T shuffled(unsigned mask, T value, unsigned from, const char* what, Place place) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = shuffle(mask, bits, from, what, place);
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned lane() {
  return (now.thread.x + now.block_size.x * (now.thread.y + now.block_size.y * now.thread.z)) % 32;
}

}  // namespace emulator

// Shuffles among all 32 lanes alone: there is no parameter for fewer.
#define PLACE emulator::Place place = emulator::Place::current()
inline void __syncthreads(PLACE) {
  emulator::synchronize(false, place);
}
inline int __syncthreads_count(int vote, PLACE) {
  return emulator::synchronize(vote, place);
}
inline int __syncthreads_or(int vote, PLACE) {
  return emulator::synchronize(vote, place) > 0;
}
inline int __syncthreads_and(int vote, PLACE) {
  return emulator::synchronize(!vote, place) == 0;
}

inline unsigned __ballot_sync(unsigned mask, int vote, PLACE) {
  return emulator::ballot(mask, vote, "__ballot_sync", place);
}
inline int __any_sync(unsigned mask, int vote, PLACE) {
  return emulator::ballot(mask, vote, "__any_sync", place) != 0;
}
inline int __all_sync(unsigned mask, int vote, PLACE) {
  return emulator::ballot(mask, vote, "__all_sync", place) == mask;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, PLACE) {
  return emulator::shuffled(mask, value, from & 31, "__shfl_sync", place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, PLACE) {
  return emulator::shuffled(mask, value, emulator::lane() ^ lanes, "__shfl_xor_sync", place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, PLACE) {
  const unsigned lane = emulator::lane();
  return emulator::shuffled(mask, value, by > 31 ? by : lane < by ? lane : lane - by, "__shfl_up_sync", place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, PLACE) {
  const unsigned lane = emulator::lane();
  return emulator::shuffled(mask, value, by > 31 ? by : lane + by > 31 ? lane : lane + by, "__shfl_down_sync", place);
}
#undef PLACE

inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}
inline int __ffsll(long long bits) {
  return __builtin_ffsll(bits);
}
inline int __clz(unsigned bits) {
  return bits == 0 ? 32 : __builtin_clz(bits);
}
inline int __clzll(unsigned long long bits) {
  return bits == 0 ? 64 : __builtin_clzll(bits);
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int __popcll(unsigned long long bits) {
  return __builtin_popcountll(bits);
}
inline int __float_as_int(float x) {
  return std::bit_cast<int>(x);
}
inline float __int_as_float(int x) {
  return std::bit_cast<float>(x);
}
inline long long __double_as_longlong(double x) {
  return std::bit_cast<long long>(x);
}
inline double __longlong_as_double(long long x) {
  return std::bit_cast<double>(x);
}
template <class T>
T __ldg(const T* at) {
  return *at;
}
inline int max(int a, int b) {
  return std::max(a, b);
}
inline int min(int a, int b) {
  return std::min(a, b);
}
inline long long max(long long a, long long b) {
  return std::max(a, b);
}
inline long long min(long long a, long long b) {
  return std::min(a, b);
}

template <class T>
T atomicAdd(T* at, T by) {
  return emulator::atomically(at, [=](T old) { return T(old + by); });
}
template <class T>
T atomicSub(T* at, T by) {
  return emulator::atomically(at, [=](T old) { return T(old - by); });
}
template <class T>
T atomicMax(T* at, T by) {
  return emulator::atomically(at, [=](T old) { return old < by ? by : old; });
}
template <class T>
T atomicMin(T* at, T by) {
  return emulator::atomically(at, [=](T old) { return by < old ? by : old; });
}
template <class T>
T atomicAnd(T* at, T by) {
  return emulator::atomically(at, [=](T old) { return T(old & by); });
}
template <class T>
T atomicOr(T* at, T by) {
  return emulator::atomically(at, [=](T old) { return T(old | by); });
}
template <class T>
T atomicXor(T* at, T by) {
  return emulator::atomically(at, [=](T old) { return T(old ^ by); });
}
template <class T>
T atomicExch(T* at, T by) {
  return emulator::atomically(at, [=](T) { return by; });
}
template <class T>
T atomicCAS(T* at, T expected, T by) {
  return emulator::atomically(at, [=](T old) { return old == expected ? by : old; });
}
inline float4 atomicAdd(float4* at, float4 by) {  // four additions, each atomic
  float* to = &at->x;
  return {atomicAdd(to, by.x), atomicAdd(to + 1, by.y), atomicAdd(to + 2, by.z), atomicAdd(to + 3, by.w)};
}
