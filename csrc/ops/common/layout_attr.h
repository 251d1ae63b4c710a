// The `layout` attribute, [outer, kept, inner], read and checked in the same way by shape functions and kernels, and
// what must fit it.

#ifndef FREEZEOPS_OPS_COMMON_LAYOUT_ATTR_H_
#define FREEZEOPS_OPS_COMMON_LAYOUT_ATTR_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/str_join.h"
#include "absl/types/span.h"
#include "mask_layout.h"
#include "ops/common/tf_compat.h"
#include "tensorflow/core/framework/tensor_shape.h"
#include "tensorflow/core/framework/types.h"

namespace freezeops {

inline std::string LayoutString(const MaskLayout& layout) {
  return absl::StrCat("[", layout.outer, ", ", layout.kept, ", ", layout.inner, "]");
}

// The product of sizes, or -1 where one of them is negative or the product of those that are not zero has more than 63
// bits. What an op's caller says of sizes is multiplied here and nowhere else: so `entries` of a layout, and any part
// of it, cannot overflow.
inline int64_t ProductOf(absl::Span<const int64_t> sizes) {
  int64_t product = 1;
  bool empty = false;
  for (const int64_t size : sizes) {
    if (size < 0) return -1;
    if (size == 0) {
      empty = true;
    } else if (__builtin_mul_overflow(product, size, &product)) {
      return -1;
    }
  }
  return empty ? 0 : product;
}

inline absl::Status ParseLayout(const std::vector<int64_t>& values, MaskLayout* layout) {
  if (values.size() != 3 || ProductOf(values) < 0) {
    return InvalidArgument("layout must be three integers [outer, kept, inner], none negative, of fewer than 2^63 ",
                           "entries. Received: layout=[", absl::StrJoin(values, ", "), "]");
  }
  *layout = MaskLayout{values[0], values[1], values[2]};
  return absl::OkStatus();
}

// Of ops of compact state.
inline absl::Status CheckDoesNotRepeat(const MaskLayout& layout) {
  if (layout.outer == 1) return absl::OkStatus();
  return InvalidArgument("layout must be one that does not repeat, with outer = 1. Received: layout=",
                         LayoutString(layout));
}

// Reads and checks the attribute; Context has GetAttr (kernels, shape functions).
template <typename Context>
absl::Status GetLayout(Context* context, MaskLayout* layout) {
  std::vector<int64_t> values;
  absl::Status status = context->GetAttr("layout", &values);
  return status.ok() ? ParseLayout(values, layout) : status;
}

inline absl::Status CheckOffsets(const tensorflow::TensorShape& offsets, int64_t kept) {
  if (offsets.dims() == 1 && offsets.dim_size(0) == rank_blocks(kept) + 1) return absl::OkStatus();
  return InvalidArgument("offsets must have shape [", rank_blocks(kept) + 1, "], one for each block of ",
                         kRankBlockBits, " of the mask's ", kept, " bits and their total. Received: offsets of shape ",
                         offsets.DebugString());
}

// The indices of compact state: as many as its capacity. Sets `size` to the number of entries that these are of.
inline absl::Status CheckIndices(tensorflow::DataType dtype, const tensorflow::TensorShape& indices,
                                 const MaskLayout& layout, int64_t* size) {
  const bool integers =
      dtype == tensorflow::DT_INT32 || dtype == tensorflow::DT_UINT32 || dtype == tensorflow::DT_INT64;
  if (indices.dims() != 1 || !integers) {
    return InvalidArgument("indices must be a vector of int32, uint32 or int64. Received: indices of dtype ",
                           tensorflow::DataTypeString(dtype), " and shape ", indices.DebugString());
  }
  *size = ProductOf({indices.dim_size(0), layout.inner});
  if (*size >= 0) return absl::OkStatus();
  return InvalidArgument("indices must name fewer than 2^63 entries, ", layout.inner,
                         " each. Received: indices of shape ", indices.DebugString());
}

inline absl::Status CheckCompact(const tensorflow::TensorShape& compact, int64_t size) {
  if (compact.num_elements() == size) return absl::OkStatus();
  return InvalidArgument("compact must have the ", size, " entries of the indices. Received: compact of shape ",
                         compact.DebugString());
}

inline constexpr char kOffsetsMessage[] =
    "offsets and indices must be those of the mask, and no more entries trainable than there are indices.";

inline absl::Status CheckMask(const tensorflow::TensorShape& mask, const MaskLayout& layout) {
  if (mask.dims() == 1 && mask.dim_size(0) == mask_bytes(layout.kept)) return absl::OkStatus();
  // `repack` empties the masks that it replaces, so that no function goes on with them.
  const char* hint =
      mask.num_elements() == 0 ? "; a function that was traced before `repack` must be traced again" : "";
  return InvalidArgument("mask must have shape [", mask_bytes(layout.kept), "], one bit for each of the ", layout.kept,
                         " kept indices of layout ", LayoutString(layout), ". Received: mask of shape ",
                         mask.DebugString(), hint);
}

inline absl::Status CheckEntries(const char* what, const tensorflow::TensorShape& shape, const MaskLayout& layout) {
  if (shape.num_elements() == entries(layout)) return absl::OkStatus();
  return InvalidArgument(what, " must have the ", entries(layout), " entries of layout ", LayoutString(layout),
                         ". Received: ", what, " of shape ", shape.DebugString());
}

// Such as a dense gradient and what it is of.
inline absl::Status CheckSameShape(const char* what, const tensorflow::TensorShape& shape, const char* whose,
                                   const tensorflow::TensorShape& other) {
  if (shape == other) return absl::OkStatus();
  return InvalidArgument(what, " must have the shape of the ", whose, ", ", other.DebugString(), ". Received: ", what,
                         " of shape ", shape.DebugString());
}

inline absl::Status CheckRowPerIndex(const tensorflow::TensorShape& values, const tensorflow::TensorShape& indices) {
  if (values.dims() >= 1 && indices.dims() == 1 && values.dim_size(0) == indices.dim_size(0)) return absl::OkStatus();
  return InvalidArgument("values must have one row for each index. Received: values of shape ", values.DebugString(),
                         ", indices of shape ", indices.DebugString());
}

// The entries in a row of `values`, which has an axis; -1 where they are too many.
inline int64_t RowSize(const tensorflow::TensorShape& values) {
  return ProductOf(absl::MakeConstSpan(values.dim_sizes()).subspan(1));
}

// Values and indices of slices of a tensor of `rows` rows.
inline absl::Status CheckSlices(const tensorflow::TensorShape& values, const tensorflow::TensorShape& indices,
                                int64_t rows, const MaskLayout& layout) {
  TF_RETURN_IF_ERROR(CheckRowPerIndex(values, indices));
  if (ProductOf({rows, RowSize(values)}) == entries(layout)) return absl::OkStatus();
  return InvalidArgument("rows times the size of a row must be the ", entries(layout), " entries of layout ",
                         LayoutString(layout), ". Received: rows=", rows, ", values of shape ", values.DebugString());
}

// Rows of a gradient that is slices.
struct GradientRows {
  int64_t count;  // of the tensor that the slices are of
  int64_t width;
};

// Values and indices of slices of a tensor of this shape.
inline absl::Status CheckSlicesOf(const tensorflow::TensorShape& values, const tensorflow::TensorShape& indices,
                                  const char* whose, const tensorflow::TensorShape& shape, GradientRows* rows) {
  TF_RETURN_IF_ERROR(CheckRowPerIndex(values, indices));
  bool same = shape.dims() == values.dims();
  for (int i = 1; same && i < shape.dims(); ++i) same = shape.dim_size(i) == values.dim_size(i);
  if (!same || RowSize(values) < 0) {
    return InvalidArgument("values must be rows of the ", whose, ", of shape ", shape.DebugString(),
                           ". Received: values of shape ", values.DebugString());
  }
  *rows = {shape.dim_size(0), RowSize(values)};
  return absl::OkStatus();
}

// Reads and checks the attribute of RankTrainable.
template <typename Context>
absl::Status GetKept(Context* context, int64_t* kept) {
  TF_RETURN_IF_ERROR(context->GetAttr("kept", kept));
  if (*kept >= 0) return absl::OkStatus();
  return InvalidArgument("kept must not be negative. Received: kept=", *kept);
}

// The attributes of SeedSlots, and what must fit them.
struct SeedAttributes {
  int64_t size = 0;  // of each slot
  bool sparse = false;
  std::vector<int64_t> powers;

