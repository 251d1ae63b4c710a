// GPU kernels of GatherTrainable, ReadTrainable, TakeTrainable, ScatterTrainable and RankTrainable.
//
// Offsets and indices that are not those of the mask are not reported, see kernels/cuda/kernels.h.

#include <vector>

#include "kernels/cuda/kernels.h"
#include "ops/common/gpu_helpers.h"
#include "ops/trainable_entries/op_kernels.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace freezeops {
namespace {

using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;

struct CompactOnGpu {
  using Index = cuda::TrainableIndex;

  static absl::Status Find(OpKernelContext* ctx, int first, const MaskLayout& layout, Index* index) {
    const Tensor& indices = ctx->input(first + 2);
    *index = {ViewOf(ctx->input(first), layout), ctx->input(first + 1).flat<int64_t>().data(), indices.data(),
              indices.dtype() == tensorflow::DT_INT64, indices.dim_size(0)};
    return absl::OkStatus();
  }

  static absl::Status Gather(OpKernelContext* ctx, const Index& index, int width, const std::vector<void*>& compact,
                             const std::vector<const void*>& sources) {
    const int arrays = static_cast<int>(sources.size());
    return Launched(ctx, cuda::gather_trainable(width, arrays, compact.data(), sources.data(), index, StreamOf(ctx)));
  }

  static absl::Status Scatter(OpKernelContext* ctx, const Index& index, int width, Tensor* value,
                              const Tensor& compact) {
    if (compact.NumElements() == 0) return absl::OkStatus();
    TF_RETURN_IF_ERROR(UnshareOnGpu(ctx, value));
    return Launched(ctx, cuda::scatter_trainable(width, value->data(), compact.data(), index, StreamOf(ctx)));
  }
};

class RankTrainableGpuOp : public RankOp {
 public:
  using RankOp::RankOp;

  void Compute(OpKernelContext* ctx) override {
    const Tensor& bits = ctx->input(0);
    OP_REQUIRES_OK(ctx, CheckInputs(ctx));
    Tensor* ranks = nullptr;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, bits.shape(), &ranks));
    OP_REQUIRES_OK(ctx, Launched(ctx, cuda::rank_of_bits(ranks->flat<int64_t>().data(), bits.flat<int64_t>().data(),
                                                         bits.NumElements(), ctx->input(1).flat<uint8_t>().data(),
                                                         kept_, ctx->input(2).flat<int64_t>().data(),
                                                         ctx->input(3).NumElements() - 1, StreamOf(ctx))));
  }
};

FREEZEOPS_REGISTER_COMPACT(GPU, CompactOnGpu, .HostMemory("variable"));
REGISTER_KERNEL_BUILDER(Name("Freezeops>RankTrainable").Device(tensorflow::DEVICE_GPU), RankTrainableGpuOp);

}  // namespace
}  // namespace freezeops
