// Checks of inputs, each written once for shape functions, OpKernels and XLA kernels.
//
// Shapes are PartialTensorShape, to which a TensorShape converts: of what is not known yet nothing is refused. The
// checks of an op's inputs are templates over Context, for which GetShape(context, input, &shape) is declared:
// InferenceContext (shape_functions.h), OpKernelContext (op_kernels.h) and XlaOpKernelContext (xla_helpers.h).

#ifndef FREEZEOPS_OPS_COMMON_CHECKS_H_
#define FREEZEOPS_OPS_COMMON_CHECKS_H_

#include <cstdint>

#include "absl/types/span.h"
#include "mask_layout.h"
#include "ops/common/layout_attr.h"
#include "ops/common/tf_compat.h"
#include "tensorflow/core/framework/tensor_shape.h"
#include "tensorflow/core/framework/types.h"

namespace tensorflow {
class OpKernelContext;
class XlaOpKernelContext;
namespace shape_inference {
class InferenceContext;
}
}  // namespace tensorflow

namespace freezeops {

using tensorflow::PartialTensorShape;

// Declared here for the templates below.
inline absl::Status GetShape(tensorflow::shape_inference::InferenceContext* c, int input, PartialTensorShape* shape);
inline absl::Status GetShape(tensorflow::OpKernelContext* ctx, int input, PartialTensorShape* shape);
inline absl::Status GetShape(tensorflow::XlaOpKernelContext* ctx, int input, PartialTensorShape* shape);

// Returns whether a shape may be [size].
inline bool IsVector(const PartialTensorShape& shape, int64_t size) {
  return shape.unknown_rank() || (shape.dims() == 1 && (shape.dim_size(0) < 0 || shape.dim_size(0) == size));
}

// Returns whether a shape may be that of a vector.
inline bool IsVector(const PartialTensorShape& shape) { return shape.unknown_rank() || shape.dims() == 1; }

inline absl::Status CheckMask(const PartialTensorShape& mask, const MaskLayout& layout) {
  if (IsVector(mask, mask_bytes(layout.kept))) return absl::OkStatus();
  // `repack` empties the masks that it replaces, so that no function goes on with them.
  const char* hint =
      mask.num_elements() == 0 ? "; a function that was traced before `repack` must be traced again" : "";
  return InvalidArgument("mask must have shape [", mask_bytes(layout.kept), "], one bit for each of the ", layout.kept,
                         " kept indices of layout ", LayoutString(layout), ". Received: mask of shape ",
                         mask.DebugString(), hint);
}

// `name` is that of the input, for the error.
inline absl::Status CheckEntries(const char* name, const PartialTensorShape& shape, const MaskLayout& layout) {
  if (shape.num_elements() < 0 || shape.num_elements() == entries(layout)) return absl::OkStatus();
  return InvalidArgument(name, " must have the ", entries(layout), " entries of layout ", LayoutString(layout),
                         ". Received: ", name, " of shape ", shape.DebugString());
}

inline absl::Status CheckDtype(const char* name, tensorflow::DataType dtype, tensorflow::DataType wanted,
                               const PartialTensorShape& shape) {
  if (dtype == wanted) return absl::OkStatus();
  return InvalidArgument(name, " must be of dtype ", tensorflow::DataTypeString(wanted), ". Received: ", name,
                         " of dtype ", tensorflow::DataTypeString(dtype), " and shape ", shape.DebugString());
}

// A tensor of the shape of another: a dense gradient and its variable.
inline absl::Status CheckSameShape(const char* name, const PartialTensorShape& shape, const char* other_name,
                                   const PartialTensorShape& other) {
  if (shape.IsCompatibleWith(other)) return absl::OkStatus();
  return InvalidArgument(name, " must have the shape of the ", other_name, ", ", other.DebugString(),
                         ". Received: ", name, " of shape ", shape.DebugString());
}

// --- Slices: rows of a tensor, as in tf.IndexedSlices

// The rows of a tensor that slices are of.
struct GradientRows {
  int64_t count;
  int64_t width;  // entries of a row
};

// Returns the entries in a row of `values`, which has an axis and is fully known; -1 where they are too many.
inline int64_t RowSize(const PartialTensorShape& values) {
  return ProductOf(absl::MakeConstSpan(values.dim_sizes()).subspan(1));
}

inline absl::Status CheckRowPerIndex(const PartialTensorShape& values, const PartialTensorShape& indices) {
  const bool has_rows = values.unknown_rank() || values.dims() >= 1;
  const int64_t rows = values.dims() >= 1 ? values.dim_size(0) : -1;
  if (has_rows && (rows < 0 ? IsVector(indices) : IsVector(indices, rows))) return absl::OkStatus();
  return InvalidArgument("values must have one row for each index. Received: values of shape ", values.DebugString(),
                         ", indices of shape ", indices.DebugString());
}

// Slices of a tensor of this shape, whose name is for the error.
inline absl::Status CheckSlicesOf(const PartialTensorShape& values, const PartialTensorShape& indices, const char* name,
                                  const PartialTensorShape& shape) {
  TF_RETURN_IF_ERROR(CheckRowPerIndex(values, indices));
  if (values.unknown_rank() || shape.unknown_rank()) return absl::OkStatus();
  bool same = shape.dims() == values.dims();
  for (int i = 1; same && i < shape.dims(); ++i) {
    same = shape.dim_size(i) == values.dim_size(i) || shape.dim_size(i) < 0 || values.dim_size(i) < 0;
  }
  const bool too_large = values.IsFullyDefined() && values.dims() >= 1 && RowSize(values) < 0;
  if (same && shape.dims() >= 1 && !too_large) return absl::OkStatus();
  return InvalidArgument("values must be rows of the ", name, ", of shape ", shape.DebugString(),
                         ". Received: values of shape ", values.DebugString());
}

// The rows of a tensor of this shape, of which values were checked to be slices.
inline GradientRows RowsOf(const PartialTensorShape& shape, const PartialTensorShape& values) {
  return {shape.dim_size(0), RowSize(values)};
}

// --- Compact state: a mask, the ranks of its blocks, the positions of its ones

inline constexpr char kOffsetsMessage[] =
    "offsets and indices must be those of the mask, and no more entries trainable than there are indices.";

inline absl::Status CheckDoesNotRepeat(const MaskLayout& layout) {
  if (layout.outer == 1) return absl::OkStatus();
  return InvalidArgument("layout must be one that does not repeat, with outer = 1. Received: layout=",
                         LayoutString(layout));
}

inline absl::Status CheckOffsets(const PartialTensorShape& offsets, int64_t kept) {
  if (IsVector(offsets, rank_blocks(kept) + 1)) return absl::OkStatus();
  return InvalidArgument("offsets must have shape [", rank_blocks(kept) + 1, "], one for each block of ",
                         kRankBlockBits, " of the mask's ", kept, " bits and their total. Received: offsets of shape ",
                         offsets.DebugString());
}

// Sets `size` to the number of entries that the indices, as many as the capacity, are of: -1 where it is not known.
inline absl::Status CheckIndices(const PartialTensorShape& indices, const MaskLayout& layout, int64_t* size) {
  if (!IsVector(indices)) {
    return InvalidArgument("indices must be a vector. Received: indices of shape ", indices.DebugString());
  }
  *size = -1;
  if (!indices.IsFullyDefined()) return absl::OkStatus();
  *size = ProductOf({indices.dim_size(0), layout.inner});
  if (*size >= 0) return absl::OkStatus();
  return InvalidArgument("indices must name fewer than 2^63 entries, ", layout.inner,
                         " each. Received: indices of shape ", indices.DebugString());
}

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_COMMON_CHECKS_H_
