// The vector types of fused updates, one entry wide: for any processor, and for a lane of a GPU.
//
// A vector type V has
//   Entry                        what is stored: float, double, Half or Bfloat16
//   kLanes                       entries in a vector, at most 16
//   set(entry), load(entries)    the same in all lanes; consecutive entries
//   store(entries)               all lanes
//   store(entries, lanes)        those of the set bits; the other entries keep their bits
//   kExpands                     whether it has the next two
//   expand(entries, lanes)       consecutive entries, as many as there are set bits, in the lanes of those
//   compress(entries, lanes)     the lanes of the set bits, one after the other; what follows up to kLanes entries may
//                                be overwritten
//   + - * /, square_root, maximum, sign_of    each rounded to the type of the entries, as Keras's operations are

#ifndef FREEZEOPS_KERNELS_COMMON_VECTORS_SCALAR_H_
#define FREEZEOPS_KERNELS_COMMON_VECTORS_SCALAR_H_

#include <stdint.h>

#include "kernels/common/dtypes.h"

namespace freezeops {
namespace {

template <Float kType>
struct Single {
  using Entry = typename EntryOf<kType>::Type;
  using Acc = typename EntryOf<kType>::Acc;
  static constexpr int kLanes = 1;
  static constexpr bool kExpands = false;
  Acc value;

  static FREEZEOPS_METHOD Single of(Acc result) { return {static_cast<Acc>(static_cast<Entry>(result))}; }
  static FREEZEOPS_METHOD Single set(Entry entry) { return {static_cast<Acc>(entry)}; }
  static FREEZEOPS_METHOD Single load(const Entry* entries) { return set(*entries); }
  FREEZEOPS_METHOD void store(Entry* entries) const { *entries = static_cast<Entry>(value); }
  FREEZEOPS_METHOD void store(Entry* entries, uint32_t lanes) const {
    if (lanes & 1) store(entries);
  }

  friend FREEZEOPS_METHOD Single operator+(Single a, Single b) { return of(a.value + b.value); }
  friend FREEZEOPS_METHOD Single operator-(Single a, Single b) { return of(a.value - b.value); }
  friend FREEZEOPS_METHOD Single operator*(Single a, Single b) { return of(a.value * b.value); }
  friend FREEZEOPS_METHOD Single operator/(Single a, Single b) { return of(a.value / b.value); }
  friend FREEZEOPS_METHOD Single square_root(Single a) {
#if defined(__CUDA_ARCH__)
    return of(sizeof(Acc) == 4 ? __fsqrt_rn(static_cast<float>(a.value)) : static_cast<Acc>(__dsqrt_rn(a.value)));
#else
    return of(sizeof(Acc) == 4 ? __builtin_sqrtf(static_cast<float>(a.value))
                               : static_cast<Acc>(__builtin_sqrt(a.value)));
#endif
  }
  // NaN wherever one of the two is.
  friend FREEZEOPS_METHOD Single maximum(Single a, Single b) {
    const bool second_is_nan = b.value != b.value && a.value == a.value;
    return a.value < b.value || second_is_nan ? b : a;
  }
  friend FREEZEOPS_METHOD Single sign_of(Single a) {
    return {a.value > 0 ? Acc(1) : a.value < 0 ? Acc(-1) : a.value == 0 ? Acc(0) : a.value};
  }
};

}  // namespace
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_COMMON_VECTORS_SCALAR_H_
