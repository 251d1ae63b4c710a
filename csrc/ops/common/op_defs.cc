// The ops' signatures and shape functions. Kernels: mask_ops.cc, variable_ops.cc, compact_ops.cc, seed_ops.cc
// (CPU), gpu_ops.cc, xla_kernels.cc.

#include <vector>

#include "ops/common/layout_attr.h"
#include "ops/common/shape_checks.h"
#include "ops/common/tf_compat.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace freezeops {
namespace {

using ::tensorflow::shape_inference::DimensionHandle;
using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

// Input `index` is a packed mask of layout.kept bits.
absl::Status CheckMask(InferenceContext* c, int index, const MaskLayout& layout) {
  ShapeHandle shape;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(index), 1, &shape));
  DimensionHandle length;
  const absl::Status status = c->WithValue(c->Dim(shape, 0), mask_bytes(layout.kept), &length);
  if (!status.ok()) {
    return InvalidArgument("mask must have ", mask_bytes(layout.kept), " bytes, one bit for each of the ", layout.kept,
                           " kept indices of layout ", LayoutString(layout), ". Received: mask of shape ",
                           c->DebugString(shape));
  }
  return absl::OkStatus();
}

absl::Status CheckEntries(InferenceContext* c, const char* what, ShapeHandle shape, const MaskLayout& layout) {
  if (!c->RankKnown(shape)) return absl::OkStatus();
  const DimensionHandle count = c->NumElements(shape);
  if (c->ValueKnown(count) && c->Value(count) != entries(layout)) {
    return InvalidArgument(what, " must have the ", entries(layout), " entries of layout ", LayoutString(layout),
                           ". Received: ", what, " of shape ", c->DebugString(shape));
  }
  return absl::OkStatus();
}

absl::Status MaskGradientShape(InferenceContext* c) {
  MaskLayout layout;
  TF_RETURN_IF_ERROR(GetLayout(c, &layout));
  TF_RETURN_IF_ERROR(CheckMask(c, 1, layout));
  TF_RETURN_IF_ERROR(CheckEntries(c, "gradient", c->input(0), layout));
  c->set_output(0, c->input(0));
  return absl::OkStatus();
}

absl::Status MaskSlicesShape(InferenceContext* c) {
  MaskLayout layout;
  TF_RETURN_IF_ERROR(GetLayout(c, &layout));
  int64_t rows;
  TF_RETURN_IF_ERROR(c->GetAttr("rows", &rows));
  if (rows < 0) return InvalidArgument("rows must not be negative. Received: rows=", rows);
  TF_RETURN_IF_ERROR(CheckMask(c, 2, layout));
  ShapeHandle values;
  TF_RETURN_IF_ERROR(c->WithRankAtLeast(c->input(0), 1, &values));
  ShapeHandle indices;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(1), 1, &indices));
  DimensionHandle count;
  if (!c->RankKnown(values)) {
    c->set_output(0, values);
    return absl::OkStatus();
  }
  if (!c->Merge(c->Dim(values, 0), c->Dim(indices, 0), &count).ok()) {
    return InvalidArgument("values must have one row for each index. Received: values of shape ",
                           c->DebugString(values), ", indices of shape ", c->DebugString(indices));
  }
  TF_RETURN_IF_ERROR(c->ReplaceDim(values, 0, count, &values));
  ShapeHandle row;
  TF_RETURN_IF_ERROR(c->Subshape(values, 1, &row));
  const DimensionHandle row_size = c->NumElements(row);
  if (c->ValueKnown(row_size)) {
    DimensionHandle total;
    TF_RETURN_IF_ERROR(c->Multiply(row_size, rows, &total));
    if (c->Value(total) != entries(layout)) {
      return InvalidArgument("rows times the size of a row must be the ", entries(layout), " entries of layout ",
                             LayoutString(layout), ". Received: rows=", rows, ", values of shape ",
                             c->DebugString(values));
    }
  }
  c->set_output(0, values);
  return absl::OkStatus();
}

