#include "ops/common/xla_helpers.h"

#include <memory>
#include <utility>

namespace freezeops {

using ::tensorflow::DataType;
using ::tensorflow::TensorShape;
using ::xla::XlaOp;

absl::Status GetShape(tensorflow::XlaOpKernelContext* ctx, int input, TensorShape* shape) {
  TF_ASSIGN_OR_RETURN(const xla::Shape xla_shape, ctx->InputXlaShape(input));
  for (const int64_t size : xla_shape.dimensions()) TF_RETURN_IF_ERROR(shape->AddDimWithStatus(size));
  return absl::OkStatus();
}

xla::PrimitiveType IntegersFor(DataType dtype) {
  switch (tensorflow::DataTypeSize(dtype)) {
    case 2:
      return xla::U16;
    case 4:
      return xla::U32;
    default:
      return xla::U64;
  }
}

// No axes of length 1 are made on the way: with those XLA picks layouts between which the fused loop copies, and the
// loop is no longer vectorized.
XlaOp TrainableBits(XlaOp mask, const MaskLayout& layout, const TensorShape& shape, xla::PrimitiveType integers) {
  xla::XlaBuilder* builder = mask.builder();
  const int rank = shape.dims();
  const int64_t last = rank == 0 ? 1 : shape.dim_size(rank - 1);
  const bool elementwise = layout.outer == 1 && layout.inner == 1;
  const bool whole_bytes_per_row = elementwise && rank > 1 && last % 8 == 0;
  std::vector<int64_t> byte_dims = {mask_bytes(layout.kept)};
  if (whole_bytes_per_row) byte_dims = {entries(layout) / last, last / 8};
  std::vector<int64_t> bit_dims = byte_dims;
  bit_dims.push_back(8);
  std::vector<int64_t> axes(byte_dims.size());
  for (size_t i = 0; i < axes.size(); ++i) axes[i] = static_cast<int64_t>(i);

  const XlaOp shifts = xla::Iota(builder, xla::ShapeUtil::MakeShape(xla::U8, bit_dims), byte_dims.size());
  XlaOp bits = xla::ShiftRightLogical(xla::BroadcastInDim(xla::Reshape(mask, byte_dims), bit_dims, axes), shifts);
  bits = xla::And(bits, xla::ConstantR0<uint8_t>(builder, 1));
  if (!whole_bytes_per_row) {
    bits = xla::Slice(xla::Reshape(bits, {byte_dims[0] * 8}), {0}, {layout.kept}, {1});
    std::vector<int64_t> spread;
    if (layout.outer > 1) spread.push_back(layout.outer);
    const int64_t kept_axis = static_cast<int64_t>(spread.size());
    spread.push_back(layout.kept);
    if (layout.inner > 1) spread.push_back(layout.inner);
    bits = xla::BroadcastInDim(bits, spread, {kept_axis});
  }
  const XlaOp all = xla::Sub(xla::Zero(builder, integers), xla::ConvertElementType(bits, integers));
  return xla::Reshape(all, shape.dim_sizes());
}

XlaOp AllBits(XlaOp predicate, xla::PrimitiveType integers) {
  return xla::Sub(xla::Zero(predicate.builder(), integers), xla::ConvertElementType(predicate, integers));
}

XlaOp Choose(XlaOp mask, XlaOp chosen, XlaOp other) {
  return xla::Or(xla::And(mask, chosen), xla::And(xla::Not(mask), other));
}

std::vector<XlaOp> CallNative(xla::XlaBuilder* builder, const char* name, const std::vector<XlaOp>& operands,
                              const std::vector<CallResult>& results) {
  const bool tuple = results.size() > 1;
  const xla::ShapeIndex whole({});
  std::vector<xla::Shape> shapes;
  std::vector<std::pair<xla::ShapeIndex, std::pair<int64_t, xla::ShapeIndex>>> in_place;
  for (const CallResult& result : results) {
    const int64_t number = static_cast<int64_t>(shapes.size());
    xla::ShapeIndex index = whole;
    if (tuple) index.push_back(number);
    if (result.operand >= 0) in_place.push_back({index, {result.operand, whole}});
    shapes.push_back(result.shape);
  }
  const XlaOp called =
      xla::CustomCall(builder, name, operands, tuple ? xla::ShapeUtil::MakeTupleShape(shapes) : shapes[0], "",
                      /*has_side_effect=*/false, in_place, nullptr, xla::CustomCallSchedule::SCHEDULE_NONE,
                      xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
  if (!tuple) return {called};
  std::vector<XlaOp> each;
  for (size_t i = 0; i < results.size(); ++i) each.push_back(xla::GetTupleElement(called, static_cast<int64_t>(i)));
  return each;
}

std::vector<int64_t> DimsOf(int64_t count, int64_t inner) {
  std::vector<int64_t> dims = {count};
  if (inner > 1) dims.push_back(inner);
  return dims;
}

XlaOp GatherRows(XlaOp values, XlaOp indices, const MaskLayout& layout) {
  xla::GatherDimensionNumbers numbers;
  numbers.add_collapsed_slice_dims(0);
  numbers.add_start_index_map(0);
  numbers.set_index_vector_dim(1);
  std::vector<int64_t> slice = {1};
  if (layout.inner > 1) {
    numbers.add_offset_dims(1);
    slice.push_back(layout.inner);
  }
  const XlaOp rows = xla::Reshape(values, DimsOf(layout.kept, layout.inner));
  return xla::Gather(rows, indices, numbers, slice, /*indices_are_sorted=*/true);
}

// As floats where that keeps every bit: as integers the whole variable would be copied. XLA scatters 16-bit floats by
// way of float32, which changes NaNs in entries that no index names.
XlaOp ScatterRows(XlaOp value, XlaOp indices, XlaOp rows, const MaskLayout& layout, int64_t count, DataType dtype,
                  xla::PrimitiveType type) {
  const bool as_is = tensorflow::DataTypeSize(dtype) > 2;
  const xla::PrimitiveType scattered = as_is ? type : IntegersFor(dtype);
  const auto to_scattered = [&](XlaOp x) { return as_is ? x : xla::BitcastConvertType(x, scattered); };
  const std::unique_ptr<xla::XlaBuilder> second = value.builder()->CreateSubBuilder("second");
  const xla::Shape scalar = xla::ShapeUtil::MakeShape(scattered, {});
  xla::Parameter(second.get(), 0, scalar, "old");
  xla::Parameter(second.get(), 1, scalar, "new");
  xla::ScatterDimensionNumbers numbers;
  if (layout.inner > 1) numbers.add_update_window_dims(1);
  numbers.add_inserted_window_dims(0);
  numbers.add_scatter_dims_to_operand_dims(0);
  numbers.set_index_vector_dim(1);
  const XlaOp old = xla::Reshape(to_scattered(value), DimsOf(layout.kept, layout.inner));
  const XlaOp updates = xla::Reshape(to_scattered(rows), DimsOf(count, layout.inner));
  const XlaOp written = xla::Scatter(old, indices, updates, *second->Build(), numbers,
                                     /*indices_are_sorted=*/true, /*unique_indices=*/true);
  return as_is ? written : xla::BitcastConvertType(written, type);
}

XlaOp SumOfRows(XlaOp values, XlaOp indices, int64_t rows, int64_t width) {
  xla::XlaBuilder* const builder = values.builder();
  const xla::Shape shape = *builder->GetShape(values);
  const xla::PrimitiveType type = shape.element_type();
  const XlaOp zeros = xla::Broadcast(xla::Zero(builder, type), {rows, width});
  const int64_t named = shape.dimensions(0);
  if (named == 0) return zeros;
  const std::unique_ptr<xla::XlaBuilder> adder = builder->CreateSubBuilder("add");
  const xla::Shape scalar = xla::ShapeUtil::MakeShape(type, {});
  xla::Add(xla::Parameter(adder.get(), 0, scalar, "a"), xla::Parameter(adder.get(), 1, scalar, "b"));
  xla::ScatterDimensionNumbers numbers;
  numbers.add_update_window_dims(1);
  numbers.add_inserted_window_dims(0);
  numbers.add_scatter_dims_to_operand_dims(0);
  numbers.set_index_vector_dim(1);
  return xla::Scatter(zeros, indices, xla::Reshape(values, {named, width}), *adder->Build(), numbers);
}

}  // namespace freezeops
