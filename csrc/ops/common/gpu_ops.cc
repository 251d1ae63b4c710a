// GPU kernels of all ops but FusedUpdate, which is in fused_update/gpu.cc.
//
// Nothing here waits for the device or looks at what is in its memory: masks, offsets, indices and scales stay there.
// So what would take a look at them is different from the CPU's kernels:
//   - MaskGradient of a mask of ones copies where it may not work in place;
//   - a snapshot is always as long as the variable, and holds nothing at trainable entries;
//   - indices that are out of range, and offsets that are not those of the mask, are not reported; see
//     kernels/cuda/kernels.h for what happens instead.
// A variable's lock is held until the kernel that reads or writes it is started; what follows on the stream comes
// after.

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

absl::Status LookUp(OpKernelContext* ctx, VarPtr* variable) {
  return LookupResource(ctx, tensorflow::HandleFromInput(ctx, 0), variable);
}

class MaskGradientGpuOp : public MaskOp {
 public:
  using MaskOp::MaskOp;

  void Compute(OpKernelContext* ctx) override {
    const Tensor& gradient = ctx->input(0);
    OP_REQUIRES_OK(ctx, CheckInputs(ctx));
    const void* source = gradient.data();
    Tensor* masked = nullptr;
    OP_REQUIRES_OK(ctx, ctx->forward_input_or_allocate_output({0}, 0, gradient.shape(), &masked));
    if (entries(layout_) == 0) return;
    const MaskView mask = ViewOf(ctx->input(1), layout_);
    const cuda::Stream stream = StreamOf(ctx);
    OP_REQUIRES_OK(ctx, Launched(ctx, masked->data() == source
                                          ? cuda::zero_frozen(width_, masked->data(), mask, stream)
                                          : cuda::copy_and_zero_frozen(width_, masked->data(), source, mask, stream)));
  }
};

class MaskSlicesGpuOp : public SlicesOp {
 public:
  using SlicesOp::SlicesOp;

  void Compute(OpKernelContext* ctx) override {
    const Tensor& values = ctx->input(0);
    const Tensor& indices = ctx->input(1);
    OP_REQUIRES_OK(ctx, CheckInputs(ctx));
    const void* source = values.data();
    Tensor* masked = nullptr;
    OP_REQUIRES_OK(ctx, ctx->forward_input_or_allocate_output({0}, 0, values.shape(), &masked));
    if (values.NumElements() == 0) return;
    OP_REQUIRES(ctx, entries(layout_) > 0,
                InvalidArgument("indices must name rows of the variable, which has none. Received: ",
                                indices.dim_size(0), " indices"));
    const cuda::Slices slices{indices.data(), indices.dtype() == tensorflow::DT_INT64, indices.dim_size(0), rows_,
                              RowSize(values.shape())};
    OP_REQUIRES_OK(ctx, Launched(ctx, cuda::mask_slices(width_, masked->data(), source, slices,
                                                        ViewOf(ctx->input(2), layout_), StreamOf(ctx))));
  }
};

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

#define FREEZEOPS_GPU(OP) Name("Freezeops>" OP).Device(tensorflow::DEVICE_GPU)
#define FREEZEOPS_REGISTER(T)                                                                              \
  REGISTER_KERNEL_BUILDER(FREEZEOPS_GPU("MaskGradient").TypeConstraint<T>("T"), MaskGradientGpuOp);        \
  REGISTER_KERNEL_BUILDER(FREEZEOPS_GPU("MaskSlices").TypeConstraint<T>("T"), MaskSlicesGpuOp);            \
  REGISTER_KERNEL_BUILDER(FREEZEOPS_GPU("RememberFrozen").HostMemory("variable").TypeConstraint<T>("T"),   \
                          RememberFrozenGpuOp);                                                            \
  REGISTER_KERNEL_BUILDER(FREEZEOPS_GPU("RestoreFrozen").HostMemory("variable").TypeConstraint<T>("T"),    \
                          RestoreFrozenGpuOp);                                                             \
  REGISTER_KERNEL_BUILDER(FREEZEOPS_GPU("GatherTrainable").TypeConstraint<T>("T"), GatherTrainableGpuOp);  \
  REGISTER_KERNEL_BUILDER(FREEZEOPS_GPU("ReadTrainable").HostMemory("variable").TypeConstraint<T>("T"),    \
                          ReadTrainableGpuOp);                                                             \
  REGISTER_KERNEL_BUILDER(FREEZEOPS_GPU("TakeTrainable").HostMemory("variable").TypeConstraint<T>("T"),    \
                          TakeTrainableGpuOp);                                                             \
  REGISTER_KERNEL_BUILDER(FREEZEOPS_GPU("ScatterTrainable").HostMemory("variable").TypeConstraint<T>("T"), \
                          ScatterTrainableGpuOp);                                                          \
  REGISTER_KERNEL_BUILDER(                                                                                 \
      FREEZEOPS_GPU("SeedSlots").HostMemory("unseeded").HostMemory("slots").TypeConstraint<T>("T"), SeedSlotsGpuOp)
FREEZEOPS_REGISTER(Eigen::half);
FREEZEOPS_REGISTER(Eigen::bfloat16);
FREEZEOPS_REGISTER(float);
FREEZEOPS_REGISTER(double);
REGISTER_KERNEL_BUILDER(FREEZEOPS_GPU("RankTrainable"), RankTrainableGpuOp);
#undef FREEZEOPS_REGISTER
#undef FREEZEOPS_GPU

}  // namespace
}  // namespace freezeops
