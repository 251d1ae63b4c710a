// What OpKernels of every device check of their inputs, and what they do with variables, in one place.

#ifndef FREEZEOPS_OPS_COMMON_OP_CHECKS_H_
#define FREEZEOPS_OPS_COMMON_OP_CHECKS_H_

#include <cstdint>
#include <memory>
#include <set>
#include <vector>

#include "ops/common/layout_attr.h"
#include "ops/common/tf_compat.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/tensor.h"

namespace freezeops {

using VarPtr = tensorflow::core::RefCountPtr<tensorflow::Var>;

inline absl::Status CheckMask(const tensorflow::Tensor& mask, const MaskLayout& layout) {
  return CheckMask(mask.shape(), layout);
}

inline MaskView ViewOf(const tensorflow::Tensor& mask, const MaskLayout& layout) {
  return MaskView{mask.flat<uint8_t>().data(), layout};
}

// A variable of the op's dtype with a layout's entries; its lock is held. `purpose` says what is to be done with it.
inline absl::Status CheckVariable(tensorflow::Var* variable, tensorflow::DataType dtype, const MaskLayout& layout,
                                  const char* purpose) {
  if (!variable->is_initialized || !variable->tensor()->IsInitialized()) {
    return absl::FailedPreconditionError(absl::StrCat("variable must be initialized before ", purpose,
                                                      ". Received: an uninitialized variable; its layout is ",
                                                      LayoutString(layout)));
  }
  if (variable->tensor()->dtype() != dtype) {
    return InvalidArgument("variable must be of dtype ", tensorflow::DataTypeString(dtype),
                           ". Received: a variable of dtype ", tensorflow::DataTypeString(variable->tensor()->dtype()),
                           " and shape ", variable->tensor()->shape().DebugString());
  }
  return CheckEntries("variable", variable->tensor()->shape(), layout);
}

// Base of the ops on entries of a layout.
class LayoutOp : public tensorflow::OpKernel {
 public:
  explicit LayoutOp(tensorflow::OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, GetLayout(ctx, &layout_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("T", &dtype_));
    width_ = tensorflow::DataTypeSize(dtype_);
  }

 protected:
  MaskLayout layout_;
  tensorflow::DataType dtype_;
  int width_ = 0;  // bytes of an entry
};

// Base of the ops that mask a gradient.
class MaskOp : public LayoutOp {
 public:
  using LayoutOp::LayoutOp;

 protected:
  absl::Status CheckInputs(tensorflow::OpKernelContext* ctx) const {
    TF_RETURN_IF_ERROR(CheckMask(ctx->input(1), layout_));
    return CheckEntries("gradient", ctx->input(0).shape(), layout_);
  }
};

// Base of the ops that mask slices.
class SlicesOp : public LayoutOp {
 public:
  explicit SlicesOp(tensorflow::OpKernelConstruction* ctx) : LayoutOp(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("rows", &rows_));
  }

 protected:
  absl::Status CheckInputs(tensorflow::OpKernelContext* ctx) const {
    TF_RETURN_IF_ERROR(CheckMask(ctx->input(2), layout_));
    return CheckSlices(ctx->input(0).shape(), ctx->input(1).shape(), rows_, layout_);
  }

  int64_t rows_ = 0;
};

// Base of the ops that remember and restore frozen entries.
class VariableOp : public LayoutOp {
 public:
  using LayoutOp::LayoutOp;

 protected:
  // The variable's lock is held.
  absl::Status CheckVariable(tensorflow::Var* variable) const {
    return freezeops::CheckVariable(variable, dtype_, layout_, "its frozen entries are remembered or restored");
  }

  // Before entries are counted, which takes as long as the layout says: it must be that of something in memory. Its
  // lock is not held, and what is checked may change until it is.
  absl::Status CheckSize(tensorflow::Var* variable) const {
    tensorflow::tf_shared_lock lock(*variable->mu());
    return CheckVariable(variable);
  }
};

// Base of the ops of compact state that move entries.
class CompactOp : public LayoutOp {
 public:
  explicit CompactOp(tensorflow::OpKernelConstruction* ctx) : LayoutOp(ctx) {
    OP_REQUIRES_OK(ctx, CheckDoesNotRepeat(layout_));
  }

