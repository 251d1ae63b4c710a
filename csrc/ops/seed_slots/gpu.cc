// GPU kernel of SeedSlots.

#include <vector>

#include "kernels/cuda/kernels.h"
#include "ops/common/gpu_helpers.h"
#include "ops/seed_slots/op_kernel.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace freezeops {
namespace {

using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;

// The host does not know whether a bit is set, so all slots get buffers of their own where a read shares them.
class SeedSlotsGpuOp : public SeedOp {
 public:
  explicit SeedSlotsGpuOp(tensorflow::OpKernelConstruction* ctx) : SeedOp(ctx) {
    OP_REQUIRES(
        ctx, count() <= cuda::kMostSeededSlots,
        InvalidArgument("slots must be at most ", cuda::kMostSeededSlots, " on a GPU. Received: ", count(), " slots"));
  }

  void Compute(OpKernelContext* ctx) override {
    const Tensor& values = ctx->input(1);
    OP_REQUIRES_OK(ctx, attributes_.CheckInputs(ctx));
    std::vector<VarPtr> variables;
    OP_REQUIRES_OK(ctx, LookUpAll(ctx, &variables));
    LockAll lock(variables);
    GradientRows rows = {};
    OP_REQUIRES_OK(ctx, CheckVariables(ctx, variables, &rows));
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
};

FREEZEOPS_REGISTER_OP("Freezeops>SeedSlots", GPU, SeedSlotsGpuOp, .HostMemory("unseeded").HostMemory("slots"));

}  // namespace
}  // namespace freezeops
