// The inputs of RememberFrozen and RestoreFrozen: a variable, its mask and a snapshot.

#ifndef FREEZEOPS_OPS_FROZEN_ENTRIES_INPUTS_H_
#define FREEZEOPS_OPS_FROZEN_ENTRIES_INPUTS_H_

#include "ops/common/checks.h"
#include "ops/common/layout_attr.h"

namespace freezeops {

template <typename Context>
absl::Status CheckFrozenMask(Context* ctx, const MaskLayout& layout) {
  PartialTensorShape mask;
  TF_RETURN_IF_ERROR(GetShape(ctx, 1, &mask));
  return CheckMask(mask, layout);
}

// A snapshot on devices that have no shorter ones. `where`, for the error: "on a GPU: ...".
template <typename Context>
absl::Status CheckWholeSnapshot(Context* ctx, const MaskLayout& layout, const char* where) {
  PartialTensorShape snapshot;
  TF_RETURN_IF_ERROR(GetShape(ctx, 2, &snapshot));
  if (IsVector(snapshot, entries(layout))) return absl::OkStatus();
  return InvalidArgument("snapshot must be a vector of all ", entries(layout), " entries of layout ",
                         LayoutString(layout), " ", where, ". Received: snapshot of shape ", snapshot.DebugString());
}

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_FROZEN_ENTRIES_INPUTS_H_
