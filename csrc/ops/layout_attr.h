// The `layout` attribute, [outer, kept, inner], read and checked in the same way by shape functions and kernels, and
// what must fit it.

#ifndef FREEZEOPS_OPS_LAYOUT_ATTR_H_
#define FREEZEOPS_OPS_LAYOUT_ATTR_H_

#include <cstdint>
#include <limits>
#include <vector>

#include "absl/strings/str_join.h"
#include "mask_layout.h"
#include "ops/tf_compat.h"
#include "tensorflow/core/framework/tensor_shape.h"

namespace freezeops {

inline absl::Status ParseLayout(const std::vector<int64_t>& values, MaskLayout* layout) {
  bool fine = values.size() == 3;
  int64_t product = 1;
  bool empty = false;
  for (size_t i = 0; fine && i < values.size(); ++i) {
    fine = values[i] >= 0;
    empty = empty || values[i] == 0;
    if (fine && values[i] > 0) {
      fine = product <= std::numeric_limits<int64_t>::max() / values[i];
      if (fine) product *= values[i];
    }
  }
  if (!fine) {
    return InvalidArgument("layout must be three integers [outer, kept, inner], none negative. Received: layout=[",
                           absl::StrJoin(values, ", "), "]");
  }
  *layout = MaskLayout{values[0], values[1], values[2]};
  return absl::OkStatus();
}

inline std::string LayoutString(const MaskLayout& layout) {
  return absl::StrCat("[", layout.outer, ", ", layout.kept, ", ", layout.inner, "]");
}

// Reads and checks the attribute; Context has GetAttr (kernels, shape functions).
template <typename Context>
absl::Status GetLayout(Context* context, MaskLayout* layout) {
  std::vector<int64_t> values;
  absl::Status status = context->GetAttr("layout", &values);
  return status.ok() ? ParseLayout(values, layout) : status;
}

inline absl::Status CheckOffsets(const tensorflow::TensorShape& offsets, int64_t kept) {
  if (offsets.dims() == 1 && offsets.dim_size(0) == rank_blocks(kept) + 1) return absl::OkStatus();
  return InvalidArgument("offsets must have shape [", rank_blocks(kept) + 1, "], one for each block of ",
                         kRankBlockBits, " of the mask's ", kept, " bits and their total. Received: offsets of shape ",
                         offsets.DebugString());
}

inline constexpr char kOffsetsMessage[] =
    "offsets and indices must be those of the mask, and no more entries trainable than there are indices.";

inline absl::Status CheckMask(const tensorflow::TensorShape& mask, const MaskLayout& layout) {
  if (mask.dims() == 1 && mask.dim_size(0) == mask_bytes(layout.kept)) return absl::OkStatus();
  // `repack` empties the masks that it replaces, so that no function goes on with them.
  const char* hint =
      mask.num_elements() == 0 ? "; a function that was traced before `repack` must be traced again" : "";
  return InvalidArgument("mask must have shape [", mask_bytes(layout.kept), "], one bit for each of the ", layout.kept,
                         " kept indices of layout ", LayoutString(layout), ". Received: mask of shape ",
                         mask.DebugString(), hint);
}

inline absl::Status CheckEntries(const char* what, const tensorflow::TensorShape& shape, const MaskLayout& layout) {
  if (shape.num_elements() == entries(layout)) return absl::OkStatus();
  return InvalidArgument(what, " must have the ", entries(layout), " entries of layout ", LayoutString(layout),
                         ". Received: ", what, " of shape ", shape.DebugString());
}

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_LAYOUT_ATTR_H_
