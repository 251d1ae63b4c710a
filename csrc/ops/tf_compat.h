// What differs between the TensorFlow versions that are supported (2.19 to 2.21), and the status helpers of the ops.

#ifndef FREEZEOPS_OPS_TF_COMPAT_H_
#define FREEZEOPS_OPS_TF_COMPAT_H_

#if !defined(FREEZEOPS_TF_MAJOR) || !defined(FREEZEOPS_TF_MINOR)
#error "FREEZEOPS_TF_MAJOR and FREEZEOPS_TF_MINOR come from CMake: TensorFlow's version header does not always say"
#endif

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace freezeops {

template <typename... Parts>
absl::Status InvalidArgument(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_TF_COMPAT_H_
