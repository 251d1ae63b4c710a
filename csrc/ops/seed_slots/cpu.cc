// CPU kernel of SeedSlots.

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "kernels/common/seed_entry.h"
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

template <typename T, typename Acc>
class SeedSlotsOp : public SeedOp {
 public:
  using SeedOp::SeedOp;

  void Compute(OpKernelContext* ctx) override {
    const Tensor& values = ctx->input(1);
    const Tensor& indices = ctx->input(2);
    const Tensor& scales = ctx->input(3);
    const int count = this->count();
    OP_REQUIRES_OK(ctx, CheckInputs(ctx));
    std::vector<VarPtr> variables;
    OP_REQUIRES_OK(ctx, LookUp(ctx, &variables));
    {
      tensorflow::tf_shared_lock lock(*variables[0]->mu());
      OP_REQUIRES_OK(ctx, CheckBits(*variables[0]->tensor()));
      const MaskView waiting = ViewOf(*variables[0]->tensor(), MaskLayout{1, size(), 1});
      // As in every step but those after an unfreezing: no bit is set.
      if (cpu_kernels().count_frozen(waiting, 0, size()) == size()) return;
    }
    LockAll lock(variables);
    OP_REQUIRES_OK(ctx, CheckBits(*variables[0]->tensor()));
    GradientRows rows = {};
    for (int i = 1; i <= count; ++i) OP_REQUIRES_OK(ctx, CheckSlot(*variables[i]->tensor(), ctx, &rows));
    for (int64_t i = 0; i < indices.dim_size(0) && attributes_.sparse; ++i) {
      const int64_t row = indices.vec<int64_t>()(i);
      OP_REQUIRES(ctx, row >= 0 && row < rows.count,
                  InvalidArgument("indices must be in [0, ", rows.count, "), the rows of the slots. Received: indices[",
                                  i, "] = ", row));
    }
    for (const VarPtr& variable : variables) {
      Tensor* value = variable->tensor();
      if (!value->RefCountIsOne()) OP_REQUIRES_OK(ctx, Unshare(ctx, value));
    }

    std::vector<SlotSeed<T, Acc>> slots(count);
    for (int i = 0; i < count; ++i) {
      slots[i] = {variables[i + 1]->tensor()->flat<T>().data(), static_cast<Acc>(scales.vec<double>()(i)),
                  static_cast<int>(attributes_.powers[i])};
    }
    uint8_t* bits = variables[0]->tensor()->flat<uint8_t>().data();
    const T* gradient = values.flat<T>().data();
    if (!attributes_.sparse) {
      ParallelForEntries(ctx, size(), sizeof(T), [&](int64_t begin, int64_t end) {
        SeedRange(bits, slots.data(), count, gradient, begin, end);
      });
      return;
    }

    // Rows may be named more than once. Their gradients add up; Keras adds up their squares as well, and that is what
    // its second moment gets. The larger of the two is taken, because gradients that cancel leave a second moment
    // behind.
    const int64_t width = rows.width;
    struct Sums {
      explicit Sums(int64_t width) : values(width, Acc(0)), squares(width, Acc(0)) {}
      std::vector<Acc> values, squares;
    };
    std::unordered_map<int64_t, Sums> named;
    for (int64_t i = 0; i < indices.dim_size(0); ++i) {
      const int64_t row = indices.vec<int64_t>()(i);
      Sums& sums = named.try_emplace(row, width).first->second;
      for (int64_t j = 0; j < width; ++j) {
        const Acc value = static_cast<Acc>(gradient[i * width + j]);
        sums.values[j] += value;
        sums.squares[j] += value * value;
      }
    }
    for (const auto& [row, sums] : named) {
      for (int64_t j = 0; j < width; ++j) {
        const int64_t entry = row * width + j;
        const uint8_t bit = uint8_t(1) << entry % 8;
        const Acc value = sums.values[j];
        const Acc square = std::max(value * value, sums.squares[j]);
        if ((bits[entry / 8] & bit) && SeedEntry(slots.data(), count, entry, value, square)) bits[entry / 8] &= ~bit;
      }
    }
  }
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
