// Base of the OpKernels of SeedSlots.

#ifndef FREEZEOPS_OPS_SEED_SLOTS_OP_KERNEL_H_
#define FREEZEOPS_OPS_SEED_SLOTS_OP_KERNEL_H_

#include <cstdint>
#include <vector>

#include "ops/common/op_kernels.h"
#include "ops/seed_slots/inputs.h"

namespace freezeops {

class SeedOp : public tensorflow::OpKernel {
 public:
  explicit SeedOp(tensorflow::OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, GetSeedAttributes(ctx, &attributes_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("T", &dtype_));
  }

 protected:
  // The number of slots.
  int count() const { return attributes_.count(); }
  int64_t size() const { return attributes_.size; }

  // The bits first, then the slots.
  absl::Status LookUpAll(tensorflow::OpKernelContext* ctx, std::vector<VarPtr>* variables) const {
    variables->resize(1 + count());
    for (int i = 0; i <= count(); ++i) TF_RETURN_IF_ERROR(LookUp(ctx, i == 0 ? 0 : 3 + i, &(*variables)[i]));
    return absl::OkStatus();
  }

  absl::Status CheckBits(const tensorflow::Tensor& bits) const {
    return attributes_.CheckBits(bits.dtype(), bits.shape());
  }

  // Checks bits and slots, whose locks are held. Sets `rows` where the gradient is slices.
  absl::Status CheckVariables(tensorflow::OpKernelContext* ctx, const std::vector<VarPtr>& variables,
                              GradientRows* rows) const {
    TF_RETURN_IF_ERROR(CheckBits(*variables[0]->tensor()));
    for (int i = 1; i <= count(); ++i) {
      const tensorflow::Tensor& slot = *variables[i]->tensor();
      if (slot.dtype() != dtype_) {
        return InvalidArgument("slots must be of the values' dtype. Received: a slot of dtype ",
                               tensorflow::DataTypeString(slot.dtype()));
      }
      TF_RETURN_IF_ERROR(attributes_.CheckSlot(ctx, slot.shape(), rows));
    }
    return absl::OkStatus();
  }

  SeedAttributes attributes_;
  tensorflow::DataType dtype_ = tensorflow::DT_INVALID;
};

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_SEED_SLOTS_OP_KERNEL_H_
