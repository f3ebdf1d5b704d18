// How this build of torch rounds where it resizes: found by trying, as it depends on the compiler and the processor.
#include <algorithm>
#include <array>
#include <optional>

#include "masks.h"

namespace cuda_ops {
namespace {

constexpr int64_t kCells = 30;
constexpr Rounding kCandidates[] = {{true, true}, {false, true}, {false, false}, {true, false}};

// Pixels in which a rounding leads elsewhere than torch's `expected`, [height, width].
template <class T>
int64_t disagreements(const Tensor& cells, const Tensor& expected, bool is_small, Rounding rounding) {
  const int64_t height = expected.size(2), width = expected.size(3);
  const auto axis = [](int64_t size) {
    return Axis<T>{kCells, size, 0, size, static_cast<T>(kCells) / size, false, T(0), 0, size};
  };
  const ResizedMask<T> mask{data_of<T>(cells), axis(width), axis(height), rounding, is_small, T(0)};
  const T* wanted = data_of<T>(expected);
  int64_t count = 0;
  for (int64_t y = 0; y < height; ++y) {
    const Sample<T> row = sample(mask.y, y, rounding.fuses_index);
    for (int64_t x = 0; x < width; ++x) {
      count += pixel(mask, sample(mask.x, x, rounding.fuses_index), row) != wanted[y * width + x];
    }
  }
  return count;
}

Tensor resized_by_torch(const Tensor& image, int64_t height, int64_t width) {
  const std::vector<int64_t> size{height, width};
  const std::optional<double> scale;
  std::array<StableIValue, 5> stack{
      torch::stable::detail::from(image), torch::stable::detail::from(torch::headeronly::IntHeaderOnlyArrayRef(size)),
      torch::stable::detail::from(false), torch::stable::detail::from(scale), torch::stable::detail::from(scale)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::upsample_bilinear2d", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]));
}

template <class T>
Rounding rounding_for(const Tensor& image, const Tensor& cells, int64_t height, int64_t width) {
  const auto expected = resized_by_torch(image, height, width);
  const auto of = [&](Rounding rounding) {
    return disagreements<T>(cells, expected, height + width <= kSmallFrame, rounding);
  };
  return *std::min_element(
      std::begin(kCandidates), std::end(kCandidates), [&](Rounding a, Rounding b) { return of(a) < of(b); });
}

template <class T>
Roundings find_roundings(ScalarType dtype) {
  const torch::stable::Device host(torch::headeronly::DeviceType::CPU);
  auto image = torch::stable::empty({1, 1, kCells, kCells}, dtype, std::nullopt, host);
  T* value = mutable_data_of<T>(image);
  uint32_t state = 1;
  for (int64_t i = 0; i < kCells * kCells; ++i) {
    state = state * 1664525u + 1013904223u;
    value[i] = static_cast<T>(state >> 8) / (1 << 24);
  }
  const auto cells = torch::stable::contiguous(torch::stable::transpose(image, 2, 3));
  return {rounding_for<T>(image, cells, 61, 53), rounding_for<T>(image, cells, 97, 211)};
}

}  // namespace

Roundings torch_roundings(ScalarType dtype) {
  static const Roundings of_float = find_roundings<float>(ScalarType::Float);
  static const Roundings of_double = find_roundings<double>(ScalarType::Double);
  return dtype == ScalarType::Float ? of_float : of_double;
}

}  // namespace cuda_ops
