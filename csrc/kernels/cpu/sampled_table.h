// The table of the kernels of the sampled matrix product of an instruction set, see sampled_kernels.h.

#ifndef FREEZEOPS_KERNELS_CPU_SAMPLED_TABLE_H_
#define FREEZEOPS_KERNELS_CPU_SAMPLED_TABLE_H_

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/sampled_kernels.h"

namespace freezeops {
namespace cpu {
namespace {

template <typename Dots>
constexpr SampledKernels sampled_kernels() {
  return {
      columns_are_possible,
      transpose<Dots>,
      add_products<Dots>,
  };
}

}  // namespace
}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_SAMPLED_TABLE_H_
