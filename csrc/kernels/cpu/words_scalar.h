// Operations on words of 64 entries in portable C++: no branch on a bit where many are set.

#ifndef FREEZEOPS_KERNELS_CPU_WORDS_SCALAR_H_
#define FREEZEOPS_KERNELS_CPU_WORDS_SCALAR_H_

#include <stdint.h>

#include "mask_layout.h"

namespace freezeops {
namespace cpu {
namespace {

// Below this many selected entries a loop over the set bits beats a branch-free loop over all 64.
constexpr int kFewBits = 12;

FREEZEOPS_INLINE int count_bits(uint64_t word) { return __builtin_popcountll(word); }

template <typename U>
struct ScalarWords {
  static FREEZEOPS_METHOD void zero(U* data, uint64_t selected) {
    for (int i = 0; i < 64; ++i) data[i] = static_cast<U>(data[i] & (((selected >> i) & 1) - 1));
  }

  static FREEZEOPS_METHOD void copy(U* destination, const U* source, uint64_t selected) {
    for (int i = 0; i < 64; ++i) {
      const U take = static_cast<U>(~(((selected >> i) & 1) - 1));
      destination[i] = static_cast<U>((destination[i] & ~take) | (source[i] & take));
    }
  }

  static FREEZEOPS_METHOD void copy_or_zero(U* destination, const U* source, uint64_t zeroed) {
    for (int i = 0; i < 64; ++i) destination[i] = static_cast<U>(source[i] & (((zeroed >> i) & 1) - 1));
  }

  // Writes the selected entries from `destination` on; returns where the next one goes. Never writes at
  // destination_end or after.
  static FREEZEOPS_METHOD U* compress(U* destination, const U* destination_end, const U* source, uint64_t selected) {
    const int count = count_bits(selected);
    if (count > kFewBits && destination_end - destination > count) {
      for (int i = 0; i < 64; ++i) {
        *destination = source[i];
        destination += (selected >> i) & 1;
      }
      return destination;
    }
    return compress_bits(destination, source, selected);
  }

  // Sets the selected entries from the values at `source`; returns the first value that was not used.
  static FREEZEOPS_METHOD const U* expand(U* destination, const U* source, const U* source_end, uint64_t selected) {
    const int count = count_bits(selected);
    if (count > kFewBits && source_end - source > count) {
      for (int i = 0; i < 64; ++i) {
        const U take = static_cast<U>(~(((selected >> i) & 1) - 1));
        destination[i] = static_cast<U>((destination[i] & ~take) | (*source & take));
        source += (selected >> i) & 1;
      }
      return source;
    }
    return expand_bits(destination, source, selected);
  }

  // The same, one set bit after the other.
  static FREEZEOPS_METHOD void zero_bits(U* data, uint64_t selected) {
    for (; selected != 0; selected &= selected - 1) data[__builtin_ctzll(selected)] = 0;
  }
  static FREEZEOPS_METHOD void copy_bits(U* destination, const U* source, uint64_t selected) {
    for (; selected != 0; selected &= selected - 1) {
      const int i = __builtin_ctzll(selected);
      destination[i] = source[i];
    }
  }
  static FREEZEOPS_METHOD U* compress_bits(U* destination, const U* source, uint64_t selected) {
    for (; selected != 0; selected &= selected - 1) *destination++ = source[__builtin_ctzll(selected)];
    return destination;
  }
  static FREEZEOPS_METHOD const U* expand_bits(U* destination, const U* source, uint64_t selected) {
    for (; selected != 0; selected &= selected - 1) destination[__builtin_ctzll(selected)] = *source++;
    return source;
  }
};

}  // namespace
}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_WORDS_SCALAR_H_
