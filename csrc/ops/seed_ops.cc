// CPU kernel of SeedSlots.

#include <algorithm>
#include <memory>
#include <set>
#include <unordered_map>
#include <vector>

#include "kernels/seed_slots.h"
#include "ops/cpu_helpers.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/register_types.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"

namespace freezeops {
namespace {

using ::tensorflow::OpKernelConstruction;
using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;
using ::tensorflow::Var;

using VarPtr = tensorflow::core::RefCountPtr<Var>;

// Locks variables for writing, in the order of their addresses, so that two ops cannot wait for each other.
class LockAll {
 public:
  explicit LockAll(const std::vector<VarPtr>& variables) {
    std::set<Var*> ordered;
    for (const VarPtr& variable : variables) ordered.insert(variable.get());
    for (Var* variable : ordered) locks_.push_back(std::make_unique<tensorflow::mutex_lock>(*variable->mu()));
  }

 private:
  std::vector<std::unique_ptr<tensorflow::mutex_lock>> locks_;
};

template <typename T, typename Acc>
class SeedSlotsOp : public tensorflow::OpKernel {
 public:
  explicit SeedSlotsOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("size", &size_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("sparse", &sparse_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("powers", &powers_));
    for (const int64_t power : powers_) {
      OP_REQUIRES(ctx, power == 1 || power == 2, InvalidArgument("powers must be 1 or 2. Received: power ", power));
    }
  }

  void Compute(OpKernelContext* ctx) override {
    const Tensor& values = ctx->input(1);
    const Tensor& indices = ctx->input(2);
    const Tensor& scales = ctx->input(3);
    const int count = static_cast<int>(powers_.size());
    OP_REQUIRES(ctx, scales.dims() == 1 && scales.dim_size(0) == count && ctx->num_inputs() == 4 + count,
                InvalidArgument("scales and slots must be as many as powers, ", count, ". Received: scales of shape ",
                                scales.shape().DebugString(), ", ", ctx->num_inputs() - 4, " slots"));
    int64_t width = 1;
    if (sparse_) {
      OP_REQUIRES(ctx, values.dims() >= 1 && indices.dims() == 1 && values.dim_size(0) == indices.dim_size(0),
                  InvalidArgument("values must have one row for each index. Received: values of shape ",
                                  values.shape().DebugString(), ", indices of shape ", indices.shape().DebugString()));
      for (int i = 1; i < values.dims(); ++i) width *= values.dim_size(i);
    } else {
      OP_REQUIRES(ctx, values.NumElements() == size_,
                  InvalidArgument("values must have the ", size_, " entries of the slots. Received: values of shape ",
                                  values.shape().DebugString()));
    }

    // The bits first, then the slots.
    std::vector<VarPtr> variables(1 + count);
    for (int i = 0; i <= count; ++i) {
      OP_REQUIRES_OK(ctx, LookupResource(ctx, tensorflow::HandleFromInput(ctx, i == 0 ? 0 : 3 + i), &variables[i]));
    }
    {
      tensorflow::tf_shared_lock lock(*variables[0]->mu());
      OP_REQUIRES_OK(ctx, CheckBits(*variables[0]->tensor()));
      const MaskView waiting = ViewOf(*variables[0]->tensor(), MaskLayout{1, size_, 1});
      // As in every step but those after an unfreezing: no bit is set.
      if (cpu_kernels().count_frozen(waiting, 0, size_) == size_) return;
    }
    LockAll lock(variables);
    OP_REQUIRES_OK(ctx, CheckBits(*variables[0]->tensor()));
    for (int i = 0; i <= count; ++i) {
      Tensor* value = variables[i]->tensor();
      if (i > 0) {
        OP_REQUIRES(
            ctx, value->dtype() == tensorflow::DataTypeToEnum<T>::v() && value->NumElements() == size_,
            InvalidArgument("slots must have ", size_, " entries of the values' dtype. Received: a slot of ",
                            tensorflow::DataTypeString(value->dtype()), " and shape ", value->shape().DebugString()));
      }
      if (!value->RefCountIsOne()) OP_REQUIRES_OK(ctx, Unshare(ctx, value));
    }

    std::vector<SlotSeed<T, Acc>> slots(count);
    for (int i = 0; i < count; ++i) {
      slots[i] = {variables[i + 1]->tensor()->flat<T>().data(), static_cast<Acc>(scales.vec<double>()(i)),
                  static_cast<int>(powers_[i])};
    }
    uint8_t* bits = variables[0]->tensor()->flat<uint8_t>().data();
    const T* gradient = values.flat<T>().data();
    if (!sparse_) {
      ParallelForEntries(ctx, size_, sizeof(T), [&](int64_t begin, int64_t end) {
        SeedRange(bits, slots.data(), count, gradient, begin, end);
      });
      return;
    }

    // Rows may be named more than once. Their gradients add up; Keras adds up their squares as well, and that is what
    // its second moment gets. The larger of the two is taken, because gradients that cancel leave a second moment
    // behind.
    struct Sums {
      explicit Sums(int64_t width) : values(width, Acc(0)), squares(width, Acc(0)) {}
      std::vector<Acc> values, squares;
    };
    std::unordered_map<int64_t, Sums> rows;
    for (int64_t i = 0; i < indices.dim_size(0); ++i) {
      const int64_t row = indices.vec<int64_t>()(i);
      OP_REQUIRES(ctx, row >= 0 && (row + 1) * width <= size_,
                  InvalidArgument("indices must be rows of the slots' ", size_, " entries. Received: index ", row,
                                  " with rows of ", width));
      Sums& sums = rows.try_emplace(row, width).first->second;
      for (int64_t j = 0; j < width; ++j) {
        const Acc value = static_cast<Acc>(gradient[i * width + j]);
        sums.values[j] += value;
        sums.squares[j] += value * value;
      }
    }
    for (const auto& [row, sums] : rows) {
      for (int64_t j = 0; j < width; ++j) {
        const int64_t entry = row * width + j;
        const uint8_t bit = uint8_t(1) << entry % 8;
        const Acc value = sums.values[j];
        const Acc square = std::max(value * value, sums.squares[j]);
        if ((bits[entry / 8] & bit) && SeedEntry(slots.data(), count, entry, value, square)) bits[entry / 8] &= ~bit;
      }
    }
  }

 private:
  absl::Status CheckBits(const Tensor& bits) const {
    if (bits.dtype() == tensorflow::DT_UINT8 && bits.NumElements() == (size_ + 7) / 8) return absl::OkStatus();
    return InvalidArgument("unseeded must have one bit for each of ", size_, " entries. Received: unseeded of ",
                           tensorflow::DataTypeString(bits.dtype()), " and shape ", bits.shape().DebugString());
  }

  int64_t size_ = 0;
  bool sparse_ = false;
  std::vector<int64_t> powers_;
};

#define FREEZEOPS_REGISTER(T, ACC)                                                                           \
  REGISTER_KERNEL_BUILDER(Name("Freezeops>SeedSlots").Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"), \
                          SeedSlotsOp<T, ACC>)
FREEZEOPS_REGISTER(Eigen::half, float);
FREEZEOPS_REGISTER(Eigen::bfloat16, float);
FREEZEOPS_REGISTER(float, float);
FREEZEOPS_REGISTER(double, double);
#undef FREEZEOPS_REGISTER

}  // namespace
}  // namespace freezeops
