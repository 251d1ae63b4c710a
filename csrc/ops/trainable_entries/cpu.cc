// CPU kernels of compact state: GatherTrainable, ReadTrainable, TakeTrainable, ScatterTrainable and
// RankTrainable.
//
// Where a thread's part of the trainable entries begins is known from the ranks that were counted once per mask; see
// kernels/cpu/parallel_compact.h.

#include <memory>
#include <vector>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/parallel_compact.h"
#include "ops/common/cpu_helpers.h"
#include "ops/common/op_checks.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/register_types.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"

namespace freezeops {
namespace {

using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;
using ::tensorflow::TensorShape;
using ::tensorflow::Var;

absl::Status OffsetsError(const TrainableParts& parts) {
  return InvalidArgument(kOffsetsMessage, " Received: ", parts.capacity(), " indices, offsets with a total of ",
                         parts.total());
}

class CpuCompactOp : public CompactOp {
 public:
  using CompactOp::CompactOp;

 protected:
  // Inputs `first` and on are the mask, its offsets and the indices.
  absl::Status MakeParts(OpKernelContext* ctx, int first, std::unique_ptr<TrainableParts>* parts,
                         int64_t* compact_size) const {
    TF_RETURN_IF_ERROR(CheckIndex(ctx, first, compact_size));
    const Tensor& mask = ctx->input(first);
    const Tensor& offsets = ctx->input(first + 1);
    const Tensor& indices = ctx->input(first + 2);
    *parts = std::make_unique<TrainableParts>(
        ViewOf(mask, layout_), offsets.flat<int64_t>().data(),
        TrainableIndices{indices.data(), indices.dtype() == tensorflow::DT_INT64}, indices.dim_size(0),
        ctx->device()->tensorflow_cpu_worker_threads()->num_threads,
        [ctx](int64_t count, int64_t cycles, const std::function<void(int64_t, int64_t)>& work) {
          ParallelFor(ctx, count, cycles, work);
        });
    return absl::OkStatus();
  }

  void Gather(OpKernelContext* ctx, const TrainableParts& parts, int64_t compact_size,
              const std::vector<const Tensor*>& sources) const {
    std::vector<void*> compact;
    std::vector<const void*> whole;
    for (size_t i = 0; i < sources.size(); ++i) {
      Tensor* output = nullptr;
      const TensorShape shape({compact_size});
      OP_REQUIRES_OK(ctx, ctx->allocate_output(static_cast<int>(i), shape, &output));
      if (output->NumElements() == 0) continue;
      compact.push_back(output->data());
      whole.push_back(sources[i]->data());
    }
    OP_REQUIRES(ctx, compact.empty() || parts.Gather(compact, whole, width_), OffsetsError(parts));
  }
};

class GatherTrainableOp : public CpuCompactOp {
 public:
  using CpuCompactOp::CpuCompactOp;

  void Compute(OpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, CheckEntries("source", ctx->input(0).shape(), layout_));
    int64_t compact_size = 0;
    std::unique_ptr<TrainableParts> parts;
    OP_REQUIRES_OK(ctx, MakeParts(ctx, 1, &parts, &compact_size));
    Gather(ctx, *parts, compact_size, {&ctx->input(0)});
  }
};

class ReadTrainableOp : public CpuCompactOp {
 public:
  using CpuCompactOp::CpuCompactOp;

  void Compute(OpKernelContext* ctx) override {
    tensorflow::core::RefCountPtr<Var> variable;
    OP_REQUIRES_OK(ctx, LookupResource(ctx, tensorflow::HandleFromInput(ctx, 0), &variable));
    int64_t compact_size = 0;
    std::unique_ptr<TrainableParts> parts;
    OP_REQUIRES_OK(ctx, MakeParts(ctx, 1, &parts, &compact_size));
    tensorflow::tf_shared_lock lock(*variable->mu());
    OP_REQUIRES_OK(ctx, CheckVariable(variable.get()));
    Gather(ctx, *parts, compact_size, {variable->tensor()});
  }
};

class TakeTrainableOp : public CpuCompactOp {
 public:
  using CpuCompactOp::CpuCompactOp;

