// Definitions of MaskGradient and MaskSlices.

#include "tensorflow/core/framework/op.h"

#include "ops/common/layout_attr.h"
#include "ops/common/shape_checks.h"
#include "ops/common/tf_compat.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace freezeops {
namespace {

using ::tensorflow::shape_inference::DimensionHandle;
using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

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

}  // namespace freezeops
