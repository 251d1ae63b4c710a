// FusedUpdate as plain HLO. XLA makes one loop over each variable of it, or a few.
//
// The arithmetic is that of fused_rules.h in the variables' type, as XLA rounds it: it may contract, reorder and, with
// 16-bit floats, keep more digits than the type has. What is not trainable takes no part: old and new values are joined
// as integers.

#include "ops/fused_hlo.h"

#include <array>
#include <memory>
#include <vector>

#include "ops/xla_helpers.h"

namespace freezeops {
namespace {

using ::tensorflow::DataType;
using ::tensorflow::TensorShape;
using ::tensorflow::XlaOpKernelContext;
using ::xla::XlaOp;

// A value of fused_rules.h: a tensor, or a scalar that all of its entries meet.
struct Expression {
  XlaOp op;
};
Expression operator+(Expression a, Expression b) { return {xla::Add(a.op, b.op)}; }
Expression operator-(Expression a, Expression b) { return {xla::Sub(a.op, b.op)}; }
Expression operator*(Expression a, Expression b) { return {xla::Mul(a.op, b.op)}; }
Expression operator/(Expression a, Expression b) { return {xla::Div(a.op, b.op)}; }
Expression square_root(Expression a) { return {xla::Sqrt(a.op)}; }
Expression maximum(Expression a, Expression b) { return {xla::Max(a.op, b.op)}; }
Expression sign_of(Expression a) { return {xla::Sign(a.op)}; }

void UpdateEntries(const NamedRule& rule, bool decays, const Expression* scalars, Expression& variable,
                   Expression gradient, Expression square, Expression* slots) {
  const auto update = [&](auto kind) {
    update_entry<decltype(kind)::value>(rule.flags, decays, scalars, variable, gradient, square, slots);
  };
  switch (rule.rule) {
    case Rule::kSgd:
      return update(std::integral_constant<Rule, Rule::kSgd>());
    case Rule::kAdam:
      return update(std::integral_constant<Rule, Rule::kAdam>());
    case Rule::kNadam:
      return update(std::integral_constant<Rule, Rule::kNadam>());
    case Rule::kRmsprop:
      return update(std::integral_constant<Rule, Rule::kRmsprop>());
    case Rule::kAdagrad:
      return update(std::integral_constant<Rule, Rule::kAdagrad>());
    case Rule::kLion:
      return update(std::integral_constant<Rule, Rule::kLion>());
  }
}

// Which bits are set, one for each entry, in bytes.
XlaOp PackedBits(XlaOp flags, int64_t size) {
  xla::XlaBuilder* const builder = flags.builder();
  const int64_t bytes = mask_bytes(size);
  const XlaOp zero = xla::ConstantR0<uint8_t>(builder, 0);
  XlaOp ones = xla::ConvertElementType(xla::Reshape(flags, {size}), xla::U8);
  xla::PaddingConfig padding;
  auto* const at_end = padding.add_dimensions();
  at_end->set_edge_padding_high(bytes * 8 - size);
  ones = xla::Reshape(xla::Pad(ones, zero, padding), {bytes, 8});
  const XlaOp shifts = xla::Iota(builder, xla::ShapeUtil::MakeShape(xla::U8, {bytes, 8}), 1);
  const std::unique_ptr<xla::XlaBuilder> either = builder->CreateSubBuilder("or");
  const xla::Shape scalar = xla::ShapeUtil::MakeShape(xla::U8, {});
  xla::Or(xla::Parameter(either.get(), 0, scalar, "a"), xla::Parameter(either.get(), 1, scalar, "b"));
  return xla::Reduce(xla::ShiftLeft(ones, shifts), zero, *either->Build(), {1});
}

// The update of one variable.
class VariableUpdate {
 public:
  VariableUpdate(XlaOpKernelContext* ctx, const FusedAttributes& attributes, int i)
      : ctx_(ctx),
        a_(attributes),
        i_(i),
        layout_(attributes.layouts[i]),
        sparse_(attributes.NumberIn(attributes.sparse)[i]),
        masked_(attributes.NumberIn(attributes.masked)[i]),
        seeded_(attributes.NumberIn(attributes.seeded)[i]),
        integers_(IntegersFor(attributes.dtype)) {}