  void Compute(OpKernelContext* ctx) override {
    tensorflow::core::RefCountPtr<Var> variable;
    OP_REQUIRES_OK(ctx, LookupResource(ctx, tensorflow::HandleFromInput(ctx, 0), &variable));
    int64_t compact_size = 0;
    std::unique_ptr<TrainableParts> parts;
    OP_REQUIRES_OK(ctx, MakeParts(ctx, 2, &parts, &compact_size));
    tensorflow::tf_shared_lock lock(*variable->mu());
    OP_REQUIRES_OK(ctx, CheckVariableAndGradient(variable.get(), ctx->input(1)));
    Gather(ctx, *parts, compact_size, {&ctx->input(1), variable->tensor()});
  }
};

class ScatterTrainableOp : public CpuCompactOp {
 public:
  using CpuCompactOp::CpuCompactOp;

  void Compute(OpKernelContext* ctx) override {
    tensorflow::core::RefCountPtr<Var> variable;
    OP_REQUIRES_OK(ctx, LookupResource(ctx, tensorflow::HandleFromInput(ctx, 0), &variable));
    const Tensor& compact = ctx->input(1);
    int64_t compact_size = 0;
    std::unique_ptr<TrainableParts> parts;
    OP_REQUIRES_OK(ctx, MakeParts(ctx, 2, &parts, &compact_size));
    OP_REQUIRES_OK(ctx, CheckCompact(compact.shape(), compact_size));

    tensorflow::mutex_lock lock(*variable->mu());
    OP_REQUIRES_OK(ctx, CheckVariable(variable.get()));
    if (parts->total() == 0 || layout_.inner == 0) return;
    Tensor* const value = variable->tensor();
    // In copy-on-read mode no read shares the buffer, otherwise one that does must not see this write.
    if (!value->RefCountIsOne()) OP_REQUIRES_OK(ctx, Unshare(ctx, value));
    OP_REQUIRES(ctx, parts->Scatter(value->data(), compact.data(), width_), OffsetsError(*parts));
  }
};

class RankTrainableOp : public RankOp {
 public:
  using RankOp::RankOp;

  void Compute(OpKernelContext* ctx) override {
    const Tensor& bits = ctx->input(0);
    const Tensor& mask = ctx->input(1);
    const Tensor& offsets = ctx->input(2);
    OP_REQUIRES_OK(ctx, CheckInputs(ctx));
    const int64_t count = bits.NumElements();
    const int64_t* bit = bits.flat<int64_t>().data();
    for (int64_t i = 0; i < count; ++i) {
      OP_REQUIRES(ctx, bit[i] >= 0 && bit[i] < kept_,
                  InvalidArgument("bits must be in [0, ", kept_, "). Received: bits[", i, "] = ", bit[i]));
    }
    Tensor* ranks = nullptr;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, bits.shape(), &ranks));
    const int64_t last = ctx->input(3).NumElements() - 1;
    int64_t* rank = ranks->flat<int64_t>().data();
    const uint8_t* words = mask.flat<uint8_t>().data();
    const int64_t* counted = offsets.flat<int64_t>().data();
    ParallelFor(ctx, count, 60, [&](int64_t first, int64_t end) {
      for (int64_t i = first; i < end; ++i) {
        rank[i] = std::max<int64_t>(std::min(RankOf(words, counted, bit[i]), last), 0);
      }
    });
  }
};

#define FREEZEOPS_REGISTER(T)                                                                                       \
  REGISTER_KERNEL_BUILDER(Name("Freezeops>GatherTrainable").Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"),  \
                          GatherTrainableOp);                                                                       \
  REGISTER_KERNEL_BUILDER(Name("Freezeops>ReadTrainable").Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"),    \
                          ReadTrainableOp);                                                                         \
  REGISTER_KERNEL_BUILDER(Name("Freezeops>TakeTrainable").Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"),    \
                          TakeTrainableOp);                                                                         \
  REGISTER_KERNEL_BUILDER(Name("Freezeops>ScatterTrainable").Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"), \
                          ScatterTrainableOp)
FREEZEOPS_REGISTER(Eigen::half);
FREEZEOPS_REGISTER(Eigen::bfloat16);
FREEZEOPS_REGISTER(float);
FREEZEOPS_REGISTER(double);
#undef FREEZEOPS_REGISTER
REGISTER_KERNEL_BUILDER(Name("Freezeops>RankTrainable").Device(tensorflow::DEVICE_CPU), RankTrainableOp);

}  // namespace
}  // namespace freezeops
