// CPU kernels of RememberFrozen and RestoreFrozen.
//
// A snapshot is either the frozen values in order (few are frozen) or the variable's whole old value (most are). The
// whole value costs no copy here: the snapshot shares the variable's buffer as a read does, and whoever updates the
// variable next copies on write. RestoreFrozen can then put the old buffer back, with only the trainable entries of
// the new one written into it.

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#include "kernels/cpu/kernels.h"
#include "ops/common/cpu_helpers.h"
#include "ops/frozen_entries/op_kernel.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace freezeops {
namespace {

using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;
using ::tensorflow::TensorShape;

// From this share of frozen entries on the whole value is the cheaper snapshot. Measured: at 0.9 and below, taking the
// frozen values out and putting them back beats the copy that the next update then makes of the variable; at 0.99
// random they are even; where whole rows are frozen, and at 1, the whole value is cheaper.
constexpr double kFullSnapshotShare = 0.98;

// The entries of a variable divided into shards: the number of frozen entries in each, and where its values begin in a
// snapshot of frozen entries.
class FrozenShards {
 public:
  FrozenShards(OpKernelContext* ctx, const MaskView& mask) : mask_(mask) {
    const int64_t count = entries(mask.layout);
    const int64_t threads = ctx->device()->tensorflow_cpu_worker_threads()->num_threads;
    constexpr int64_t kLeastEntries = 16384;
    const int64_t wanted = std::min(count / kLeastEntries + 1, 8 * threads);
    shard_size_ = (count + wanted - 1) / wanted;
    shard_size_ = std::max<int64_t>((shard_size_ + 63) / 64 * 64, 64);
    const int64_t shards = (count + shard_size_ - 1) / shard_size_;
    offsets_.resize(shards + 1, 0);
    const cpu::KernelTable& kernels = cpu::kernels();
    ParallelFor(ctx, shards, shard_size_ / 16, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) offsets_[i + 1] = kernels.count_frozen(mask_, begin(i), end(i));
    });
    for (int64_t i = 0; i < shards; ++i) offsets_[i + 1] += offsets_[i];
  }

  int64_t total() const { return offsets_.back(); }
  int64_t shards() const { return static_cast<int64_t>(offsets_.size()) - 1; }
  int64_t shard_size() const { return shard_size_; }
  int64_t begin(int64_t shard) const { return shard * shard_size_; }
  int64_t end(int64_t shard) const { return std::min((shard + 1) * shard_size_, entries(mask_.layout)); }
  int64_t offset(int64_t shard) const { return offsets_[shard]; }
  int64_t frozen(int64_t shard) const { return offsets_[shard + 1] - offsets_[shard]; }

 private:
  MaskView mask_;
  int64_t shard_size_;
  std::vector<int64_t> offsets_;
};

void ForEachShard(OpKernelContext* ctx, const FrozenShards& frozen, int64_t width,
                  const std::function<void(int64_t)>& work) {
  ParallelFor(ctx, frozen.shards(), std::max<int64_t>(frozen.shard_size() * width / 8, 1),
              [&](int64_t first, int64_t last) {
                for (int64_t shard = first; shard < last; ++shard) work(shard);
              });
}

class CpuFrozenEntriesOp : public FrozenEntriesOp {
 public:
  using FrozenEntriesOp::FrozenEntriesOp;

 protected:
  // Before entries are counted, which takes as long as the layout says: it must be that of something in memory. The
  // variable's lock is not held, and what is checked may change until it is.
  absl::Status CheckSize(tensorflow::Var* variable) const {
    tensorflow::tf_shared_lock lock(*variable->mu());
    return CheckVariable(variable);
  }
};

class RememberFrozenOp : public CpuFrozenEntriesOp {
 public:
  using CpuFrozenEntriesOp::CpuFrozenEntriesOp;

  void Compute(OpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, CheckFrozenMask(ctx, layout_));
    VarPtr variable;
    OP_REQUIRES_OK(ctx, LookUp(ctx, 0, &variable));
    OP_REQUIRES_OK(ctx, CheckSize(variable.get()));
    const MaskView mask = ViewOf(ctx->input(1), layout_);
    const FrozenShards frozen(ctx, mask);

