// The kernels of the sampled matrix product for any processor.

#include "kernels/cpu/dots_generic.h"
#include "kernels/cpu/sampled_table.h"

namespace freezeops {
namespace cpu {

constexpr SampledKernels kGenericSampledKernels = sampled_kernels<GenericDots>();

}  // namespace cpu
}  // namespace freezeops
