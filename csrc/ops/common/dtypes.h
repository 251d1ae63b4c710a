// TensorFlow's dtypes as the kernels' types.

#ifndef FREEZEOPS_OPS_COMMON_DTYPES_H_
#define FREEZEOPS_OPS_COMMON_DTYPES_H_

#include "kernels/common/dtypes.h"
#include "tensorflow/core/framework/types.h"

namespace freezeops {

// `dtype` is one of the ops' attribute T: half, bfloat16, float, double.
inline Float FloatOf(tensorflow::DataType dtype) {
  switch (dtype) {
    case tensorflow::DT_HALF:
      return Float::kFloat16;
    case tensorflow::DT_BFLOAT16:
      return Float::kBfloat16;
    case tensorflow::DT_FLOAT:
      return Float::kFloat32;
    default:
      return Float::kFloat64;
  }
}

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_COMMON_DTYPES_H_
