// XLA kernel of SeedSlots.

#include <algorithm>
#include <vector>

#include "ops/common/op_checks.h"
#include "ops/common/tf_compat.h"
#include "ops/common/xla_compat.h"
#include "ops/common/xla_helpers.h"
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
    xla::XlaBuilder* builder = ctx->builder();
    TensorShape bits_shape, values_shape, indices_shape, scales_shape;
    XlaOp bits;
    OP_REQUIRES_OK(ctx, ctx->ReadVariableInput(0, tensorflow::DT_UINT8, &bits_shape, &bits));
    OP_REQUIRES_OK(ctx, GetShape(ctx, 1, &values_shape));
    OP_REQUIRES_OK(ctx, GetShape(ctx, 2, &indices_shape));
    OP_REQUIRES_OK(ctx, GetShape(ctx, 3, &scales_shape));
    OP_REQUIRES_OK(ctx, attributes_.CheckBits(tensorflow::DT_UINT8, bits_shape));
    OP_REQUIRES_OK(ctx, attributes_.CheckShapes(values_shape, indices_shape, scales_shape));
    const int count = attributes_.count();
    std::vector<XlaOp> slots(count);
    TensorShape shape;
    GradientRows rows = {};
    for (int i = 0; i < count; ++i) {
      TensorShape slot_shape;
      OP_REQUIRES_OK(ctx, ctx->ReadVariableInput(4 + i, dtype_, &slot_shape, &slots[i]));
      OP_REQUIRES_OK(ctx, attributes_.CheckSlot(slot_shape, values_shape, indices_shape, &rows));
      if (i > 0) OP_REQUIRES_OK(ctx, CheckSameShape("slots", slot_shape, "first one", shape));
      shape = slot_shape;
    }
    if (attributes_.size == 0) return;
    xla::PrimitiveType type;
    OP_REQUIRES_OK(ctx, tensorflow::DataTypeToPrimitiveType(dtype_, &type));
    const xla::PrimitiveType wide = dtype_ == tensorflow::DT_DOUBLE ? xla::F64 : xla::F32;
    const xla::PrimitiveType integers = IntegersFor(dtype_);
    if (native_) {
      OP_REQUIRES_OK(ctx, Call(ctx, bits, slots, shape));
      return;
    }
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
    for (int i = 0; i < count; ++i) {
      const XlaOp scale = xla::Reshape(xla::SliceInDim(scales, i, i + 1, 1, 0), {});
      const XlaOp seed = xla::Mul(attributes_.powers[i] == 2 ? square : gradient, scale);
      // The slots of an entry that waits are zero together, unless repeated rows cancelled. So with dense gradients
      // each looks at itself alone: a second slot as an operand makes XLA's loops twice as slow.
      const XlaOp guard = slots[attributes_.sparse ? 0 : i];
      const XlaOp empty = xla::ConvertElementType(xla::Eq(guard, xla::ScalarLike(guard, 0)), integers);
      const XlaOp due = xla::And(unseeded, xla::Sub(xla::Zero(builder, integers), empty));
      const XlaOp chosen = xla::And(due, xla::BitcastConvertType(xla::ConvertElementType(seed, type), integers));
      const XlaOp kept = xla::And(xla::Not(due), xla::BitcastConvertType(slots[i], integers));
      OP_REQUIRES_OK(ctx, ctx->AssignVariable(4 + i, dtype_, xla::BitcastConvertType(xla::Or(chosen, kept), type)));
    }
  }

 private:
  absl::Status Call(XlaOpKernelContext* ctx, XlaOp bits, const std::vector<XlaOp>& slots, const TensorShape& shape) {
    xla::PrimitiveType type;
    TF_RETURN_IF_ERROR(tensorflow::DataTypeToPrimitiveType(dtype_, &type));
    const XlaOp gradient = xla::Reshape(ctx->Input(1), shape.dim_sizes());
    std::vector<XlaOp> operands = {bits, gradient, ctx->Input(3),
                                   xla::ConstantR1<int64_t>(ctx->builder(), attributes_.powers)};
    std::vector<xla::Shape> results = {xla::ShapeUtil::MakeShape(xla::U8, {mask_bytes(attributes_.size)})};
    const xla::ShapeIndex whole({});
    std::vector<std::pair<xla::ShapeIndex, std::pair<int64_t, xla::ShapeIndex>>> in_place = {
        {xla::ShapeIndex({0}), {0, whole}}};
    for (size_t i = 0; i < slots.size(); ++i) {
      in_place.push_back(
          {xla::ShapeIndex({static_cast<int64_t>(i) + 1}), {static_cast<int64_t>(operands.size()), whole}});
      operands.push_back(slots[i]);
      results.push_back(xla::ShapeUtil::MakeShape(type, shape.dim_sizes()));
    }
    const XlaOp seeded = xla::CustomCall(
        ctx->builder(), kSeedCall, operands, xla::ShapeUtil::MakeTupleShape(results), "", /*has_side_effect=*/false,
        in_place, nullptr, xla::CustomCallSchedule::SCHEDULE_NONE, xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
    TF_RETURN_IF_ERROR(ctx->AssignVariable(0, tensorflow::DT_UINT8, xla::GetTupleElement(seeded, 0)));
    for (size_t i = 0; i < slots.size(); ++i) {
      const XlaOp slot = xla::GetTupleElement(seeded, static_cast<int64_t>(i) + 1);
      TF_RETURN_IF_ERROR(ctx->AssignVariable(static_cast<int>(4 + i), dtype_, slot));
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
