// Operations on words of 64 entries for any processor.

#ifndef FREEZEOPS_KERNELS_CPU_WORDS_GENERIC_H_
#define FREEZEOPS_KERNELS_CPU_WORDS_GENERIC_H_

#include "kernels/cpu/words_scalar.h"

namespace freezeops {
namespace cpu {
namespace {

template <typename U>
struct GenericWords : ScalarWords<U> {
  static FREEZEOPS_METHOD void zero(U* data, uint64_t selected) {
    if (count_bits(selected) <= kFewBits) {
      ScalarWords<U>::zero_bits(data, selected);
    } else {
      ScalarWords<U>::zero(data, selected);
    }
  }
  static FREEZEOPS_METHOD void copy(U* destination, const U* source, uint64_t selected) {
    if (count_bits(selected) <= kFewBits) {
      ScalarWords<U>::copy_bits(destination, source, selected);
    } else {
      ScalarWords<U>::copy(destination, source, selected);
    }
  }
};

}  // namespace
}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_WORDS_GENERIC_H_
