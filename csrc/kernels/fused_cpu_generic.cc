// Fused updates for any processor.

#include "kernels/vectors_scalar.h"
#include "kernels/words_generic.h"

namespace freezeops {
namespace {
template <FusedType kType>
using Vector = Single<kType>;
}  // namespace
}  // namespace freezeops

#include "kernels/fused_impl.h"

namespace freezeops {
FREEZEOPS_DEFINE_FUSED_KERNELS(kGenericFused);
}  // namespace freezeops
