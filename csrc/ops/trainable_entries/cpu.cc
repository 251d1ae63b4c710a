// CPU kernels of GatherTrainable, ReadTrainable, TakeTrainable, ScatterTrainable and RankTrainable.
//
// The rank at which each thread's shard begins is known from the ranks that were counted once per mask, see
// kernels/cpu/parallel_compact.h.

#include <algorithm>
#include <memory>
#include <vector>

#include "kernels/cpu/parallel_compact.h"
#include "ops/common/cpu_helpers.h"
#include "ops/trainable_entries/op_kernels.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace freezeops {
namespace {

using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;

absl::Status OffsetsError(const cpu::ParallelCompact& shards) {
  return InvalidArgument(kOffsetsMessage, " Received: ", shards.capacity(), " indices, offsets with a total of ",
                         shards.total());
}

struct CompactOnCpu {
  using Index = std::unique_ptr<cpu::ParallelCompact>;

  static absl::Status Find(OpKernelContext* ctx, int first, const MaskLayout& layout, Index* index) {
    const Tensor& indices = ctx->input(first + 2);
    *index = std::make_unique<cpu::ParallelCompact>(
        ViewOf(ctx->input(first), layout), ctx->input(first + 1).flat<int64_t>().data(),
        cpu::TrainableIndices{indices.data(), indices.dtype() == tensorflow::DT_INT64}, indices.dim_size(0),
        ctx->device()->tensorflow_cpu_worker_threads()->num_threads, ParallelForOf(ctx));
    return absl::OkStatus();
  }

  static absl::Status Gather(OpKernelContext*, const Index& index, int width, const std::vector<void*>& compact,
                             const std::vector<const void*>& sources) {
    return index->Gather(compact, sources, width) ? absl::OkStatus() : OffsetsError(*index);
  }

  static absl::Status Scatter(OpKernelContext* ctx, const Index& index, int width, Tensor* value,
                              const Tensor& compact) {
    if (index->total() == 0) return absl::OkStatus();
    TF_RETURN_IF_ERROR(Unshare(ctx, value));
    return index->Scatter(value->data(), compact.data(), width) ? absl::OkStatus() : OffsetsError(*index);
  }
};

class RankTrainableOp : public RankOp {
 public:
  using RankOp::RankOp;

  void Compute(OpKernelContext* ctx) override {
    const Tensor& bits = ctx->input(0);
    const Tensor& mask = ctx->input(1);
    const Tensor& offsets = ctx->input(2);
    OP_REQUIRES_OK(ctx, CheckInputs(ctx));
    const int64_t count = bits.NumElements();
    const int64_t* bit = bits.flat<int64_t>().data();
    for (int64_t i = 0; i < count; ++i) {
      OP_REQUIRES(ctx, bit[i] >= 0 && bit[i] < kept_,
                  InvalidArgument("bits must be in [0, ", kept_, "). Received: bits[", i, "] = ", bit[i]));
    }
    Tensor* ranks = nullptr;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, bits.shape(), &ranks));
    const int64_t last = ctx->input(3).NumElements() - 1;
    int64_t* rank = ranks->flat<int64_t>().data();
    const uint8_t* words = mask.flat<uint8_t>().data();
    const int64_t* counted = offsets.flat<int64_t>().data();
    ParallelFor(ctx, count, 60, [&](int64_t first, int64_t end) {
      for (int64_t i = first; i < end; ++i) {
        rank[i] = std::max<int64_t>(std::min(cpu::RankOf(words, counted, bit[i]), last), 0);
      }
    });
  }
};

FREEZEOPS_REGISTER_COMPACT(CPU, CompactOnCpu);
REGISTER_KERNEL_BUILDER(Name("Freezeops>RankTrainable").Device(tensorflow::DEVICE_CPU), RankTrainableOp);

}  // namespace
}  // namespace freezeops
