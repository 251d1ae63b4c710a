// FusedUpdate: the step of an optimizer in one pass. Its signature, its shape function and its CPU kernel.

#include "ops/fused_ops.h"

#include <algorithm>
#include <vector>

#include "kernels/fused_parts.h"
#include "ops/cpu_helpers.h"
#include "ops/op_checks.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace freezeops {
namespace {

using ::tensorflow::OpKernelConstruction;
using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;
using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

absl::Status FusedUpdateShape(InferenceContext* c) {
  FusedAttributes attributes;
  TF_RETURN_IF_ERROR(GetFusedAttributes(c, &attributes));
  const std::vector<int> sparse = attributes.NumberIn(attributes.sparse);
  for (int i = 0; i < attributes.count(); ++i) {
    const ShapeHandle gradient = c->input(attributes.gradient(i));
    if (sparse[i] >= 0 || !c->RankKnown(gradient)) continue;
    const auto count = c->NumElements(gradient);
    if (c->ValueKnown(count) && c->Value(count) != entries(attributes.layouts[i])) {
      return InvalidArgument("gradient must have the ", entries(attributes.layouts[i]), " entries of layout ",
                             LayoutString(attributes.layouts[i]), ". Received: gradient of shape ",
                             c->DebugString(gradient));
    }
  }
  ShapeHandle scalars, scales;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(attributes.scalars()), 1, &scalars));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(attributes.scales()), 1, &scales));
  tensorflow::shape_inference::DimensionHandle unused;
  TF_RETURN_IF_ERROR(c->WithValue(c->Dim(scalars, 0), attributes.rule->scalars, &unused));
  return c->WithValue(c->Dim(scales, 0), FusedAttributes::Size(attributes.seed_slots), &unused);
}

