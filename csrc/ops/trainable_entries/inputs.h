// The inputs of the ops of compact state.

#ifndef FREEZEOPS_OPS_TRAINABLE_ENTRIES_INPUTS_H_
#define FREEZEOPS_OPS_TRAINABLE_ENTRIES_INPUTS_H_

#include <cstdint>

#include "ops/common/checks.h"
#include "ops/common/layout_attr.h"

namespace freezeops {

// `size`: the entries of the indices; -1 where it is not known.
inline absl::Status CheckCompact(const PartialTensorShape& compact, int64_t size) {
  if (compact.num_elements() == size || compact.num_elements() < 0 || size < 0) return absl::OkStatus();
  return InvalidArgument("compact must have the ", size, " entries of the indices. Received: compact of shape ",
                         compact.DebugString());
}

// Inputs `first` and on are the mask, its offsets and the indices. Sets `size` as CheckIndices does.
template <typename Context>
absl::Status CheckTrainable(Context* ctx, int first, const MaskLayout& layout, int64_t* size) {
  PartialTensorShape mask, offsets, indices;
  TF_RETURN_IF_ERROR(CheckDoesNotRepeat(layout));
  TF_RETURN_IF_ERROR(GetShape(ctx, first, &mask));
  TF_RETURN_IF_ERROR(CheckMask(mask, layout));
  TF_RETURN_IF_ERROR(GetShape(ctx, first + 1, &offsets));
  TF_RETURN_IF_ERROR(CheckOffsets(offsets, layout.kept));
  TF_RETURN_IF_ERROR(GetShape(ctx, first + 2, &indices));
  return CheckIndices(indices, layout, size);
}

// Reads and checks the attribute of RankTrainable.
template <typename Context>
absl::Status GetKept(Context* context, int64_t* kept) {
  TF_RETURN_IF_ERROR(context->GetAttr("kept", kept));
  if (*kept >= 0) return absl::OkStatus();
  return InvalidArgument("kept must not be negative. Received: kept=", *kept);
}

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_TRAINABLE_ENTRIES_INPUTS_H_
