// The `layout` attribute, [outer, kept, inner].

#ifndef FREEZEOPS_OPS_COMMON_LAYOUT_ATTR_H_
#define FREEZEOPS_OPS_COMMON_LAYOUT_ATTR_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/str_join.h"
#include "absl/types/span.h"
#include "mask_layout.h"
#include "ops/common/tf_compat.h"

namespace freezeops {

inline std::string LayoutString(const MaskLayout& layout) {
  return absl::StrCat("[", layout.outer, ", ", layout.kept, ", ", layout.inner, "]");
}

// Returns the product of sizes; -1 where one is negative or the product of those that are not zero has more than 63
// bits. Sizes that callers of an op choose are multiplied here and nowhere else: so `entries` of a layout, and any part
// of it, cannot overflow.
inline int64_t ProductOf(absl::Span<const int64_t> sizes) {
  int64_t product = 1;
  bool empty = false;
  for (const int64_t size : sizes) {
    if (size < 0) return -1;
    if (size == 0) {
      empty = true;
    } else if (__builtin_mul_overflow(product, size, &product)) {
      return -1;
    }
  }
  return empty ? 0 : product;
}

inline absl::Status ParseLayout(const std::vector<int64_t>& values, MaskLayout* layout) {
  if (values.size() != 3 || ProductOf(values) < 0) {
    return InvalidArgument("layout must be three integers [outer, kept, inner], none negative, of fewer than 2^63 ",
                           "entries. Received: layout=[", absl::StrJoin(values, ", "), "]");
  }
  *layout = MaskLayout{values[0], values[1], values[2]};
  return absl::OkStatus();
}

// Reads and checks the attribute. Context: one with GetAttr, of a kernel or a shape function.
template <typename Context>
absl::Status GetLayout(Context* context, MaskLayout* layout) {
  std::vector<int64_t> values;
  absl::Status status = context->GetAttr("layout", &values);
  return status.ok() ? ParseLayout(values, layout) : status;
}

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_COMMON_LAYOUT_ATTR_H_
