// XLA kernel of FusedUpdate. On the CPU a call of the native kernel, which writes variables and slots in place: it is
// faster than the loops that XLA makes of the same arithmetic. Elsewhere plain HLO, see hlo.cc.

#include <cstdlib>
#include <vector>

#include "ops/common/xla_compat.h"
#include "ops/common/xla_helpers.h"
#include "ops/fused_update/attributes.h"
#include "ops/fused_update/hlo.h"
#include "ops/fused_update/xla_calls.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace freezeops {
namespace {

using ::tensorflow::TensorShape;
using ::tensorflow::XlaOpKernelContext;
using ::xla::XlaOp;

class FusedUpdateXlaOp : public tensorflow::XlaOpKernel {
 public:
  explicit FusedUpdateXlaOp(tensorflow::OpKernelConstruction* ctx) : XlaOpKernel(ctx) {
    OP_REQUIRES_OK(ctx, GetFusedAttributes(ctx, &attributes_));
    // For tests, which have no other device to run the HLO on.
    const bool hlo_only = std::getenv("FREEZEOPS_FUSED_HLO") != nullptr;
    native_ = kHaveXlaCalls && !hlo_only && ctx->device_type() == tensorflow::DeviceType("XLA_CPU_JIT");
  }

  void Compile(XlaOpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, Check(ctx));
    OP_REQUIRES_OK(ctx, native_ ? Call(ctx) : BuildFusedUpdate(ctx, attributes_));
  }

 private:
  absl::Status Check(XlaOpKernelContext* ctx) const {
    const FusedAttributes& a = attributes_;
    TensorShape scalars, scales;
    TF_RETURN_IF_ERROR(GetShape(ctx, a.scalars(), &scalars));
    TF_RETURN_IF_ERROR(GetShape(ctx, a.scales(), &scales));
    TF_RETURN_IF_ERROR(a.CheckNumbers(scalars, scales));
    const std::vector<int> sparse = a.NumberIn(a.sparse), masked = a.NumberIn(a.masked), seeded = a.NumberIn(a.seeded);
    tensorflow::DataType dtype, offsets_dtype;
    for (int i = 0; i < a.count(); ++i) {
      TensorShape variable, gradient, named;
      GradientRows rows;
      TF_RETURN_IF_ERROR(ctx->GetVariableTypeAndShape(a.variable(i), &dtype, &variable));
      TF_RETURN_IF_ERROR(GetShape(ctx, a.gradient(i), &gradient));
      if (sparse[i] >= 0) TF_RETURN_IF_ERROR(GetShape(ctx, a.rows(sparse[i]), &named));
      TF_RETURN_IF_ERROR(CheckEntries("variable", variable, a.layouts[i]));
      TF_RETURN_IF_ERROR(a.CheckGradient(variable, gradient, sparse[i] < 0 ? nullptr : &named, &rows));
      int64_t slot_size = entries(a.layouts[i]);
      if (masked[i] < 0) {
        TF_RETURN_IF_ERROR(a.CheckUnmasked(i));
      } else {
        TensorShape mask;
        TF_RETURN_IF_ERROR(ctx->GetVariableTypeAndShape(a.mask(masked[i]), &dtype, &mask));
        TF_RETURN_IF_ERROR(CheckMask(mask, a.layouts[i]));
      }
      if (a.compact) {
        TensorShape offsets, indices;
        TF_RETURN_IF_ERROR(ctx->GetVariableTypeAndShape(a.offsets(i), &offsets_dtype, &offsets));
        TF_RETURN_IF_ERROR(ctx->GetVariableTypeAndShape(a.indices(i), &dtype, &indices));
        TF_RETURN_IF_ERROR(a.CheckIndex(i, offsets_dtype, offsets, dtype, indices, &slot_size));
      }
      for (int j = 0; j < a.rule->slots; ++j) {
        TensorShape slot;
        TF_RETURN_IF_ERROR(ctx->GetVariableTypeAndShape(a.slot(i, j), &dtype, &slot));
        TF_RETURN_IF_ERROR(CheckEntries("slot", slot, MaskLayout{1, slot_size, 1}));
      }
      if (seeded[i] >= 0) {
        TensorShape unseeded;
        TF_RETURN_IF_ERROR(ctx->GetVariableTypeAndShape(a.unseeded(seeded[i]), &dtype, &unseeded));
        TF_RETURN_IF_ERROR(CheckMask(unseeded, MaskLayout{1, slot_size, 1}));
      }
    }
    return absl::OkStatus();
  }

