// Helpers of shape functions: shapes as far as they are known.

#ifndef FREEZEOPS_OPS_COMMON_SHAPE_FUNCTIONS_H_
#define FREEZEOPS_OPS_COMMON_SHAPE_FUNCTIONS_H_

#include <vector>

#include "ops/common/checks.h"
#include "ops/common/tf_compat.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/framework/types.h"

namespace freezeops {

inline absl::Status GetShape(tensorflow::shape_inference::InferenceContext* c,
                             tensorflow::shape_inference::ShapeHandle handle, PartialTensorShape* shape) {
  *shape = PartialTensorShape();
  if (!c->RankKnown(handle)) return absl::OkStatus();
  std::vector<int64_t> sizes;
  for (int i = 0; i < c->Rank(handle); ++i) {
    sizes.push_back(c->ValueKnown(c->Dim(handle, i)) ? c->Value(c->Dim(handle, i)) : -1);
  }
  return PartialTensorShape::BuildPartialTensorShape(sizes, shape);
}

inline absl::Status GetShape(tensorflow::shape_inference::InferenceContext* c, int input, PartialTensorShape* shape) {
  return GetShape(c, c->input(input), shape);
}

// The dtype and the shape of the variable that an input is a handle of, as far as the handle tells them.
inline absl::Status GetVariable(tensorflow::shape_inference::InferenceContext* c, int input,
                                tensorflow::DataType* dtype, PartialTensorShape* shape) {
  *dtype = tensorflow::DT_INVALID;
  *shape = PartialTensorShape();
  const auto* handle = c->input_handle_shapes_and_types(input);
  if (handle == nullptr || handle->empty()) return absl::OkStatus();
  *dtype = (*handle)[0].dtype;
  return GetShape(c, (*handle)[0].shape, shape);
}

// Input 0 is a variable of the op's dtype T with a layout's entries. Sets `shape` as GetVariable does.
inline absl::Status CheckVariable(tensorflow::shape_inference::InferenceContext* c, const MaskLayout& layout,
                                  PartialTensorShape* shape) {
  tensorflow::DataType dtype, wanted;
  TF_RETURN_IF_ERROR(c->GetAttr("T", &wanted));
  TF_RETURN_IF_ERROR(GetVariable(c, 0, &dtype, shape));
  if (dtype != tensorflow::DT_INVALID) TF_RETURN_IF_ERROR(CheckDtype("variable", dtype, wanted, *shape));
  return CheckEntries("variable", *shape, layout);
}

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_COMMON_SHAPE_FUNCTIONS_H_
