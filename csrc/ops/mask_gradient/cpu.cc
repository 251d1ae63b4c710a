// CPU kernels of MaskGradient and MaskSlices.

#include <cstring>

#include "kernels/common/dtypes.h"
#include "kernels/cpu/kernels.h"
#include "ops/common/cpu_helpers.h"
#include "ops/common/op_kernels.h"
#include "ops/mask_gradient/inputs.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace freezeops {
namespace {

using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;

class MaskGradientOp : public LayoutOp {
 public:
  using LayoutOp::LayoutOp;

  void Compute(OpKernelContext* ctx) override {
    const Tensor& gradient = ctx->input(0);
    const Tensor& mask_tensor = ctx->input(1);
    OP_REQUIRES_OK(ctx, CheckMaskGradient(ctx, layout_));
    const int64_t count = entries(layout_);
    const MaskView mask = ViewOf(mask_tensor, layout_);
    if (count == 0 || cpu::all_trainable(mask)) {
      ctx->set_output(0, gradient);
      return;
    }

    const void* source = gradient.data();
    Tensor* masked = nullptr;
    OP_REQUIRES_OK(ctx, ctx->forward_input_or_allocate_output({0}, 0, gradient.shape(), &masked));
    void* destination = masked->data();
    const cpu::KernelTable& kernels = cpu::kernels();
    if (destination == source) {
      const cpu::Residence residence = ResidenceOf(count * width_);
      ParallelForEntries(ctx, count, width_, [&](int64_t begin, int64_t end) {
        kernels.zero_frozen(width_, At(destination, begin, width_), mask, begin, end, residence);
      });
    } else {
      ParallelForEntries(ctx, count, width_, [&](int64_t begin, int64_t end) {
        kernels.copy_and_zero_frozen(width_, At(destination, begin, width_), At(source, begin, width_), mask, begin,
                                     end);
      });
    }
  }
};

class MaskSlicesOp : public LayoutOp {
 public:
  explicit MaskSlicesOp(tensorflow::OpKernelConstruction* ctx) : LayoutOp(ctx) {
    OP_REQUIRES_OK(ctx, GetSlicesAttributes(ctx, &layout_, &rows_));
  }

  void Compute(OpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, CheckMaskSlices(ctx, layout_, rows_));
    with_index(ctx->input(1).dtype() == tensorflow::DT_INT64, [&](auto index) { Mask<decltype(index)>(ctx); });
  }

 private:
  template <typename Index>
  void Mask(OpKernelContext* ctx) const {
    const Tensor& values = ctx->input(0);
    const Tensor& indices = ctx->input(1);
    const Tensor& mask_tensor = ctx->input(2);
    const int64_t row_size = RowSize(values.shape());
    // Indices are checked before anything is written, so that nothing is half done.
    const int64_t slices = indices.dim_size(0);
    const Index* index_of = indices.flat<Index>().data();
    for (int64_t i = 0; i < slices; ++i) {
      OP_REQUIRES(ctx, index_of[i] >= 0 && index_of[i] < rows_,
                  InvalidArgument("indices must be in [0, ", rows_, "), the rows of the variable. Received: indices[",
                                  i, "] = ", index_of[i]));
    }

    if (values.NumElements() == 0) {
      ctx->set_output(0, values);
      return;
    }
    const void* source = values.data();
    Tensor* masked = nullptr;
    OP_REQUIRES_OK(ctx, ctx->forward_input_or_allocate_output({0}, 0, values.shape(), &masked));
    void* destination = masked->data();
    const bool in_place = destination == source;
    const MaskView mask = ViewOf(mask_tensor, layout_);
    const cpu::KernelTable& kernels = cpu::kernels();
    // Where each row lies under one bit, only that bit is looked at.
    const bool bit_per_row = layout_.inner % row_size == 0;
    const int64_t cycles_per_row = 20 + row_size * width_ / 8;
    ParallelFor(ctx, slices, cycles_per_row, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t begin = static_cast<int64_t>(index_of[i]) * row_size;
        char* const to = At(destination, i * row_size, width_);
        const char* const from = At(source, i * row_size, width_);
        if (bit_per_row) {
          if (!bit_is_set(mask.bits, bit_of_entry(layout_, begin))) {
            std::memset(to, 0, row_size * width_);
          } else if (!in_place) {
            std::memcpy(to, from, row_size * width_);
          }
        } else if (in_place) {
          kernels.zero_frozen(width_, to, mask, begin, begin + row_size, cpu::Residence::kCache);
        } else {
          kernels.copy_and_zero_frozen(width_, to, from, mask, begin, begin + row_size);
        }
      }
    });
  }

  int64_t rows_ = 0;
};

FREEZEOPS_REGISTER_OP("Freezeops>MaskGradient", CPU, MaskGradientOp);
FREEZEOPS_REGISTER_OP("Freezeops>MaskSlices", CPU, MaskSlicesOp);

}  // namespace
}  // namespace freezeops