  // All is passed flat, so that there is one way only to lay it out.
  absl::Status Call(XlaOpKernelContext* ctx) {
    const FusedAttributes& a = attributes_;
    operands_ = {xla::ConstantR1<int64_t>(ctx->builder(), a.Encoded()), ctx->Input(a.scalars()),
                 ctx->Input(a.scales())};
    written_.clear();
    for (int i = 0; i < a.count(); ++i) {
      TF_RETURN_IF_ERROR(AddVariable(ctx, a.variable(i), a.dtype, true));
    }
    for (int i = 0; i < a.count(); ++i) TF_RETURN_IF_ERROR(AddInput(ctx, a.gradient(i)));
    for (int i = 0; i < FusedAttributes::Size(a.sparse); ++i) TF_RETURN_IF_ERROR(AddInput(ctx, a.rows(i)));
    for (int i = a.slot(0, 0); i < a.mask(0); ++i) TF_RETURN_IF_ERROR(AddVariable(ctx, i, a.dtype, true));
    for (int i = a.mask(0); i < a.offsets(0); ++i) {
      TF_RETURN_IF_ERROR(AddVariable(ctx, i, tensorflow::DT_UINT8, false));
    }
    for (int i = a.offsets(0); i < a.indices(0); ++i) {
      TF_RETURN_IF_ERROR(AddVariable(ctx, i, tensorflow::DT_INT64, false));
    }
    for (int i = a.indices(0); i < a.unseeded(0); ++i) {
      tensorflow::DataType dtype;
      TensorShape shape;
      TF_RETURN_IF_ERROR(ctx->GetVariableTypeAndShape(i, &dtype, &shape));
      TF_RETURN_IF_ERROR(AddVariable(ctx, i, dtype, false));
    }
    for (int i = a.unseeded(0); i < a.scalars(); ++i) {
      TF_RETURN_IF_ERROR(AddVariable(ctx, i, tensorflow::DT_UINT8, true));
    }

    std::vector<xla::Shape> results;
    std::vector<std::pair<xla::ShapeIndex, std::pair<int64_t, xla::ShapeIndex>>> in_place;
    const xla::ShapeIndex whole({});
    for (const Written& each : written_) {
      in_place.push_back({xla::ShapeIndex({static_cast<int64_t>(results.size())}), {each.operand, whole}});
      results.push_back(xla::ShapeUtil::MakeShape(each.type, {each.shape.num_elements()}));
    }
    const XlaOp updated = xla::CustomCall(
        ctx->builder(), kFusedCall, operands_, xla::ShapeUtil::MakeTupleShape(results), "", /*has_side_effect=*/false,
        in_place, nullptr, xla::CustomCallSchedule::SCHEDULE_NONE, xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
    for (size_t i = 0; i < written_.size(); ++i) {
      const Written& each = written_[i];
      const XlaOp value = xla::GetTupleElement(updated, static_cast<int64_t>(i));
      TF_RETURN_IF_ERROR(ctx->AssignVariable(each.input, each.dtype, xla::Reshape(value, each.shape.dim_sizes())));
    }
    return absl::OkStatus();
  }

  struct Written {
    int input;
    int64_t operand;
    tensorflow::DataType dtype;
    xla::PrimitiveType type;
    TensorShape shape;
  };

  absl::Status AddInput(XlaOpKernelContext* ctx, int input) {
    TF_ASSIGN_OR_RETURN(const xla::Shape shape, ctx->InputXlaShape(input));
    operands_.push_back(xla::Reshape(ctx->Input(input), {xla::ShapeUtil::ElementsIn(shape)}));
    return absl::OkStatus();
  }

  absl::Status AddVariable(XlaOpKernelContext* ctx, int input, tensorflow::DataType dtype, bool written) {
    TensorShape shape;
    XlaOp value;
    TF_RETURN_IF_ERROR(ctx->ReadVariableInput(input, dtype, &shape, &value));
    if (written) {
      xla::PrimitiveType type;
      TF_RETURN_IF_ERROR(tensorflow::DataTypeToPrimitiveType(dtype, &type));
      written_.push_back({input, static_cast<int64_t>(operands_.size()), dtype, type, shape});
    }
    operands_.push_back(xla::Reshape(value, {shape.num_elements()}));
    return absl::OkStatus();
  }

  FusedAttributes attributes_;
  bool native_ = false;  // by a call of the native kernel
  std::vector<XlaOp> operands_;
  std::vector<Written> written_;
};

FREEZEOPS_REGISTER_XLA("Freezeops>FusedUpdate", FusedUpdateXlaOp);

}  // namespace
}  // namespace freezeops
