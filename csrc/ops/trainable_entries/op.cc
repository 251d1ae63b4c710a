// Definitions of the ops of compact state: GatherTrainable, ReadTrainable, TakeTrainable, ScatterTrainable and
// RankTrainable.

#include "tensorflow/core/framework/op.h"

#include "ops/common/shape_functions.h"
#include "ops/trainable_entries/inputs.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace freezeops {
namespace {

using ::tensorflow::shape_inference::InferenceContext;

// Sets outputs 0 to `outputs` - 1 to the shape of what is compact. Inputs `first` and on are as for CheckTrainable.
absl::Status SetCompact(InferenceContext* c, int first, const MaskLayout& layout, int outputs) {
  int64_t size;
  TF_RETURN_IF_ERROR(CheckTrainable(c, first, layout, &size));
  const auto shape = c->Vector(size < 0 ? InferenceContext::kUnknownDim : size);
  for (int i = 0; i < outputs; ++i) c->set_output(i, shape);
  return absl::OkStatus();
}

absl::Status GatherTrainableShape(InferenceContext* c) {
  MaskLayout layout;
  PartialTensorShape source;
  TF_RETURN_IF_ERROR(GetLayout(c, &layout));
  TF_RETURN_IF_ERROR(GetShape(c, 0, &source));
  TF_RETURN_IF_ERROR(CheckEntries("source", source, layout));
  return SetCompact(c, 1, layout, 1);
}

absl::Status ReadTrainableShape(InferenceContext* c) {
  MaskLayout layout;
  PartialTensorShape variable;
  TF_RETURN_IF_ERROR(GetLayout(c, &layout));
  TF_RETURN_IF_ERROR(CheckVariable(c, layout, &variable));
  return SetCompact(c, 1, layout, 1);
}

absl::Status TakeTrainableShape(InferenceContext* c) {
  MaskLayout layout;
  PartialTensorShape variable, gradient;
  TF_RETURN_IF_ERROR(GetLayout(c, &layout));
  TF_RETURN_IF_ERROR(CheckVariable(c, layout, &variable));
  TF_RETURN_IF_ERROR(GetShape(c, 1, &gradient));
  TF_RETURN_IF_ERROR(CheckSameShape("gradient", gradient, "variable", variable));
  TF_RETURN_IF_ERROR(CheckEntries("gradient", gradient, layout));
  return SetCompact(c, 2, layout, 2);
}

absl::Status ScatterTrainableShape(InferenceContext* c) {
  MaskLayout layout;
  PartialTensorShape variable, compact;
  int64_t size;
  TF_RETURN_IF_ERROR(GetLayout(c, &layout));
  TF_RETURN_IF_ERROR(CheckVariable(c, layout, &variable));
  TF_RETURN_IF_ERROR(CheckTrainable(c, 2, layout, &size));
  TF_RETURN_IF_ERROR(GetShape(c, 1, &compact));
  return CheckCompact(compact, size);
}

absl::Status RankTrainableShape(InferenceContext* c) {
  int64_t kept, size;
  TF_RETURN_IF_ERROR(GetKept(c, &kept));
  TF_RETURN_IF_ERROR(CheckTrainable(c, 1, MaskLayout{1, kept, 1}, &size));
  c->set_output(0, c->input(0));
  return absl::OkStatus();
}

}  // namespace

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
