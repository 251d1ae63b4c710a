// CPU kernels of compact state: GatherTrainable, ReadTrainable, ScatterTrainable and RankTrainable.
//
// Trainable entries are found by the mask's bits, a word at a time; where a thread's part of them begins is known from
// the ranks that were counted once per mask. The indices are for XLA and the reference twins: here only their number,
// the capacity, is looked at.

#include <atomic>
#include <cstring>
#include <vector>

#include "kernels/kernels.h"
#include "ops/cpu_helpers.h"
#include "ops/layout_attr.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/register_types.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"

namespace freezeops {
namespace {

using ::tensorflow::OpKernel;
using ::tensorflow::OpKernelConstruction;
using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;
using ::tensorflow::TensorShape;
using ::tensorflow::Var;

absl::Status CheckOffsets(const Tensor& offsets, int64_t kept) {
  if (offsets.dims() == 1 && offsets.dim_size(0) == rank_blocks(kept) + 1) return absl::OkStatus();
  return InvalidArgument("offsets must have shape [", rank_blocks(kept) + 1, "], one for each block of ",
                         kRankBlockBits, " of the mask's ", kept, " bits and their total. Received: offsets of shape ",
                         offsets.shape().DebugString());
}

// The number of ones before a bit.
int64_t RankOf(const uint8_t* bits, const int64_t* offsets, int64_t bit) {
  const int64_t block = bit / kRankBlockBits;
  return offsets[block] + cpu_kernels().count_ones(bits, block * kRankBlockBits, bit);
}

// The parts of a mask that the threads work on, and the rank at which each begins.
class Parts {
 public:
  absl::Status Init(OpKernelContext* ctx, const Tensor& mask, const Tensor& offsets, const Tensor& indices,
                    const MaskLayout& layout) {
    TF_RETURN_IF_ERROR(CheckMask(mask, layout));
    TF_RETURN_IF_ERROR(CheckOffsets(offsets, layout.kept));
    if (indices.dims() != 1) {
      return InvalidArgument("indices must be a vector. Received: indices of shape ", indices.shape().DebugString());
    }
    mask_ = ViewOf(mask, layout);
    capacity_ = indices.dim_size(0);
    const int64_t kept = layout.kept;
    const int64_t threads = ctx->device()->tensorflow_cpu_worker_threads()->num_threads;
    constexpr int64_t kLeastEntries = 16384;
    const int64_t wanted = std::min({entries(layout) / kLeastEntries + 1, 8 * threads, std::max<int64_t>(kept, 1)});
    part_bits_ = (kept + wanted - 1) / wanted;
    // Whole words, where a word's entries are few.
    if (layout.inner < 64 || part_bits_ > 512) part_bits_ = (part_bits_ + 63) / 64 * 64;
    part_bits_ = std::max<int64_t>(part_bits_, 1);
    const int64_t parts = (kept + part_bits_ - 1) / part_bits_;
    ranks_.resize(parts + 1, 0);
    const int64_t* counted = offsets.flat<int64_t>().data();
    for (int64_t i = 0; i < parts; ++i) ranks_[i] = RankOf(mask_.bits, counted, i * part_bits_);
    ranks_[parts] = counted[rank_blocks(kept)];

    // Counted again: what follows reads and writes as many values as the offsets say.
    std::atomic<bool> fits(ranks_[0] == 0 && ranks_[parts] <= capacity_);
    ParallelFor(ctx, parts, part_bits_ / 16 + 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        if (cpu_kernels().count_ones(mask_.bits, i * part_bits_, end_bit(i)) != count(i)) fits = false;
      }
    });
    if (fits) return absl::OkStatus();
    return InvalidArgument("offsets must be those of the mask, and at most as many entries trainable as there are ",
                           "indices, ", capacity_, ". Received: offsets with a total of ", ranks_[parts]);
  }

