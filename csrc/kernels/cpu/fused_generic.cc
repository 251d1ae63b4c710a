// The fused kernels for any processor.

#include "kernels/cpu/fused_table.h"
#include "kernels/cpu/isa_generic.h"

namespace freezeops {
namespace cpu {

constexpr FusedKernels kGenericFusedKernels = fused_kernels<Generic>();

}  // namespace cpu
}  // namespace freezeops
