// FusedUpdate as plain HLO, for devices on which XLA has no native kernel to call.

#ifndef FREEZEOPS_OPS_FUSED_HLO_H_
#define FREEZEOPS_OPS_FUSED_HLO_H_

#include "ops/fused_ops.h"
#include "ops/xla_compat.h"

namespace freezeops {

// Reads and assigns what the op's inputs hold.
absl::Status BuildFusedUpdate(tensorflow::XlaOpKernelContext* ctx, const FusedAttributes& attributes);

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_FUSED_HLO_H_