// The variable's shape where the handle tells it.
absl::Status CheckVariable(InferenceContext* c, const MaskLayout& layout) {
  ShapeHandle unused;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 0, &unused));
  const auto* handle = c->input_handle_shapes_and_types(0);
  if (handle == nullptr || handle->empty()) return absl::OkStatus();
  const auto& value = (*handle)[0];
  tensorflow::DataType dtype;
  TF_RETURN_IF_ERROR(c->GetAttr("T", &dtype));
  if (value.dtype != tensorflow::DT_INVALID && value.dtype != dtype) {
    return InvalidArgument("variable must be of dtype ", tensorflow::DataTypeString(dtype),
                           ". Received: a variable of dtype ", tensorflow::DataTypeString(value.dtype));
  }
  return CheckEntries(c, "variable", value.shape, layout);
}

absl::Status RememberFrozenShape(InferenceContext* c) {
  MaskLayout layout;
  TF_RETURN_IF_ERROR(GetLayout(c, &layout));
  TF_RETURN_IF_ERROR(CheckVariable(c, layout));
  TF_RETURN_IF_ERROR(CheckMask(c, 1, layout));
  c->set_output(0, c->Vector(InferenceContext::kUnknownDim));
  return absl::OkStatus();
}

absl::Status RestoreFrozenShape(InferenceContext* c) {
  MaskLayout layout;
  TF_RETURN_IF_ERROR(GetLayout(c, &layout));
  TF_RETURN_IF_ERROR(CheckVariable(c, layout));
  TF_RETURN_IF_ERROR(CheckMask(c, 1, layout));
  ShapeHandle snapshot;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(2), 1, &snapshot));
  const DimensionHandle length = c->Dim(snapshot, 0);
  if (c->ValueKnown(length) && c->Value(length) > entries(layout)) {
    return InvalidArgument("snapshot must have at most the ", entries(layout), " entries of layout ",
                           LayoutString(layout), ". Received: snapshot of shape ", c->DebugString(snapshot));
  }
  return absl::OkStatus();
}

absl::Status SeedSlotsShape(InferenceContext* c) {
  SeedAttributes attributes;
  TF_RETURN_IF_ERROR(GetSeedAttributes(c, &attributes));
  ShapeHandle scales, indices;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(2), 1, &indices));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(3), 1, &scales));
  DimensionHandle unused;
  TF_RETURN_IF_ERROR(c->WithValue(c->Dim(scales, 0), attributes.count(), &unused));
  if (attributes.sparse) {
    ShapeHandle values;
    TF_RETURN_IF_ERROR(c->WithRankAtLeast(c->input(1), 1, &values));
    return c->Merge(c->Dim(values, 0), c->Dim(indices, 0), &unused);
  }
  return CheckEntries(c, "values", c->input(1), MaskLayout{1, attributes.size, 1});
}

// Inputs `first` and on are the mask, its rank offsets and the indices of its trainable entries. Sets `compact` to the
// shape of what these name, flat.
absl::Status CheckTrainable(InferenceContext* c, int first, const MaskLayout& layout, ShapeHandle* compact) {
  TF_RETURN_IF_ERROR(CheckDoesNotRepeat(layout));
  TF_RETURN_IF_ERROR(CheckMask(c, first, layout));
  ShapeHandle offsets, indices;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(first + 1), 1, &offsets));
  DimensionHandle unused;
  if (!c->WithValue(c->Dim(offsets, 0), rank_blocks(layout.kept) + 1, &unused).ok()) {
    return InvalidArgument("offsets must have shape [", rank_blocks(layout.kept) + 1, "], one for each block of ",
                           kRankBlockBits, " of the mask's ", layout.kept,
                           " bits and their total. Received: offsets of shape ", c->DebugString(offsets));
  }
  TF_RETURN_IF_ERROR(c->WithRank(c->input(first + 2), 1, &indices));
  DimensionHandle length;
  TF_RETURN_IF_ERROR(c->Multiply(c->Dim(indices, 0), layout.inner, &length));
  *compact = c->Vector(length);
  return absl::OkStatus();
}

absl::Status GatherTrainableShape(InferenceContext* c) {
  MaskLayout layout;
  ShapeHandle compact;
  TF_RETURN_IF_ERROR(GetLayout(c, &layout));
  TF_RETURN_IF_ERROR(CheckEntries(c, "source", c->input(0), layout));
  TF_RETURN_IF_ERROR(CheckTrainable(c, 1, layout, &compact));
  c->set_output(0, compact);
  return absl::OkStatus();
}

absl::Status ReadTrainableShape(InferenceContext* c) {
  MaskLayout layout;
  ShapeHandle compact;
  TF_RETURN_IF_ERROR(GetLayout(c, &layout));
  TF_RETURN_IF_ERROR(CheckVariable(c, layout));
  TF_RETURN_IF_ERROR(CheckTrainable(c, 1, layout, &compact));
  c->set_output(0, compact);
  return absl::OkStatus();
}

