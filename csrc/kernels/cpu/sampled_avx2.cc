// The kernels of the sampled matrix product for x86-64 with AVX2, FMA and F16C.

#include "kernels/cpu/dots_avx2.h"
#include "kernels/cpu/sampled_table.h"

namespace freezeops {
namespace cpu {

constexpr SampledKernels kAvx2SampledKernels = sampled_kernels<Avx2Dots>();

}  // namespace cpu
}  // namespace freezeops
