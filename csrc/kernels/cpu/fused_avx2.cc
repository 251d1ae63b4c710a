// The fused kernels for x86-64 with AVX2, BMI, BMI2 and F16C.

#include "kernels/cpu/fused_table.h"
#include "kernels/cpu/isa_avx2.h"

namespace freezeops {
namespace cpu {

constexpr FusedKernels kAvx2FusedKernels = fused_kernels<Avx2>();

}  // namespace cpu
}  // namespace freezeops
