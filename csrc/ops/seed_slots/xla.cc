// XLA kernel of SeedSlots.

#include <vector>

#include "ops/common/tf_compat.h"
#include "ops/common/xla_compat.h"
#include "ops/common/xla_helpers.h"
#include "ops/seed_slots/inputs.h"
#include "ops/seed_slots/xla_calls.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace freezeops {
namespace {

using ::tensorflow::DataType;
using ::tensorflow::OpKernelConstruction;
using ::tensorflow::TensorShape;
using ::tensorflow::XlaOpKernel;
using ::tensorflow::XlaOpKernelContext;
using ::xla::XlaOp;

// HLO, fused into the optimizer's loops, which never clears a bit: slots that are not zero count as seeded. On the CPU,
// where the gradient has been written to memory before, a call of the native kernel.
class SeedSlotsXlaOp : public XlaOpKernel {
 public:
  explicit SeedSlotsXlaOp(OpKernelConstruction* ctx) : XlaOpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("T", &dtype_));
    OP_REQUIRES_OK(ctx, GetSeedAttributes(ctx, &attributes_));
    bool materialized = false;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("materialized", &materialized));
    native_ = kHaveXlaCalls && materialized && !attributes_.sparse &&
              ctx->device_type() == tensorflow::DeviceType("XLA_CPU_JIT");
  }

  void Compile(XlaOpKernelContext* ctx) override {
    XlaOp bits;
    std::vector<XlaOp> slots(attributes_.count());
    TensorShape shape;
    GradientRows rows = {};
    OP_REQUIRES_OK(ctx, Read(ctx, &bits, &slots, &shape, &rows));
    if (attributes_.size == 0) return;
    OP_REQUIRES_OK(ctx, native_ ? Call(ctx, bits, slots, shape) : Build(ctx, bits, slots, shape, rows));
  }

 private:
  // Reads and checks the variables. `shape` is that of the slots; `rows` is set where the gradient is slices.
  absl::Status Read(XlaOpKernelContext* ctx, XlaOp* bits, std::vector<XlaOp>* slots, TensorShape* shape,
                    GradientRows* rows) {
    TensorShape bits_shape;
    TF_RETURN_IF_ERROR(ctx->ReadVariableInput(0, tensorflow::DT_UINT8, &bits_shape, bits));
    TF_RETURN_IF_ERROR(attributes_.CheckBits(tensorflow::DT_UINT8, bits_shape));
    TF_RETURN_IF_ERROR(attributes_.CheckInputs(ctx));
    for (int i = 0; i < attributes_.count(); ++i) {
      TensorShape slot_shape;
      TF_RETURN_IF_ERROR(ctx->ReadVariableInput(4 + i, dtype_, &slot_shape, &(*slots)[i]));
      TF_RETURN_IF_ERROR(attributes_.CheckSlot(ctx, slot_shape, rows));
      if (i > 0) TF_RETURN_IF_ERROR(CheckSameShape("slots", slot_shape, "first one", *shape));
      *shape = slot_shape;
    }
    return absl::OkStatus();
  }

  // As HLO.
  absl::Status Build(XlaOpKernelContext* ctx, XlaOp bits, const std::vector<XlaOp>& slots, const TensorShape& shape,
                     const GradientRows& rows) {
    xla::PrimitiveType type;
    TF_RETURN_IF_ERROR(tensorflow::DataTypeToPrimitiveType(dtype_, &type));
    const xla::PrimitiveType wide = dtype_ == tensorflow::DT_DOUBLE ? xla::F64 : xla::F32;
    const xla::PrimitiveType integers = IntegersFor(dtype_);
    XlaOp gradient = xla::ConvertElementType(ctx->Input(1), wide);
    XlaOp square = xla::Mul(gradient, gradient);
    if (attributes_.sparse) {
      gradient = SumOfRows(gradient, ctx->Input(2), rows.count, rows.width);
      square = xla::Max(xla::Mul(gradient, gradient), SumOfRows(square, ctx->Input(2), rows.count, rows.width));
    }
    gradient = xla::Reshape(gradient, shape.dim_sizes());
    square = xla::Reshape(square, shape.dim_sizes());

    const XlaOp unseeded = TrainableBits(bits, MaskLayout{1, attributes_.size, 1}, shape, integers);
    const XlaOp scales = xla::ConvertElementType(ctx->Input(3), wide);
    for (size_t i = 0; i < slots.size(); ++i) {
      const int64_t number = static_cast<int64_t>(i);
      const XlaOp scale = xla::Reshape(xla::SliceInDim(scales, number, number + 1, 1, 0), {});
      const XlaOp seed = xla::Mul(attributes_.powers[i] == 2 ? square : gradient, scale);
      // The slots of an entry that waits are zero together, unless repeated rows cancelled. So with dense gradients
      // each looks at itself alone: a second slot as an operand makes XLA's loops twice as slow.
      const XlaOp guard = slots[attributes_.sparse ? 0 : i];
      const XlaOp due = xla::And(unseeded, AllBits(xla::Eq(guard, xla::ScalarLike(guard, 0)), integers));
      const XlaOp seeded = Choose(due, xla::BitcastConvertType(xla::ConvertElementType(seed, type), integers),
                                  xla::BitcastConvertType(slots[i], integers));
      TF_RETURN_IF_ERROR(ctx->AssignVariable(4 + static_cast<int>(i), dtype_, xla::BitcastConvertType(seeded, type)));
    }
    return absl::OkStatus();
  }

  // By the native kernel.
  absl::Status Call(XlaOpKernelContext* ctx, XlaOp bits, const std::vector<XlaOp>& slots, const TensorShape& shape) {
    xla::PrimitiveType type;
    TF_RETURN_IF_ERROR(tensorflow::DataTypeToPrimitiveType(dtype_, &type));
    std::vector<XlaOp> operands = {bits, xla::Reshape(ctx->Input(1), shape.dim_sizes()), ctx->Input(3),
                                   xla::ConstantR1<int64_t>(ctx->builder(), attributes_.powers)};
    std::vector<CallResult> results = {{xla::ShapeUtil::MakeShape(xla::U8, {mask_bytes(attributes_.size)}), 0}};
    for (const XlaOp& slot : slots) {
      results.push_back({xla::ShapeUtil::MakeShape(type, shape.dim_sizes()), static_cast<int64_t>(operands.size())});
      operands.push_back(slot);
    }
    const std::vector<XlaOp> seeded = CallNative(ctx->builder(), kSeedCall, operands, results);
    TF_RETURN_IF_ERROR(ctx->AssignVariable(0, tensorflow::DT_UINT8, seeded[0]));
    for (size_t i = 0; i < slots.size(); ++i) {
      TF_RETURN_IF_ERROR(ctx->AssignVariable(static_cast<int>(4 + i), dtype_, seeded[i + 1]));
    }
    return absl::OkStatus();
  }

  DataType dtype_;
  SeedAttributes attributes_;
  bool native_ = false;
};

FREEZEOPS_REGISTER_XLA("Freezeops>SeedSlots", SeedSlotsXlaOp);

}  // namespace
}  // namespace freezeops
