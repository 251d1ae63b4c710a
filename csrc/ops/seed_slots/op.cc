// Definition of SeedSlots.

#include "tensorflow/core/framework/op.h"

#include "ops/common/shape_functions.h"
#include "ops/seed_slots/inputs.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace freezeops {
namespace {

using ::tensorflow::shape_inference::InferenceContext;

absl::Status SeedSlotsShape(InferenceContext* c) {
  SeedAttributes attributes;
  TF_RETURN_IF_ERROR(GetSeedAttributes(c, &attributes));
  return attributes.CheckInputs(c);
}

}  // namespace

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

}  // namespace freezeops
