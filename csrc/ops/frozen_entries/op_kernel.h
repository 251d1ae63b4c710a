// Base of the OpKernels of RememberFrozen and RestoreFrozen.

#ifndef FREEZEOPS_OPS_FROZEN_ENTRIES_OP_KERNEL_H_
#define FREEZEOPS_OPS_FROZEN_ENTRIES_OP_KERNEL_H_

#include "ops/common/op_kernels.h"
#include "ops/frozen_entries/inputs.h"

namespace freezeops {

class FrozenEntriesOp : public LayoutOp {
 public:
  using LayoutOp::LayoutOp;

 protected:
  // The variable's lock is held.
  absl::Status CheckVariable(tensorflow::Var* variable) const {
    return freezeops::CheckVariable(variable, dtype_, layout_, "its frozen entries are remembered or restored");
  }
};

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_FROZEN_ENTRIES_OP_KERNEL_H_
