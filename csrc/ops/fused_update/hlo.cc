// FusedUpdate as plain HLO. XLA makes one loop over each variable of it, or a few.
//
// The arithmetic is that of update_rules.h in the variables' type, as XLA rounds it: it may contract, reorder and, with
// 16-bit floats, keep more digits than the type has. What is not trainable takes no part: old and new values are joined
// as integers.

#include "ops/fused_update/hlo.h"

#include <array>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "ops/common/xla_helpers.h"

namespace freezeops {
namespace {

using ::tensorflow::DataType;
using ::tensorflow::TensorShape;
using ::tensorflow::XlaOpKernelContext;
using ::xla::XlaOp;

// A value as update_rules.h takes it: a tensor, or a scalar, which is broadcast.
struct Expression {
  Expression() = default;
  Expression(XlaOp value) : op(value) {}  // NOLINT(runtime/explicit)
  Expression(const Expression& other) : op(other.op) {}
  // A new slot is used as it is stored, with the old values of frozen entries: otherwise XLA calculates it again from
  // the old slot, of which it makes a copy, as that is overwritten.
  Expression& operator=(const Expression& other) {
    op = stored ? stored(other.op) : other.op;
    return *this;
  }

  XlaOp op;
  std::function<XlaOp(XlaOp)> stored;  // of slots: what is stored for a new value
};
Expression operator+(Expression a, Expression b) { return xla::Add(a.op, b.op); }
Expression operator-(Expression a, Expression b) { return xla::Sub(a.op, b.op); }
Expression operator*(Expression a, Expression b) { return xla::Mul(a.op, b.op); }
Expression operator/(Expression a, Expression b) { return xla::Div(a.op, b.op); }
Expression square_root(Expression a) { return xla::Sqrt(a.op); }
// NaN wherever one of the two is: XLA's own may give the other one on the CPU.
Expression maximum(Expression a, Expression b) {
  return xla::Select(xla::Ne(a.op, a.op), a.op, xla::Select(xla::Ne(b.op, b.op), b.op, xla::Max(a.op, b.op)));
}
Expression sign_of(Expression a) { return xla::Sign(a.op); }

void UpdateEntries(const NamedRule& rule, bool decays, const Expression* scalars, Expression& variable,
                   Expression gradient, Expression square, Expression* slots) {
  const auto update = [&](auto kind) {
    update_entry<decltype(kind)::value>(rule.flags, decays, scalars, variable, gradient, square, slots);
  };
  with_rule(rule.rule, update);
}

// Bytes joined along axes.
XlaOp Union(XlaOp bytes, absl::Span<const int64_t> axes) {
  const std::unique_ptr<xla::XlaBuilder> either = bytes.builder()->CreateSubBuilder("or");
  const xla::Shape scalar = xla::ShapeUtil::MakeShape(xla::U8, {});
  xla::Or(xla::Parameter(either.get(), 0, scalar, "a"), xla::Parameter(either.get(), 1, scalar, "b"));
  return xla::Reduce(bytes, xla::ConstantR0<uint8_t>(bytes.builder(), 0), *either->Build(), axes);
}

// From integers with all bits set or none, one bit for each.
XlaOp PackedBits(XlaOp all, int64_t size) {
  xla::XlaBuilder* const builder = all.builder();
  const int64_t bytes = mask_bytes(size);
  const XlaOp set = xla::Ne(xla::Reshape(all, {size}), xla::ScalarLike(all, 0));
  xla::PaddingConfig padding;
  padding.add_dimensions()->set_edge_padding_high(bytes * 8 - size);
  const XlaOp ones = xla::Pad(xla::ConvertElementType(set, xla::U8), xla::ConstantR0<uint8_t>(builder, 0), padding);
  const XlaOp shifts = xla::Iota(builder, xla::ShapeUtil::MakeShape(xla::U8, {bytes, 8}), 1);
  return Union(xla::ShiftLeft(xla::Reshape(ones, {bytes, 8}), shifts), {1});
}

// The update of one variable. Calls come in this order: Read; SeedOperands, WhoIsSeeded and Seed if may_wait; Write.
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