absl::Status TakeTrainableShape(InferenceContext* c) {
  MaskLayout layout;
  ShapeHandle compact;
  TF_RETURN_IF_ERROR(GetLayout(c, &layout));
  TF_RETURN_IF_ERROR(CheckVariable(c, layout));
  TF_RETURN_IF_ERROR(CheckGradientOf(c, 0, c->input(1)));
  TF_RETURN_IF_ERROR(CheckEntries(c, "gradient", c->input(1), layout));
  TF_RETURN_IF_ERROR(CheckTrainable(c, 2, layout, &compact));
  c->set_output(0, compact);
  c->set_output(1, compact);
  return absl::OkStatus();
}

absl::Status ScatterTrainableShape(InferenceContext* c) {
  MaskLayout layout;
  ShapeHandle compact;
  TF_RETURN_IF_ERROR(GetLayout(c, &layout));
  TF_RETURN_IF_ERROR(CheckVariable(c, layout));
  TF_RETURN_IF_ERROR(CheckTrainable(c, 2, layout, &compact));
  const DimensionHandle given = c->NumElements(c->input(1));
  const DimensionHandle wanted = c->Dim(compact, 0);
  if (c->ValueKnown(given) && c->ValueKnown(wanted) && c->Value(given) != c->Value(wanted)) {
    return InvalidArgument("compact must have the ", c->Value(wanted),
                           " entries of the indices. Received: compact of shape ", c->DebugString(c->input(1)));
  }
  return absl::OkStatus();
}

absl::Status RankTrainableShape(InferenceContext* c) {
  int64_t kept;
  ShapeHandle unused;
  TF_RETURN_IF_ERROR(GetKept(c, &kept));
  TF_RETURN_IF_ERROR(CheckTrainable(c, 1, MaskLayout{1, kept, 1}, &unused));
  c->set_output(0, c->input(0));
  return absl::OkStatus();
}

}  // namespace

REGISTER_OP("Freezeops>MaskGradient")
    .Input("gradient: T")
    .Input("mask: uint8")
    .Output("masked: T")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("layout: list(int)")
    .SetShapeFn(MaskGradientShape)
    .Doc(R"doc(
The gradient with +0 at the frozen entries; the bits of the others are kept as they are.

gradient: A tensor of outer * kept * inner entries.
mask: The packed mask, one bit for each kept index, little bit order, 1 = trainable.
layout: [outer, kept, inner]; entry (o * kept + k) * inner + j uses bit k.
)doc");

REGISTER_OP("Freezeops>MaskSlices")
    .Input("values: T")
    .Input("indices: Tindices")
    .Input("mask: uint8")
    .Output("masked: T")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("Tindices: {int32, int64}")
    .Attr("layout: list(int)")
    .Attr("rows: int")
    .SetShapeFn(MaskSlicesShape)
    .Doc(R"doc(
The values of an IndexedSlices with +0 at the frozen entries of the rows that its indices name.

values: [k, d...], one row for each index.
indices: [k], each in [0, rows).
mask: The packed mask of the dense variable, as for MaskGradient.
layout: The mask's layout over the rows * d entries of the dense variable.
rows: The number of rows of the dense variable.
)doc");

REGISTER_OP("Freezeops>RememberFrozen")
    .Input("variable: resource")
    .Input("mask: uint8")
    .Output("snapshot: T")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("layout: list(int)")
    .SetIsStateful()
    .SetShapeFn(RememberFrozenShape)
    .Doc(R"doc(
An opaque snapshot of the variable's frozen entries, for RestoreFrozen.

snapshot: The frozen values in order; or as many values as the variable has, of which those at frozen entries count: on a
  GPU, under XLA, and where nearly all are frozen.
)doc");

REGISTER_OP("Freezeops>RestoreFrozen")
    .Input("variable: resource")
    .Input("mask: uint8")
    .Input("snapshot: T")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("layout: list(int)")
    .SetIsStateful()
    .SetShapeFn(RestoreFrozenShape)
    .Doc(R"doc(
Writes the frozen entries back that RememberFrozen saw, with the same mask. Trainable entries stay as they are.

snapshot: What RememberFrozen returned, in either form.
)doc");

