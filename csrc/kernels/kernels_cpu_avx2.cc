// The kernels for x86-64 with AVX2, BMI and BMI2.

// In this order.
// clang-format off
#include "kernels/words_avx2.h"
#include "kernels/kernels_impl.h"
// clang-format on

namespace freezeops {
FREEZEOPS_DEFINE_KERNEL_TABLE(kAvx2Kernels, "avx2");
}  // namespace freezeops