  absl::Status Build() {
    TF_RETURN_IF_ERROR(tensorflow::DataTypeToPrimitiveType(a_.dtype, &type_));
    TF_RETURN_IF_ERROR(ReadScalars());
    TF_RETURN_IF_ERROR(ctx_->ReadVariableInput(a_.variable(i_), a_.dtype, &shape_, &whole_));
    TF_RETURN_IF_ERROR(CheckEntries("variable", shape_, layout_));
    TF_RETURN_IF_ERROR(ReadGradient());
    TF_RETURN_IF_ERROR(ReadMask());
    TF_RETURN_IF_ERROR(ReadSlots());
    const bool nothing = entries(layout_) == 0 || updated_.num_elements() == 0;
    if (nothing) return absl::OkStatus();
    TF_RETURN_IF_ERROR(Seed());

    Expression value{value_}, slots[kMostSlots];
    for (int j = 0; j < a_.rule->slots; ++j) slots[a_.rule->places[j]] = {slots_[j]};
    UpdateEntries(*a_.rule, a_.decays[i_], scalars_.data(), value, {gradient_}, {square_}, slots);

    for (int j = 0; j < a_.rule->slots; ++j) {
      const XlaOp slot = Kept(slots[a_.rule->places[j]].op, old_slots_[j]);
      TF_RETURN_IF_ERROR(
          ctx_->AssignVariable(a_.slot(i_, j), a_.dtype, xla::Reshape(slot, slot_shapes_[j].dim_sizes())));
    }
    XlaOp written = Kept(value.op, value_);
    if (a_.compact) {
      written = ScatterRows(whole_, indices_, written, layout_, capacity_, a_.dtype, type_);
    }
    return ctx_->AssignVariable(a_.variable(i_), a_.dtype, xla::Reshape(written, shape_.dim_sizes()));
  }

 private:
  absl::Status ReadScalars() {
    TensorShape shape;
    TF_RETURN_IF_ERROR(GetShape(ctx_, a_.scalars(), &shape));
    if (shape.dims() != 1 || shape.dim_size(0) != a_.rule->scalars) {
      return InvalidArgument("scalars must be the ", a_.rule->scalars, " of rule ", a_.rule->name,
                             ". Received: scalars of shape ", shape.DebugString());
    }
    for (int i = 0; i < a_.rule->scalars; ++i) {
      scalars_[i].op = xla::Reshape(xla::SliceInDim(ctx_->Input(a_.scalars()), i, i + 1, 1, 0), {});
    }
    return absl::OkStatus();
  }

  // Dense, in the variable's shape.
  absl::Status ReadGradient() {
    TensorShape shape;
    TF_RETURN_IF_ERROR(GetShape(ctx_, a_.gradient(i_), &shape));
    if (sparse_ < 0) {
      TF_RETURN_IF_ERROR(CheckEntries("gradient", shape, layout_));
      gradient_ = xla::Reshape(ctx_->Input(a_.gradient(i_)), shape_.dim_sizes());
      return absl::OkStatus();
    }
    TensorShape rows;
    TF_RETURN_IF_ERROR(GetShape(ctx_, a_.rows(sparse_), &rows));
    if (shape.dims() < 1 || rows.dims() != 1 || shape.dim_size(0) != rows.dim_size(0)) {
      return InvalidArgument("values must have one row for each index. Received: values of shape ", shape.DebugString(),
                             ", indices of shape ", rows.DebugString());
    }
    int64_t width = 1;
    for (int axis = 1; axis < shape.dims(); ++axis) width *= shape.dim_size(axis);
    const int64_t height = width > 0 ? entries(layout_) / width : 0;
    if (height * width != entries(layout_)) {
      return InvalidArgument("rows must divide the ", entries(layout_), " entries of layout ", LayoutString(layout_),
                             ". Received: values of shape ", shape.DebugString());
    }
    XlaOp values = xla::Reshape(ctx_->Input(a_.gradient(i_)), {rows.dim_size(0), width});
    if (a_.rule->rule == Rule::kSgd) {
      // As Keras: by the learning rate before they are summed.
      values = xla::Mul(values, scalars_[kRate].op);
      scalars_[kRate].op = xla::ScalarLike(scalars_[kRate].op, 1);
    }
    const XlaOp index = ctx_->Input(a_.rows(sparse_));
    gradient_ = xla::Reshape(SumOfRows(values, index, height, width), shape_.dim_sizes());
    square_ = xla::Reshape(SumOfRows(xla::Mul(values, values), index, height, width), shape_.dim_sizes());
    return absl::OkStatus();
  }

