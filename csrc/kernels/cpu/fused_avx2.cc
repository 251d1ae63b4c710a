// Fused updates for x86-64 with AVX2, BMI, BMI2 and F16C.

// In this order.
// clang-format off
#include "kernels/cpu/vectors_avx2.h"
#include "kernels/cpu/words_avx2.h"
#include "kernels/cpu/fused_kernels.h"
// clang-format on

namespace freezeops {
FREEZEOPS_DEFINE_FUSED_KERNELS(kAvx2Fused);
}  // namespace freezeops
