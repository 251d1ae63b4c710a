// The kernels for x86-64 with AVX-512 (F, BW, DQ, VL, VBMI2).

// In this order.
// clang-format off
#include "kernels/cpu/words_avx512.h"
#include "kernels/cpu/mask_kernels.h"
// clang-format on

namespace freezeops {
FREEZEOPS_DEFINE_KERNEL_TABLE(kAvx512Kernels, "avx512");
}  // namespace freezeops
