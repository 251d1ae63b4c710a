// The operations of any processor, by which kernels are written, see mask_kernels.h.

#ifndef FREEZEOPS_KERNELS_CPU_ISA_GENERIC_H_
#define FREEZEOPS_KERNELS_CPU_ISA_GENERIC_H_

#include "kernels/common/vectors_scalar.h"
#include "kernels/cpu/words_generic.h"

namespace freezeops {
namespace cpu {
namespace {

struct Generic {
  template <typename U>
  using Words = GenericWords<U>;
  template <Float kType>
  using Vector = Single<kType>;

  static constexpr bool kStreams = false;
  static void stream_zero_line(char*) {}
  static void stream_fence() {}
};

}  // namespace
}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_ISA_GENERIC_H_
