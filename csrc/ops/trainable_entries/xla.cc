// XLA kernels of GatherTrainable, ReadTrainable, TakeTrainable, ScatterTrainable and RankTrainable.

#include <algorithm>
#include <vector>

#include "ops/common/tf_compat.h"
#include "ops/common/xla_compat.h"
#include "ops/common/xla_helpers.h"
#include "ops/trainable_entries/inputs.h"
#include "ops/trainable_entries/xla_calls.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace freezeops {
namespace {

using ::tensorflow::DataType;
using ::tensorflow::OpKernelConstruction;
using ::tensorflow::TensorShape;
using ::tensorflow::XlaOpKernel;
using ::tensorflow::XlaOpKernelContext;
using ::xla::XlaOp;

// Compact state. On the CPU the native kernels are called; elsewhere entries are found by their indices. An index that
// is out of range stands for none: what is gathered there is zero, and nothing is scattered.
class CompactXlaOp : public XlaOpKernel {
 public:
  explicit CompactXlaOp(OpKernelConstruction* ctx) : XlaOpKernel(ctx) {
    OP_REQUIRES_OK(ctx, GetLayout(ctx, &layout_));
    OP_REQUIRES_OK(ctx, CheckDoesNotRepeat(layout_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("T", &dtype_));
    native_ = kHaveXlaCalls && ctx->device_type() == tensorflow::DeviceType("XLA_CPU_JIT");
  }

 protected:
  // Inputs `first` and on are the mask, its offsets and the indices.
  absl::Status CheckTrainable(XlaOpKernelContext* ctx, int first) {
    TensorShape indices;
    TF_RETURN_IF_ERROR(freezeops::CheckTrainable(ctx, first, layout_, &size_));
    TF_RETURN_IF_ERROR(GetShape(ctx, first + 2, &indices));
    capacity_ = indices.dim_size(0);
    return absl::OkStatus();
  }

  std::vector<int64_t> Dims(int64_t count) const { return DimsOf(count, layout_.inner); }

  // Sets one output for each source. Inputs `first` and on are as for CheckTrainable, which was called.
  absl::Status Gather(XlaOpKernelContext* ctx, const std::vector<XlaOp>& sources, int first) {
    xla::PrimitiveType type;
    TF_RETURN_IF_ERROR(tensorflow::DataTypeToPrimitiveType(dtype_, &type));
    const bool empty = size_ == 0 || layout_.kept == 0;
    std::vector<XlaOp> compact;
    if (native_ && !empty) {
      const CallResult result{xla::ShapeUtil::MakeShape(type, Dims(capacity_))};
      std::vector<XlaOp> operands = {ctx->Input(first), ctx->Input(first + 1), ctx->Input(first + 2)};
      for (const XlaOp& source : sources) operands.push_back(xla::Reshape(source, Dims(layout_.kept)));
      const char* const call = sources.size() == 2 ? kGatherTwoCall : kGatherCall;
      compact = CallNative(ctx->builder(), call, operands, std::vector<CallResult>(sources.size(), result));
    }
    for (size_t i = 0; i < sources.size(); ++i) {
      if (empty) {
        compact.push_back(xla::Broadcast(xla::Zero(ctx->builder(), type), {size_}));
      } else if (!native_) {
        compact.push_back(GatherOne(sources[i], ctx->Input(first + 2), type));
      }
      ctx->SetOutput(static_cast<int>(i), xla::Reshape(compact[i], {size_}));
    }
    return absl::OkStatus();
  }

  XlaOp GatherOne(XlaOp source, XlaOp indices, xla::PrimitiveType type) const {
    const xla::PrimitiveType integers = IntegersFor(dtype_);
    const XlaOp gathered = GatherRows(xla::BitcastConvertType(source, integers), indices, layout_);
    const XlaOp valid = AllBits(xla::Lt(indices, xla::ScalarLike(indices, layout_.kept)), integers);
    return xla::BitcastConvertType(xla::And(xla::BroadcastInDim(valid, Dims(capacity_), {0}), gathered), type);
  }

  MaskLayout layout_;
  DataType dtype_;
  int64_t capacity_ = 0;
  int64_t size_ = 0;     // of what is compact
  bool native_ = false;  // by a call of the native kernels
};

class GatherTrainableXlaOp : public CompactXlaOp {
 public:
  using CompactXlaOp::CompactXlaOp;

  void Compile(XlaOpKernelContext* ctx) override {
    TensorShape shape;
    OP_REQUIRES_OK(ctx, GetShape(ctx, 0, &shape));
    OP_REQUIRES_OK(ctx, CheckEntries("source", shape, layout_));
    OP_REQUIRES_OK(ctx, CheckTrainable(ctx, 1));
    OP_REQUIRES_OK(ctx, Gather(ctx, {ctx->Input(0)}, 1));
  }
};

class ReadTrainableXlaOp : public CompactXlaOp {
 public:
  using CompactXlaOp::CompactXlaOp;

  void Compile(XlaOpKernelContext* ctx) override {
    TensorShape shape;
    XlaOp value;
    OP_REQUIRES_OK(ctx, CheckTrainable(ctx, 1));
    OP_REQUIRES_OK(ctx, ctx->ReadVariableInput(0, dtype_, &shape, &value));
    OP_REQUIRES_OK(ctx, CheckEntries("variable", shape, layout_));
    OP_REQUIRES_OK(ctx, Gather(ctx, {value}, 1));
  }
};

class TakeTrainableXlaOp : public CompactXlaOp {
 public:
  using CompactXlaOp::CompactXlaOp;