  // Reads all operands. Dtypes and shapes have been checked, see xla.cc.
  absl::Status Read() {
    TF_RETURN_IF_ERROR(tensorflow::DataTypeToPrimitiveType(a_.dtype, &type_));
    ReadScalars();
    TF_RETURN_IF_ERROR(ctx_->ReadVariableInput(a_.variable(i_), a_.dtype, &shape_, &whole_));
    TF_RETURN_IF_ERROR(ReadGradient());
    TF_RETURN_IF_ERROR(ReadMask());
    TF_RETURN_IF_ERROR(ReadSlots());
    return seeded_ < 0 ? absl::OkStatus() : ReadUnseeded();
  }

  bool empty() const { return entries(layout_) == 0 || updated_.num_elements() == 0; }

  // Returns whether entries may wait to be seeded.
  bool may_wait() const { return seeded_ >= 0 && !a_.seed_slots.empty() && !empty(); }
  XlaOp unseeded() const { return unseeded_; }

  // Returns the operands of WhoIsSeeded; `unseeded` first.
  std::vector<XlaOp> SeedOperands() const {
    std::vector<XlaOp> operands = {unseeded_, old_slots_[a_.seed_slots[0]], gradient_, ctx_->Input(a_.scales())};
    if (sparse_ >= 0) operands.push_back(square_);
    if (masked_ >= 0) operands.push_back(mask_);
    if (a_.compact) operands.push_back(indices_);
    return operands;
  }

  // Returns the bits of the entries to seed now, and of those that go on waiting. The operands may be those of another
  // computation.
  std::pair<XlaOp, XlaOp> WhoIsSeeded(const std::vector<XlaOp>& operands) const {
    auto next = operands.begin() + 4;
    const XlaOp first = operands[1], gradient = operands[2], scales = operands[3];
    const XlaOp square = sparse_ >= 0 ? *next++ : gradient;
    XlaOp waiting = TrainableBits(operands[0], {1, updated_.num_elements(), 1}, updated_, integers_);
    XlaOp may = waiting;
    if (a_.compact) {
      may = xla::And(may, AllOfRow(NamesOnes(next[0], next[1])));
    } else if (masked_ >= 0) {
      may = xla::And(may, TrainableBits(*next, layout_, updated_, integers_));
    }
    const XlaOp zero = xla::ScalarLike(first, 0);
    const XlaOp due = xla::And(may, AllBits(xla::Eq(first, zero), integers_));
    const XlaOp seeded = Chosen(due, SeedOf(0, gradient, square, scales), first);
    const XlaOp done = xla::And(may, AllBits(xla::Ne(seeded, zero), integers_));
    return {PackedBits(due, updated_.num_elements()),
            PackedBits(xla::And(waiting, xla::Not(done)), updated_.num_elements())};
  }

  // Seeds the entries of set bits, before the update.
  absl::Status Seed(XlaOp bits, XlaOp still_unseeded) {
    const XlaOp due = TrainableBits(bits, {1, updated_.num_elements(), 1}, updated_, integers_);
    for (int i = 0; i < FusedAttributes::Size(a_.seed_slots); ++i) {
      XlaOp& slot = slots_[a_.seed_slots[i]];
      slot = Chosen(due, SeedOf(i, gradient_, square_, ctx_->Input(a_.scales())), slot);
    }
    return ctx_->AssignVariable(a_.unseeded(seeded_), tensorflow::DT_UINT8, still_unseeded);
  }

  absl::Status Write() {
    if (empty()) return absl::OkStatus();
    Expression value(value_), slots[kMostSlots];
    for (int j = 0; j < a_.rule->slots; ++j) {
      Expression& slot = slots[a_.rule->slot_positions[j]];
      slot = slots_[j];
      slot.stored = [this, j](XlaOp updated) { return KeptSlot(updated, slots_[j]); };
    }
    UpdateEntries(*a_.rule, a_.decays[i_], scalars_.data(), value, gradient_, square_, slots);
    for (int j = 0; j < a_.rule->slots; ++j) {
      const XlaOp slot = xla::Reshape(slots[a_.rule->slot_positions[j]].op, slot_shapes_[j].dim_sizes());
      TF_RETURN_IF_ERROR(ctx_->AssignVariable(a_.slot(i_, j), a_.dtype, slot));
    }
    XlaOp written = Kept(value.op, value_);
    if (a_.compact) written = ScatterRows(whole_, indices_, written, layout_, capacity_, a_.dtype, type_);
    return ctx_->AssignVariable(a_.variable(i_), a_.dtype, xla::Reshape(written, shape_.dim_sizes()));
  }

