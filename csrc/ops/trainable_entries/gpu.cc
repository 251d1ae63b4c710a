// GPU kernels of GatherTrainable, ReadTrainable, TakeTrainable, ScatterTrainable and RankTrainable.
//
// Offsets and indices that are not those of the mask are not reported, see kernels/cuda/kernels.h.

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

class CompactGpuOp : public CompactOp {
 public:
  using CompactOp::CompactOp;

 protected:
  // Inputs `first` and on are the mask, its offsets and the indices, which were checked.
  cuda::TrainableIndex IndexOf(OpKernelContext* ctx, int first) const {
    const Tensor& indices = ctx->input(first + 2);
    return {ViewOf(ctx->input(first), layout_), ctx->input(first + 1).flat<int64_t>().data(), indices.data(),
            indices.dtype() == tensorflow::DT_INT64, indices.dim_size(0)};
  }

  // Sets one output for each source.
  absl::Status Gather(OpKernelContext* ctx, const std::vector<const Tensor*>& sources, int first,
                      int64_t compact_size) const {
    const cuda::TrainableIndex index = IndexOf(ctx, first);
    const TensorShape shape({compact_size});
    std::vector<void*> compact;
    std::vector<const void*> whole;
    for (const Tensor* source : sources) {
      Tensor* output = nullptr;
      TF_RETURN_IF_ERROR(ctx->allocate_output(static_cast<int>(compact.size()), shape, &output));
      compact.push_back(output->data());
      whole.push_back(source->data());
    }
    return Launched(ctx, cuda::gather_trainable(width_, static_cast<int>(sources.size()), compact.data(), whole.data(),
                                                index, StreamOf(ctx)));
  }
};

class GatherTrainableGpuOp : public CompactGpuOp {
 public:
  using CompactGpuOp::CompactGpuOp;

  void Compute(OpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, CheckEntries("source", ctx->input(0).shape(), layout_));
    int64_t compact_size = 0;
    OP_REQUIRES_OK(ctx, CheckIndex(ctx, 1, &compact_size));
    OP_REQUIRES_OK(ctx, Gather(ctx, {&ctx->input(0)}, 1, compact_size));
  }
};

class ReadTrainableGpuOp : public CompactGpuOp {
 public:
  using CompactGpuOp::CompactGpuOp;

  void Compute(OpKernelContext* ctx) override {
    VarPtr variable;
    OP_REQUIRES_OK(ctx, LookUp(ctx, &variable));
    int64_t compact_size = 0;
    OP_REQUIRES_OK(ctx, CheckIndex(ctx, 1, &compact_size));
    tensorflow::tf_shared_lock lock(*variable->mu());
    OP_REQUIRES_OK(ctx, CheckVariable(variable.get()));
    OP_REQUIRES_OK(ctx, Gather(ctx, {variable->tensor()}, 1, compact_size));
  }
};

class TakeTrainableGpuOp : public CompactGpuOp {
 public:
  using CompactGpuOp::CompactGpuOp;

  void Compute(OpKernelContext* ctx) override {
    VarPtr variable;
    OP_REQUIRES_OK(ctx, LookUp(ctx, &variable));
    int64_t compact_size = 0;
    OP_REQUIRES_OK(ctx, CheckIndex(ctx, 2, &compact_size));
    tensorflow::tf_shared_lock lock(*variable->mu());
    OP_REQUIRES_OK(ctx, CheckVariableAndGradient(variable.get(), ctx->input(1)));
    OP_REQUIRES_OK(ctx, Gather(ctx, {&ctx->input(1), variable->tensor()}, 2, compact_size));
  }
};

class ScatterTrainableGpuOp : public CompactGpuOp {
 public:
  using CompactGpuOp::CompactGpuOp;

  void Compute(OpKernelContext* ctx) override {
    VarPtr variable;
    OP_REQUIRES_OK(ctx, LookUp(ctx, &variable));
    const Tensor& compact = ctx->input(1);
    int64_t compact_size = 0;
    OP_REQUIRES_OK(ctx, CheckIndex(ctx, 2, &compact_size));
    const cuda::TrainableIndex index = IndexOf(ctx, 2);
    OP_REQUIRES_OK(ctx, CheckCompact(compact.shape(), compact_size));
    tensorflow::mutex_lock lock(*variable->mu());
    OP_REQUIRES_OK(ctx, CheckVariable(variable.get()));
    if (compact.NumElements() == 0) return;
    OP_REQUIRES_OK(ctx, UnshareOnGpu(ctx, variable->tensor()));
    OP_REQUIRES_OK(ctx, Launched(ctx, cuda::scatter_trainable(width_, variable->tensor()->data(), compact.data(), index,
                                                              StreamOf(ctx))));
  }
};

class RankTrainableGpuOp : public RankOp {
 public:
  using RankOp::RankOp;

  void Compute(OpKernelContext* ctx) override {
    const Tensor& bits = ctx->input(0);
    OP_REQUIRES_OK(ctx, CheckInputs(ctx));
    Tensor* ranks = nullptr;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, bits.shape(), &ranks));
    OP_REQUIRES_OK(ctx, Launched(ctx, cuda::rank_of_bits(ranks->flat<int64_t>().data(), bits.flat<int64_t>().data(),
                                                         bits.NumElements(), ctx->input(1).flat<uint8_t>().data(),
                                                         kept_, ctx->input(2).flat<int64_t>().data(),
                                                         ctx->input(3).NumElements() - 1, StreamOf(ctx))));
  }
};

#define FREEZEOPS_REGISTER(T)                                                                                          \
  REGISTER_KERNEL_BUILDER(Name("Freezeops>GatherTrainable").Device(tensorflow::DEVICE_GPU).TypeConstraint<T>("T"),     \
                          GatherTrainableGpuOp);                                                                       \
  REGISTER_KERNEL_BUILDER(                                                                                             \
      Name("Freezeops>ReadTrainable").Device(tensorflow::DEVICE_GPU).HostMemory("variable").TypeConstraint<T>("T"),    \
      ReadTrainableGpuOp);                                                                                             \
  REGISTER_KERNEL_BUILDER(                                                                                             \
      Name("Freezeops>TakeTrainable").Device(tensorflow::DEVICE_GPU).HostMemory("variable").TypeConstraint<T>("T"),    \
      TakeTrainableGpuOp);                                                                                             \
  REGISTER_KERNEL_BUILDER(                                                                                             \
      Name("Freezeops>ScatterTrainable").Device(tensorflow::DEVICE_GPU).HostMemory("variable").TypeConstraint<T>("T"), \
      ScatterTrainableGpuOp)
FREEZEOPS_REGISTER(Eigen::half);
FREEZEOPS_REGISTER(Eigen::bfloat16);
FREEZEOPS_REGISTER(float);
FREEZEOPS_REGISTER(double);
#undef FREEZEOPS_REGISTER
REGISTER_KERNEL_BUILDER(Name("Freezeops>RankTrainable").Device(tensorflow::DEVICE_GPU), RankTrainableGpuOp);

}  // namespace
}  // namespace freezeops
