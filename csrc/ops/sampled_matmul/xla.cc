// XLA kernel of SampledMatmul.

#include <vector>

#include "kernels/cpu/sampled_matmul.h"
#include "ops/common/tf_compat.h"
#include "ops/common/xla_compat.h"
#include "ops/common/xla_helpers.h"
#include "ops/sampled_matmul/inputs.h"
#include "ops/sampled_matmul/xla_calls.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace freezeops {
namespace {

using ::tensorflow::OpKernelConstruction;
using ::tensorflow::XlaOpKernel;
using ::tensorflow::XlaOpKernelContext;
using ::xla::XlaOp;

// On the CPU a call of the native kernel; elsewhere the whole product, of which entries are found by their indices.
class SampledMatmulXlaOp : public XlaOpKernel {
 public:
  explicit SampledMatmulXlaOp(OpKernelConstruction* ctx) : XlaOpKernel(ctx) {
    native_ = kHaveXlaCalls && ctx->device_type() == tensorflow::DeviceType("XLA_CPU_JIT");
  }

  void Compile(XlaOpKernelContext* ctx) override {
    SampledSizes sizes;
    OP_REQUIRES_OK(ctx, CheckSampled(ctx, &sizes));
    const xla::PrimitiveType type = ctx->input_xla_type(0);
    const MaskLayout layout{1, sizes.rows * sizes.columns, 1};
    if (sizes.capacity == 0 || layout.kept == 0) {
      ctx->SetOutput(0, xla::Broadcast(xla::Zero(ctx->builder(), type), {sizes.capacity}));
    } else if (native_) {
      const int64_t scratch = cpu::MostScratch(sizes.tokens, sizes.rows, sizes.columns, sizes.capacity);
      const std::vector<CallResult> results = {{xla::ShapeUtil::MakeShape(type, {sizes.capacity})},
                                               {xla::ShapeUtil::MakeShape(xla::F32, {scratch})}};
      ctx->SetOutput(
          0, CallNative(ctx->builder(), kSampledMatmulCall, {ctx->Input(0), ctx->Input(1), ctx->Input(2)}, results)[0]);
    } else {
      ctx->SetOutput(0, xla::ConvertElementType(GatherProduct(ctx, layout), type));
    }
  }

 private:
  static XlaOp GatherProduct(XlaOpKernelContext* ctx, const MaskLayout& layout) {
    xla::DotDimensionNumbers over_tokens;
    over_tokens.add_lhs_contracting_dimensions(0);
    over_tokens.add_rhs_contracting_dimensions(0);
    const XlaOp x = xla::ConvertElementType(ctx->Input(0), xla::F32);
    const XlaOp dy = xla::ConvertElementType(ctx->Input(1), xla::F32);
    const XlaOp indices = ctx->Input(3);
    const XlaOp gathered = GatherRows(xla::DotGeneral(x, dy, over_tokens), indices, layout);
    const XlaOp valid = xla::And(xla::Ge(indices, xla::ScalarLike(indices, 0)),
                                 xla::Lt(indices, xla::ScalarLike(indices, layout.kept)));
    return xla::Select(valid, gathered, xla::ZerosLike(gathered));
  }

  bool native_ = false;  // by a call of the native kernel
};

FREEZEOPS_REGISTER_XLA("Freezeops>SampledMatmul", SampledMatmulXlaOp);

}  // namespace
}  // namespace freezeops
