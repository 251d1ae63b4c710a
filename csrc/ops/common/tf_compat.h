// Differences between the supported TensorFlow versions (2.19 to 2.21), and the status helper of the ops.

#ifndef FREEZEOPS_OPS_COMMON_TF_COMPAT_H_
#define FREEZEOPS_OPS_COMMON_TF_COMPAT_H_

#if !defined(FREEZEOPS_TF_MAJOR) || !defined(FREEZEOPS_TF_MINOR)
#error "FREEZEOPS_TF_MAJOR and FREEZEOPS_TF_MINOR come from CMake: TensorFlow's version header does not always say"
#endif

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

// TensorFlow 2.19's include folder has a header that needs LLVM's, which are not there. All that the headers used here
// want of it is that this class, an argument of a function for CUDA, is complete; nothing here makes one.
#if FREEZEOPS_TF_MAJOR == 2 && FREEZEOPS_TF_MINOR == 19 && !__has_include("llvm/ADT/ArrayRef.h")
#define XLA_STREAM_EXECUTOR_GPU_TMA_METADATA_H_
namespace stream_executor {
namespace gpu {
class TmaDescriptor {
 public:
  TmaDescriptor() = delete;
};
}  // namespace gpu
}  // namespace stream_executor
#endif

namespace freezeops {

template <typename... Parts>
absl::Status InvalidArgument(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_COMMON_TF_COMPAT_H_
