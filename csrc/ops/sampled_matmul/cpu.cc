// CPU kernel of SampledMatmul.

#include "kernels/cpu/sampled_matmul.h"
#include "ops/common/cpu_helpers.h"
#include "ops/common/dtypes.h"
#include "ops/sampled_matmul/inputs.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace freezeops {
namespace {

using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;

class SampledMatmulOp : public tensorflow::OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* ctx) override {
    SampledSizes sizes;
    OP_REQUIRES_OK(ctx, CheckSampled(ctx, &sizes));
    Tensor* compact = nullptr;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, tensorflow::TensorShape({sizes.capacity}), &compact));
    if (sizes.capacity == 0) return;
    const Tensor& x = ctx->input(0);
    const Tensor& visits = ctx->input(2);
    Tensor scratch;
    const auto allocate = [&](int64_t floats) {
      const absl::Status status = ctx->allocate_temp(tensorflow::DT_FLOAT, tensorflow::TensorShape({floats}), &scratch);
      return status.ok() ? scratch.flat<float>().data() : nullptr;
    };
    cpu::SampledMatmul product(FloatOf(x.dtype()), x.data(), ctx->input(1).data(), sizes.tokens, sizes.rows,
                               sizes.columns, ctx->device()->tensorflow_cpu_worker_threads()->num_threads,
                               ParallelForOf(ctx), allocate);
    const cpu::SampledResult result =
        product.Run(visits.flat<int32_t>().data(), visits.NumElements(), compact->data(), sizes.capacity);
    OP_REQUIRES(ctx, result != cpu::SampledResult::kNotThePlan, NotThePlan(sizes, visits));
    OP_REQUIRES(ctx, result != cpu::SampledResult::kNoMemory,
                absl::ResourceExhaustedError("SampledMatmul found no memory to transpose x and dy in"));
  }

 private:
  static absl::Status NotThePlan(const SampledSizes& sizes, const Tensor& visits) {
    // `repack` empties the plans that it replaces, as it does masks.
    const char* hint =
        visits.NumElements() == 0 ? "; a function that was traced before `repack` must be traced again" : "";
    return InvalidArgument(cpu::kVisitsMessage, " Received: ", sizes.rows, " rows, ", sizes.columns, " columns, ",
                           sizes.capacity, " indices, visits of shape ", visits.shape().DebugString(), hint);
  }
};

FREEZEOPS_REGISTER_FOR_TYPE("Freezeops>SampledMatmul", CPU, SampledMatmulOp, Eigen::half);
FREEZEOPS_REGISTER_FOR_TYPE("Freezeops>SampledMatmul", CPU, SampledMatmulOp, Eigen::bfloat16);
FREEZEOPS_REGISTER_FOR_TYPE("Freezeops>SampledMatmul", CPU, SampledMatmulOp, float);

}  // namespace
}  // namespace freezeops