 private:
  void ReadScalars() {
    for (int i = 0; i < a_.rule->scalars; ++i) {
      scalars_[i].op = xla::Reshape(xla::SliceInDim(ctx_->Input(a_.scalars()), i, i + 1, 1, 0), {});
    }
  }

  // Sets the gradient, dense and in the variable's shape; a compact one as it is.
  absl::Status ReadGradient() {
    if (sparse_ < 0) {
      gradient_ = ctx_->Input(a_.gradient(i_));
      return absl::OkStatus();
    }
    TensorShape values_shape;
    TF_RETURN_IF_ERROR(GetShape(ctx_, a_.gradient(i_), &values_shape));
    const GradientRows found = {shape_.dim_size(0), RowSize(values_shape)};
    XlaOp values = xla::Reshape(ctx_->Input(a_.gradient(i_)), {values_shape.dim_size(0), found.width});
    if (a_.rule->rule == UpdateRule::kSgd) {
      // As Keras: by the learning rate before they are summed.
      values = xla::Mul(values, scalars_[kRate].op);
      scalars_[kRate].op = xla::ScalarLike(scalars_[kRate].op, 1);
    }
    const XlaOp index = ctx_->Input(a_.rows(sparse_));
    gradient_ = xla::Reshape(SumOfRows(values, index, found.count, found.width), shape_.dim_sizes());
    square_ = xla::Reshape(SumOfRows(xla::Mul(values, values), index, found.count, found.width), shape_.dim_sizes());
    return absl::OkStatus();
  }

  // Sets what is updated: the whole variable or, in compact state, its trainable entries.
  absl::Status ReadMask() {
    if (masked_ >= 0) {
      TensorShape mask_shape;
      TF_RETURN_IF_ERROR(ctx_->ReadVariableInput(a_.mask(masked_), tensorflow::DT_UINT8, &mask_shape, &mask_));
    }
    if (!a_.compact) {
      updated_ = shape_;
      value_ = whole_;
      if (sparse_ < 0) square_ = xla::Mul(gradient_, gradient_);
      if (masked_ >= 0 && !empty()) trainable_ = TrainableBits(mask_, layout_, shape_, integers_);
      return absl::OkStatus();
    }

    DataType index_dtype;
    TensorShape index_shape;
    TF_RETURN_IF_ERROR(ctx_->GetVariableTypeAndShape(a_.indices(i_), &index_dtype, &index_shape));
    TF_RETURN_IF_ERROR(ctx_->ReadVariableInput(a_.indices(i_), index_dtype, &index_shape, &indices_));
    capacity_ = index_shape.dim_size(0);
    updated_ = TensorShape(DimsOf(capacity_, layout_.inner));
    if (empty()) return absl::OkStatus();
    const auto gather = [&](XlaOp from) {
      return xla::BitcastConvertType(GatherRows(xla::BitcastConvertType(from, integers_), indices_, layout_), type_);
    };
    value_ = gather(whole_);
    gradient_ = a_.IsGathered(i_) ? xla::Reshape(gradient_, updated_.dim_sizes()) : gather(gradient_);
    square_ = sparse_ < 0 ? xla::Mul(gradient_, gradient_) : gather(square_);
    trainable_ = AllOfRow(NamesOnes(mask_, indices_));
    return absl::OkStatus();
  }

