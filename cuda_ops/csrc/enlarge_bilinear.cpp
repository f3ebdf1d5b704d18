// An image enlarged, and mirrored if asked: [h, w, 3] uint8 → [height, width, 3] uint8.
//
// Rows are widened, four at a time, into a ring of eight; two neighbours of them make a row of the result. Every value
// is two + round((one - two) · weight), the weight in 2^-15, which AVX2 does for 16 values at once; in scalars it is
// the same.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "common.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__CUDACC__)
#include <immintrin.h>
#define HAS_AVX2_KERNELS
#define AVX2 __attribute__((target("avx2")))
#endif

namespace cuda_ops {
namespace {

constexpr int64_t kChannels = 3;
constexpr int64_t kRows = 4;         // widened at once
constexpr int64_t kRing = 2 * kRows;
constexpr int64_t kSlack = 8;        // bytes beyond a row that are read, and one of them written
constexpr int64_t kGrainRows = 128;  // a thread widens a few rows in vain where its part begins

// Each output lies between inputs first and first + 1; `weight` is that of the first, of 2^15.
struct Axis {
  std::vector<int64_t> first;
  std::vector<int16_t> weight;
};

Axis make_axis(int64_t size, int64_t outputs, bool is_mirrored) {
  Axis axis{std::vector<int64_t>(outputs), std::vector<int16_t>(outputs)};
  const double scale = static_cast<double>(size) / static_cast<double>(outputs);
  for (int64_t output = 0; output < outputs; ++output) {
    const double centre = std::clamp((output + 0.5) * scale - 0.5, 0.0, static_cast<double>(size - 1));
    const int64_t first = std::min(static_cast<int64_t>(centre), size - 2);
    const int64_t place = is_mirrored ? outputs - 1 - output : output;
    const double weight = std::floor((1.0 - (centre - static_cast<double>(first))) * 32768.0 + 0.5);
    axis.first[place] = first;
    axis.weight[place] = static_cast<int16_t>(std::min(weight, 32767.0));  // which still rounds to all of it
  }
  return axis;
}

ALWAYS_INLINE uint8_t mix(int32_t one, int32_t two, int32_t weight) {
  return static_cast<uint8_t>(two + (((one - two) * weight + (1 << 14)) >> 15));
}

struct Kernels {
  void (*widen)(const uint8_t* const in[kRows], const Axis& columns, uint8_t* const out[kRows]);
  void (*mix_rows)(const uint8_t* one, const uint8_t* two, int16_t weight, int64_t size, uint8_t* out);
};

void widen_scalar(const uint8_t* const in[kRows], const Axis& columns, uint8_t* const out[kRows]) {
  const int64_t width = columns.first.size();
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t x = 0; x < width; ++x) {
      const uint8_t* one = in[row] + kChannels * columns.first[x];
      for (int64_t c = 0; c < kChannels; ++c) {
        out[row][kChannels * x + c] = mix(one[c], one[c + kChannels], columns.weight[x]);
      }
    }
  }
}

void mix_rows_scalar(const uint8_t* one, const uint8_t* two, int16_t weight, int64_t size, uint8_t* out) {
  for (int64_t i = 0; i < size; ++i) out[i] = mix(one[i], two[i], weight);
}

#ifdef HAS_AVX2_KERNELS
AVX2 inline int64_t load_eight(const uint8_t* bytes) {
  int64_t loaded;
  std::memcpy(&loaded, bytes, sizeof(loaded));
  return loaded;
}

AVX2 inline void store_pixel(uint64_t bytes, uint8_t* out) {  // and a byte beyond, which the next pixel overwrites
  const auto low = static_cast<uint32_t>(bytes);
  std::memcpy(out, &low, sizeof(low));
}

AVX2 inline __m256i mix_avx2(__m256i one, __m256i two, __m256i weight) {
  return _mm256_add_epi16(two, _mm256_mulhrs_epi16(_mm256_sub_epi16(one, two), weight));
}

