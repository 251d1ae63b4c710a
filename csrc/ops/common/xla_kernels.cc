// XLA kernels of all ops but FusedUpdate: plain HLO, which XLA fuses into whatever makes or takes the values, and calls
// of native kernels where these are faster (xla_cpu_calls.cc).
//
// Registered for the JIT devices directly: the registration macro of XLA's own kernels takes effect only if the library
// is loaded before XLA is used for the first time.

#include <algorithm>
#include <vector>

#include "ops/common/op_checks.h"
#include "ops/common/tf_compat.h"
#include "ops/common/xla_compat.h"
#include "ops/common/xla_cpu_calls.h"
#include "ops/common/xla_helpers.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace freezeops {
namespace {

using ::tensorflow::DataType;
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
    TensorShape shape, mask_shape;
    OP_REQUIRES_OK(ctx, GetShape(ctx, 0, &shape));
    OP_REQUIRES_OK(ctx, GetShape(ctx, 1, &mask_shape));
    OP_REQUIRES_OK(ctx, CheckMask(mask_shape, layout_));
    OP_REQUIRES_OK(ctx, CheckEntries("gradient", shape, layout_));
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
    OP_REQUIRES_OK(ctx, GetLayout(ctx, &layout_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("rows", &rows_));
  }

  void Compile(XlaOpKernelContext* ctx) override {
    TensorShape values_shape, indices_shape, mask_shape;
    OP_REQUIRES_OK(ctx, GetShape(ctx, 0, &values_shape));
    OP_REQUIRES_OK(ctx, GetShape(ctx, 1, &indices_shape));
    OP_REQUIRES_OK(ctx, GetShape(ctx, 2, &mask_shape));
    OP_REQUIRES_OK(ctx, CheckMask(mask_shape, layout_));
    OP_REQUIRES_OK(ctx, CheckSlices(values_shape, indices_shape, rows_, layout_));
    const int64_t row_size = RowSize(values_shape);
    if (values_shape.num_elements() == 0 || entries(layout_) == 0) {
      ctx->SetOutput(0, ctx->Input(0));
      return;
    }

    xla::XlaBuilder* builder = ctx->builder();
    const int64_t slices = indices_shape.dim_size(0);
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

class RememberFrozenXlaOp : public XlaOpKernel {
 public:
  explicit RememberFrozenXlaOp(OpKernelConstruction* ctx) : XlaOpKernel(ctx) {
    OP_REQUIRES_OK(ctx, GetLayout(ctx, &layout_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("T", &dtype_));
  }

  // Shapes are static here, so the snapshot is always the whole value.
  void Compile(XlaOpKernelContext* ctx) override {
    TensorShape shape, mask_shape;
    XlaOp value;
    OP_REQUIRES_OK(ctx, GetShape(ctx, 1, &mask_shape));
    OP_REQUIRES_OK(ctx, CheckMask(mask_shape, layout_));
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
    TensorShape shape, mask_shape;
    XlaOp value;
    OP_REQUIRES_OK(ctx, GetShape(ctx, 1, &mask_shape));
    OP_REQUIRES_OK(ctx, CheckMask(mask_shape, layout_));
    OP_REQUIRES_OK(ctx, ctx->ReadVariableInput(0, dtype_, &shape, &value));
    OP_REQUIRES_OK(ctx, CheckEntries("variable", shape, layout_));
    TensorShape snapshot_shape;
    OP_REQUIRES_OK(ctx, GetShape(ctx, 2, &snapshot_shape));
    OP_REQUIRES(ctx, snapshot_shape.dims() == 1 && snapshot_shape.num_elements() == entries(layout_),
                InvalidArgument("snapshot must be a vector of all ", entries(layout_), " entries of layout ",
                                LayoutString(layout_),
                                " in a function that XLA compiles: remember and restore in the same function. "
                                "Received: snapshot of shape ",
                                snapshot_shape.DebugString()));
    if (entries(layout_) == 0) return;
    const xla::PrimitiveType integers = IntegersFor(dtype_);
    const XlaOp trainable = TrainableBits(ctx->Input(1), layout_, shape, integers);
    const XlaOp old = xla::BitcastConvertType(xla::Reshape(ctx->Input(2), shape.dim_sizes()), integers);
    const XlaOp restored =
        xla::Or(xla::And(trainable, xla::BitcastConvertType(value, integers)), xla::And(xla::Not(trainable), old));
    xla::PrimitiveType type;
    OP_REQUIRES_OK(ctx, tensorflow::DataTypeToPrimitiveType(dtype_, &type));
    OP_REQUIRES_OK(ctx, ctx->AssignVariable(0, dtype_, xla::BitcastConvertType(restored, type)));
  }

 private:
  MaskLayout layout_;
  DataType dtype_;
};

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
    TensorShape mask_shape, offsets_shape, indices_shape;
    TF_RETURN_IF_ERROR(GetShape(ctx, first, &mask_shape));
    TF_RETURN_IF_ERROR(CheckMask(mask_shape, layout_));
    TF_RETURN_IF_ERROR(GetShape(ctx, first + 1, &offsets_shape));
    TF_RETURN_IF_ERROR(CheckOffsets(offsets_shape, layout_.kept));
    TF_RETURN_IF_ERROR(GetShape(ctx, first + 2, &indices_shape));
    TF_RETURN_IF_ERROR(CheckIndices(ctx->input_type(first + 2), indices_shape, layout_, &size_));
    capacity_ = indices_shape.dim_size(0);
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
      const xla::Shape shape = xla::ShapeUtil::MakeShape(type, Dims(capacity_));
      std::vector<XlaOp> operands = {ctx->Input(first), ctx->Input(first + 1), ctx->Input(first + 2)};
      for (const XlaOp& source : sources) operands.push_back(xla::Reshape(source, Dims(layout_.kept)));
      const bool both = sources.size() == 2;
      const XlaOp gathered =
          xla::CustomCall(ctx->builder(), both ? kGatherTwoCall : kGatherCall, operands,
                          both ? xla::ShapeUtil::MakeTupleShape({shape, shape}) : shape, "",
                          /*has_side_effect=*/false, {}, nullptr, xla::CustomCallSchedule::SCHEDULE_NONE,
                          xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
      for (size_t i = 0; i < sources.size(); ++i) {
        compact.push_back(both ? xla::GetTupleElement(gathered, static_cast<int64_t>(i)) : gathered);
      }
    }
    for (size_t i = 0; i < sources.size(); ++i) {
      if (empty) {
        compact.push_back(xla::Broadcast(xla::Zero(ctx->builder(), type), {size_}));
      } else if (!native_) {
        compact.push_back(GatherOne(ctx, sources[i], ctx->Input(first + 2), type));
      }
      ctx->SetOutput(static_cast<int>(i), xla::Reshape(compact[i], {size_}));
    }
    return absl::OkStatus();
  }

  XlaOp GatherOne(XlaOpKernelContext* ctx, XlaOp source, XlaOp indices, xla::PrimitiveType type) const {
    const xla::PrimitiveType integers = IntegersFor(dtype_);
    const XlaOp gathered = GatherRows(xla::BitcastConvertType(source, integers), indices, layout_);
    const XlaOp valid = xla::ConvertElementType(xla::Lt(indices, xla::ScalarLike(indices, layout_.kept)), integers);
    const XlaOp all = xla::BroadcastInDim(xla::Sub(xla::Zero(ctx->builder(), integers), valid), Dims(capacity_), {0});
    return xla::BitcastConvertType(xla::And(all, gathered), type);
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
    if (compact_shape.num_elements() == 0 || entries(layout_) == 0) return;
    xla::PrimitiveType type;
    OP_REQUIRES_OK(ctx, tensorflow::DataTypeToPrimitiveType(dtype_, &type));
    if (native_) {
      const xla::ShapeIndex whole({});
      const std::vector<std::pair<xla::ShapeIndex, std::pair<int64_t, xla::ShapeIndex>>> in_place = {
          {whole, {0, whole}}};
      const XlaOp written = xla::CustomCall(
          ctx->builder(), kScatterCall,
          {xla::Reshape(value, Dims(layout_.kept)), ctx->Input(2), ctx->Input(3), ctx->Input(4),
           xla::Reshape(ctx->Input(1), Dims(capacity_))},
          xla::ShapeUtil::MakeShape(type, Dims(layout_.kept)), "", /*has_side_effect=*/false, in_place, nullptr,
          xla::CustomCallSchedule::SCHEDULE_NONE, xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
      OP_REQUIRES_OK(ctx, ctx->AssignVariable(0, dtype_, xla::Reshape(written, shape.dim_sizes())));
      return;
    }
    const XlaOp written = ScatterRows(value, ctx->Input(4), ctx->Input(1), layout_, capacity_, dtype_, type);
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
    TensorShape bits_shape, mask_shape, offsets_shape, indices_shape;
    OP_REQUIRES_OK(ctx, GetShape(ctx, 0, &bits_shape));
    OP_REQUIRES_OK(ctx, GetShape(ctx, 1, &mask_shape));
    OP_REQUIRES_OK(ctx, GetShape(ctx, 2, &offsets_shape));
    OP_REQUIRES_OK(ctx, GetShape(ctx, 3, &indices_shape));
    const MaskLayout layout{1, kept_, 1};
    int64_t capacity = 0;
    OP_REQUIRES_OK(ctx, CheckMask(mask_shape, layout));
    OP_REQUIRES_OK(ctx, CheckOffsets(offsets_shape, kept_));
    OP_REQUIRES_OK(ctx, CheckIndices(ctx->input_type(3), indices_shape, layout, &capacity));
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

#define FREEZEOPS_REGISTER(OP, KERNEL)                             \
  REGISTER_KERNEL_BUILDER(Name(OP).Device("XLA_CPU_JIT"), KERNEL); \
  REGISTER_KERNEL_BUILDER(Name(OP).Device("XLA_GPU_JIT"), KERNEL)
FREEZEOPS_REGISTER("Freezeops>MaskGradient", MaskGradientXlaOp);
FREEZEOPS_REGISTER("Freezeops>MaskSlices", MaskSlicesXlaOp);
FREEZEOPS_REGISTER("Freezeops>RememberFrozen", RememberFrozenXlaOp);
FREEZEOPS_REGISTER("Freezeops>RestoreFrozen", RestoreFrozenXlaOp);
FREEZEOPS_REGISTER("Freezeops>SeedSlots", SeedSlotsXlaOp);
FREEZEOPS_REGISTER("Freezeops>GatherTrainable", GatherTrainableXlaOp);
FREEZEOPS_REGISTER("Freezeops>ReadTrainable", ReadTrainableXlaOp);
FREEZEOPS_REGISTER("Freezeops>TakeTrainable", TakeTrainableXlaOp);
FREEZEOPS_REGISTER("Freezeops>ScatterTrainable", ScatterTrainableXlaOp);
FREEZEOPS_REGISTER("Freezeops>RankTrainable", RankTrainableXlaOp);
#undef FREEZEOPS_REGISTER

}  // namespace
}  // namespace freezeops
