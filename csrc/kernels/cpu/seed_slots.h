// Seeds slots from a gradient, see seed_entry.h.
//
// Not for files that are compiled for different instruction sets: it uses the standard library.

#ifndef FREEZEOPS_KERNELS_CPU_SEED_SLOTS_H_
#define FREEZEOPS_KERNELS_CPU_SEED_SLOTS_H_

#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "kernels/common/dtypes.h"
#include "kernels/common/seed_entry.h"

namespace freezeops {
namespace cpu {

// Seeds the entries [begin, end) from a dense gradient; begin is a multiple of 8. All pointers are to whole tensors.
template <Float kType>
void SeedRange(uint8_t* unseeded, const std::vector<SlotSeed<kType>>& slots,
               const typename EntryOf<kType>::Type* gradient, int64_t begin, int64_t end) {
  using Acc = typename EntryOf<kType>::Acc;
  const int count = static_cast<int>(slots.size());
  for (int64_t byte = begin / 8; byte * 8 < end; ++byte) {
    uint8_t bits = unseeded[byte];
    if (bits == 0) continue;
    for (int bit = 0; bit < 8 && byte * 8 + bit < end; ++bit) {
      if (!(bits >> bit & 1)) continue;
      const int64_t entry = byte * 8 + bit;
      const Acc value = static_cast<Acc>(gradient[entry]);
      if (SeedEntry(slots.data(), count, entry, value, value * value)) bits &= static_cast<uint8_t>(~(1u << bit));
    }
    unseeded[byte] = bits;
  }
}

// Seeds the rows that slices name, of `width` entries each; every row must exist.
//
// Rows may be named more than once. Their gradients add up; Keras adds up their squares as well, for its second moment.
// The larger of the two squares is taken, because gradients that cancel leave a second moment behind.
template <Float kType>
void SeedRows(uint8_t* unseeded, const std::vector<SlotSeed<kType>>& slots, const typename EntryOf<kType>::Type* values,
              const int64_t* rows, int64_t slices, int64_t width) {
  using Acc = typename EntryOf<kType>::Acc;
  const int count = static_cast<int>(slots.size());
  struct Sums {
    explicit Sums(int64_t width) : values(width, Acc(0)), squares(width, Acc(0)) {}
    std::vector<Acc> values, squares;
  };
  std::unordered_map<int64_t, Sums> sums_of_row;
  for (int64_t i = 0; i < slices; ++i) {
    Sums& sums = sums_of_row.try_emplace(rows[i], width).first->second;
    for (int64_t j = 0; j < width; ++j) {
      const Acc value = static_cast<Acc>(values[i * width + j]);
      sums.values[j] += value;
      sums.squares[j] += value * value;
    }
  }
  for (const auto& [row, sums] : sums_of_row) {
    for (int64_t j = 0; j < width; ++j) {
      const int64_t entry = row * width + j;
      if (!bit_is_set(unseeded, entry)) continue;
      const Acc value = sums.values[j];
      const Acc square = std::max(value * value, sums.squares[j]);
      if (SeedEntry(slots.data(), count, entry, value, square)) {
        unseeded[entry / 8] &= static_cast<uint8_t>(~(1u << entry % 8));
      }
    }
  }
}

}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_SEED_SLOTS_H_
