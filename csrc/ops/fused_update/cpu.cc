// CPU kernel of FusedUpdate.

#include <algorithm>
#include <vector>

#include "kernels/cpu/parallel_fused.h"
#include "ops/common/cpu_helpers.h"
#include "ops/common/dtypes.h"
#include "ops/fused_update/cpu_step.h"
#include "ops/fused_update/inputs.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace freezeops {
namespace {

using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;

class FusedUpdateOp : public FusedOp {
 public:
  using FusedOp::FusedOp;

  void Compute(OpKernelContext* ctx) override {
    const FusedAttributes& a = attributes_;
    OP_REQUIRES_OK(ctx, a.CheckNumbers(ctx));
    std::vector<Held> held(a.count());
    std::vector<cpu::FusedVariable> variables(a.count());
    std::vector<cpu::Slices> slices(a.count());
    for (int i = 0; i < a.count(); ++i) OP_REQUIRES_OK(ctx, ReadMask(ctx, i, &held[i]));
    std::vector<VarPtr> locked;
    OP_REQUIRES_OK(ctx, LookUpWritten(ctx, &locked));
    LockAll lock(locked);
    std::vector<Written> written;
    const auto unshare = [ctx](Tensor* value) { return Unshare(ctx, value); };
    OP_REQUIRES_OK(ctx, PrepareWritten(ctx, locked, unshare, &held, &written));
    for (int i = 0; i < a.count(); ++i) {
      OP_REQUIRES_OK(ctx, ReadGradient(ctx, i, held[i].rows, &slices[i], &variables[i]));
    }
    for (int i = 0; i < a.count(); ++i) {
      cpu::FusedTensor& tensor = variables[i].tensor;
      tensor.variable = written[i].variable;
      std::copy_n(written[i].slots, kMostSlots, tensor.slots);
      tensor.mask = masked_[i] < 0 ? MaskView{&kAllTrainable, a.layouts[i]} : ViewOf(held[i].mask, a.layouts[i]);
      tensor.unseeded = written[i].unseeded;
      tensor.unseeded_bytes = written[i].unseeded_bytes;
      tensor.decays = a.decays[i];
      if (!a.compact) continue;
      variables[i].offsets = held[i].offsets.flat<int64_t>().data();
      variables[i].indices = {held[i].indices.data(), HasWideIndices(held[i])};
      variables[i].capacity = held[i].indices.dim_size(0);
    }

    cpu::ParallelFused parallel(*a.rule, FloatOf(a.dtype), ctx->input(a.scalars()).data(),
                                SeedsOf(a, ctx->input(a.scales()).vec<double>().data()),
                                ctx->device()->tensorflow_cpu_worker_threads()->num_threads, ParallelForOf(ctx));
    OP_REQUIRES(ctx, parallel.Update(variables), InvalidArgument(kOffsetsMessage));
  }

 private:
  absl::Status ReadGradient(OpKernelContext* ctx, int i, const GradientRows& rows, cpu::Slices* slices,
                            cpu::FusedVariable* variable) const {
    const Tensor& gradient = ctx->input(attributes_.gradient(i));
    if (attributes_.IsGathered(i)) {
      variable->tensor.gathered = gradient.data();
      return absl::OkStatus();
    }
    if (sparse_[i] < 0) {
      variable->tensor.gradient = gradient.data();
      return absl::OkStatus();
    }
    const Tensor& named = ctx->input(attributes_.rows(sparse_[i]));
    const int64_t count = named.dim_size(0);
    const int64_t* const row = named.flat<int64_t>().data();
    for (int64_t k = 0; k < count; ++k) {
      if (row[k] < 0 || row[k] >= rows.count) {
        return InvalidArgument("indices must be in [0, ", rows.count, "), the rows of the variable. Received: indices[",
                               k, "] = ", row[k]);
      }
    }
    *slices = {gradient.data(), row, count, rows.width};
    variable->slices = slices;
    return absl::OkStatus();
  }
};

FREEZEOPS_REGISTER_OP("Freezeops>FusedUpdate", CPU, FusedUpdateOp);

}  // namespace
}  // namespace freezeops
