// Seeding: the slots of an entry that was unfrozen late start from its own first gradient that is not zero.
//
// Where an entry's bit in `unseeded` is set and its entry of the first slot is zero, each slot becomes scale * gradient
// or, for power 2, scale * square. The bit is cleared once the first slot is not zero any more. Both are looked at, so
// that an implementation that never clears bits gives the same slots.

#ifndef FREEZEOPS_KERNELS_COMMON_SEED_ENTRY_H_
#define FREEZEOPS_KERNELS_COMMON_SEED_ENTRY_H_

#include <stdint.h>

#include "mask_layout.h"

namespace freezeops {

// One slot of a variable. Acc is what T is calculated in: float for 16-bit floats.
template <typename T, typename Acc>
struct SlotSeed {
  T* data;
  Acc scale;
  int power;  // 1 or 2
};

// Seeds one entry, whose bit is set. Returns whether the bit is to be cleared.
template <typename T, typename Acc>
FREEZEOPS_INLINE bool SeedEntry(const SlotSeed<T, Acc>* slots, int count, int64_t entry, Acc gradient, Acc square) {
  if (static_cast<Acc>(slots[0].data[entry]) == Acc(0)) {
    for (int i = 0; i < count; ++i) {
      slots[i].data[entry] = static_cast<T>(slots[i].scale * (slots[i].power == 2 ? square : gradient));
    }
  }
  return static_cast<Acc>(slots[0].data[entry]) != Acc(0);
}

// Seeds the entries [begin, end); begin is a multiple of 8.
template <typename T, typename Acc>
void SeedRange(uint8_t* unseeded, const SlotSeed<T, Acc>* slots, int count, const T* gradient, int64_t begin,
               int64_t end) {
  for (int64_t byte = begin / 8; byte * 8 < end; ++byte) {
    uint8_t bits = unseeded[byte];
    if (bits == 0) continue;
    for (int bit = 0; bit < 8 && byte * 8 + bit < end; ++bit) {
      if (!(bits >> bit & 1)) continue;
      const int64_t entry = byte * 8 + bit;
      const Acc value = static_cast<Acc>(gradient[entry]);
      if (SeedEntry(slots, count, entry, value, value * value)) bits &= ~(1u << bit);
    }
    unseeded[byte] = bits;
  }
}

}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_COMMON_SEED_ENTRY_H_
