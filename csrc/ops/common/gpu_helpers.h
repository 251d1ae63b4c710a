// Helpers of the GPU OpKernels: TensorFlow's stream without a header of CUDA, and errors of launches.
//
// No GPU OpKernel waits for the device or looks at what is in its memory: masks, offsets, indices and scales stay
// there. So what would take a look at them differs from the CPU's kernels, as each gpu.cc says.
// A variable's lock is held until the kernel that reads or writes it is started; what follows on the stream comes
// after.

#ifndef FREEZEOPS_OPS_COMMON_GPU_HELPERS_H_
#define FREEZEOPS_OPS_COMMON_GPU_HELPERS_H_

#include "kernels/cuda/kernels.h"
#include "ops/common/dtypes.h"
#include "ops/common/op_kernels.h"
#include "ops/common/tf_compat.h"
#include "tensorflow/core/framework/device_base.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor.h"
#include "xla/stream_executor/stream.h"

namespace freezeops {

// TensorFlow has made the device of the op current in this thread.
inline cuda::Stream StreamOf(tensorflow::OpKernelContext* ctx) {
  return static_cast<cuda::Stream>(ctx->op_device_context()->stream()->platform_specific_handle().stream);
}

// The status of an op whose kernels were started, or were not.
inline absl::Status Launched(tensorflow::OpKernelContext* ctx, int error) {
  if (error == 0) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(ctx->op_kernel().type_string(),
                                          " could not start its kernel on the GPU: ", cuda::error_text(error)));
}

// Gives a variable's value a buffer of its own, where a read shares it. The variable's lock is held: what comes later
// on the stream sees the copy.
inline absl::Status UnshareOnGpu(tensorflow::OpKernelContext* ctx, tensorflow::Tensor* value) {
  if (value->RefCountIsOne()) return absl::OkStatus();
  tensorflow::Tensor copy;
  TF_RETURN_IF_ERROR(ctx->allocate_temp(value->dtype(), value->shape(), &copy));
  const int64_t bytes = value->NumElements() * tensorflow::DataTypeSize(value->dtype());
  TF_RETURN_IF_ERROR(Launched(ctx, cuda::copy_bytes(copy.data(), value->data(), bytes, StreamOf(ctx))));
  *value = copy;
  return absl::OkStatus();
}

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_COMMON_GPU_HELPERS_H_
