// The table of the mask kernels of an instruction set, see mask_kernels.h.

#ifndef FREEZEOPS_KERNELS_CPU_MASK_TABLE_H_
#define FREEZEOPS_KERNELS_CPU_MASK_TABLE_H_

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/mask_kernels.h"

namespace freezeops {
namespace cpu {
namespace {

template <typename Isa>
constexpr MaskKernels mask_kernels() {
  return {
      count_frozen,
      count_ones,
      zero_frozen<Isa>,
      copy_and_zero_frozen<Isa>,
      copy_selected<Isa, false>,
      copy_selected<Isa, true>,
      gather<Isa, false>,
      gather<Isa, true>,
      gather_two<Isa>,
      scatter<Isa, false>,
      scatter<Isa, true>,
  };
}

}  // namespace
}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_MASK_TABLE_H_