 protected:
  // Inputs `first` and on are the mask, its offsets and the indices. Sets the number of entries that the latter are of.
  absl::Status CheckIndex(tensorflow::OpKernelContext* ctx, int first, int64_t* compact_size) const {
    TF_RETURN_IF_ERROR(CheckMask(ctx->input(first), layout_));
    TF_RETURN_IF_ERROR(CheckOffsets(ctx->input(first + 1).shape(), layout_.kept));
    const tensorflow::Tensor& indices = ctx->input(first + 2);
    return CheckIndices(indices.dtype(), indices.shape(), layout_, compact_size);
  }

  // The variable's lock is held. What is checked of it comes before what was given for it.
  absl::Status CheckVariableAndGradient(tensorflow::Var* variable, const tensorflow::Tensor& gradient) const {
    TF_RETURN_IF_ERROR(CheckVariable(variable));
    return CheckSameShape("gradient", gradient.shape(), "variable", variable->tensor()->shape());
  }

  // The variable's lock is held.
  absl::Status CheckVariable(tensorflow::Var* variable) const {
    return freezeops::CheckVariable(variable, dtype_, layout_, "its trainable entries are read or written");
  }
};

// Base of the ops that rank bits.
class RankOp : public tensorflow::OpKernel {
 public:
  explicit RankOp(tensorflow::OpKernelConstruction* ctx) : OpKernel(ctx) { OP_REQUIRES_OK(ctx, GetKept(ctx, &kept_)); }

 protected:
  absl::Status CheckInputs(tensorflow::OpKernelContext* ctx) const {
    const MaskLayout layout{1, kept_, 1};
    int64_t unused;
    TF_RETURN_IF_ERROR(CheckMask(ctx->input(1), layout));
    TF_RETURN_IF_ERROR(CheckOffsets(ctx->input(2).shape(), kept_));
    return CheckIndices(ctx->input(3).dtype(), ctx->input(3).shape(), layout, &unused);
  }

  int64_t kept_ = 0;
};

// Locks variables for writing, in the order of their addresses, so that two ops cannot wait for each other.
class LockAll {
 public:
  explicit LockAll(const std::vector<VarPtr>& variables) {
    std::set<tensorflow::Var*> ordered;
    for (const VarPtr& variable : variables) ordered.insert(variable.get());
    for (tensorflow::Var* variable : ordered) {
      locks_.push_back(std::make_unique<tensorflow::mutex_lock>(*variable->mu()));
    }
  }

 private:
  std::vector<std::unique_ptr<tensorflow::mutex_lock>> locks_;
};

// Base of the ops that seed slots.
class SeedOp : public tensorflow::OpKernel {
 public:
  explicit SeedOp(tensorflow::OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, GetSeedAttributes(ctx, &attributes_));
  }

 protected:
  // The number of slots.
  int count() const { return attributes_.count(); }
  int64_t size() const { return attributes_.size; }

  absl::Status CheckInputs(tensorflow::OpKernelContext* ctx) const {
    return attributes_.CheckShapes(ctx->input(1).shape(), ctx->input(2).shape(), ctx->input(3).shape());
  }

  // The bits first, then the slots.
  absl::Status LookUp(tensorflow::OpKernelContext* ctx, std::vector<VarPtr>* variables) const {
    variables->resize(1 + count());
    for (int i = 0; i <= count(); ++i) {
      const int input = i == 0 ? 0 : 3 + i;
      TF_RETURN_IF_ERROR(LookupResource(ctx, tensorflow::HandleFromInput(ctx, input), &(*variables)[i]));
    }
    return absl::OkStatus();
  }

  absl::Status CheckBits(const tensorflow::Tensor& bits) const {
    return attributes_.CheckBits(bits.dtype(), bits.shape());
  }

  // `rows` is set where the gradient is slices.
  absl::Status CheckSlot(const tensorflow::Tensor& slot, tensorflow::OpKernelContext* ctx, GradientRows* rows) const {
    const tensorflow::Tensor& values = ctx->input(1);
    if (slot.dtype() != values.dtype()) {
      return InvalidArgument("slots must be of the values' dtype. Received: a slot of dtype ",
                             tensorflow::DataTypeString(slot.dtype()));
    }
    return attributes_.CheckSlot(slot.shape(), values.shape(), ctx->input(2).shape(), rows);
  }

  SeedAttributes attributes_;
};

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_COMMON_OP_CHECKS_H_