  void Compile(XlaOpKernelContext* ctx) override {
    TensorShape shape, gradient_shape;
    XlaOp value;
    OP_REQUIRES_OK(ctx, CheckTrainable(ctx, 2));
    OP_REQUIRES_OK(ctx, ctx->ReadVariableInput(0, dtype_, &shape, &value));
    OP_REQUIRES_OK(ctx, CheckEntries("variable", shape, layout_));
    OP_REQUIRES_OK(ctx, GetShape(ctx, 1, &gradient_shape));
    OP_REQUIRES_OK(ctx, CheckSameShape("gradient", gradient_shape, "variable", shape));
    OP_REQUIRES_OK(ctx, Gather(ctx, {ctx->Input(1), value}, 2));
  }
};

class ScatterTrainableXlaOp : public CompactXlaOp {
 public:
  using CompactXlaOp::CompactXlaOp;

  void Compile(XlaOpKernelContext* ctx) override {
    TensorShape shape, compact_shape;
    XlaOp value;
    OP_REQUIRES_OK(ctx, CheckTrainable(ctx, 2));
    OP_REQUIRES_OK(ctx, ctx->ReadVariableInput(0, dtype_, &shape, &value));
    OP_REQUIRES_OK(ctx, CheckEntries("variable", shape, layout_));
    OP_REQUIRES_OK(ctx, GetShape(ctx, 1, &compact_shape));
    OP_REQUIRES_OK(ctx, CheckCompact(compact_shape, size_));
    if (size_ == 0 || entries(layout_) == 0) return;
    xla::PrimitiveType type;
    OP_REQUIRES_OK(ctx, tensorflow::DataTypeToPrimitiveType(dtype_, &type));
    XlaOp written;
    if (native_) {
      const CallResult in_place{xla::ShapeUtil::MakeShape(type, Dims(layout_.kept)), 0};
      written = CallNative(ctx->builder(), kScatterCall,
                           {xla::Reshape(value, Dims(layout_.kept)), ctx->Input(2), ctx->Input(3), ctx->Input(4),
                            xla::Reshape(ctx->Input(1), Dims(capacity_))},
                           {in_place})[0];
    } else {
      written = ScatterRows(value, ctx->Input(4), ctx->Input(1), layout_, capacity_, dtype_, type);
    }
    OP_REQUIRES_OK(ctx, ctx->AssignVariable(0, dtype_, xla::Reshape(written, shape.dim_sizes())));
  }
};

// A binary search in the indices. A bit that is out of range cannot be reported from here: its rank is the capacity,
// where XLA scatters nothing, so that what takes the rank drops it.
class RankTrainableXlaOp : public XlaOpKernel {
 public:
  explicit RankTrainableXlaOp(OpKernelConstruction* ctx) : XlaOpKernel(ctx) {
    OP_REQUIRES_OK(ctx, GetKept(ctx, &kept_));
  }

  void Compile(XlaOpKernelContext* ctx) override {
    int64_t capacity = 0;
    OP_REQUIRES_OK(ctx, CheckTrainable(ctx, 1, MaskLayout{1, kept_, 1}, &capacity));
    TensorShape bits_shape;
    OP_REQUIRES_OK(ctx, GetShape(ctx, 0, &bits_shape));
    const int64_t count = bits_shape.num_elements();
    const XlaOp indices = ctx->Input(3);
    const xla::PrimitiveType integer = ctx->input_xla_type(3);
    const auto constant = [&](int64_t value) { return xla::ConstantR0WithType(ctx->builder(), integer, value); };
    xla::GatherDimensionNumbers numbers;
    numbers.add_collapsed_slice_dims(0);
    numbers.add_start_index_map(0);
    numbers.set_index_vector_dim(1);
    const XlaOp given = xla::Reshape(ctx->Input(0), {count});
    const XlaOp bits = xla::ConvertElementType(given, integer);
    XlaOp rank = xla::Broadcast(constant(0), {count});
    int64_t step = 1;
    while (step * 2 <= capacity) step *= 2;
    for (; step > 0 && capacity > 0; step /= 2) {
      const XlaOp next = xla::Add(rank, constant(step));
      const XlaOp before = xla::Lt(xla::Gather(indices, xla::Sub(next, constant(1)), numbers, {1}), bits);
      rank = xla::Select(xla::And(xla::Le(next, constant(capacity)), before), next, rank);
    }
    rank = xla::Clamp(constant(0), rank, constant(std::max<int64_t>(capacity - 1, 0)));
    const XlaOp in_range =
        xla::And(xla::Ge(given, xla::ScalarLike(given, 0)), xla::Lt(given, xla::ScalarLike(given, kept_)));
    const XlaOp none = xla::Broadcast(xla::ScalarLike(given, capacity), {count});
    const XlaOp ranks = xla::Select(in_range, xla::ConvertElementType(rank, xla::S64), none);
    ctx->SetOutput(0, xla::Reshape(ranks, bits_shape.dim_sizes()));
  }

 private:
  int64_t kept_ = 0;
};

FREEZEOPS_REGISTER_XLA("Freezeops>GatherTrainable", GatherTrainableXlaOp);
FREEZEOPS_REGISTER_XLA("Freezeops>ReadTrainable", ReadTrainableXlaOp);
FREEZEOPS_REGISTER_XLA("Freezeops>TakeTrainable", TakeTrainableXlaOp);
FREEZEOPS_REGISTER_XLA("Freezeops>ScatterTrainable", ScatterTrainableXlaOp);
FREEZEOPS_REGISTER_XLA("Freezeops>RankTrainable", RankTrainableXlaOp);

}  // namespace
}  // namespace freezeops