  // Sets what is updated: the whole variable or, in compact state, its trainable entries.
  absl::Status ReadMask() {
    XlaOp mask;
    if (masked_ >= 0) {
      TensorShape mask_shape;
      TF_RETURN_IF_ERROR(ctx_->ReadVariableInput(a_.mask(masked_), tensorflow::DT_UINT8, &mask_shape, &mask));
      TF_RETURN_IF_ERROR(CheckMask(mask_shape, layout_));
    }
    if (!a_.compact) {
      updated_ = shape_;
      value_ = whole_;
      if (sparse_ < 0) square_ = xla::Mul(gradient_, gradient_);
      all_trainable_ = masked_ < 0;
      if (!all_trainable_ && entries(layout_) > 0) trainable_ = TrainableBits(mask, layout_, shape_, integers_);
      return absl::OkStatus();
    }

    DataType index_dtype;
    TensorShape index_shape, offsets_shape;
    DataType offsets_dtype;
    TF_RETURN_IF_ERROR(ctx_->GetVariableTypeAndShape(a_.offsets(i_), &offsets_dtype, &offsets_shape));
    TF_RETURN_IF_ERROR(CheckOffsets(offsets_shape, layout_.kept));
    TF_RETURN_IF_ERROR(ctx_->GetVariableTypeAndShape(a_.indices(i_), &index_dtype, &index_shape));
    TF_RETURN_IF_ERROR(ctx_->ReadVariableInput(a_.indices(i_), index_dtype, &index_shape, &indices_));
    if (index_shape.dims() != 1 || !tensorflow::DataTypeIsInteger(index_dtype)) {
      return InvalidArgument("indices must be a vector of integers. Received: indices of dtype ",
                             tensorflow::DataTypeString(index_dtype), " and shape ", index_shape.DebugString());
    }
    capacity_ = index_shape.dim_size(0);
    const std::vector<int64_t> dims = DimsOf(capacity_, layout_.inner);
    updated_ = TensorShape(dims);
    if (updated_.num_elements() == 0 || entries(layout_) == 0) return absl::OkStatus();
    const auto gather = [&](XlaOp from) {
      return xla::BitcastConvertType(GatherRows(xla::BitcastConvertType(from, integers_), indices_, layout_), type_);
    };
    value_ = gather(whole_);
    gradient_ = gather(gradient_);
    square_ = sparse_ < 0 ? xla::Mul(gradient_, gradient_) : gather(square_);
    trainable_ = xla::BroadcastInDim(AllBits(NamesOnes(mask), integers_), dims, {0});
    return absl::OkStatus();
  }

  // Which of the indices are those of ones in the mask. The others write what is there: their slots are room, and no
  // index of another mask must reach a frozen entry.
  XlaOp NamesOnes(XlaOp mask) const {
    const XlaOp last = xla::ScalarLike(indices_, layout_.kept - 1);
    const XlaOp bit = xla::Clamp(xla::ScalarLike(indices_, 0), indices_, last);
    const MaskLayout bytes{1, mask_bytes(layout_.kept), 1};
    const XlaOp byte = GatherRows(mask, xla::ShiftRightLogical(bit, xla::ScalarLike(bit, 3)), bytes);
    const XlaOp shift = xla::ConvertElementType(xla::And(bit, xla::ScalarLike(bit, 7)), xla::U8);
    const XlaOp one = xla::And(xla::ShiftRightLogical(byte, shift), xla::ScalarLike(byte, 1));
    return xla::And(xla::Eq(bit, indices_), xla::Ne(one, xla::ScalarLike(one, 0)));
  }

  absl::Status ReadSlots() {
    slot_shapes_.resize(a_.rule->slots);
    for (int j = 0; j < a_.rule->slots; ++j) {
      XlaOp slot;
      TF_RETURN_IF_ERROR(ctx_->ReadVariableInput(a_.slot(i_, j), a_.dtype, &slot_shapes_[j], &slot));
      if (slot_shapes_[j].num_elements() != updated_.num_elements()) {
        return InvalidArgument("slot must have ", updated_.num_elements(), " entries. Received: one of shape ",
                               slot_shapes_[j].DebugString());
      }
      old_slots_.push_back(xla::Reshape(slot, updated_.dim_sizes()));
    }
    slots_ = old_slots_;
    return absl::OkStatus();
  }