  // Returns for each index whether it is that of a one in the mask. Entries of other indices keep their values: their
  // slots are room for more, and an index that belongs to another mask must not reach a frozen entry.
  XlaOp NamesOnes(XlaOp mask, XlaOp indices) const {
    const XlaOp last = xla::ScalarLike(indices, layout_.kept - 1);
    const XlaOp bit = xla::Clamp(xla::ScalarLike(indices, 0), indices, last);
    const MaskLayout bytes{1, mask_bytes(layout_.kept), 1};
    const XlaOp byte = GatherRows(mask, xla::ShiftRightLogical(bit, xla::ScalarLike(bit, 3)), bytes);
    const XlaOp shift = xla::ConvertElementType(xla::And(bit, xla::ScalarLike(bit, 7)), xla::U8);
    const XlaOp one = xla::And(xla::ShiftRightLogical(byte, shift), xla::ScalarLike(byte, 1));
    return xla::And(xla::Eq(bit, indices), xla::Ne(one, xla::ScalarLike(one, 0)));
  }

  XlaOp AllOfRow(XlaOp each) const { return xla::BroadcastInDim(AllBits(each, integers_), updated_.dim_sizes(), {0}); }

  absl::Status ReadSlots() {
    slot_shapes_.resize(a_.rule->slots);
    for (int j = 0; j < a_.rule->slots; ++j) {
      XlaOp slot;
      TF_RETURN_IF_ERROR(ctx_->ReadVariableInput(a_.slot(i_, j), a_.dtype, &slot_shapes_[j], &slot));
      old_slots_.push_back(xla::Reshape(slot, updated_.dim_sizes()));
    }
    slots_ = old_slots_;
    return absl::OkStatus();
  }

  absl::Status ReadUnseeded() {
    TensorShape shape;
    return ctx_->ReadVariableInput(a_.unseeded(seeded_), tensorflow::DT_UINT8, &shape, &unseeded_);
  }

  // Returns the seeds of slot number i of seed_slots, see seed_entry.h.
  XlaOp SeedOf(int64_t i, XlaOp gradient, XlaOp square, XlaOp scales) const {
    const xla::PrimitiveType wide = a_.dtype == tensorflow::DT_DOUBLE ? xla::F64 : xla::F32;
    XlaOp seed = xla::ConvertElementType(gradient, wide);
    if (a_.seed_powers[i] == 2) {
      seed = xla::Mul(seed, seed);
      if (sparse_ >= 0) seed = xla::Max(seed, xla::ConvertElementType(square, wide));
    }
    const XlaOp scale = xla::Reshape(xla::SliceInDim(xla::ConvertElementType(scales, wide), i, i + 1, 1, 0), {});
    return xla::ConvertElementType(xla::Mul(seed, scale), type_);
  }

  XlaOp Chosen(XlaOp mask, XlaOp chosen, XlaOp other) const {
    const auto to_integers = [&](XlaOp x) { return xla::BitcastConvertType(x, integers_); };
    return xla::BitcastConvertType(Choose(mask, to_integers(chosen), to_integers(other)), type_);
  }

  XlaOp Kept(XlaOp updated, XlaOp old) const { return masked_ < 0 ? updated : Chosen(trainable_, updated, old); }

  // XLA calculates 32- and 64-bit floats in their own type, so that Select keeps every bit of them too. It makes one
  // loop for a slot, whose result the loop of the variable reads; a conversion would be calculated again where it is
  // read.
  XlaOp KeptSlot(XlaOp updated, XlaOp old) const {
    if (masked_ < 0 || tensorflow::DataTypeSize(a_.dtype) == 2) return Kept(updated, old);
    return xla::Select(xla::Ne(trainable_, xla::ScalarLike(trainable_, 0)), updated, old);
  }

