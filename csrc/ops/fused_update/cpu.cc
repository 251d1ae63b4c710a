// FusedUpdate: the step of an optimizer in one pass. Its signature, its shape function and its CPU kernel.

#include <algorithm>
#include <vector>

#include "kernels/cpu/parallel_fused.h"
#include "ops/common/cpu_helpers.h"
#include "ops/common/shape_checks.h"
#include "ops/fused_update/attributes.h"
#include "ops/fused_update/inputs.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace freezeops {
namespace {

using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;
using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

absl::Status FusedUpdateShape(InferenceContext* c) {
  FusedAttributes attributes;
  TF_RETURN_IF_ERROR(GetFusedAttributes(c, &attributes));
  const std::vector<int> sparse = attributes.NumberIn(attributes.sparse);
  for (int i = 0; i < attributes.count(); ++i) {
    const int variable = attributes.variable(i);
    const ShapeHandle gradient = c->input(attributes.gradient(i));
    TF_RETURN_IF_ERROR(sparse[i] < 0 ? CheckGradientOf(c, variable, gradient) : CheckSlicesOf(c, variable, gradient));
  }
  ShapeHandle scalars, scales;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(attributes.scalars()), 1, &scalars));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(attributes.scales()), 1, &scales));
  tensorflow::shape_inference::DimensionHandle unused;
  TF_RETURN_IF_ERROR(c->WithValue(c->Dim(scalars, 0), attributes.rule->scalars, &unused));
  return c->WithValue(c->Dim(scales, 0), FusedAttributes::Size(attributes.seed_slots), &unused);
}

class FusedUpdateOp : public FusedOp {
 public:
  using FusedOp::FusedOp;

  void Compute(OpKernelContext* ctx) override {
    const FusedAttributes& a = attributes_;
    OP_REQUIRES_OK(ctx, CheckNumbers(ctx));
    std::vector<Held> held(a.count());
    std::vector<FusedVariable> variables(a.count());
    std::vector<Slices> slices(a.count());
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
    static const uint8_t kAll = 0xff;
    for (int i = 0; i < a.count(); ++i) {
      FusedTensor& tensor = variables[i].tensor;
      tensor.variable = written[i].variable;
      std::copy_n(written[i].slots, kMostSlots, tensor.slots);
      tensor.mask = masked_[i] < 0 ? MaskView{&kAll, a.layouts[i]} : ViewOf(held[i].mask, a.layouts[i]);
      tensor.unseeded = written[i].unseeded;
      tensor.unseeded_bytes = written[i].unseeded_bytes;
      tensor.decays = a.decays[i];
      if (!a.compact) continue;
      variables[i].offsets = held[i].offsets.flat<int64_t>().data();
      variables[i].indices = {held[i].indices.data(), HasWideIndices(held[i])};
      variables[i].capacity = held[i].indices.dim_size(0);
    }

    FusedParts parts(*a.rule, FusedTypeOf(a.dtype), ctx->input(a.scalars()).data(),
                     a.SeedsWith(ctx->input(a.scales()).vec<double>().data()),
                     ctx->device()->tensorflow_cpu_worker_threads()->num_threads,
                     [ctx](int64_t count, int64_t cycles, const std::function<void(int64_t, int64_t)>& work) {
                       ParallelFor(ctx, count, cycles, work);
                     });
    OP_REQUIRES(ctx, parts.Update(variables), InvalidArgument(kOffsetsMessage));
  }

 private:
  absl::Status ReadGradient(OpKernelContext* ctx, int i, const GradientRows& rows, Slices* slices,
                            FusedVariable* variable) const {
    const Tensor& gradient = ctx->input(attributes_.gradient(i));
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

}  // namespace

REGISTER_OP("Freezeops>FusedUpdate")
    .Input("variables: N * resource")
    .Input("gradients: N * T")
    .Input("rows: S * int64")
    .Input("slots: M * resource")
    .Input("masks: K * resource")
    .Input("offsets: C * resource")
    .Input("indices: C * resource")
    .Input("unseeded: U * resource")
    .Input("scalars: T")
    .Input("scales: double")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("N: int >= 1")
    .Attr("S: int >= 0")
    .Attr("M: int >= 0")
    .Attr("K: int >= 0")
    .Attr("C: int >= 0")
    .Attr("U: int >= 0")
    .Attr("rule: string")
    .Attr("layouts: list(int)")
    .Attr("decays: list(bool)")
    .Attr("sparse: list(int)")
    .Attr("masked: list(int)")
    .Attr("seeded: list(int)")
    .Attr("seed_slots: list(int)")
    .Attr("seed_powers: list(int)")
    .Attr("compact: bool")
    .SetIsStateful()
    .SetShapeFn(FusedUpdateShape)
    .Doc(R"doc(
One step of an optimizer for several variables: in one pass over each, its trainable entries and their slots are updated,
and no other entry is written.

variables: The model's variables.
gradients: One for each, dense, or the values of an IndexedSlices.
rows: For those in `sparse` the rows that the values are of. Repeated rows add up, their squares by themselves; rows that
  are not named have a gradient of zero.
slots: Those of the rule, variable after variable; in full state of the variable's size, in compact state with one entry
  for each trainable one (and room for more).
masks: For those in `masked` the uint8 variables of packed masks; of the other variables every entry is trainable.
offsets: With compact state: int64 variables of rank offsets, as for GatherTrainable.
indices: With compact state: integer variables of the ones' positions, as for GatherTrainable.
unseeded: For those in `seeded` uint8 variables of one bit for each entry of a slot, as for SeedSlots.
scalars: What a step multiplies with and adds, of the rule; see csrc/kernels/common/update_rules.h.
scales: One for each of `seed_slots`, as for SeedSlots.
rule: Its name in csrc/kernels/common/update_rules.h.
layouts: [outer, kept, inner] of each variable, one after the other; [1, 1, n] without a mask.
decays: Which variables' weights decay.
sparse, masked, seeded: Positions of variables, ascending.
seed_slots: Which slots of each variable are seeded, in the order of SeedSlots.
seed_powers: 1 or 2 for each of those.
compact: Whether the slots are those of compact state.
)doc");

#define FREEZEOPS_REGISTER(T)                                                                                  \
  REGISTER_KERNEL_BUILDER(Name("Freezeops>FusedUpdate").Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"), \
                          FusedUpdateOp)
FREEZEOPS_REGISTER(Eigen::half);
FREEZEOPS_REGISTER(Eigen::bfloat16);
FREEZEOPS_REGISTER(float);
FREEZEOPS_REGISTER(double);
#undef FREEZEOPS_REGISTER

}  // namespace freezeops