  // The number of slots.
  int count() const { return static_cast<int>(powers.size()); }

  absl::Status CheckShapes(const tensorflow::TensorShape& values, const tensorflow::TensorShape& indices,
                           const tensorflow::TensorShape& scales) const {
    if (scales.dims() != 1 || scales.dim_size(0) != count()) {
      return InvalidArgument("scales must be as many as slots, ", count(), ". Received: scales of shape ",
                             scales.DebugString());
    }
    if (indices.dims() != 1) {
      return InvalidArgument("indices must be a vector. Received: indices of shape ", indices.DebugString());
    }
    return sparse ? CheckRowPerIndex(values, indices) : CheckEntries("values", values, MaskLayout{1, size, 1});
  }

  absl::Status CheckBits(tensorflow::DataType dtype, const tensorflow::TensorShape& bits) const {
    if (dtype == tensorflow::DT_UINT8 && bits.dims() == 1 && bits.dim_size(0) == mask_bytes(size)) {
      return absl::OkStatus();
    }
    return InvalidArgument("unseeded must have one bit for each of ", size, " entries. Received: unseeded of ",
                           tensorflow::DataTypeString(dtype), " and shape ", bits.DebugString());
  }

  // `rows` is set where the gradient is slices.
  absl::Status CheckSlot(const tensorflow::TensorShape& slot, const tensorflow::TensorShape& values,
                         const tensorflow::TensorShape& indices, GradientRows* rows) const {
    TF_RETURN_IF_ERROR(CheckEntries("slots", slot, MaskLayout{1, size, 1}));
    if (sparse) return CheckSlicesOf(values, indices, "slots", slot, rows);
    return CheckSameShape("values", values, "slots", slot);
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

#endif  // FREEZEOPS_OPS_COMMON_LAYOUT_ATTR_H_
