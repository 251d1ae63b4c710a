// Definition of SampledMatmul.

#include "tensorflow/core/framework/op.h"

#include "ops/common/shape_functions.h"
#include "ops/sampled_matmul/inputs.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace freezeops {
namespace {

using ::tensorflow::shape_inference::InferenceContext;

absl::Status SampledMatmulShape(InferenceContext* c) {
  SampledSizes sizes;
  TF_RETURN_IF_ERROR(CheckSampled(c, &sizes));
  c->set_output(0, c->Vector(sizes.capacity < 0 ? InferenceContext::kUnknownDim : sizes.capacity));
  return absl::OkStatus();
}

}  // namespace

REGISTER_OP("Freezeops>SampledMatmul")
    .Input("x: T")
    .Input("dy: T")
    .Input("visits: int32")
    .Input("indices: Tindices")
    .Output("compact: T")
    .Attr("T: {half, bfloat16, float}")
    .Attr("Tindices: {int32, uint32, int64}")
    .SetShapeFn(SampledMatmulShape)
    .Doc(R"doc(
The trainable entries of x^T dy in order, and zeros up to the capacity. Sums are of float32, rounded once.

x: A matrix [tokens, rows].
dy: A matrix [tokens, columns].
visits: The plan for the mask, see freezeops/masks/visits.py.
indices: As for GatherTrainable. On CPUs their number, the capacity, is all that counts.
)doc");

}  // namespace freezeops