// Each half of a register holds two rows: eight bytes of each, then four 16-bit values of each, the last of them 0.
AVX2 void widen_avx2(const uint8_t* const in[kRows], const Axis& columns, uint8_t* const out[kRows]) {
  const __m256i left = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, -1, 1, -1, 2, -1, -1, -1, 8, -1, 9, -1, 10, -1, -1, -1));
  const __m256i right = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(3, -1, 4, -1, 5, -1, -1, -1, 11, -1, 12, -1, 13, -1, -1, -1));
  const int64_t width = columns.first.size();
  const int64_t* first = columns.first.data();
  const int16_t* weight = columns.weight.data();
  for (int64_t x = 0; x < width; ++x) {
    const int64_t at = kChannels * first[x];
    const __m256i bytes = _mm256_setr_epi64x(
        load_eight(in[0] + at), load_eight(in[1] + at), load_eight(in[2] + at), load_eight(in[3] + at));
    const __m256i mixed = mix_avx2(
        _mm256_shuffle_epi8(bytes, left), _mm256_shuffle_epi8(bytes, right), _mm256_set1_epi16(weight[x]));
    const __m256i packed = _mm256_packus_epi16(mixed, mixed);
    const uint64_t upper = _mm256_extract_epi64(packed, 0), lower = _mm256_extract_epi64(packed, 2);
    store_pixel(upper, out[0] + kChannels * x);
    store_pixel(upper >> 32, out[1] + kChannels * x);
    store_pixel(lower, out[2] + kChannels * x);
    store_pixel(lower >> 32, out[3] + kChannels * x);
  }
}

AVX2 void mix_rows_avx2(const uint8_t* one, const uint8_t* two, int16_t weight, int64_t size, uint8_t* out) {
  const __m256i weights = _mm256_set1_epi16(weight), nothing = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 32 <= size; i += 32) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(one + i));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(two + i));
    const __m256i low =
        mix_avx2(_mm256_unpacklo_epi8(a, nothing), _mm256_unpacklo_epi8(b, nothing), weights);
    const __m256i high =
        mix_avx2(_mm256_unpackhi_epi8(a, nothing), _mm256_unpackhi_epi8(b, nothing), weights);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_packus_epi16(low, high));
  }
  mix_rows_scalar(one + i, two + i, weight, size - i, out + i);
}
#endif

Kernels choose_kernels() {
#ifdef HAS_AVX2_KERNELS
  if (__builtin_cpu_supports("avx2")) return {widen_avx2, mix_rows_avx2};
#endif
  return {widen_scalar, mix_rows_scalar};
}

struct Task {
  const uint8_t* in;      // [h, w, 3]
  const uint8_t* last;    // its last row, with kSlack to spare
  int64_t height, width;  // of `in`
  Axis rows, columns;
  uint8_t* out;
};

void enlarge(const Task& task, int64_t begin, int64_t end) {
  static const Kernels kernels = choose_kernels();
  const int64_t size = kChannels * task.columns.first.size(), stride = size + kSlack;
  std::vector<uint8_t> ring(kRing * stride);
  const auto widened = [&](int64_t y) { return ring.data() + y % kRing * stride; };
  for (int64_t y = begin, next = task.rows.first[begin]; y < end; ++y) {
    const int64_t first = task.rows.first[y];
    while (next < first + 2) {
      const uint8_t* in[kRows];
      uint8_t* out[kRows];
      for (int64_t row = 0; row < kRows; ++row, ++next) {
        in[row] = next < task.height - 1 ? task.in + kChannels * task.width * next : task.last;
        out[row] = widened(next);
      }
      kernels.widen(in, task.columns, out);
    }
    kernels.mix_rows(widened(first), widened(first + 1), task.rows.weight[y], size, task.out + size * y);
  }
}

Tensor enlarge_bilinear_cpu(const Tensor& image, int64_t height, int64_t width, bool is_mirrored) {
  const auto in = torch::stable::contiguous(image);
  auto out = torch::stable::new_empty(in, {height, width, kChannels});
  const int64_t row_size = kChannels * in.size(1);
  std::vector<uint8_t> last(row_size + kSlack);
  std::copy_n(data_of<uint8_t>(in) + (in.size(0) - 1) * row_size, row_size, last.data());
  const Task task{
      .in = data_of<uint8_t>(in),
      .last = last.data(),
      .height = in.size(0),
      .width = in.size(1),
      .rows = make_axis(in.size(0), height, false),
      .columns = make_axis(in.size(1), width, is_mirrored),
      .out = mutable_data_of<uint8_t>(out)};
  torch::stable::parallel_for(0, height, kGrainRows, [&](int64_t begin, int64_t end) { enlarge(task, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, m) {
  m.def("enlarge_bilinear(Tensor image, int height, int width, bool is_mirrored) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CPU, m) {
  m.impl("enlarge_bilinear", TORCH_BOX(&enlarge_bilinear_cpu));
}

}  // namespace cuda_ops
