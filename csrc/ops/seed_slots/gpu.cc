// GPU kernel of SeedSlots.

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

// Whether a bit is set is not known here, so the slots get buffers of their own wherever a read shares them.
class SeedSlotsGpuOp : public SeedOp {
 public:
  explicit SeedSlotsGpuOp(tensorflow::OpKernelConstruction* ctx) : SeedOp(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("T", &dtype_));
    OP_REQUIRES(
        ctx, count() <= cuda::kMostSeededSlots,
        InvalidArgument("slots must be at most ", cuda::kMostSeededSlots, " on a GPU. Received: ", count(), " slots"));
  }

  void Compute(OpKernelContext* ctx) override {
    const Tensor& values = ctx->input(1);
    OP_REQUIRES_OK(ctx, CheckInputs(ctx));
    std::vector<VarPtr> variables;
    OP_REQUIRES_OK(ctx, SeedOp::LookUp(ctx, &variables));
    LockAll lock(variables);
    OP_REQUIRES_OK(ctx, CheckBits(*variables[0]->tensor()));
    GradientRows rows = {};
    for (int i = 1; i <= count(); ++i) OP_REQUIRES_OK(ctx, CheckSlot(*variables[i]->tensor(), ctx, &rows));
    if (size() == 0 || values.NumElements() == 0) return;
    for (const VarPtr& variable : variables) OP_REQUIRES_OK(ctx, UnshareOnGpu(ctx, variable->tensor()));

    cuda::SeedArguments arguments{};
    arguments.unseeded = variables[0]->tensor()->flat<uint8_t>().data();
    arguments.size = size();
    arguments.count = count();
    for (int i = 0; i < count(); ++i) {
      arguments.slots[i] = variables[i + 1]->tensor()->data();
      arguments.powers[i] = static_cast<int>(attributes_.powers[i]);
    }
    arguments.scales = ctx->input(3).flat<double>().data();
    arguments.values = values.data();
    if (attributes_.sparse) {
      arguments.indices = ctx->input(2).flat<int64_t>().data();
      arguments.slices = ctx->input(2).dim_size(0);
      arguments.row_size = rows.width;
    }
    OP_REQUIRES_OK(ctx, Launched(ctx, cuda::seed_slots(FloatOf(dtype_), arguments, StreamOf(ctx))));
  }

 private:
  tensorflow::DataType dtype_;
};

#define FREEZEOPS_REGISTER(T)                                 \
  REGISTER_KERNEL_BUILDER(Name("Freezeops>SeedSlots")         \
                              .Device(tensorflow::DEVICE_GPU) \
                              .HostMemory("unseeded")         \
                              .HostMemory("slots")            \
                              .TypeConstraint<T>("T"),        \
                          SeedSlotsGpuOp)
FREEZEOPS_REGISTER(Eigen::half);
FREEZEOPS_REGISTER(Eigen::bfloat16);
FREEZEOPS_REGISTER(float);
FREEZEOPS_REGISTER(double);
#undef FREEZEOPS_REGISTER

}  // namespace
}  // namespace freezeops
