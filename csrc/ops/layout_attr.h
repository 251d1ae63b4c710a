// The `layout` attribute, [outer, kept, inner], read and checked in the same way by shape functions and kernels.

#ifndef FREEZEOPS_OPS_LAYOUT_ATTR_H_
#define FREEZEOPS_OPS_LAYOUT_ATTR_H_

#include <cstdint>
#include <limits>
#include <vector>

#include "absl/strings/str_join.h"
#include "mask_layout.h"
#include "ops/tf_compat.h"

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

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_LAYOUT_ATTR_H_
