// Fused updates for x86-64 with AVX-512 (F, BW, DQ, VL, VBMI2).

// In this order.
// clang-format off
#include "kernels/cpu/vectors_avx512.h"
#include "kernels/cpu/words_avx512.h"
#include "kernels/cpu/fused_kernels.h"
// clang-format on

namespace freezeops {
FREEZEOPS_DEFINE_FUSED_KERNELS(kAvx512Fused);
}  // namespace freezeops
