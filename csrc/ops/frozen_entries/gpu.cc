// GPU kernels of RememberFrozen and RestoreFrozen.
//
// A snapshot is always as long as the variable, and holds nothing at trainable entries.

#include <vector>

#include "kernels/cuda/kernels.h"
#include "ops/common/gpu_helpers.h"
#include "ops/common/op_checks.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/register_types.h"
#include "tensorflow/core/framework/types.h"

namespace freezeops {
namespace {

using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;
using ::tensorflow::TensorShape;

class RememberFrozenGpuOp : public VariableOp {
 public:
  using VariableOp::VariableOp;

  void Compute(OpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, CheckMask(ctx->input(1), layout_));
    VarPtr variable;
    OP_REQUIRES_OK(ctx, LookUp(ctx, &variable));
    tensorflow::tf_shared_lock lock(*variable->mu());
    OP_REQUIRES_OK(ctx, CheckVariable(variable.get()));
    Tensor* snapshot = nullptr;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, TensorShape({entries(layout_)}), &snapshot));
    if (entries(layout_) == 0) return;
    OP_REQUIRES_OK(ctx, Launched(ctx, cuda::copy_frozen(width_, snapshot->data(), variable->tensor()->data(),
                                                        ViewOf(ctx->input(1), layout_), StreamOf(ctx))));
  }
};

class RestoreFrozenGpuOp : public VariableOp {
 public:
  using VariableOp::VariableOp;

  void Compute(OpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, CheckMask(ctx->input(1), layout_));
    VarPtr variable;
    OP_REQUIRES_OK(ctx, LookUp(ctx, &variable));
    const Tensor& snapshot = ctx->input(2);
    OP_REQUIRES(ctx, snapshot.dims() == 1 && snapshot.NumElements() == entries(layout_),
                InvalidArgument("snapshot must be a vector of all ", entries(layout_), " entries of layout ",
                                LayoutString(layout_), " on a GPU: remember and restore on the same device. ",
                                "Received: snapshot of shape ", snapshot.shape().DebugString()));
    tensorflow::mutex_lock lock(*variable->mu());
    OP_REQUIRES_OK(ctx, CheckVariable(variable.get()));
    Tensor* const value = variable->tensor();
    if (entries(layout_) == 0 || value->data() == snapshot.data()) return;
    OP_REQUIRES_OK(ctx, UnshareOnGpu(ctx, value));
    OP_REQUIRES_OK(ctx, Launched(ctx, cuda::copy_frozen(width_, value->data(), snapshot.data(),
                                                        ViewOf(ctx->input(1), layout_), StreamOf(ctx))));
  }
};

#define FREEZEOPS_REGISTER(T)                                                                                        \
  REGISTER_KERNEL_BUILDER(                                                                                           \
      Name("Freezeops>RememberFrozen").Device(tensorflow::DEVICE_GPU).HostMemory("variable").TypeConstraint<T>("T"), \
      RememberFrozenGpuOp);                                                                                          \
  REGISTER_KERNEL_BUILDER(                                                                                           \
      Name("Freezeops>RestoreFrozen").Device(tensorflow::DEVICE_GPU).HostMemory("variable").TypeConstraint<T>("T"),  \
      RestoreFrozenGpuOp)
FREEZEOPS_REGISTER(Eigen::half);
FREEZEOPS_REGISTER(Eigen::bfloat16);
FREEZEOPS_REGISTER(float);
FREEZEOPS_REGISTER(double);
#undef FREEZEOPS_REGISTER

}  // namespace
}  // namespace freezeops
