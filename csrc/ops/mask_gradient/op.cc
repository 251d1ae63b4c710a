// Definitions of MaskGradient and MaskSlices.

#include "tensorflow/core/framework/op.h"

#include "ops/common/shape_functions.h"
#include "ops/mask_gradient/inputs.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace freezeops {
namespace {

using ::tensorflow::shape_inference::DimensionHandle;
using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

absl::Status MaskGradientShape(InferenceContext* c) {
  MaskLayout layout;
  TF_RETURN_IF_ERROR(GetLayout(c, &layout));
  TF_RETURN_IF_ERROR(CheckMaskGradient(c, layout));
  c->set_output(0, c->input(0));
  return absl::OkStatus();
}

absl::Status MaskSlicesShape(InferenceContext* c) {
  MaskLayout layout;
  int64_t rows;
  TF_RETURN_IF_ERROR(GetSlicesAttributes(c, &layout, &rows));
  TF_RETURN_IF_ERROR(CheckMaskSlices(c, layout, rows));
  ShapeHandle values = c->input(0);
  if (c->RankKnown(values) && c->RankKnown(c->input(1))) {
    DimensionHandle count;
    TF_RETURN_IF_ERROR(c->Merge(c->Dim(values, 0), c->Dim(c->input(1), 0), &count));
    TF_RETURN_IF_ERROR(c->ReplaceDim(values, 0, count, &values));
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
