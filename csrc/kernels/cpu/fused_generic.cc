// Fused updates for any processor.

#include "kernels/common/vectors_scalar.h"
#include "kernels/cpu/words_generic.h"

namespace freezeops {
namespace {
template <FusedType kType>
using Vector = Single<kType>;
}  // namespace
}  // namespace freezeops

#include "kernels/cpu/fused_kernels.h"

namespace freezeops {
FREEZEOPS_DEFINE_FUSED_KERNELS(kGenericFused);
}  // namespace freezeops
