// XLA's headers, with what differs between the TensorFlow versions that are supported.

#ifndef FREEZEOPS_OPS_XLA_COMPAT_H_
#define FREEZEOPS_OPS_XLA_COMPAT_H_

#include "ops/tf_compat.h"

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

#include "tensorflow/compiler/tf2xla/type_util.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#if __has_include("xla/hlo/builder/xla_builder.h")
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/xla_builder.h"
#else
#include "xla/client/lib/constants.h"
#include "xla/client/xla_builder.h"
#endif
#include "xla/shape_util.h"

#endif  // FREEZEOPS_OPS_XLA_COMPAT_H_
