// GPU kernel of FusedUpdate. The numbers of a step are read by its kernels, rows of slices that are out of range are
// passed over, and offsets and indices that are not those of the mask are not reported.

#include <algorithm>
#include <vector>

#include "kernels/cuda/kernels.h"
#include "ops/common/gpu_helpers.h"
#include "ops/fused_update/inputs.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/types.h"

namespace freezeops {
namespace {

using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;

class FusedUpdateGpuOp : public FusedOp {
 public:
  using FusedOp::FusedOp;

  void Compute(OpKernelContext* ctx) override {
    const FusedAttributes& a = attributes_;
    OP_REQUIRES_OK(ctx, a.CheckNumbers(ctx));
    std::vector<Held> held(a.count());
    for (int i = 0; i < a.count(); ++i) {
      OP_REQUIRES_OK(ctx, ReadMask(ctx, i, &held[i]));
      OP_REQUIRES(ctx, !a.compact || held[i].indices.dtype() != tensorflow::DT_INT32,
                  InvalidArgument("indices must be of dtype uint32 or int64 on a GPU, where TensorFlow keeps "
                                  "variables of int32 in the host's memory. Received: indices of dtype int32"));
    }
    std::vector<VarPtr> locked;
    OP_REQUIRES_OK(ctx, LookUpWritten(ctx, &locked));
    LockAll lock(locked);
    std::vector<Written> written;
    const auto unshare = [ctx](Tensor* value) { return UnshareOnGpu(ctx, value); };
    OP_REQUIRES_OK(ctx, PrepareWritten(ctx, locked, unshare, &held, &written));
    std::vector<Tensor> scratch;  // until the kernels that use it are started: what comes later on the stream waits
    std::vector<cuda::FusedVariable> variables(a.count(), cuda::FusedVariable{});
    for (int i = 0; i < a.count(); ++i) {
      OP_REQUIRES_OK(ctx, TakeGradient(ctx, i, held[i].rows, &scratch, &variables[i]));
    }
    for (int i = 0; i < a.count(); ++i) {
      cuda::FusedVariable& each = variables[i];
      each.variable = written[i].variable;
      std::copy_n(written[i].slots, kMostSlots, each.slots);
      each.unseeded = written[i].unseeded;
      each.mask = masked_[i] < 0 ? MaskView{nullptr, a.layouts[i]} : ViewOf(held[i].mask, a.layouts[i]);
      each.decays = a.decays[i];
      each.gathered = a.IsGathered(i);
      if (!a.compact) continue;
      each.offsets = held[i].offsets.flat<int64_t>().data();
      each.indices = held[i].indices.data();
      each.wide = HasWideIndices(held[i]);
      each.capacity = held[i].indices.dim_size(0);
    }

    cuda::FusedStep step{};
    step.rule = a.rule;
    step.scalars = ctx->input(a.scalars()).data();
    step.scales = ctx->input(a.scales()).flat<double>().data();
    step.seeds = FusedAttributes::Size(a.seed_slots);
    for (int i = 0; i < step.seeds; ++i) {
      step.seed_slots[i] = a.rule->slot_positions[a.seed_slots[i]];
      step.seed_powers[i] = static_cast<int>(a.seed_powers[i]);
    }
    OP_REQUIRES_OK(
        ctx, Launched(ctx, cuda::fused_update(FloatOf(a.dtype), step, variables.data(), a.count(), StreamOf(ctx))));
  }

 private:
  // Sums slices up, in scratch of their size and two numbers for each row of the variable.
  absl::Status TakeGradient(OpKernelContext* ctx, int i, const GradientRows& rows, std::vector<Tensor>* scratch,
                            cuda::FusedVariable* variable) const {
    const FusedAttributes& a = attributes_;
    const Tensor& gradient = ctx->input(a.gradient(i));
    if (sparse_[i] < 0) {
      variable->gradient = gradient.data();
      return absl::OkStatus();
    }
    const auto allocate = [&](tensorflow::DataType dtype, int64_t size, void** data) {
      Tensor memory;
      TF_RETURN_IF_ERROR(ctx->allocate_temp(dtype, tensorflow::TensorShape({size}), &memory));
      *data = memory.data();
      scratch->push_back(memory);
      return absl::OkStatus();
    };
    const Tensor& named = ctx->input(a.rows(sparse_[i]));
    cuda::RowSums& sums = variable->rows;
    void* numbers = nullptr;
    TF_RETURN_IF_ERROR(allocate(tensorflow::DT_UINT8, cuda::named_bytes(rows.count), &numbers));
    TF_RETURN_IF_ERROR(allocate(a.dtype, gradient.NumElements(), &sums.sums));
    TF_RETURN_IF_ERROR(allocate(a.dtype, gradient.NumElements(), &sums.squares));
    sums.named = static_cast<uint64_t*>(numbers);
    sums.slices = named.dim_size(0);
    sums.row_size = rows.width;
    // Keras's SGD multiplies slices by the learning rate before it sums them.
    const char* const scalars = static_cast<const char*>(ctx->input(a.scalars()).data());
    const void* const rate = scalars + kRate * tensorflow::DataTypeSize(a.dtype);
    return Launched(ctx,
                    cuda::sum_slices(FloatOf(a.dtype), sums, named.flat<int64_t>().data(), rows.count, gradient.data(),
                                     a.rule->rule == UpdateRule::kSgd ? rate : nullptr, StreamOf(ctx)));
  }
};

// Handles alone are on the host.
FREEZEOPS_REGISTER_OP("Freezeops>FusedUpdate", GPU, FusedUpdateGpuOp,
                      .HostMemory("variables")
                          .HostMemory("slots")
                          .HostMemory("masks")
                          .HostMemory("offsets")
                          .HostMemory("indices")
                          .HostMemory("unseeded"));

}  // namespace
}  // namespace freezeops
