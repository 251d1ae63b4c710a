// CPU kernels of RememberFrozen and RestoreFrozen.
//
// A snapshot is either the frozen values in order (few are frozen) or the variable's whole old value (most are). The
// whole value costs no copy here: the snapshot shares the variable's buffer as a read does, and whoever updates the
// variable next copies on write. RestoreFrozen can then put the old buffer back, with only the trainable entries of
// the new one written into it.

#include <vector>

#include "kernels/cpu/kernels.h"
#include "ops/common/cpu_helpers.h"
#include "ops/common/op_checks.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/register_types.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"

namespace freezeops {
namespace {

using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;
using ::tensorflow::TensorShape;
using ::tensorflow::Var;

// From this share of frozen entries on the whole value is the cheaper snapshot. Measured: at 0.9 and below, taking the
// frozen values out and putting them back beats the copy that the next update then makes of the variable; at 0.99
// random they are even; where whole rows are frozen, and at 1, the whole value is cheaper.
constexpr double kFullSnapshotShare = 0.98;

// The number of frozen entries in each of the parts that the threads work on, and where each part's values begin in a
// compressed snapshot.
class FrozenCount {
 public:
  FrozenCount(OpKernelContext* ctx, const MaskView& mask) : mask_(mask) {
    const int64_t count = entries(mask.layout);
    const int64_t threads = ctx->device()->tensorflow_cpu_worker_threads()->num_threads;
    constexpr int64_t kLeastEntries = 16384;
    const int64_t wanted = std::min(count / kLeastEntries + 1, 8 * threads);
    part_size_ = (count + wanted - 1) / wanted;
    part_size_ = std::max<int64_t>((part_size_ + 63) / 64 * 64, 64);
    const int64_t parts = (count + part_size_ - 1) / part_size_;
    offsets_.resize(parts + 1, 0);
    const KernelTable& kernels = cpu_kernels();
    ParallelFor(ctx, parts, part_size_ / 16, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) offsets_[i + 1] = kernels.count_frozen(mask_, begin(i), end(i));
    });
    for (int64_t i = 0; i < parts; ++i) offsets_[i + 1] += offsets_[i];
  }

  int64_t total() const { return offsets_.back(); }
  int64_t parts() const { return static_cast<int64_t>(offsets_.size()) - 1; }
  int64_t part_size() const { return part_size_; }
  int64_t begin(int64_t part) const { return part * part_size_; }
  int64_t end(int64_t part) const { return std::min((part + 1) * part_size_, entries(mask_.layout)); }
  int64_t offset(int64_t part) const { return offsets_[part]; }
  int64_t frozen(int64_t part) const { return offsets_[part + 1] - offsets_[part]; }

 private:
  MaskView mask_;
  int64_t part_size_;
  std::vector<int64_t> offsets_;
};

void ForEachPart(OpKernelContext* ctx, const FrozenCount& frozen, int64_t width,
                 const std::function<void(int64_t)>& work) {
  ParallelFor(ctx, frozen.parts(), std::max<int64_t>(frozen.part_size() * width / 8, 1),
              [&](int64_t first, int64_t last) {
                for (int64_t part = first; part < last; ++part) work(part);
              });
}

class RememberFrozenOp : public VariableOp {
 public:
  using VariableOp::VariableOp;

  void Compute(OpKernelContext* ctx) override {
    const Tensor& mask_tensor = ctx->input(1);
    OP_REQUIRES_OK(ctx, CheckMask(mask_tensor, layout_));
    tensorflow::core::RefCountPtr<Var> variable;
    OP_REQUIRES_OK(ctx, LookupResource(ctx, tensorflow::HandleFromInput(ctx, 0), &variable));
    OP_REQUIRES_OK(ctx, CheckSize(variable.get()));
    const MaskView mask = ViewOf(mask_tensor, layout_);
    const FrozenCount frozen(ctx, mask);

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
    const auto gather = cpu_kernels().gather_frozen[width_index(width_)];
    ForEachPart(ctx, frozen, width_, [&](int64_t part) {
      gather(At(to, frozen.offset(part), width_), frozen.frozen(part), At(from, frozen.begin(part), width_), mask,
             frozen.begin(part), frozen.end(part));
    });
  }
};

class RestoreFrozenOp : public VariableOp {
 public:
  using VariableOp::VariableOp;

  void Compute(OpKernelContext* ctx) override {
    const Tensor& mask_tensor = ctx->input(1);
    OP_REQUIRES_OK(ctx, CheckMask(mask_tensor, layout_));
    tensorflow::core::RefCountPtr<Var> variable;
    OP_REQUIRES_OK(ctx, LookupResource(ctx, tensorflow::HandleFromInput(ctx, 0), &variable));
    OP_REQUIRES_OK(ctx, CheckSize(variable.get()));
    const MaskView mask = ViewOf(mask_tensor, layout_);
    const FrozenCount frozen(ctx, mask);
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

    const int index = width_index(width_);
    const KernelTable& kernels = cpu_kernels();
    if (full && 2 * (count - frozen.total()) <= count && !variable->copy_on_read_mode.load()) {
      // The old buffer is taken back where nobody else can see it.
      std::unique_ptr<Tensor> taken =
          ctx->forward_input(2, OpKernelContext::Params::kNoReservation, dtype_, value->shape(),
                             ctx->input_memory_type(2), tensorflow::AllocatorAttributes());
      if (taken != nullptr) {
        const void* from = value->data();
        void* to = taken->data();
        ForEachPart(ctx, frozen, width_, [&](int64_t part) {
          if (frozen.frozen(part) == frozen.end(part) - frozen.begin(part)) return;
          const int64_t begin = frozen.begin(part);
          kernels.copy_trainable[index](At(to, begin, width_), At(from, begin, width_), mask, begin, frozen.end(part));
        });
        *value = *taken;
        return;
      }
    }

    // In copy-on-read mode no read shares the buffer, otherwise one that does must not see this write.
    if (!value->RefCountIsOne()) {
      OP_REQUIRES_OK(ctx, Unshare(ctx, value));
    }
    void* to = value->data();
    ForEachPart(ctx, frozen, width_, [&](int64_t part) {
      const int64_t begin = frozen.begin(part);
      if (frozen.frozen(part) == 0) return;
      if (full) {
        kernels.copy_frozen[index](At(to, begin, width_), At(old, begin, width_), mask, begin, frozen.end(part));
      } else {
        kernels.scatter_frozen[index](At(to, begin, width_), At(old, frozen.offset(part), width_), frozen.frozen(part),
                                      mask, begin, frozen.end(part));
      }
    });
  }
};

#define FREEZEOPS_REGISTER(T)                                                                                     \
  REGISTER_KERNEL_BUILDER(Name("Freezeops>RememberFrozen").Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"), \
                          RememberFrozenOp);                                                                      \
  REGISTER_KERNEL_BUILDER(Name("Freezeops>RestoreFrozen").Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"),  \
                          RestoreFrozenOp)
FREEZEOPS_REGISTER(Eigen::half);
FREEZEOPS_REGISTER(Eigen::bfloat16);
FREEZEOPS_REGISTER(float);
FREEZEOPS_REGISTER(double);
#undef FREEZEOPS_REGISTER

}  // namespace
}  // namespace freezeops
