// The mask kernels for any processor.

#include "kernels/cpu/isa_generic.h"
#include "kernels/cpu/mask_table.h"

namespace freezeops {
namespace cpu {

constexpr MaskKernels kGenericMaskKernels = mask_kernels<Generic>();

}  // namespace cpu
}  // namespace freezeops
