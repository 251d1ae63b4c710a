// FusedUpdate as plain HLO, for devices on which XLA has no native kernel to call.

#ifndef FREEZEOPS_OPS_FUSED_UPDATE_HLO_H_
#define FREEZEOPS_OPS_FUSED_UPDATE_HLO_H_

#include "ops/common/xla_compat.h"
#include "ops/fused_update/attributes.h"

namespace freezeops {

// Reads and assigns what the op's inputs hold.
absl::Status BuildFusedUpdate(tensorflow::XlaOpKernelContext* ctx, const FusedAttributes& attributes);

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_FUSED_UPDATE_HLO_H_
