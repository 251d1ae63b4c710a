// The kernels for x86-64 with AVX2, BMI and BMI2.

// In this order.
// clang-format off
#include "kernels/cpu/words_avx2.h"
#include "kernels/cpu/mask_kernels.h"
// clang-format on

namespace freezeops {
FREEZEOPS_DEFINE_KERNEL_TABLE(kAvx2Kernels, "avx2");
}  // namespace freezeops
