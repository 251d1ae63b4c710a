// XLA kernels of RememberFrozen and RestoreFrozen.

#include "ops/common/tf_compat.h"
#include "ops/common/xla_compat.h"
#include "ops/common/xla_helpers.h"
#include "ops/frozen_entries/inputs.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace freezeops {
namespace {

using ::tensorflow::DataType;
using ::tensorflow::OpKernelConstruction;
using ::tensorflow::TensorShape;
using ::tensorflow::XlaOpKernel;
using ::tensorflow::XlaOpKernelContext;
using ::xla::XlaOp;

class RememberFrozenXlaOp : public XlaOpKernel {
 public:
  explicit RememberFrozenXlaOp(OpKernelConstruction* ctx) : XlaOpKernel(ctx) {
    OP_REQUIRES_OK(ctx, GetLayout(ctx, &layout_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("T", &dtype_));
  }

  // Shapes are static here, so the snapshot is always the whole value.
  void Compile(XlaOpKernelContext* ctx) override {
    TensorShape shape;
    XlaOp value;
    OP_REQUIRES_OK(ctx, CheckFrozenMask(ctx, layout_));
    OP_REQUIRES_OK(ctx, ctx->ReadVariableInput(0, dtype_, &shape, &value));
    OP_REQUIRES_OK(ctx, CheckEntries("variable", shape, layout_));
    ctx->SetOutput(0, xla::Reshape(value, {shape.num_elements()}));
  }

 private:
  MaskLayout layout_;
  DataType dtype_;
};

class RestoreFrozenXlaOp : public XlaOpKernel {
 public:
  explicit RestoreFrozenXlaOp(OpKernelConstruction* ctx) : XlaOpKernel(ctx) {
    OP_REQUIRES_OK(ctx, GetLayout(ctx, &layout_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("T", &dtype_));
  }

  void Compile(XlaOpKernelContext* ctx) override {
    TensorShape shape;
    XlaOp value;
    OP_REQUIRES_OK(ctx, CheckFrozenMask(ctx, layout_));
    OP_REQUIRES_OK(ctx, ctx->ReadVariableInput(0, dtype_, &shape, &value));
    OP_REQUIRES_OK(ctx, CheckEntries("variable", shape, layout_));
    OP_REQUIRES_OK(
        ctx,
        CheckWholeSnapshot(ctx, layout_, "in a function that XLA compiles: remember and restore in the same function"));
    if (entries(layout_) == 0) return;
    const xla::PrimitiveType integers = IntegersFor(dtype_);
    const XlaOp trainable = TrainableBits(ctx->Input(1), layout_, shape, integers);
    const XlaOp old = xla::BitcastConvertType(xla::Reshape(ctx->Input(2), shape.dim_sizes()), integers);
    const XlaOp restored = Choose(trainable, xla::BitcastConvertType(value, integers), old);
    xla::PrimitiveType type;
    OP_REQUIRES_OK(ctx, tensorflow::DataTypeToPrimitiveType(dtype_, &type));
    OP_REQUIRES_OK(ctx, ctx->AssignVariable(0, dtype_, xla::BitcastConvertType(restored, type)));
  }

 private:
  MaskLayout layout_;
  DataType dtype_;
};

FREEZEOPS_REGISTER_XLA("Freezeops>RememberFrozen", RememberFrozenXlaOp);
FREEZEOPS_REGISTER_XLA("Freezeops>RestoreFrozen", RestoreFrozenXlaOp);

}  // namespace
}  // namespace freezeops
