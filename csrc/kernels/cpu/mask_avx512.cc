// The mask kernels for x86-64 with AVX-512 (F, BW, DQ, VL, VBMI2).

#include "kernels/cpu/isa_avx512.h"
#include "kernels/cpu/mask_table.h"

namespace freezeops {
namespace cpu {

constexpr MaskKernels kAvx512MaskKernels = mask_kernels<Avx512>();

}  // namespace cpu
}  // namespace freezeops
