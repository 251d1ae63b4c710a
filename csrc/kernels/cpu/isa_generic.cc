// The kernels for any processor.

// In this order.
// clang-format off
#include "kernels/cpu/words_generic.h"
#include "kernels/cpu/mask_kernels.h"
// clang-format on

namespace freezeops {
FREEZEOPS_DEFINE_KERNEL_TABLE(kGenericKernels, "generic");
}  // namespace freezeops
