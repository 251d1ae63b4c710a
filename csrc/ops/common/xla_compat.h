// XLA's headers, with what differs between the TensorFlow versions that are supported.

#ifndef FREEZEOPS_OPS_COMMON_XLA_COMPAT_H_
#define FREEZEOPS_OPS_COMMON_XLA_COMPAT_H_

#include "ops/common/tf_compat.h"
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

#endif  // FREEZEOPS_OPS_COMMON_XLA_COMPAT_H_
