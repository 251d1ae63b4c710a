// Bodies of the kernels that seed slots; see seed_entry.h for what that is and warps.h for bodies.

#ifndef FREEZEOPS_KERNELS_CUDA_SEED_BODIES_H_
#define FREEZEOPS_KERNELS_CUDA_SEED_BODIES_H_

#include "kernels/common/dtypes.h"
#include "kernels/common/seed_entry.h"
#include "kernels/cuda/warps.h"

namespace freezeops {
namespace cuda {

template <Float kType>
struct SeedTarget {
  using T = typename EntryOf<kType>::Type;
  using Acc = typename EntryOf<kType>::Acc;

  SeedArguments arguments;

  // Seeds one entry, whose bit is set. Returns whether the bit is to be cleared.
  FREEZEOPS_METHOD bool seed(int64_t entry, Acc gradient, Acc square) const {
    SlotSeed<kType> slots[kMostSeededSlots];
    FREEZEOPS_UNROLL
    for (int i = 0; i < kMostSeededSlots; ++i) {
      if (i >= arguments.count) break;
      slots[i] = {static_cast<T*>(arguments.slots[i]), static_cast<Acc>(arguments.scales[i]), arguments.powers[i]};
    }
    return SeedEntry(slots, arguments.count, entry, gradient, square);
  }

  FREEZEOPS_METHOD bool is_empty(int64_t entry) const {
    return static_cast<Acc>(static_cast<const T*>(arguments.slots[0])[entry]) == Acc(0);
  }
};

// A dense gradient: a lane for each bit. In nearly every step no bit is set, and they are all that is read.
template <Float kType>
struct SeedDense {
  using T = typename EntryOf<kType>::Type;
  using Acc = typename EntryOf<kType>::Acc;
  static constexpr bool kWaits = true;
  static constexpr int kWordsInTile = 128;

  SeedTarget<kType> target;

  int64_t tiles() const { return ceil_divide(target.arguments.size, 32 * kWordsInTile); }

  FREEZEOPS_METHOD uint32_t word_at(int64_t bit) const {
    const SeedArguments& a = target.arguments;
    return load_word(a.unseeded, mask_bytes(a.size), bit) & low_bits32(a.size - bit);
  }

  template <typename Warp>
  FREEZEOPS_METHOD void operator()(const Warp& warp, int64_t tile) const {
    const SeedArguments& a = target.arguments;
    const int lane = warp.lane();
    const int64_t begin = tile * 32 * kWordsInTile;
    uint32_t any = 0;
    for (int i = lane; i < kWordsInTile; i += kLanes) any |= word_at(begin + 32 * i);
    if (warp.all(any == 0)) return;
    for (int64_t at = begin; at < min64(begin + 32 * kWordsInTile, a.size); at += 32) {
      const uint32_t word = word_at(at);
      bool seeded = false;
      if (word >> lane & 1) {
        const Acc value = static_cast<Acc>(static_cast<const T*>(a.values)[at + lane]);
        seeded = target.seed(at + lane, value, value * value);
      }
      const uint32_t left = word & ~warp.ballot(seeded);
      // Each lane a byte: the mask may end within a word.
      if (left != word && lane < 4 && at / 8 + lane < mask_bytes(a.size)) {
        a.unseeded[at / 8 + lane] = static_cast<uint8_t>(left >> (8 * lane));
      }
    }
  }
};

// Slices: a warp for each. Rows may be named more than once. Their gradients add up, in the order of the slices; Keras
// adds up their squares as well, and that is what its second moment gets. The larger of the two is taken, because
// gradients that cancel leave a second moment behind. The first slice of a row does so for all.
template <Float kType>
struct SeedSlices {
  using T = typename EntryOf<kType>::Type;
  using Acc = typename EntryOf<kType>::Acc;
  static constexpr bool kWaits = true;
  SeedTarget<kType> target;

  int64_t tiles() const { return target.arguments.slices; }

  template <typename Warp>
  FREEZEOPS_METHOD void operator()(const Warp& warp, int64_t tile) const {
    const SeedArguments& a = target.arguments;
    const int lane = warp.lane();
    const int64_t row = a.indices[tile];
    if (row < 0 || row >= a.size / a.row_size) return;  // no lane goes on
    bool none = true;
    for (int64_t j = lane; j < a.row_size; j += kLanes) {
      const int64_t entry = row * a.row_size + j;
      none = none && !(bit_is_set(a.unseeded, entry) && target.is_empty(entry));
    }
    if (warp.all(none)) return;
    bool first = true;
    for (int64_t i = lane; i < tile; i += kLanes) first = first && a.indices[i] != row;
    if (!warp.all(first)) return;
    const T* const values = static_cast<const T*>(a.values);
    for (int64_t begin = 0; begin < a.row_size; begin += kLanes) {
      const int64_t j = begin + lane;
      const bool due = j < a.row_size && bit_is_set(a.unseeded, row * a.row_size + j);
      if (warp.all(!due)) continue;
      Acc sum = Acc(0);
      Acc squares = Acc(0);
      for (int64_t at = tile; at < a.slices; at += kLanes) {
        uint32_t same = warp.ballot(at + lane < a.slices && a.indices[at + lane] == row);
        for (; same != 0; same &= same - 1) {
          if (!due) continue;
          const Acc value = static_cast<Acc>(values[(at + lowest_one(same)) * a.row_size + j]);
          sum += value;
          squares += value * value;
        }
      }
      if (!due) continue;
      const Acc square = sum * sum;
      target.seed(row * a.row_size + j, sum, square < squares ? squares : square);
    }
  }
};

}  // namespace cuda
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CUDA_SEED_BODIES_H_
