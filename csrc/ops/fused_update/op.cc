// Definition of FusedUpdate: the step of an optimizer in one pass.

#include "tensorflow/core/framework/op.h"

#include <vector>

#include "ops/common/shape_functions.h"
#include "ops/fused_update/attributes.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace freezeops {
namespace {

using ::tensorflow::shape_inference::InferenceContext;

absl::Status FusedUpdateShape(InferenceContext* c) {
  FusedAttributes attributes;
  TF_RETURN_IF_ERROR(GetFusedAttributes(c, &attributes));
  const std::vector<int> sparse = attributes.NumberIn(attributes.sparse);
  for (int i = 0; i < attributes.count(); ++i) {
    tensorflow::DataType dtype;
    PartialTensorShape variable, indices;
    int64_t slot_size = -1;
    TF_RETURN_IF_ERROR(GetVariable(c, attributes.variable(i), &dtype, &variable));
    if (attributes.compact) {
      TF_RETURN_IF_ERROR(GetVariable(c, attributes.indices(i), &dtype, &indices));
      TF_RETURN_IF_ERROR(CheckIndices(indices, attributes.layouts[i], &slot_size));
    }
    TF_RETURN_IF_ERROR(attributes.CheckGradient(c, i, sparse[i], variable, slot_size));
  }
  return attributes.CheckNumbers(c);
}

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
    .Attr("gathered: list(int) = []")
    .SetIsStateful()
    .SetShapeFn(FusedUpdateShape)
    .Doc(R"doc(
One step of an optimizer for several variables: in one pass over each, its trainable entries and their slots are updated,
and no other entry is written.

variables: The model's variables.
gradients: One for each, dense, the values of an IndexedSlices, or the trainable entries alone.
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
gathered: Positions of variables, ascending, whose gradients hold the trainable entries alone, as GatherTrainable returns
  them. Of variables with compact state, and none in `sparse`.
)doc");

}  // namespace freezeops
