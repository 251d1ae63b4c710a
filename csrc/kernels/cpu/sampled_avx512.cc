// The kernels of the sampled matrix product for x86-64 with AVX-512 (F, BW, DQ, VL).

#include "kernels/cpu/dots_avx512.h"
#include "kernels/cpu/sampled_table.h"

namespace freezeops {
namespace cpu {

constexpr SampledKernels kAvx512SampledKernels = sampled_kernels<Avx512Dots>();

}  // namespace cpu
}  // namespace freezeops
