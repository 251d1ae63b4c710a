// What OpKernels of every device check of their inputs, and what they do with variables, in one place.

#ifndef FREEZEOPS_OPS_OP_CHECKS_H_
#define FREEZEOPS_OPS_OP_CHECKS_H_

#include <cstdint>
#include <memory>
#include <set>
#include <vector>

#include "ops/layout_attr.h"
#include "ops/tf_compat.h"
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

inline absl::Status CheckRowPerIndex(const tensorflow::TensorShape& values, const tensorflow::TensorShape& indices) {
  if (values.dims() >= 1 && indices.dims() == 1 && values.dim_size(0) == indices.dim_size(0)) return absl::OkStatus();
  return InvalidArgument("values must have one row for each index. Received: values of shape ", values.DebugString(),
                         ", indices of shape ", indices.DebugString());
}

// The entries in a row of `values`, which has an axis.
inline int64_t RowSize(const tensorflow::TensorShape& values) {
  int64_t size = 1;
  for (int i = 1; i < values.dims(); ++i) size *= values.dim_size(i);
  return size;
}

// Values and indices of slices of a tensor of `rows` rows.
inline absl::Status CheckSlices(const tensorflow::TensorShape& values, const tensorflow::TensorShape& indices,
                                int64_t rows, const MaskLayout& layout) {
  TF_RETURN_IF_ERROR(CheckRowPerIndex(values, indices));
  if (rows >= 0 && rows * RowSize(values) == entries(layout)) return absl::OkStatus();
  return InvalidArgument("rows times the size of a row must be the ", entries(layout), " entries of layout ",
                         LayoutString(layout), ". Received: rows=", rows, ", values of shape ", values.DebugString());
}

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
};

// Base of the ops of compact state that move entries.
class CompactOp : public LayoutOp {
 public:
  explicit CompactOp(tensorflow::OpKernelConstruction* ctx) : LayoutOp(ctx) {
    OP_REQUIRES(ctx, layout_.outer == 1,
                InvalidArgument("layout must be one that does not repeat, with outer = 1. Received: layout=",
                                LayoutString(layout_)));
  }

 protected:
  // Inputs `first` and on are the mask, its offsets and the indices.
  absl::Status CheckIndex(tensorflow::OpKernelContext* ctx, int first) const {
    TF_RETURN_IF_ERROR(CheckMask(ctx->input(first), layout_));
    TF_RETURN_IF_ERROR(CheckOffsets(ctx->input(first + 1).shape(), layout_.kept));
    const tensorflow::Tensor& indices = ctx->input(first + 2);
    if (indices.dims() == 1) return absl::OkStatus();
    return InvalidArgument("indices must be a vector. Received: indices of shape ", indices.shape().DebugString());
  }

  absl::Status CheckCompact(const tensorflow::Tensor& compact, int64_t capacity) const {
    if (compact.NumElements() == capacity * layout_.inner) return absl::OkStatus();
    return InvalidArgument("compact must have ", layout_.inner, " entries for each of the ", capacity,
                           " indices. Received: compact of shape ", compact.shape().DebugString());
  }

  // The variable's lock is held.
  absl::Status CheckVariable(tensorflow::Var* variable) const {
    return freezeops::CheckVariable(variable, dtype_, layout_, "its trainable entries are read or written");
  }
};

// Base of the ops that rank bits.
class RankOp : public tensorflow::OpKernel {
 public:
  explicit RankOp(tensorflow::OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("kept", &kept_));
  }

 protected:
  absl::Status CheckInputs(tensorflow::OpKernelContext* ctx) const {
    TF_RETURN_IF_ERROR(CheckMask(ctx->input(1), MaskLayout{1, kept_, 1}));
    return CheckOffsets(ctx->input(2).shape(), kept_);
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
    OP_REQUIRES_OK(ctx, ctx->GetAttr("size", &size_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("sparse", &sparse_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("powers", &powers_));
    for (const int64_t power : powers_) {
      OP_REQUIRES(ctx, power == 1 || power == 2, InvalidArgument("powers must be 1 or 2. Received: power ", power));
    }
  }

 protected:
  // The number of slots.
  int count() const { return static_cast<int>(powers_.size()); }

  absl::Status CheckInputs(tensorflow::OpKernelContext* ctx) const {
    const tensorflow::Tensor& values = ctx->input(1);
    const tensorflow::Tensor& scales = ctx->input(3);
    if (scales.dims() != 1 || scales.dim_size(0) != count() || ctx->num_inputs() != 4 + count()) {
      return InvalidArgument("scales and slots must be as many as powers, ", count(), ". Received: scales of shape ",
                             scales.shape().DebugString(), ", ", ctx->num_inputs() - 4, " slots");
    }
    if (sparse_) return CheckRowPerIndex(values.shape(), ctx->input(2).shape());
    if (values.NumElements() == size_) return absl::OkStatus();
    return InvalidArgument("values must have the ", size_, " entries of the slots. Received: values of shape ",
                           values.shape().DebugString());
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
    if (bits.dtype() == tensorflow::DT_UINT8 && bits.NumElements() == mask_bytes(size_)) return absl::OkStatus();
    return InvalidArgument("unseeded must have one bit for each of ", size_, " entries. Received: unseeded of ",
                           tensorflow::DataTypeString(bits.dtype()), " and shape ", bits.shape().DebugString());
  }

  absl::Status CheckSlot(const tensorflow::Tensor& slot, tensorflow::DataType dtype) const {
    if (slot.dtype() == dtype && slot.NumElements() == size_) return absl::OkStatus();
    return InvalidArgument("slots must have ", size_, " entries of the values' dtype. Received: a slot of ",
                           tensorflow::DataTypeString(slot.dtype()), " and shape ", slot.shape().DebugString());
  }

  int64_t size_ = 0;
  bool sparse_ = false;
  std::vector<int64_t> powers_;
};

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_OP_CHECKS_H_
