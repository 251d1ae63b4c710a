// Definitions of RememberFrozen and RestoreFrozen.

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

}  // namespace

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

}  // namespace freezeops
