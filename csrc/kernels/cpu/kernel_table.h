// The table of kernels of an instruction set, see mask_kernels.h.

#ifndef FREEZEOPS_KERNELS_CPU_KERNEL_TABLE_H_
#define FREEZEOPS_KERNELS_CPU_KERNEL_TABLE_H_

#include "kernels/cpu/fused_compact.h"
#include "kernels/cpu/fused_full.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/mask_kernels.h"

namespace freezeops {
namespace cpu {
namespace {

template <typename Isa>
constexpr KernelTable kernel_table(const char* name) {
  return {
      name,
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
      update_full<Isa>,
      update_compact<Isa>,
      update_by_index<Isa>,
      add_row<Isa>,
  };
}

}  // namespace
}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_KERNEL_TABLE_H_
