// The attributes and the inputs of SeedSlots.

#ifndef FREEZEOPS_OPS_SEED_SLOTS_INPUTS_H_
#define FREEZEOPS_OPS_SEED_SLOTS_INPUTS_H_

#include <cstdint>
#include <vector>

#include "absl/strings/str_join.h"
#include "ops/common/checks.h"

namespace freezeops {

struct SeedAttributes {
  int64_t size = 0;  // of each slot
  bool sparse = false;
  std::vector<int64_t> powers;

  // The number of slots.
  int count() const { return static_cast<int>(powers.size()); }

  // Inputs 1 to 3 are the gradient's values, their indices and the scales.
  template <typename Context>
  absl::Status CheckInputs(Context* ctx) const {
    PartialTensorShape values, indices, scales;
    TF_RETURN_IF_ERROR(GetShape(ctx, 1, &values));
    TF_RETURN_IF_ERROR(GetShape(ctx, 2, &indices));
    TF_RETURN_IF_ERROR(GetShape(ctx, 3, &scales));
    if (!IsVector(scales, count())) {
      return InvalidArgument("scales must be as many as slots, ", count(), ". Received: scales of shape ",
                             scales.DebugString());
    }
    if (!IsVector(indices)) {
      return InvalidArgument("indices must be a vector. Received: indices of shape ", indices.DebugString());
    }
    return sparse ? CheckRowPerIndex(values, indices) : CheckEntries("values", values, MaskLayout{1, size, 1});
  }

  absl::Status CheckBits(tensorflow::DataType dtype, const PartialTensorShape& bits) const {
    if (dtype == tensorflow::DT_UINT8 && IsVector(bits, mask_bytes(size))) return absl::OkStatus();
    return InvalidArgument("unseeded must have one bit for each of ", size, " entries. Received: unseeded of ",
                           tensorflow::DataTypeString(dtype), " and shape ", bits.DebugString());
  }

  // Sets `rows` where the gradient is slices.
  template <typename Context>
  absl::Status CheckSlot(Context* ctx, const PartialTensorShape& slot, GradientRows* rows) const {
    PartialTensorShape values, indices;
    TF_RETURN_IF_ERROR(GetShape(ctx, 1, &values));
    TF_RETURN_IF_ERROR(GetShape(ctx, 2, &indices));
    TF_RETURN_IF_ERROR(CheckEntries("slots", slot, MaskLayout{1, size, 1}));
    if (!sparse) return CheckSameShape("values", values, "slots", slot);
    TF_RETURN_IF_ERROR(CheckSlicesOf(values, indices, "slots", slot));
    *rows = RowsOf(slot, values);
    return absl::OkStatus();
  }
};

template <typename Context>
absl::Status GetSeedAttributes(Context* context, SeedAttributes* found) {
  int32_t slots = 0;
  TF_RETURN_IF_ERROR(context->GetAttr("N", &slots));
  TF_RETURN_IF_ERROR(context->GetAttr("size", &found->size));
  TF_RETURN_IF_ERROR(context->GetAttr("sparse", &found->sparse));
  TF_RETURN_IF_ERROR(context->GetAttr("powers", &found->powers));
  bool fine = found->size >= 0 && found->count() == slots;
  for (const int64_t power : found->powers) fine = fine && (power == 1 || power == 2);
  if (fine) return absl::OkStatus();
  return InvalidArgument("powers must be 1 or 2 for each of the ", slots,
                         " slots, and size not negative. Received: powers=[", absl::StrJoin(found->powers, ", "),
                         "], size=", found->size);
}

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_SEED_SLOTS_INPUTS_H_