    tensorflow::tf_shared_lock lock(*variable->mu());
    OP_REQUIRES_OK(ctx, CheckVariable(variable.get()));
    const Tensor& value = *variable->tensor();
    const double share =
        static_cast<double>(frozen.total()) / static_cast<double>(std::max<int64_t>(entries(layout_), 1));
    if (frozen.total() > 0 && share >= kFullSnapshotShare && !variable->copy_on_read_mode.load()) {
      Tensor snapshot;
      OP_REQUIRES(ctx, snapshot.CopyFrom(value, TensorShape({value.NumElements()})),
                  absl::InternalError("the snapshot has another number of entries than its variable"));
      ctx->set_output(0, snapshot);
      return;
    }
    Tensor* snapshot = nullptr;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, TensorShape({frozen.total()}), &snapshot));
    if (frozen.total() == 0) return;
    const void* from = value.data();
    void* to = snapshot->data();
    const auto gather = cpu::kernels().gather_frozen;
    ForEachShard(ctx, frozen, width_, [&](int64_t shard) {
      gather(width_, At(to, frozen.offset(shard), width_), frozen.frozen(shard), At(from, frozen.begin(shard), width_),
             mask, frozen.begin(shard), frozen.end(shard));
    });
  }
};

class RestoreFrozenOp : public CpuFrozenEntriesOp {
 public:
  using CpuFrozenEntriesOp::CpuFrozenEntriesOp;

  void Compute(OpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, CheckFrozenMask(ctx, layout_));
    VarPtr variable;
    OP_REQUIRES_OK(ctx, LookUp(ctx, 0, &variable));
    OP_REQUIRES_OK(ctx, CheckSize(variable.get()));
    const MaskView mask = ViewOf(ctx->input(1), layout_);
    const FrozenShards frozen(ctx, mask);
    const int64_t count = entries(layout_);
    const int64_t length = ctx->input(2).NumElements();
    const TensorShape snapshot_shape = ctx->input(2).shape();
    OP_REQUIRES(ctx, snapshot_shape.dims() == 1 && (length == frozen.total() || length == count),
                InvalidArgument("snapshot must be a vector of the ", frozen.total(), " frozen entries or of all ",
                                count, " entries of layout ", LayoutString(layout_), ". Received: snapshot of shape ",
                                snapshot_shape.DebugString()));

    tensorflow::mutex_lock lock(*variable->mu());
    OP_REQUIRES_OK(ctx, CheckVariable(variable.get()));
    if (frozen.total() == 0) return;
    Tensor* const value = variable->tensor();
    const void* const old = ctx->input(2).data();
    const bool full = length == count;
    if (full && old == value->data()) return;  // nobody wrote the variable meanwhile

    const cpu::KernelTable& kernels = cpu::kernels();
    if (full && 2 * (count - frozen.total()) <= count && !variable->copy_on_read_mode.load()) {
      // The old buffer is taken back where nobody else can see it.
      std::unique_ptr<Tensor> taken =
          ctx->forward_input(2, OpKernelContext::Params::kNoReservation, dtype_, value->shape(),
                             ctx->input_memory_type(2), tensorflow::AllocatorAttributes());
      if (taken != nullptr) {
        const void* from = value->data();
        void* to = taken->data();
        ForEachShard(ctx, frozen, width_, [&](int64_t shard) {
          if (frozen.frozen(shard) == frozen.end(shard) - frozen.begin(shard)) return;
          const int64_t begin = frozen.begin(shard);
          kernels.copy_trainable(width_, At(to, begin, width_), At(from, begin, width_), mask, begin,
                                 frozen.end(shard));
        });
        *value = *taken;
        return;
      }
    }

    OP_REQUIRES_OK(ctx, Unshare(ctx, value));
    void* to = value->data();
    ForEachShard(ctx, frozen, width_, [&](int64_t shard) {
      const int64_t begin = frozen.begin(shard);
      if (frozen.frozen(shard) == 0) return;
      if (full) {
        kernels.copy_frozen(width_, At(to, begin, width_), At(old, begin, width_), mask, begin, frozen.end(shard));
      } else {
        kernels.scatter_frozen(width_, At(to, begin, width_), At(old, frozen.offset(shard), width_),
                               frozen.frozen(shard), mask, begin, frozen.end(shard));
      }
    });
  }
};

FREEZEOPS_REGISTER_OP("Freezeops>RememberFrozen", CPU, RememberFrozenOp);
FREEZEOPS_REGISTER_OP("Freezeops>RestoreFrozen", CPU, RestoreFrozenOp);

}  // namespace
}  // namespace freezeops
