// XLA kernel of FusedUpdate. On the CPU it calls the native kernel, which writes variables and slots in place: that is
// faster than the loops that XLA makes of the same arithmetic. Elsewhere it is plain HLO, see hlo.cc.

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
    TF_RETURN_IF_ERROR(a.CheckNumbers(ctx));
    const std::vector<int> sparse = a.NumberIn(a.sparse), masked = a.NumberIn(a.masked), seeded = a.NumberIn(a.seeded);
    for (int i = 0; i < a.count(); ++i) {
      TF_RETURN_IF_ERROR(CheckVariable(ctx, i, sparse[i], masked[i], seeded[i]));
    }
    return absl::OkStatus();
  }

  // `sparse`, `masked`, `seeded`: the variable's numbers in the attributes, or -1.
  absl::Status CheckVariable(XlaOpKernelContext* ctx, int i, int sparse, int masked, int seeded) const {
    const FusedAttributes& a = attributes_;
    const MaskLayout& layout = a.layouts[i];
    tensorflow::DataType dtype, offsets_dtype;
    TensorShape shape, offsets;
    TF_RETURN_IF_ERROR(ctx->GetVariableTypeAndShape(a.variable(i), &dtype, &shape));
    TF_RETURN_IF_ERROR(CheckEntries("variable", shape, layout));
    const TensorShape variable = shape;
    if (masked < 0) {
      TF_RETURN_IF_ERROR(a.CheckUnmasked(i));
    } else {
      TF_RETURN_IF_ERROR(ctx->GetVariableTypeAndShape(a.mask(masked), &dtype, &shape));
      TF_RETURN_IF_ERROR(CheckMask(shape, layout));
    }
    int64_t slot_size = entries(layout);
    if (a.compact) {
      TF_RETURN_IF_ERROR(ctx->GetVariableTypeAndShape(a.offsets(i), &offsets_dtype, &offsets));
      TF_RETURN_IF_ERROR(ctx->GetVariableTypeAndShape(a.indices(i), &dtype, &shape));
      TF_RETURN_IF_ERROR(a.CheckIndex(i, offsets_dtype, offsets, dtype, shape, &slot_size));
    }
    TF_RETURN_IF_ERROR(a.CheckGradient(ctx, i, sparse, variable, slot_size));
    for (int j = 0; j < a.rule->slots; ++j) {
      TF_RETURN_IF_ERROR(ctx->GetVariableTypeAndShape(a.slot(i, j), &dtype, &shape));
      TF_RETURN_IF_ERROR(CheckEntries("slot", shape, MaskLayout{1, slot_size, 1}));
    }
    if (seeded < 0) return absl::OkStatus();
    TF_RETURN_IF_ERROR(ctx->GetVariableTypeAndShape(a.unseeded(seeded), &dtype, &shape));
    return CheckMask(shape, MaskLayout{1, slot_size, 1});
  }

  // Calls the native kernel. All is passed flat, so that there is one way only to lay it out.
  absl::Status Call(XlaOpKernelContext* ctx) {
    const FusedAttributes& a = attributes_;
    operands_ = {xla::ConstantR1<int64_t>(ctx->builder(), Encoded(a)), ctx->Input(a.scalars()), ctx->Input(a.scales())};
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

    std::vector<CallResult> results;
    for (const Written& each : written_) {
      results.push_back({xla::ShapeUtil::MakeShape(each.type, {each.shape.num_elements()}), each.operand});
    }
    const std::vector<XlaOp> updated = CallNative(ctx->builder(), kFusedCall, operands_, results);
    for (size_t i = 0; i < written_.size(); ++i) {
      const Written& each = written_[i];
      TF_RETURN_IF_ERROR(ctx->AssignVariable(each.input, each.dtype, xla::Reshape(updated[i], each.shape.dim_sizes())));
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
    TensorShape shape;
    TF_RETURN_IF_ERROR(GetShape(ctx, input, &shape));
    operands_.push_back(xla::Reshape(ctx->Input(input), {shape.num_elements()}));
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
