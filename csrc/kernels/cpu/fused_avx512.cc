// The fused kernels for x86-64 with AVX-512 (F, BW, DQ, VL, VBMI2).

#include "kernels/cpu/fused_table.h"
#include "kernels/cpu/isa_avx512.h"

namespace freezeops {
namespace cpu {

constexpr FusedKernels kAvx512FusedKernels = fused_kernels<Avx512>();

}  // namespace cpu
}  // namespace freezeops
