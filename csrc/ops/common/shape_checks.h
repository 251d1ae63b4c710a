// What shape functions check in the same way.

#ifndef FREEZEOPS_OPS_COMMON_SHAPE_CHECKS_H_
#define FREEZEOPS_OPS_COMMON_SHAPE_CHECKS_H_

#include "ops/common/layout_attr.h"
#include "ops/common/tf_compat.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace freezeops {

// The shape of the variable that input `variable` is a handle of, as far as that tells it.
inline tensorflow::shape_inference::ShapeHandle VariableShape(tensorflow::shape_inference::InferenceContext* c,
                                                              int variable) {
  const auto* handle = c->input_handle_shapes_and_types(variable);
  return handle == nullptr || handle->empty() ? c->UnknownShape() : (*handle)[0].shape;
}

// A dense gradient of that variable.
inline absl::Status CheckGradientOf(tensorflow::shape_inference::InferenceContext* c, int variable,
                                    tensorflow::shape_inference::ShapeHandle gradient) {
  tensorflow::shape_inference::ShapeHandle unused;
  if (c->Merge(gradient, VariableShape(c, variable), &unused).ok()) return absl::OkStatus();
  return InvalidArgument("gradient must have the shape of the variable, ", c->DebugString(VariableShape(c, variable)),
                         ". Received: gradient of shape ", c->DebugString(gradient));
}

// The values of slices of that variable.
inline absl::Status CheckSlicesOf(tensorflow::shape_inference::InferenceContext* c, int variable,
                                  tensorflow::shape_inference::ShapeHandle values) {
  const auto shape = VariableShape(c, variable);
  if (!c->RankKnown(shape) || !c->RankKnown(values)) return absl::OkStatus();
  tensorflow::shape_inference::ShapeHandle row, row_of_values, unused;
  if (c->Rank(shape) == c->Rank(values) && c->Rank(shape) > 0 && c->Subshape(shape, 1, &row).ok() &&
      c->Subshape(values, 1, &row_of_values).ok() && c->Merge(row, row_of_values, &unused).ok()) {
    return absl::OkStatus();
  }
  return InvalidArgument("values must be rows of the variable, of shape ", c->DebugString(shape),
                         ". Received: values of shape ", c->DebugString(values));
}

// Input `index` is a packed mask of layout.kept bits.
inline absl::Status CheckMask(tensorflow::shape_inference::InferenceContext* c, int index, const MaskLayout& layout) {
  tensorflow::shape_inference::ShapeHandle shape;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(index), 1, &shape));
  tensorflow::shape_inference::DimensionHandle length;
  const absl::Status status = c->WithValue(c->Dim(shape, 0), mask_bytes(layout.kept), &length);
  if (!status.ok()) {
    return InvalidArgument("mask must have ", mask_bytes(layout.kept), " bytes, one bit for each of the ", layout.kept,
                           " kept indices of layout ", LayoutString(layout), ". Received: mask of shape ",
                           c->DebugString(shape));
  }
  return absl::OkStatus();
}

inline absl::Status CheckEntries(tensorflow::shape_inference::InferenceContext* c, const char* what,
                                 tensorflow::shape_inference::ShapeHandle shape, const MaskLayout& layout) {
  if (!c->RankKnown(shape)) return absl::OkStatus();
  const tensorflow::shape_inference::DimensionHandle count = c->NumElements(shape);
  if (c->ValueKnown(count) && c->Value(count) != entries(layout)) {
    return InvalidArgument(what, " must have the ", entries(layout), " entries of layout ", LayoutString(layout),
                           ". Received: ", what, " of shape ", c->DebugString(shape));
  }
  return absl::OkStatus();
}

// The variable's shape where the handle tells it.
inline absl::Status CheckVariable(tensorflow::shape_inference::InferenceContext* c, const MaskLayout& layout) {
  tensorflow::shape_inference::ShapeHandle unused;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 0, &unused));
  const auto* handle = c->input_handle_shapes_and_types(0);
  if (handle == nullptr || handle->empty()) return absl::OkStatus();
  const auto& value = (*handle)[0];
  tensorflow::DataType dtype;
  TF_RETURN_IF_ERROR(c->GetAttr("T", &dtype));
  if (value.dtype != tensorflow::DT_INVALID && value.dtype != dtype) {
    return InvalidArgument("variable must be of dtype ", tensorflow::DataTypeString(dtype),
                           ". Received: a variable of dtype ", tensorflow::DataTypeString(value.dtype));
  }
  return CheckEntries(c, "variable", value.shape, layout);
}

// Inputs `first` and on are the mask, its rank offsets and the indices of its trainable entries. Sets `compact` to the
// shape of what these name, flat.
inline absl::Status CheckTrainable(tensorflow::shape_inference::InferenceContext* c, int first,
                                   const MaskLayout& layout, tensorflow::shape_inference::ShapeHandle* compact) {
  TF_RETURN_IF_ERROR(CheckDoesNotRepeat(layout));
  TF_RETURN_IF_ERROR(CheckMask(c, first, layout));
  tensorflow::shape_inference::ShapeHandle offsets, indices;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(first + 1), 1, &offsets));
  tensorflow::shape_inference::DimensionHandle unused;
  if (!c->WithValue(c->Dim(offsets, 0), rank_blocks(layout.kept) + 1, &unused).ok()) {
    return InvalidArgument("offsets must have shape [", rank_blocks(layout.kept) + 1, "], one for each block of ",
                           kRankBlockBits, " of the mask's ", layout.kept,
                           " bits and their total. Received: offsets of shape ", c->DebugString(offsets));
  }
  TF_RETURN_IF_ERROR(c->WithRank(c->input(first + 2), 1, &indices));
  tensorflow::shape_inference::DimensionHandle length;
  TF_RETURN_IF_ERROR(c->Multiply(c->Dim(indices, 0), layout.inner, &length));
  *compact = c->Vector(length);
  return absl::OkStatus();
}

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_COMMON_SHAPE_CHECKS_H_
