// Weighted sums of few long rows, on the CPU: sums stay in registers while the rows stream by. Inlined into VECTORIZED functions;
// written in the compiler's vector extension, for loops over arrays of sums end up in memory.
#pragma once

#include <cstring>

#include "roi_align_plan.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace cuda_ops {

template <class W>
struct Lanes {
  static constexpr int kCount = 32 / sizeof(W);
  typedef W Vector __attribute__((vector_size(32)));
};

template <class W, class T>
ALWAYS_INLINE void load(const T* from, typename Lanes<W>::Vector& to) {
  if constexpr (std::is_same_v<T, W>) {
    std::memcpy(&to, from, sizeof to);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    typedef uint16_t Half16 __attribute__((vector_size(16)));
    typedef uint32_t Wide __attribute__((vector_size(32)));
    Half16 bits;
    std::memcpy(&bits, from, sizeof bits);
    const Wide wide = __builtin_convertvector(bits, Wide) << 16;  // a bfloat16 is the upper half of a float
    std::memcpy(&to, &wide, sizeof to);
  } else {
    for (int i = 0; i < Lanes<W>::kCount; ++i) to[i] = static_cast<W>(from[i]);
  }
}

template <class W, class T>
ALWAYS_INLINE void store(const typename Lanes<W>::Vector& from, T* to) {
  if constexpr (std::is_same_v<T, W>) {
    std::memcpy(to, &from, sizeof from);
  } else {
    for (int i = 0; i < Lanes<W>::kCount; ++i) to[i] = static_cast<T>(from[i]);
  }
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

// out[i] = Σ weight · row_of(idx)[i] over the taps of a group, or += with kAdd, for i < length. Whatever the length, a sum is taken
// in the order of the taps.
template <bool kAdd, class W, class RowOf, class Out>
ALWAYS_INLINE void weighted_sum(const Group<W>& group, const RowOf& row_of, int64_t length, Out* out) {
  constexpr int kLanes = Lanes<W>::kCount;
  int64_t i = 0;
  for (; i + 4 * kLanes <= length; i += 4 * kLanes) weighted_sum_block<4, kAdd>(group, row_of, i, out);
  for (; i + kLanes <= length; i += kLanes) weighted_sum_block<1, kAdd>(group, row_of, i, out);
  for (; i < length; ++i) {
    W sum = kAdd ? static_cast<W>(out[i]) : W(0);
    for (const Tap<W>* tap = group.first; tap != group.last; ++tap) sum += tap->weight * static_cast<W>(row_of(tap->idx)[i]);
    out[i] = static_cast<Out>(sum);
  }
}

}  // namespace cuda_ops
