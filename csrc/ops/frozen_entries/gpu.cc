// GPU kernels of RememberFrozen and RestoreFrozen.
//
// A snapshot is always as long as the variable, and holds nothing at trainable entries.

#include "kernels/cuda/kernels.h"
#include "ops/common/gpu_helpers.h"
#include "ops/frozen_entries/op_kernel.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace freezeops {
namespace {

using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;
using ::tensorflow::TensorShape;

class RememberFrozenGpuOp : public FrozenEntriesOp {
 public:
  using FrozenEntriesOp::FrozenEntriesOp;

  void Compute(OpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, CheckFrozenMask(ctx, layout_));
    VarPtr variable;
    OP_REQUIRES_OK(ctx, LookUp(ctx, 0, &variable));
    tensorflow::tf_shared_lock lock(*variable->mu());
    OP_REQUIRES_OK(ctx, CheckVariable(variable.get()));
    Tensor* snapshot = nullptr;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, TensorShape({entries(layout_)}), &snapshot));
    if (entries(layout_) == 0) return;
    OP_REQUIRES_OK(ctx, Launched(ctx, cuda::copy_frozen(width_, snapshot->data(), variable->tensor()->data(),
                                                        ViewOf(ctx->input(1), layout_), StreamOf(ctx))));
  }
};

class RestoreFrozenGpuOp : public FrozenEntriesOp {
 public:
  using FrozenEntriesOp::FrozenEntriesOp;

  void Compute(OpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, CheckFrozenMask(ctx, layout_));
    VarPtr variable;
    OP_REQUIRES_OK(ctx, LookUp(ctx, 0, &variable));
    const Tensor& snapshot = ctx->input(2);
    OP_REQUIRES_OK(ctx, CheckWholeSnapshot(ctx, layout_, "on a GPU: remember and restore on the same device"));
    tensorflow::mutex_lock lock(*variable->mu());
    OP_REQUIRES_OK(ctx, CheckVariable(variable.get()));
    Tensor* const value = variable->tensor();
    if (entries(layout_) == 0 || value->data() == snapshot.data()) return;
    OP_REQUIRES_OK(ctx, UnshareOnGpu(ctx, value));
    OP_REQUIRES_OK(ctx, Launched(ctx, cuda::copy_frozen(width_, value->data(), snapshot.data(),
                                                        ViewOf(ctx->input(1), layout_), StreamOf(ctx))));
  }
};

FREEZEOPS_REGISTER_OP("Freezeops>RememberFrozen", GPU, RememberFrozenGpuOp, .HostMemory("variable"));
FREEZEOPS_REGISTER_OP("Freezeops>RestoreFrozen", GPU, RestoreFrozenGpuOp, .HostMemory("variable"));

}  // namespace
}  // namespace freezeops
