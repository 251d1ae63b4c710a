// CPU kernel of SeedSlots.

#include <vector>

#include "kernels/common/dtypes.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/seed_slots.h"
#include "ops/common/cpu_helpers.h"
#include "ops/common/dtypes.h"
#include "ops/seed_slots/op_kernel.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace freezeops {
namespace {

using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;

class SeedSlotsOp : public SeedOp {
 public:
  using SeedOp::SeedOp;

  void Compute(OpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, attributes_.CheckInputs(ctx));
    std::vector<VarPtr> variables;
    OP_REQUIRES_OK(ctx, LookUpAll(ctx, &variables));
    {
      tensorflow::tf_shared_lock lock(*variables[0]->mu());
      OP_REQUIRES_OK(ctx, CheckBits(*variables[0]->tensor()));
      const MaskView waiting = ViewOf(*variables[0]->tensor(), MaskLayout{1, size(), 1});
      // As in every step but those after an unfreezing: no bit is set.
      if (cpu::kernels().count_frozen(waiting, 0, size()) == size()) return;
    }
    LockAll lock(variables);
    GradientRows rows = {};
    OP_REQUIRES_OK(ctx, CheckVariables(ctx, variables, &rows));
    const Tensor& indices = ctx->input(2);
    for (int64_t i = 0; i < indices.dim_size(0) && attributes_.sparse; ++i) {
      const int64_t row = indices.vec<int64_t>()(i);
      OP_REQUIRES(ctx, row >= 0 && row < rows.count,
                  InvalidArgument("indices must be in [0, ", rows.count, "), the rows of the slots. Received: indices[",
                                  i, "] = ", row));
    }
    for (const VarPtr& variable : variables) OP_REQUIRES_OK(ctx, Unshare(ctx, variable->tensor()));
    with_float(FloatOf(dtype_), [&](auto type) {
      constexpr Float kType = decltype(type)::value;
      using Entry = typename EntryOf<kType>::Type;
      using Acc = typename EntryOf<kType>::Acc;
      std::vector<SlotSeed<kType>> slots(count());
      for (int i = 0; i < count(); ++i) {
        slots[i] = {static_cast<Entry*>(variables[i + 1]->tensor()->data()),
                    static_cast<Acc>(ctx->input(3).vec<double>()(i)), static_cast<int>(attributes_.powers[i])};
      }
      uint8_t* const bits = variables[0]->tensor()->flat<uint8_t>().data();
      const Entry* const gradient = static_cast<const Entry*>(ctx->input(1).data());
      if (attributes_.sparse) {
        cpu::SeedRows(bits, slots, gradient, indices.flat<int64_t>().data(), indices.dim_size(0), rows.width);
      } else {
        ParallelForEntries(ctx, size(), sizeof(Entry),
                           [&](int64_t begin, int64_t end) { cpu::SeedRange(bits, slots, gradient, begin, end); });
      }
    });
  }
};

FREEZEOPS_REGISTER_OP("Freezeops>SeedSlots", CPU, SeedSlotsOp);

}  // namespace
}  // namespace freezeops
