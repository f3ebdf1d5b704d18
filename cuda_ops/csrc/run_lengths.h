// COCO's compressed run-length code: lengths of runs of 0, 1, 0, … as text.
#pragma once

#include <algorithm>
#include <utility>

#include "common.h"

namespace cuda_ops {

using Text = std::vector<uint8_t>;

// Five bits a character from 48 on, lowest first; the sixth says that more follow. The last of the five is the sign.
inline void append_number(int64_t number, Text& text) {
  for (bool has_more = true; has_more;) {
    const int64_t bits = number & 31;
    number >>= 5;
    has_more = number != (bits & 16 ? -1 : 0);
    text.push_back(static_cast<uint8_t>(48 + (has_more ? bits | 32 : bits)));
  }
}

// Text of the mask of `pixels` pixels that changes at these places. From the fourth run on, lengths are written as
// differences to the length two before.
inline Text text_of(const int64_t* changes, int64_t num_changes, int64_t pixels) {
  Text text;
  text.reserve(2 * num_changes + 8);
  int64_t start = 0, before_last = 0, last = 0;
  for (int64_t run = 0; run <= num_changes; ++run) {
    const int64_t end = run < num_changes ? changes[run] : pixels;
    append_number(end - start - (run > 2 ? before_last : 0), text);
    before_last = std::exchange(last, end - start);
    start = end;
  }
  return text;
}

// All texts in one uint8 tensor, and where each begins: [bytes], [texts + 1] int64, both in host memory.
inline std::tuple<Tensor, Tensor> joined(const std::vector<Text>& texts) {
  const torch::stable::Device host(torch::headeronly::DeviceType::CPU);
  auto offsets = torch::stable::empty({static_cast<int64_t>(texts.size()) + 1}, ScalarType::Long, std::nullopt, host);
  auto* offset = mutable_data_of<int64_t>(offsets);
  *offset = 0;
  for (const Text& text : texts) {
    offset[1] = *offset + static_cast<int64_t>(text.size());
    ++offset;
  }
  auto bytes = torch::stable::empty({*offset}, ScalarType::Byte, std::nullopt, host);
  auto* byte = mutable_data_of<uint8_t>(bytes);
  for (const Text& text : texts) byte = std::copy(text.begin(), text.end(), byte);
  return {bytes, offsets};
}

}  // namespace cuda_ops