REGISTER_OP("Freezeops>SeedSlots")
    .Input("unseeded: resource")
    .Input("values: T")
    .Input("indices: int64")
    .Input("scales: double")
    .Input("slots: N * resource")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("N: int >= 1")
    .Attr("powers: list(int)")
    .Attr("size: int")
    .Attr("sparse: bool")
    .Attr("materialized: bool = false")
    .SetIsStateful()
    .SetShapeFn(SeedSlotsShape)
    .Doc(R"doc(
Starts the slots of entries that were unfrozen late from their first gradient that is not zero.

Where an entry's bit in `unseeded` is set and its entry of the first slot is zero, each slot becomes
scale * gradient^power. Bits whose entry of the first slot is not zero any more may be cleared.

unseeded: A uint8 variable of one bit for each entry, little bit order.
values: The gradient; or the values of an IndexedSlices.
indices: The rows that `values` names where `sparse` is true, else empty. Repeated rows add up, and the larger of their
  squared sum and their summed squares stands for gradient^2.
scales: One for each slot.
slots: Variables of `size` entries.
powers: 1 or 2 for each slot.
size: The number of entries.
materialized: Whether the gradient is in memory anyway, so that XLA does better to call a kernel than to fuse.
)doc");

REGISTER_OP("Freezeops>GatherTrainable")
    .Input("source: T")
    .Input("mask: uint8")
    .Input("offsets: int64")
    .Input("indices: Tindices")
    .Output("compact: T")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("Tindices: {int32, uint32, int64}")
    .Attr("layout: list(int)")
    .SetShapeFn(GatherTrainableShape)
    .Doc(R"doc(
The trainable entries of a tensor in order, and zeros up to the capacity, flat.

source: A tensor of kept * inner entries.
mask: The packed mask, one bit for each kept index, little bit order, 1 = trainable.
offsets: The number of ones before each block of 2048 bits, and their total.
indices: The kept indices of the ones, ascending; from the total on, up to the capacity, each at least `kept`. Kernels
  look at the mask and the offsets or at these, which must say the same. Those of uint32 must be below 2^31: they are
  there for GPUs, where TensorFlow has no variables of int32.
layout: [1, kept, inner]; entry k * inner + j uses bit k.
)doc");

REGISTER_OP("Freezeops>ReadTrainable")
    .Input("variable: resource")
    .Input("mask: uint8")
    .Input("offsets: int64")
    .Input("indices: Tindices")
    .Output("compact: T")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("Tindices: {int32, uint32, int64}")
    .Attr("layout: list(int)")
    .SetIsStateful()
    .SetShapeFn(ReadTrainableShape)
    .Doc(R"doc(
GatherTrainable from a variable.
)doc");

REGISTER_OP("Freezeops>TakeTrainable")
    .Input("variable: resource")
    .Input("gradient: T")
    .Input("mask: uint8")
    .Input("offsets: int64")
    .Input("indices: Tindices")
    .Output("compact_gradient: T")
    .Output("compact_value: T")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("Tindices: {int32, uint32, int64}")
    .Attr("layout: list(int)")
    .SetIsStateful()
    .SetShapeFn(TakeTrainableShape)
    .Doc(R"doc(
GatherTrainable of a gradient and ReadTrainable of its variable at once.
)doc");

REGISTER_OP("Freezeops>ScatterTrainable")
    .Input("variable: resource")
    .Input("compact: T")
    .Input("mask: uint8")
    .Input("offsets: int64")
    .Input("indices: Tindices")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("Tindices: {int32, uint32, int64}")
    .Attr("layout: list(int)")
    .SetIsStateful()
    .SetShapeFn(ScatterTrainableShape)
    .Doc(R"doc(
Writes the trainable entries of a variable, and no other; the reverse of ReadTrainable.
)doc");

REGISTER_OP("Freezeops>RankTrainable")
    .Input("bits: int64")
    .Input("mask: uint8")
    .Input("offsets: int64")
    .Input("indices: Tindices")
    .Output("ranks: int64")
    .Attr("Tindices: {int32, uint32, int64}")
    .Attr("kept: int")
    .SetShapeFn(RankTrainableShape)
    .Doc(R"doc(
The number of ones before each of the given bits, at most one less than the capacity: where in compact state its entries
are, if it is one itself. A bit that is none of the mask's is an error; under XLA its rank is the capacity.

kept: The number of the mask's bits.
)doc");

}  // namespace freezeops
