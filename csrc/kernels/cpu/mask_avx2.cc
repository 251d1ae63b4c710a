// The mask kernels for x86-64 with AVX2, BMI, BMI2 and F16C.

#include "kernels/cpu/isa_avx2.h"
#include "kernels/cpu/mask_table.h"

namespace freezeops {
namespace cpu {

constexpr MaskKernels kAvx2MaskKernels = mask_kernels<Avx2>();

}  // namespace cpu
}  // namespace freezeops