class FusedUpdateOp : public tensorflow::OpKernel {
 public:
  explicit FusedUpdateOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, GetFusedAttributes(ctx, &attributes_));
    sparse_ = attributes_.NumberIn(attributes_.sparse);
    masked_ = attributes_.NumberIn(attributes_.masked);
    seeded_ = attributes_.NumberIn(attributes_.seeded);
  }

  void Compute(OpKernelContext* ctx) override {
    const FusedAttributes& a = attributes_;
    const Tensor& scalars = ctx->input(a.scalars());
    const Tensor& scales = ctx->input(a.scales());
    OP_REQUIRES(ctx, scalars.dims() == 1 && scalars.dim_size(0) == a.rule->scalars,
                InvalidArgument("scalars must be the ", a.rule->scalars, " of rule ", a.rule->name,
                                ". Received: scalars of shape ", scalars.shape().DebugString()));
    OP_REQUIRES(ctx, scales.dims() == 1 && scales.dim_size(0) == FusedAttributes::Size(a.seed_slots),
                InvalidArgument("scales must be as many as seed_slots, ", a.seed_slots.size(),
                                ". Received: scales of shape ", scales.shape().DebugString()));

    // What is read alone is held as a read holds it: whoever writes it meanwhile writes to another buffer.
    std::vector<Tensor> masks(a.count()), offsets(a.count()), indices(a.count());
    std::vector<FusedVariable> variables(a.count());
    std::vector<Slices> slices(a.count());
    for (int i = 0; i < a.count(); ++i) {
      OP_REQUIRES_OK(ctx, ReadMask(ctx, i, &masks[i], &offsets[i], &indices[i], &variables[i]));
      OP_REQUIRES_OK(ctx, ReadGradient(ctx, i, &slices[i], &variables[i]));
    }

    // Of each variable itself, its slots, its bits of what waits; in the order in which they are used below.
    std::vector<VarPtr> written;
    const auto look_up = [&](int input) {
      VarPtr variable;
      const absl::Status status = LookupResource(ctx, tensorflow::HandleFromInput(ctx, input), &variable);
      if (status.ok()) written.push_back(std::move(variable));
      return status;
    };
    for (int i = 0; i < a.count(); ++i) {
      OP_REQUIRES_OK(ctx, look_up(a.variable(i)));
      for (int j = 0; j < a.rule->slots; ++j) OP_REQUIRES_OK(ctx, look_up(a.slot(i, j)));
      if (seeded_[i] >= 0) OP_REQUIRES_OK(ctx, look_up(a.unseeded(seeded_[i])));
    }
    LockAll lock(written);
    // All are checked before anything is written.
    auto next = written.begin();
    for (int i = 0; i < a.count(); ++i) {
      const int64_t size = entries(a.layouts[i]);
      const int64_t slot_size = a.compact ? variables[i].capacity * a.layouts[i].inner : size;
      OP_REQUIRES_OK(ctx, CheckWritten("variable", **next++, a.dtype, size));
      for (int j = 0; j < a.rule->slots; ++j) OP_REQUIRES_OK(ctx, CheckWritten("slot", **next++, a.dtype, slot_size));
      if (seeded_[i] >= 0) {
        OP_REQUIRES_OK(ctx, CheckWritten("unseeded", **next++, tensorflow::DT_UINT8, mask_bytes(slot_size)));
      }
    }
    const auto data_of = [ctx](tensorflow::Var* variable, void** data) {
      Tensor* const value = variable->tensor();
      // In copy-on-read mode no read shares the buffer, otherwise one that does must not see this write.
      if (!value->RefCountIsOne()) TF_RETURN_IF_ERROR(Unshare(ctx, value));
      *data = value->data();
      return absl::OkStatus();
    };
    next = written.begin();
    for (int i = 0; i < a.count(); ++i) {
      FusedTensor& tensor = variables[i].tensor;
      OP_REQUIRES_OK(ctx, data_of((next++)->get(), &tensor.variable));
      for (int j = 0; j < a.rule->slots; ++j) {
        OP_REQUIRES_OK(ctx, data_of((next++)->get(), &tensor.slots[a.rule->places[j]]));
      }
      if (seeded_[i] >= 0) {
        void* bits = nullptr;
        tensor.unseeded_bytes = (*next)->tensor()->NumElements();
        OP_REQUIRES_OK(ctx, data_of((next++)->get(), &bits));
        tensor.unseeded = static_cast<uint8_t*>(bits);
      }
      tensor.decays = a.decays[i];
    }

    FusedParts parts(*a.rule, FusedTypeOf(a.dtype), scalars.data(), a.SeedsWith(scales.vec<double>().data()),
                     ctx->device()->tensorflow_cpu_worker_threads()->num_threads,
                     [ctx](int64_t count, int64_t cycles, const std::function<void(int64_t, int64_t)>& work) {
                       ParallelFor(ctx, count, cycles, work);
                     });
    OP_REQUIRES(ctx, parts.Update(variables), InvalidArgument(kOffsetsMessage));
  }

 private:
  static absl::Status ReadVariable(OpKernelContext* ctx, int input, Tensor* value) {
    VarPtr variable;
    TF_RETURN_IF_ERROR(LookupResource(ctx, tensorflow::HandleFromInput(ctx, input), &variable));
    tensorflow::tf_shared_lock lock(*variable->mu());
    *value = *variable->tensor();
    return absl::OkStatus();
  }

  absl::Status ReadMask(OpKernelContext* ctx, int i, Tensor* mask, Tensor* offsets, Tensor* indices,
                        FusedVariable* variable) const {
    const FusedAttributes& a = attributes_;
    const MaskLayout& layout = a.layouts[i];
    static const uint8_t kAll = 0xff;
    variable->tensor.mask = {&kAll, layout};
    if (masked_[i] < 0) {
      if (layout.kept == 1) return absl::OkStatus();
      return InvalidArgument("layout must be [1, 1, n] without a mask. Received: layout=", LayoutString(layout));
    }
    TF_RETURN_IF_ERROR(ReadVariable(ctx, a.mask(masked_[i]), mask));
    if (mask->dtype() != tensorflow::DT_UINT8) {
      return InvalidArgument("mask must be of dtype uint8. Received: mask of dtype ",
                             tensorflow::DataTypeString(mask->dtype()));
    }
    TF_RETURN_IF_ERROR(CheckMask(*mask, layout));
    variable->tensor.mask = ViewOf(*mask, layout);
    if (!a.compact) return absl::OkStatus();
    TF_RETURN_IF_ERROR(ReadVariable(ctx, a.offsets(i), offsets));
    TF_RETURN_IF_ERROR(ReadVariable(ctx, a.indices(i), indices));
    TF_RETURN_IF_ERROR(CheckOffsets(offsets->shape(), layout.kept));
    const int64_t index_bytes = tensorflow::DataTypeSize(indices->dtype());
    if (offsets->dtype() != tensorflow::DT_INT64 || indices->dims() != 1 ||
        !tensorflow::DataTypeIsInteger(indices->dtype()) || index_bytes < 4) {
      return InvalidArgument("offsets must be int64 and indices a vector of integers. Received: offsets of dtype ",
                             tensorflow::DataTypeString(offsets->dtype()), ", indices of dtype ",
                             tensorflow::DataTypeString(indices->dtype()), " and shape ",
                             indices->shape().DebugString());
    }
    variable->offsets = offsets->flat<int64_t>().data();
    variable->indices = {indices->data(), index_bytes == 8};
    variable->capacity = indices->dim_size(0);
    return absl::OkStatus();
  }

  absl::Status ReadGradient(OpKernelContext* ctx, int i, Slices* slices, FusedVariable* variable) const {
    const Tensor& gradient = ctx->input(attributes_.gradient(i));
    const MaskLayout& layout = attributes_.layouts[i];
    if (sparse_[i] < 0) {
      variable->tensor.gradient = gradient.data();
      return CheckEntries("gradient", gradient.shape(), layout);
    }
    const Tensor& rows = ctx->input(attributes_.rows(sparse_[i]));
    if (gradient.dims() < 1 || rows.dims() != 1 || gradient.dim_size(0) != rows.dim_size(0)) {
      return InvalidArgument("values must have one row for each index. Received: values of shape ",
                             gradient.shape().DebugString(), ", indices of shape ", rows.shape().DebugString());
    }
    int64_t width = 1;
    for (int axis = 1; axis < gradient.dims(); ++axis) width *= gradient.dim_size(axis);
    const int64_t count = rows.dim_size(0);
    const int64_t height = width > 0 ? entries(layout) / width : 0;
    if (height * width != entries(layout)) {
      return InvalidArgument("rows must divide the ", entries(layout), " entries of layout ", LayoutString(layout),
                             ". Received: values of shape ", gradient.shape().DebugString());
    }
    const int64_t* const row = rows.flat<int64_t>().data();
    for (int64_t k = 0; k < count && width > 0; ++k) {
      if (row[k] < 0 || row[k] >= height) {
        return InvalidArgument("indices must be in [0, ", height, "), the rows of the variable. Received: indices[", k,
                               "] = ", row[k]);
      }
    }
    *slices = {gradient.data(), row, count, width};
    variable->slices = slices;
    return absl::OkStatus();
  }

  // Its lock is held.
  static absl::Status CheckWritten(const char* what, tensorflow::Var& variable, tensorflow::DataType dtype,
                                   int64_t size) {
    if (!variable.is_initialized || !variable.tensor()->IsInitialized()) {
      return absl::FailedPreconditionError(
          absl::StrCat(what, " must be initialized before it is updated. Received: an uninitialized variable"));
    }
    const Tensor& value = *variable.tensor();
    if (value.dtype() == dtype && value.NumElements() == size) return absl::OkStatus();
    return InvalidArgument(what, " must be of dtype ", tensorflow::DataTypeString(dtype), " with ", size,
                           " entries. Received: one of dtype ", tensorflow::DataTypeString(value.dtype()),
                           " and shape ", value.shape().DebugString());
  }

  FusedAttributes attributes_;
  std::vector<int> sparse_, masked_, seeded_;  // for each variable its number among those, or -1
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
scalars: What a step multiplies with and adds, of the rule; see csrc/kernels/fused_rules.h.
scales: One for each of `seed_slots`, as for SeedSlots.
rule: Its name in csrc/kernels/fused_rules.h.
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
