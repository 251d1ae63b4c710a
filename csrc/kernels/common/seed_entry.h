// Seeding: the slots of an entry that was unfrozen late start from its first gradient that is not zero.
//
// Where an entry's bit in `unseeded` is set and its entry of the first slot is zero, each slot becomes scale * gradient
// or, for power 2, scale * square. The bit is cleared once the first slot is not zero any more. Both are looked at, so
// that an implementation that never clears bits gives the same slots.

#ifndef FREEZEOPS_KERNELS_COMMON_SEED_ENTRY_H_
#define FREEZEOPS_KERNELS_COMMON_SEED_ENTRY_H_

#include <stdint.h>

#include "kernels/common/dtypes.h"
#include "mask_layout.h"

namespace freezeops {

// One slot of a variable, and how it is seeded.
template <Float kType>
struct SlotSeed {
  typename EntryOf<kType>::Type* data;
  typename EntryOf<kType>::Acc scale;
  int power;  // 1 or 2
};

// Seeds an entry whose bit is set. Returns whether the bit is to be cleared.
template <Float kType>
FREEZEOPS_INLINE bool SeedEntry(const SlotSeed<kType>* slots, int count, int64_t entry,
                                typename EntryOf<kType>::Acc gradient, typename EntryOf<kType>::Acc square) {
  using T = typename EntryOf<kType>::Type;
  using Acc = typename EntryOf<kType>::Acc;
  if (static_cast<Acc>(slots[0].data[entry]) == Acc(0)) {
    for (int i = 0; i < count; ++i) {
      slots[i].data[entry] = static_cast<T>(slots[i].scale * (slots[i].power == 2 ? square : gradient));
    }
  }
  return static_cast<Acc>(slots[0].data[entry]) != Acc(0);
}

}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_COMMON_SEED_ENTRY_H_
