// Helpers of the OpKernels of every device: the layout attribute, variables and their locks.

#ifndef FREEZEOPS_OPS_COMMON_OP_KERNELS_H_
#define FREEZEOPS_OPS_COMMON_OP_KERNELS_H_

#include <cstdint>
#include <memory>
#include <set>
#include <vector>

#include "ops/common/checks.h"
#include "ops/common/layout_attr.h"
#include "ops/common/tf_compat.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/register_types.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/tensor.h"

namespace freezeops {

using VarPtr = tensorflow::core::RefCountPtr<tensorflow::Var>;

inline absl::Status GetShape(tensorflow::OpKernelContext* ctx, int input, PartialTensorShape* shape) {
  *shape = ctx->input(input).shape();
  return absl::OkStatus();
}

inline MaskView ViewOf(const tensorflow::Tensor& mask, const MaskLayout& layout) {
  return MaskView{mask.flat<uint8_t>().data(), layout};
}

// Looks up the variable that an input is a handle of.
inline absl::Status LookUp(tensorflow::OpKernelContext* ctx, int input, VarPtr* variable) {
  return LookupResource(ctx, tensorflow::HandleFromInput(ctx, input), variable);
}

// A variable of the op's dtype with a layout's entries; its lock is held. `purpose` says what is to be done with it.
inline absl::Status CheckVariable(tensorflow::Var* variable, tensorflow::DataType dtype, const MaskLayout& layout,
                                  const char* purpose) {
  if (!variable->is_initialized || !variable->tensor()->IsInitialized()) {
    return absl::FailedPreconditionError(absl::StrCat("variable must be initialized before ", purpose,
                                                      ". Received: an uninitialized variable; its layout is ",
                                                      LayoutString(layout)));
  }
  const tensorflow::Tensor& value = *variable->tensor();
  TF_RETURN_IF_ERROR(CheckDtype("variable", value.dtype(), dtype, value.shape()));
  return CheckEntries("variable", value.shape(), layout);
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
  MaskLayout layout_ = {};
  tensorflow::DataType dtype_ = tensorflow::DT_INVALID;
  int width_ = 0;  // bytes of an entry
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

// Registers an OpKernel for the four dtypes. DEVICE is CPU or GPU; what follows are calls such as .HostMemory("slots").
#define FREEZEOPS_REGISTER_OP(OP, DEVICE, KERNEL, ...)                           \
  FREEZEOPS_REGISTER_FOR_TYPE(OP, DEVICE, KERNEL, Eigen::half, __VA_ARGS__);     \
  FREEZEOPS_REGISTER_FOR_TYPE(OP, DEVICE, KERNEL, Eigen::bfloat16, __VA_ARGS__); \
  FREEZEOPS_REGISTER_FOR_TYPE(OP, DEVICE, KERNEL, float, __VA_ARGS__);           \
  FREEZEOPS_REGISTER_FOR_TYPE(OP, DEVICE, KERNEL, double, __VA_ARGS__)
#define FREEZEOPS_REGISTER_FOR_TYPE(OP, DEVICE, KERNEL, T, ...) \
  REGISTER_KERNEL_BUILDER(Name(OP).Device(tensorflow::DEVICE_##DEVICE).TypeConstraint<T>("T") __VA_ARGS__, KERNEL)

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_COMMON_OP_KERNELS_H_