  int64_t size() const { return static_cast<int64_t>(ranks_.size()) - 1; }
  int64_t total() const { return ranks_.back(); }
  int64_t capacity() const { return capacity_; }
  int64_t rank(int64_t part) const { return ranks_[part]; }
  int64_t count(int64_t part) const { return ranks_[part + 1] - ranks_[part]; }
  int64_t begin(int64_t part) const { return part * part_bits_ * mask_.layout.inner; }
  int64_t end(int64_t part) const { return end_bit(part) * mask_.layout.inner; }
  const MaskView& mask() const { return mask_; }

  // Runs work(part) for each part with a trainable entry.
  void ForEach(OpKernelContext* ctx, int64_t width, const std::function<void(int64_t)>& work) const {
    const int64_t cycles = std::max<int64_t>(part_bits_ * mask_.layout.inner * width / 8, 1);
    ParallelFor(ctx, size(), cycles, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        if (count(part) > 0) work(part);
      }
    });
  }

 private:
  int64_t end_bit(int64_t part) const { return std::min((part + 1) * part_bits_, mask_.layout.kept); }

  MaskView mask_;
  int64_t capacity_ = 0;
  int64_t part_bits_ = 1;
  std::vector<int64_t> ranks_;
};

class CompactOp : public OpKernel {
 public:
  explicit CompactOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, GetLayout(ctx, &layout_));
    OP_REQUIRES(ctx, layout_.outer == 1,
                InvalidArgument("layout must be one that does not repeat, with outer = 1. Received: layout=",
                                LayoutString(layout_)));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("T", &dtype_));
    width_ = tensorflow::DataTypeSize(dtype_);
  }

 protected:
  // The trainable entries of `source`, then zeros.
  void Gather(OpKernelContext* ctx, const Parts& parts, const Tensor& source) const {
    const int64_t inner = layout_.inner;
    Tensor* compact = nullptr;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, TensorShape({parts.capacity() * inner}), &compact));
    if (compact->NumElements() == 0) return;
    const void* from = source.data();
    void* to = compact->data();
    const auto gather = cpu_kernels().gather_trainable[width_index(width_)];
    parts.ForEach(ctx, width_, [&](int64_t part) {
      gather(At(to, parts.rank(part) * inner, width_), parts.count(part) * inner,
             At(from, parts.begin(part), width_), parts.mask(), parts.begin(part), parts.end(part));
    });
    const int64_t rest = (parts.capacity() - parts.total()) * inner;
    if (rest > 0) std::memset(At(to, parts.total() * inner, width_), 0, rest * width_);
  }

  // The variable's lock is held.
  absl::Status CheckVariable(Var* variable) const {
    if (!variable->is_initialized || !variable->tensor()->IsInitialized()) {
      return absl::FailedPreconditionError(absl::StrCat(
          "variable must be initialized before its trainable entries are read or written. Received: an uninitialized "
          "variable; its layout is ",
          LayoutString(layout_)));
    }
    if (variable->tensor()->dtype() != dtype_) {
      return InvalidArgument("variable must be of dtype ", tensorflow::DataTypeString(dtype_),
                             ". Received: a variable of dtype ",
                             tensorflow::DataTypeString(variable->tensor()->dtype()), " and shape ",
                             variable->tensor()->shape().DebugString());
    }
    return CheckEntries("variable", variable->tensor()->shape(), layout_);
  }

  MaskLayout layout_;
  tensorflow::DataType dtype_;
  int64_t width_;
};

class GatherTrainableOp : public CompactOp {
 public:
  using CompactOp::CompactOp;

  void Compute(OpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, CheckEntries("source", ctx->input(0).shape(), layout_));
    Parts parts;
    OP_REQUIRES_OK(ctx, parts.Init(ctx, ctx->input(1), ctx->input(2), ctx->input(3), layout_));
    Gather(ctx, parts, ctx->input(0));
  }
};

class ReadTrainableOp : public CompactOp {
 public:
  using CompactOp::CompactOp;

