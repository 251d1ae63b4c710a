// Definitions of RememberFrozen and RestoreFrozen.

#include "tensorflow/core/framework/op.h"

#include "ops/common/shape_functions.h"
#include "ops/frozen_entries/inputs.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace freezeops {
namespace {

using ::tensorflow::shape_inference::InferenceContext;

absl::Status CheckVariableAndMask(InferenceContext* c, MaskLayout* layout) {
  PartialTensorShape variable;
  TF_RETURN_IF_ERROR(GetLayout(c, layout));
  TF_RETURN_IF_ERROR(CheckVariable(c, *layout, &variable));
  return CheckFrozenMask(c, *layout);
}

absl::Status RememberFrozenShape(InferenceContext* c) {
  MaskLayout layout;
  TF_RETURN_IF_ERROR(CheckVariableAndMask(c, &layout));
  c->set_output(0, c->Vector(InferenceContext::kUnknownDim));
  return absl::OkStatus();
}

absl::Status RestoreFrozenShape(InferenceContext* c) {
  MaskLayout layout;
  TF_RETURN_IF_ERROR(CheckVariableAndMask(c, &layout));
  PartialTensorShape snapshot;
  TF_RETURN_IF_ERROR(GetShape(c, 2, &snapshot));
  if (IsVector(snapshot) && snapshot.num_elements() <= entries(layout)) return absl::OkStatus();
  return InvalidArgument("snapshot must be a vector of at most the ", entries(layout), " entries of layout ",
                         LayoutString(layout), ". Received: snapshot of shape ", snapshot.DebugString());
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
