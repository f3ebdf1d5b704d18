// Weighted sums of few long rows, on the CPU: sums stay in registers while the rows stream by. Inlined into VECTORIZED
// functions; written in the compiler's vector extension, for loops over arrays of sums end up in memory.
#pragma once

#include <cstring>
#include <utility>

#include "roi_align_plan.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace cuda_ops {

template <class W>
struct Lanes {
  static constexpr int kCount = 32 / sizeof(W);
  typedef W Vector __attribute__((vector_size(32)));
  typedef std::conditional_t<sizeof(W) == 8, int64_t, int32_t> Indices __attribute__((vector_size(32)));
};

template <class W, class T>
ALWAYS_INLINE void load(const T* from, typename Lanes<W>::Vector& to) {
  if constexpr (std::is_same_v<T, W>) {
    std::memcpy(&to, from, sizeof(to));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    typedef uint16_t Halves __attribute__((vector_size(16)));
    typedef uint32_t Bits __attribute__((vector_size(32)));
    Halves halves;  // the upper halves of floats
    std::memcpy(&halves, from, sizeof(halves));
    const Bits bits = __builtin_convertvector(halves, Bits) << 16;
    to = reinterpret_cast<typename Lanes<W>::Vector>(bits);
  } else {
    for (int i = 0; i < Lanes<W>::kCount; ++i) to[i] = static_cast<W>(from[i]);
  }
}

template <class W, class T>
ALWAYS_INLINE void store(const typename Lanes<W>::Vector& from, T* to) {
  if constexpr (std::is_same_v<T, W>) {
    std::memcpy(to, &from, sizeof(from));
  } else {
    for (int i = 0; i < Lanes<W>::kCount; ++i) to[i] = static_cast<T>(from[i]);
  }
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, typename Lanes<W>::Indices{__VA_ARGS__})
#endif

// Swaps blocks of kBlock lanes between two vectors: the upper one of each pair of a for the lower one of b.
template <class W, int kBlock, int... kLane>
ALWAYS_INLINE void swap_blocks(
    typename Lanes<W>::Vector& a, typename Lanes<W>::Vector& b, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = Lanes<W>::kCount;
  const typename Lanes<W>::Vector lower = SHUFFLE(a, b, ((kLane & kBlock) ? kCount + kLane - kBlock : kLane)...);
  b = SHUFFLE(a, b, ((kLane & kBlock) ? kCount + kLane : kLane + kBlock)...);
  a = lower;
}

// Turns a square of lanes.
template <class W, int kBlock = Lanes<W>::kCount / 2>
ALWAYS_INLINE void transpose(typename Lanes<W>::Vector (&rows)[Lanes<W>::kCount]) {
  constexpr int kCount = Lanes<W>::kCount;
  for (int i = 0; i < kCount; ++i) {
    if (!(i & kBlock)) swap_blocks<W, kBlock>(rows[i], rows[i + kBlock], std::make_integer_sequence<int, kCount>{});
  }
  if constexpr (kBlock > 1) transpose<W, kBlock / 2>(rows);
}

template <int kVectors, bool kAdd, class W, class RowOf, class Out>
ALWAYS_INLINE void weighted_sum_block(const Group<W>& group, const RowOf& row_of, int64_t at, Out* out) {
  constexpr int kLanes = Lanes<W>::kCount;
  typename Lanes<W>::Vector sums[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    if constexpr (kAdd) {
      load<W>(out + at + v * kLanes, sums[v]);
    } else {
      sums[v] = typename Lanes<W>::Vector{};
    }
  }
  for (const Tap<W>* tap = group.first; tap != group.last; ++tap) {
    const auto* row = row_of(tap->idx) + at;
    for (int v = 0; v < kVectors; ++v) {
      typename Lanes<W>::Vector values;
      load<W>(row + v * kLanes, values);
      sums[v] += tap->weight * values;
    }
  }
  for (int v = 0; v < kVectors; ++v) store<W>(sums[v], out + at + v * kLanes);
}

// out[i] = Σ weight · row_of(idx)[i] over the taps of a group, or += with kAdd, for i < length. Whatever the length, a
// sum is taken in the order of the taps.
template <bool kAdd, class W, class RowOf, class Out>
ALWAYS_INLINE void weighted_sum(const Group<W>& group, const RowOf& row_of, int64_t length, Out* out) {
  constexpr int kLanes = Lanes<W>::kCount;
  int64_t i = 0;
  for (; i + 4 * kLanes <= length; i += 4 * kLanes) weighted_sum_block<4, kAdd>(group, row_of, i, out);
  for (; i + 2 * kLanes <= length; i += 2 * kLanes) weighted_sum_block<2, kAdd>(group, row_of, i, out);
  for (; i + kLanes <= length; i += kLanes) weighted_sum_block<1, kAdd>(group, row_of, i, out);
  for (; i < length; ++i) {
    W sum = kAdd ? static_cast<W>(out[i]) : W(0);
    for (const Tap<W>* tap = group.first; tap != group.last; ++tap) {
      sum += tap->weight * static_cast<W>(row_of(tap->idx)[i]);
    }
    out[i] = static_cast<Out>(sum);
  }
}

}  // namespace cuda_ops
