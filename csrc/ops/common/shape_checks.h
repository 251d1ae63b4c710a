// What the shape functions of op_defs.cc and fused_ops.cc check in the same way.

#ifndef FREEZEOPS_OPS_COMMON_SHAPE_CHECKS_H_
#define FREEZEOPS_OPS_COMMON_SHAPE_CHECKS_H_

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

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_COMMON_SHAPE_CHECKS_H_
