// The inputs of MaskGradient and MaskSlices.

#ifndef FREEZEOPS_OPS_MASK_GRADIENT_INPUTS_H_
#define FREEZEOPS_OPS_MASK_GRADIENT_INPUTS_H_

#include <cstdint>

#include "ops/common/checks.h"
#include "ops/common/layout_attr.h"

namespace freezeops {

template <typename Context>
absl::Status CheckMaskGradient(Context* ctx, const MaskLayout& layout) {
  PartialTensorShape gradient, mask;
  TF_RETURN_IF_ERROR(GetShape(ctx, 0, &gradient));
  TF_RETURN_IF_ERROR(GetShape(ctx, 1, &mask));
  TF_RETURN_IF_ERROR(CheckMask(mask, layout));
  return CheckEntries("gradient", gradient, layout);
}

// The attributes of MaskSlices. `rows`: those of the dense variable.
template <typename Context>
absl::Status GetSlicesAttributes(Context* context, MaskLayout* layout, int64_t* rows) {
  TF_RETURN_IF_ERROR(GetLayout(context, layout));
  TF_RETURN_IF_ERROR(context->GetAttr("rows", rows));
  if (*rows >= 0) return absl::OkStatus();
  return InvalidArgument("rows must not be negative. Received: rows=", *rows);
}

template <typename Context>
absl::Status CheckMaskSlices(Context* ctx, const MaskLayout& layout, int64_t rows) {
  PartialTensorShape values, indices, mask;
  TF_RETURN_IF_ERROR(GetShape(ctx, 0, &values));
  TF_RETURN_IF_ERROR(GetShape(ctx, 1, &indices));
  TF_RETURN_IF_ERROR(GetShape(ctx, 2, &mask));
  TF_RETURN_IF_ERROR(CheckMask(mask, layout));
  TF_RETURN_IF_ERROR(CheckRowPerIndex(values, indices));
  if (values.unknown_rank()) return absl::OkStatus();
  bool known = true;
  for (int i = 1; i < values.dims(); ++i) known = known && values.dim_size(i) >= 0;
  if (!known || ProductOf({rows, RowSize(values)}) == entries(layout)) return absl::OkStatus();
  return InvalidArgument("rows times the size of a row must be the ", entries(layout), " entries of layout ",
                         LayoutString(layout), ". Received: rows=", rows, ", values of shape ", values.DebugString());
}

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_MASK_GRADIENT_INPUTS_H_
