// GPU kernels of MaskGradient and MaskSlices.
//
// MaskGradient of a mask of ones copies where it may not work in place. Indices that are out of range are not reported.

#include "kernels/cuda/kernels.h"
#include "ops/common/gpu_helpers.h"
#include "ops/common/op_kernels.h"
#include "ops/mask_gradient/inputs.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/types.h"

namespace freezeops {
namespace {

using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;

class MaskGradientGpuOp : public LayoutOp {
 public:
  using LayoutOp::LayoutOp;

  void Compute(OpKernelContext* ctx) override {
    const Tensor& gradient = ctx->input(0);
    OP_REQUIRES_OK(ctx, CheckMaskGradient(ctx, layout_));
    const void* source = gradient.data();
    Tensor* masked = nullptr;
    OP_REQUIRES_OK(ctx, ctx->forward_input_or_allocate_output({0}, 0, gradient.shape(), &masked));
    if (entries(layout_) == 0) return;
    const MaskView mask = ViewOf(ctx->input(1), layout_);
    const cuda::Stream stream = StreamOf(ctx);
    OP_REQUIRES_OK(ctx, Launched(ctx, masked->data() == source
                                          ? cuda::zero_frozen(width_, masked->data(), mask, stream)
                                          : cuda::copy_and_zero_frozen(width_, masked->data(), source, mask, stream)));
  }
};

class MaskSlicesGpuOp : public LayoutOp {
 public:
  explicit MaskSlicesGpuOp(tensorflow::OpKernelConstruction* ctx) : LayoutOp(ctx) {
    OP_REQUIRES_OK(ctx, GetSlicesAttributes(ctx, &layout_, &rows_));
  }

  void Compute(OpKernelContext* ctx) override {
    const Tensor& values = ctx->input(0);
    const Tensor& indices = ctx->input(1);
    OP_REQUIRES_OK(ctx, CheckMaskSlices(ctx, layout_, rows_));
    const void* source = values.data();
    Tensor* masked = nullptr;
    OP_REQUIRES_OK(ctx, ctx->forward_input_or_allocate_output({0}, 0, values.shape(), &masked));
    if (values.NumElements() == 0) return;
    OP_REQUIRES(ctx, entries(layout_) > 0,
                InvalidArgument("indices must name rows of the variable, which has none. Received: ",
                                indices.dim_size(0), " indices"));
    const cuda::Slices slices{indices.data(), indices.dtype() == tensorflow::DT_INT64, indices.dim_size(0), rows_,
                              RowSize(values.shape())};
    OP_REQUIRES_OK(ctx, Launched(ctx, cuda::mask_slices(width_, masked->data(), source, slices,
                                                        ViewOf(ctx->input(2), layout_), StreamOf(ctx))));
  }

 private:
  int64_t rows_ = 0;
};

FREEZEOPS_REGISTER_OP("Freezeops>MaskGradient", GPU, MaskGradientGpuOp);
FREEZEOPS_REGISTER_OP("Freezeops>MaskSlices", GPU, MaskSlicesGpuOp);

}  // namespace
}  // namespace freezeops
