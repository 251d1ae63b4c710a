// The kernels for any processor.

// In this order.
// clang-format off
#include "kernels/words_generic.h"
#include "kernels/kernels_impl.h"
// clang-format on

namespace freezeops {
FREEZEOPS_DEFINE_KERNEL_TABLE(kGenericKernels, "generic");
}  // namespace freezeops