  XlaOpKernelContext* const ctx_;
  const FusedAttributes& a_;
  const int i_;
  const MaskLayout layout_;
  const int sparse_, masked_, seeded_;  // its numbers in the attributes, or -1
  const xla::PrimitiveType integers_;
  xla::PrimitiveType type_;
  std::array<Expression, kMostScalars> scalars_;
  TensorShape shape_;  // the variable's
  XlaOp whole_;        // the variable
  TensorShape updated_;
  XlaOp value_, gradient_, square_;  // of the updated entries
  XlaOp mask_, trainable_;           // packed; of the updated entries, all bits set or none
  XlaOp indices_;                    // of compact state
  int64_t capacity_ = 0;
  std::vector<TensorShape> slot_shapes_;
  std::vector<XlaOp> old_slots_, slots_;  // before and after seeding
  XlaOp unseeded_;
};

// Finds the entries to seed, of all variables in one branch that is taken if any entry waits, as in few steps. One
// branch, because on a GPU each waits for the device. Without a branch each loop would read a slot that another writes,
// which XLA would copy first.
absl::Status SeedTogether(xla::XlaBuilder* builder, const std::vector<VariableUpdate*>& updates) {
  const auto parameter = [](xla::XlaBuilder* branch, XlaOp tuple) -> absl::StatusOr<XlaOp> {
    TF_ASSIGN_OR_RETURN(const xla::Shape shape, tuple.builder()->GetShape(tuple));
    return xla::Parameter(branch, 0, shape, "operands");
  };
  std::vector<XlaOp> operands, bits;
  XlaOp any = xla::ConstantR0<uint8_t>(builder, 0);
  for (const VariableUpdate* update : updates) {
    for (const XlaOp operand : update->SeedOperands()) operands.push_back(operand);
    bits.push_back(update->unseeded());
    any = xla::Or(any, Union(update->unseeded(), {0}));
  }
  const XlaOp looked_at = xla::Tuple(builder, operands), none = xla::Tuple(builder, bits);

  const std::unique_ptr<xla::XlaBuilder> some_wait = builder->CreateSubBuilder("some_wait");
  TF_ASSIGN_OR_RETURN(XlaOp given, parameter(some_wait.get(), looked_at));
  std::vector<XlaOp> results;
  int64_t next = 0;
  for (const VariableUpdate* update : updates) {
    std::vector<XlaOp> of_one(update->SeedOperands().size());
    for (XlaOp& operand : of_one) operand = xla::GetTupleElement(given, next++);
    const auto [due, still] = update->WhoIsSeeded(of_one);
    results.push_back(due);
    results.push_back(still);
  }
  xla::Tuple(some_wait.get(), results);
  TF_ASSIGN_OR_RETURN(const xla::XlaComputation find, some_wait->Build());

  const std::unique_ptr<xla::XlaBuilder> none_waits = builder->CreateSubBuilder("none_waits");
  TF_ASSIGN_OR_RETURN(given, parameter(none_waits.get(), none));
  results.clear();
  for (size_t i = 0; i < updates.size(); ++i) {
    const XlaOp zeros = xla::GetTupleElement(given, static_cast<int64_t>(i));
    results.push_back(zeros);
    results.push_back(zeros);
  }
  xla::Tuple(none_waits.get(), results);
  TF_ASSIGN_OR_RETURN(const xla::XlaComputation keep, none_waits->Build());

  const XlaOp waits = xla::Ne(any, xla::ScalarLike(any, 0));
  const XlaOp found = xla::Conditional(waits, looked_at, find, none, keep);
  for (size_t i = 0; i < updates.size(); ++i) {
    const int64_t due = 2 * static_cast<int64_t>(i);
    TF_RETURN_IF_ERROR(updates[i]->Seed(xla::GetTupleElement(found, due), xla::GetTupleElement(found, due + 1)));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status BuildFusedUpdate(XlaOpKernelContext* ctx, const FusedAttributes& attributes) {
  std::vector<std::unique_ptr<VariableUpdate>> updates;
  std::vector<VariableUpdate*> may_wait;
  for (int i = 0; i < attributes.count(); ++i) {
    updates.push_back(std::make_unique<VariableUpdate>(ctx, attributes, i));
    TF_RETURN_IF_ERROR(updates.back()->Read());
    if (updates.back()->may_wait()) may_wait.push_back(updates.back().get());
  }
  if (!may_wait.empty()) TF_RETURN_IF_ERROR(SeedTogether(ctx->builder(), may_wait));
  for (const auto& update : updates) TF_RETURN_IF_ERROR(update->Write());
  return absl::OkStatus();
}

}  // namespace freezeops
