// The inputs of SampledMatmul.

#ifndef FREEZEOPS_OPS_SAMPLED_MATMUL_INPUTS_H_
#define FREEZEOPS_OPS_SAMPLED_MATMUL_INPUTS_H_

#include <algorithm>
#include <cstdint>

#include "ops/common/checks.h"

namespace freezeops {

// Sizes of a call; -1 where one is not known.
struct SampledSizes {
  int64_t tokens = -1;
  int64_t rows = -1;
  int64_t columns = -1;
  int64_t capacity = -1;
};

// Inputs are x, dy, visits and indices.
template <typename Context>
absl::Status CheckSampled(Context* ctx, SampledSizes* sizes) {
  PartialTensorShape x, dy, visits, indices;
  TF_RETURN_IF_ERROR(GetShape(ctx, 0, &x));
  TF_RETURN_IF_ERROR(GetShape(ctx, 1, &dy));
  TF_RETURN_IF_ERROR(GetShape(ctx, 2, &visits));
  TF_RETURN_IF_ERROR(GetShape(ctx, 3, &indices));
  const bool matrices = (x.unknown_rank() || x.dims() == 2) && (dy.unknown_rank() || dy.dims() == 2);
  const bool known = matrices && !x.unknown_rank() && !dy.unknown_rank();
  if (known) *sizes = {std::max(x.dim_size(0), dy.dim_size(0)), x.dim_size(1), dy.dim_size(1), -1};
  const bool as_many = !known || x.dim_size(0) < 0 || dy.dim_size(0) < 0 || x.dim_size(0) == dy.dim_size(0);
  if (!matrices || !as_many) {
    return InvalidArgument("x and dy must be matrices with a row for each token. Received: x of shape ",
                           x.DebugString(), ", dy of shape ", dy.DebugString());
  }
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  if (sizes->rows > kMost || sizes->columns > kMost) {
    return InvalidArgument("x and dy must have fewer than 2^31 columns. Received: x of shape ", x.DebugString(),
                           ", dy of shape ", dy.DebugString());
  }
  if (!IsVector(visits)) {
    return InvalidArgument("visits must be a vector. Received: visits of shape ", visits.DebugString());
  }
  return CheckIndices(indices, MaskLayout{1, 0, 1}, &sizes->capacity);
}

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_SAMPLED_MATMUL_INPUTS_H_
