// The table of the fused kernels of an instruction set, see mask_kernels.h.

#ifndef FREEZEOPS_KERNELS_CPU_FUSED_TABLE_H_
#define FREEZEOPS_KERNELS_CPU_FUSED_TABLE_H_

#include "kernels/cpu/fused_compact.h"
#include "kernels/cpu/fused_full.h"
#include "kernels/cpu/kernels.h"

namespace freezeops {
namespace cpu {
namespace {

template <typename Isa>
constexpr FusedKernels fused_kernels() {
  return {
      update_full<Isa>,
      update_compact<Isa>,
      update_by_index<Isa>,
      add_row<Isa>,
  };
}

}  // namespace
}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_FUSED_TABLE_H_