  void Compute(OpKernelContext* ctx) override {
    tensorflow::core::RefCountPtr<Var> variable;
    OP_REQUIRES_OK(ctx, LookupResource(ctx, tensorflow::HandleFromInput(ctx, 0), &variable));
    Parts parts;
    OP_REQUIRES_OK(ctx, parts.Init(ctx, ctx->input(1), ctx->input(2), ctx->input(3), layout_));
    tensorflow::tf_shared_lock lock(*variable->mu());
    OP_REQUIRES_OK(ctx, CheckVariable(variable.get()));
    Gather(ctx, parts, *variable->tensor());
  }
};

class ScatterTrainableOp : public CompactOp {
 public:
  using CompactOp::CompactOp;

  void Compute(OpKernelContext* ctx) override {
    tensorflow::core::RefCountPtr<Var> variable;
    OP_REQUIRES_OK(ctx, LookupResource(ctx, tensorflow::HandleFromInput(ctx, 0), &variable));
    const Tensor& compact = ctx->input(1);
    Parts parts;
    OP_REQUIRES_OK(ctx, parts.Init(ctx, ctx->input(2), ctx->input(3), ctx->input(4), layout_));
    const int64_t inner = layout_.inner;
    OP_REQUIRES(ctx, compact.NumElements() == parts.capacity() * inner,
                InvalidArgument("compact must have ", inner, " entries for each of the ", parts.capacity(),
                                " indices. Received: compact of shape ", compact.shape().DebugString()));

    tensorflow::mutex_lock lock(*variable->mu());
    OP_REQUIRES_OK(ctx, CheckVariable(variable.get()));
    if (parts.total() == 0 || inner == 0) return;
    Tensor* const value = variable->tensor();
    // In copy-on-read mode no read shares the buffer, otherwise one that does must not see this write.
    if (!value->RefCountIsOne()) OP_REQUIRES_OK(ctx, Unshare(ctx, value));
    const void* from = compact.data();
    void* to = value->data();
    const auto scatter = cpu_kernels().scatter_trainable[width_index(width_)];
    parts.ForEach(ctx, width_, [&](int64_t part) {
      scatter(At(to, parts.begin(part), width_), At(from, parts.rank(part) * inner, width_),
              parts.count(part) * inner, parts.mask(), parts.begin(part), parts.end(part));
    });
  }
};

class RankTrainableOp : public OpKernel {
 public:
  explicit RankTrainableOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("kept", &kept_));
  }

  void Compute(OpKernelContext* ctx) override {
    const Tensor& bits = ctx->input(0);
    const Tensor& mask = ctx->input(1);
    const Tensor& offsets = ctx->input(2);
    OP_REQUIRES_OK(ctx, CheckMask(mask, MaskLayout{1, kept_, 1}));
    OP_REQUIRES_OK(ctx, CheckOffsets(offsets, kept_));
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
        rank[i] = std::max<int64_t>(std::min(RankOf(words, counted, bit[i]), last), 0);
      }
    });
  }

 private:
  int64_t kept_ = 0;
};

#define FREEZEOPS_REGISTER(T)                                                                                       \
  REGISTER_KERNEL_BUILDER(Name("Freezeops>GatherTrainable").Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"),  \
                          GatherTrainableOp);                                                                       \
  REGISTER_KERNEL_BUILDER(Name("Freezeops>ReadTrainable").Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"),    \
                          ReadTrainableOp);                                                                         \
  REGISTER_KERNEL_BUILDER(Name("Freezeops>ScatterTrainable").Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"), \
                          ScatterTrainableOp)
FREEZEOPS_REGISTER(Eigen::half);
FREEZEOPS_REGISTER(Eigen::bfloat16);
FREEZEOPS_REGISTER(float);
FREEZEOPS_REGISTER(double);
#undef FREEZEOPS_REGISTER
REGISTER_KERNEL_BUILDER(Name("Freezeops>RankTrainable").Device(tensorflow::DEVICE_CPU), RankTrainableOp);

}  // namespace
}  // namespace freezeops
