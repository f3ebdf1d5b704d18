// Run-length codes of masks: probabilities [D, M, M] and boxes [D, 4] → text [bytes] uint8, offsets [D + 1] int64.
#include "masks.h"
#include "run_lengths.h"

// As VECTORIZED, with fused multiply-add besides: by its feature, as an architecture names processors of one maker.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define VECTORIZED_FMA __attribute__((target_clones("fma", "default"), flatten))
#else
#define VECTORIZED_FMA
#endif

namespace cuda_ops {
namespace {

// What all columns of a mask share, and what the column at hand has.
template <class T>
struct Tables {
  std::vector<int64_t> first_rows;       // of each cell, and the end
  std::vector<T> weights, next_weights;  // of each row in the image
  std::vector<T> values;                 // of each cell's mix in this column
  std::vector<uint8_t> certainties;      // of the same
  std::vector<int64_t> changes;          // of all columns so far
};

template <class T>
inline void fill_rows(const ResizedMask<T>& mask, Tables<T>& tables) {
  const Axis<T>& y = mask.y;
  tables.first_rows.resize(y.cells + 1);
  for (int64_t cell = 0; cell <= y.cells; ++cell) {
    tables.first_rows[cell] = first_row(y, cell, mask.rounding.fuses_index);
  }
  tables.weights.resize(y.end - y.begin);
  tables.next_weights.resize(y.end - y.begin);
  for (int64_t row = y.begin; row < y.end; ++row) {
    const Sample<T> of_row = sample(y, row, mask.rounding.fuses_index);
    tables.weights[row - y.begin] = of_row.weight;
    tables.next_weights[row - y.begin] = of_row.next_weight;
  }
  tables.values.resize(y.cells);
  tables.certainties.resize(y.cells);
}

// What is restricted is not aliased by bytes, which else may alias anything: the loop is vectorised.
template <class T>
inline void mix_all(
    const T* left, const T* right, Sample<T> column, int64_t cells, T threshold, bool is_fused, T* __restrict values,
    uint8_t* __restrict certainties) {
  for (int64_t cell = 0; cell < cells; ++cell) {
    const Mix<T> mixed = mix(left[cell], right[cell], column, is_fused);
    values[cell] = mixed.value;
    certainties[cell] = certainty(mixed, threshold);
  }
}

// One column of pixels, its mixes computed beforehand.
template <class T>
class TabulatedColumn {
 public:
  TabulatedColumn(const ResizedMask<T>& mask, const Sample<T>& column, Tables<T>& tables)
      : mask_(mask), column_(column), tables_(tables) {
    const int64_t cells = mask.y.cells;
    mix_all(
        mask.cells + column.cell * cells, mask.cells + mask.x.after(column.cell) * cells, column, cells, mask.threshold,
        mask.rounding.fuses_value, tables.values.data(), tables.certainties.data());
  }

  uint8_t certainty(int64_t cell) const {
    return tables_.certainties[cell];
  }

  bool is_set(int64_t cell, int64_t next, int64_t row) const {
    const int64_t i = row - mask_.y.begin;
    const Sample<T> of_row{cell, tables_.weights[i], tables_.next_weights[i]};
    const T value = mask_.is_small ? small_pixel(mask_, column_, of_row)
                                   : large_pixel(mask_, {tables_.values[cell], 0}, {tables_.values[next], 0}, of_row);
    return value > mask_.threshold;
  }

 private:
  const ResizedMask<T>& mask_;
  const Sample<T>& column_;
  const Tables<T>& tables_;
};

template <class T>
inline void find_changes(const ResizedMask<T>& mask, Tables<T>& tables) {
  tables.changes.clear();
  if (!is_visible(mask)) return;
  fill_rows(mask, tables);
  bool is_set = false;
  for (int64_t x = mask.x.begin; x < end_of_changes(mask); ++x) {
    const Sample<T> at_x = sample(mask.x, x, mask.rounding.fuses_index);
    const TabulatedColumn<T> column(mask, at_x, tables);
    const auto record = [&tables](int64_t place) { tables.changes.push_back(place); };
    is_set = record_changes(mask, tables.first_rows.data(), x, is_set, column, record);
  }
}

VECTORIZED_FMA void find_changes_of(const ResizedMask<float>& mask, Tables<float>& tables) {
  find_changes(mask, tables);
}

VECTORIZED_FMA void find_changes_of(const ResizedMask<double>& mask, Tables<double>& tables) {
  find_changes(mask, tables);
}

std::tuple<Tensor, Tensor> encode_masks_cpu(
    const Tensor& mask_probs, const Tensor& boxes, int64_t height, int64_t width, double threshold,
    bool is_exact) {
  const auto padded = padded_cells(mask_probs), box = torch::stable::contiguous(boxes);
  std::vector<Text> texts(padded.size(0));
  dispatch_float(padded.scalar_type(), "encode_masks", [&](auto zero) {
    using T = decltype(zero);
    const int64_t side = padded.size(1);
    const auto* cells = data_of<T>(padded);
    const auto* frames = reinterpret_cast<const Box<T>*>(box.const_data_ptr());
    const T limit = exclusive_threshold<T>(threshold, is_exact);
    const Roundings roundings = is_exact ? Roundings{} : torch_roundings(padded.scalar_type());
    torch::stable::parallel_for(0, padded.size(0), 1, [&](int64_t begin, int64_t end) {
      Tables<T> tables;
      for (int64_t d = begin; d < end; ++d) {
        const auto mask = resized_mask(
            cells + d * side * side, frames[d], side, height, width, limit, is_exact, roundings);
        find_changes_of(mask, tables);
        texts[d] = text_of(tables.changes.data(), static_cast<int64_t>(tables.changes.size()), height * width);
      }
    });
  });
  return joined(texts);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, m) {
  m.def(
      "encode_masks(Tensor mask_probs, Tensor boxes, int height, int width, float threshold, bool is_exact) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CPU, m) {
  m.impl("encode_masks", TORCH_BOX(&encode_masks_cpu));
}

}  // namespace cuda_ops
