// XLA kernels of MaskGradient and MaskSlices.

#include "ops/common/tf_compat.h"
#include "ops/common/xla_compat.h"
#include "ops/common/xla_helpers.h"
#include "ops/mask_gradient/inputs.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace freezeops {
namespace {

using ::tensorflow::OpKernelConstruction;
using ::tensorflow::TensorShape;
using ::tensorflow::XlaOpKernel;
using ::tensorflow::XlaOpKernelContext;
using ::xla::XlaOp;

class MaskGradientXlaOp : public XlaOpKernel {
 public:
  explicit MaskGradientXlaOp(OpKernelConstruction* ctx) : XlaOpKernel(ctx) {
    OP_REQUIRES_OK(ctx, GetLayout(ctx, &layout_));
  }

  void Compile(XlaOpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, CheckMaskGradient(ctx, layout_));
    TensorShape shape;
    OP_REQUIRES_OK(ctx, GetShape(ctx, 0, &shape));
    if (shape.num_elements() == 0) {
      ctx->SetOutput(0, ctx->Input(0));
      return;
    }
    const xla::PrimitiveType integers = IntegersFor(ctx->input_type(0));
    const XlaOp masked = xla::And(TrainableBits(ctx->Input(1), layout_, shape, integers),
                                  xla::BitcastConvertType(ctx->Input(0), integers));
    ctx->SetOutput(0, xla::BitcastConvertType(masked, ctx->input_xla_type(0)));
  }

 private:
  MaskLayout layout_;
};

class MaskSlicesXlaOp : public XlaOpKernel {
 public:
  explicit MaskSlicesXlaOp(OpKernelConstruction* ctx) : XlaOpKernel(ctx) {
    OP_REQUIRES_OK(ctx, GetSlicesAttributes(ctx, &layout_, &rows_));
  }

  void Compile(XlaOpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, CheckMaskSlices(ctx, layout_, rows_));
    TensorShape values_shape;
    OP_REQUIRES_OK(ctx, GetShape(ctx, 0, &values_shape));
    const int64_t row_size = RowSize(values_shape);
    if (values_shape.num_elements() == 0 || entries(layout_) == 0) {
      ctx->SetOutput(0, ctx->Input(0));
      return;
    }

    xla::XlaBuilder* builder = ctx->builder();
    const int64_t slices = values_shape.dim_size(0);
    const bool bit_per_row = layout_.inner % row_size == 0;
    const int64_t columns = bit_per_row ? 1 : row_size;
    const xla::PrimitiveType integer = entries(layout_) < (int64_t{1} << 31) ? xla::S32 : xla::S64;
    const auto constant = [&](int64_t value) { return xla::ConstantR0WithType(builder, integer, value); };

    // The entry, then the bit, of each value (of each row where a row lies under one bit). An index that is out of
    // range cannot be reported from here; it is clamped, and what takes the slices drops it.
    XlaOp bit = xla::Clamp(constant(0), xla::ConvertElementType(ctx->Input(1), integer), constant(rows_ - 1));
    bit = xla::BroadcastInDim(xla::Mul(bit, constant(row_size)), {slices, columns}, {0});
    if (columns > 1) bit = xla::Add(bit, xla::Iota(builder, xla::ShapeUtil::MakeShape(integer, {slices, columns}), 1));
    if (layout_.inner > 1) bit = xla::Div(bit, constant(layout_.inner));
    if (layout_.outer > 1) bit = xla::Rem(bit, constant(layout_.kept));

    xla::GatherDimensionNumbers numbers;
    numbers.add_collapsed_slice_dims(0);
    numbers.add_start_index_map(0);
    numbers.set_index_vector_dim(2);
    const XlaOp bytes = xla::Gather(ctx->Input(2), xla::ShiftRightLogical(bit, constant(3)), numbers, {1});
    const XlaOp shifts = xla::ConvertElementType(xla::And(bit, constant(7)), xla::U8);
    const XlaOp bits = xla::And(xla::ShiftRightLogical(bytes, shifts), xla::ConstantR0<uint8_t>(builder, 1));
    const XlaOp trainable = xla::Ne(bits, xla::ConstantR0<uint8_t>(builder, 0));

    const xla::PrimitiveType integers = IntegersFor(ctx->input_type(0));
    const XlaOp values = xla::Reshape(xla::BitcastConvertType(ctx->Input(0), integers), {slices, row_size});
    const XlaOp zeros = xla::Broadcast(xla::Zero(builder, integers), {slices, row_size});
    const XlaOp passes =
        bit_per_row ? xla::BroadcastInDim(xla::Reshape(trainable, {slices}), {slices, row_size}, {0}) : trainable;
    const XlaOp masked = xla::Select(passes, values, zeros);
    ctx->SetOutput(0, xla::BitcastConvertType(xla::Reshape(masked, values_shape.dim_sizes()), ctx->input_xla_type(0)));
  }

 private:
  MaskLayout layout_;
  int64_t rows_ = 0;
};

FREEZEOPS_REGISTER_XLA("Freezeops>MaskGradient", MaskGradientXlaOp);
FREEZEOPS_REGISTER_XLA("Freezeops>MaskSlices", MaskSlicesXlaOp);

}  // namespace
}  // namespace freezeops