  // Starts slots that wait, see seed_slots.h.
  absl::Status Seed() {
    if (seeded_ < 0 || a_.seed_slots.empty()) return absl::OkStatus();
    const MaskLayout flat{1, updated_.num_elements(), 1};
    TensorShape bits_shape;
    XlaOp bits;
    TF_RETURN_IF_ERROR(ctx_->ReadVariableInput(a_.unseeded(seeded_), tensorflow::DT_UINT8, &bits_shape, &bits));
    TF_RETURN_IF_ERROR(CheckMask(bits_shape, flat));
    const xla::PrimitiveType wide = a_.dtype == tensorflow::DT_DOUBLE ? xla::F64 : xla::F32;
    const XlaOp gradient = xla::ConvertElementType(gradient_, wide);
    XlaOp square = xla::Mul(gradient, gradient);
    if (sparse_ >= 0) square = xla::Max(square, xla::ConvertElementType(square_, wide));
    const XlaOp waiting = TrainableBits(bits, flat, updated_, integers_);
    const XlaOp may = all_trainable_ ? waiting : xla::And(waiting, trainable_);
    const XlaOp first = slots_[a_.seed_slots[0]];
    const XlaOp due = xla::And(may, AllBits(xla::Eq(first, xla::ScalarLike(first, 0)), integers_));
    const XlaOp scales = xla::ConvertElementType(ctx_->Input(a_.scales()), wide);
    for (int64_t i = 0; i < FusedAttributes::Size(a_.seed_slots); ++i) {
      XlaOp& slot = slots_[a_.seed_slots[i]];
      const XlaOp scale = xla::Reshape(xla::SliceInDim(scales, i, i + 1, 1, 0), {});
      const XlaOp seed = xla::ConvertElementType(xla::Mul(a_.seed_powers[i] == 2 ? square : gradient, scale), type_);
      slot = Chosen(due, seed, slot);
    }
    const XlaOp seeded = slots_[a_.seed_slots[0]];
    const XlaOp done = xla::And(may, AllBits(xla::Ne(seeded, xla::ScalarLike(seeded, 0)), integers_));
    const XlaOp still = xla::And(waiting, xla::Not(done));
    const XlaOp packed = PackedBits(xla::Ne(still, xla::ScalarLike(still, 0)), updated_.num_elements());
    return ctx_->AssignVariable(a_.unseeded(seeded_), tensorflow::DT_UINT8, packed);
  }

  XlaOp Chosen(XlaOp mask, XlaOp chosen, XlaOp other) const {
    const auto to_integers = [&](XlaOp x) { return xla::BitcastConvertType(x, integers_); };
    return xla::BitcastConvertType(Choose(mask, to_integers(chosen), to_integers(other)), type_);
  }

  XlaOp Kept(XlaOp updated, XlaOp old) const { return all_trainable_ ? updated : Chosen(trainable_, updated, old); }

  XlaOpKernelContext* const ctx_;
  const FusedAttributes& a_;
  const int i_;
  const MaskLayout layout_;
  const int sparse_, masked_, seeded_;  // its number among those, or -1
  const xla::PrimitiveType integers_;
  xla::PrimitiveType type_;
  std::array<Expression, kMostScalars> scalars_;
  TensorShape shape_;  // the variable's
  XlaOp whole_;        // the variable
  TensorShape updated_;
  XlaOp value_, gradient_, square_;  // of what is updated
  bool all_trainable_ = false;
  XlaOp trainable_;  // all bits set or none, unless all_trainable_
  XlaOp indices_;    // of compact state
  int64_t capacity_ = 0;
  std::vector<TensorShape> slot_shapes_;
  std::vector<XlaOp> old_slots_, slots_;  // before and after seeding
};

}  // namespace

absl::Status BuildFusedUpdate(XlaOpKernelContext* ctx, const FusedAttributes& attributes) {
  for (int i = 0; i < attributes.count(); ++i) TF_RETURN_IF_ERROR(VariableUpdate(ctx, attributes, i).Build());
  return absl::OkStatus();
}

}  // namespace freezeops
