// The attributes of FusedUpdate, checked against each other.

#ifndef FREEZEOPS_OPS_FUSED_UPDATE_ATTRIBUTES_H_
#define FREEZEOPS_OPS_FUSED_UPDATE_ATTRIBUTES_H_

#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_join.h"
#include "kernels/common/update_rules.h"
#include "ops/common/checks.h"
#include "ops/common/layout_attr.h"
#include "tensorflow/core/framework/types.h"

namespace freezeops {

inline const NamedRule* FindRule(const std::string& name) {
  for (const NamedRule& rule : kNamedRules) {
    if (name == rule.name) return &rule;
  }
  return nullptr;
}

// The attributes, and the position of each input in the op's flat list of inputs.
struct FusedAttributes {
  const NamedRule* rule = nullptr;
  tensorflow::DataType dtype = tensorflow::DT_INVALID;
  std::vector<MaskLayout> layouts;  // one for each variable
  std::vector<bool> decays;         // likewise
  bool compact = false;
  std::vector<int64_t> sparse;    // the variables whose gradients are slices
  std::vector<int64_t> masked;    // the variables with a mask; every entry of the others is trainable
  std::vector<int64_t> seeded;    // the variables with entries that may wait to be seeded
  std::vector<int64_t> gathered;  // the variables whose gradients are compact: of their trainable entries alone
  std::vector<int64_t> seed_slots, seed_powers;

  // The number of variables.
  int count() const { return static_cast<int>(layouts.size()); }

  // Positions of inputs. `number` counts the variables in `sparse`, `masked` or `seeded`.
  int variable(int i) const { return i; }
  int gradient(int i) const { return count() + i; }
  int rows(int number) const { return 2 * count() + number; }
  int slot(int i, int j) const { return 2 * count() + Size(sparse) + i * rule->slots + j; }
  int mask(int number) const { return slot(count(), 0) + number; }
  int offsets(int i) const { return mask(Size(masked)) + i; }
  int indices(int i) const { return offsets(compact ? count() : 0) + i; }
  int unseeded(int number) const { return indices(compact ? count() : 0) + number; }
  int scalars() const { return unseeded(Size(seeded)); }
  int scales() const { return scalars() + 1; }

  // Returns whether the gradient of variable i is compact.
  bool IsGathered(int i) const { return std::binary_search(gathered.begin(), gathered.end(), i); }

  // Returns for each variable its number in a list of variables, or -1.
  std::vector<int> NumberIn(const std::vector<int64_t>& list) const {
    std::vector<int> numbers(count(), -1);
    for (int i = 0; i < Size(list); ++i) numbers[list[i]] = i;
    return numbers;
  }

  template <typename Context>
  absl::Status CheckNumbers(Context* ctx) const {
    PartialTensorShape numbers;
    TF_RETURN_IF_ERROR(GetShape(ctx, scalars(), &numbers));
    if (!IsVector(numbers, rule->scalars)) {
      return InvalidArgument("scalars must be the ", rule->scalars, " of rule ", rule->name,
                             ". Received: scalars of shape ", numbers.DebugString());
    }
    TF_RETURN_IF_ERROR(GetShape(ctx, scales(), &numbers));
    if (IsVector(numbers, Size(seed_slots))) return absl::OkStatus();
    return InvalidArgument("scales must be as many as seed_slots, ", seed_slots.size(), ". Received: scales of shape ",
                           numbers.DebugString());
  }

  // Checks the gradient of variable i, which has number `sparse_number` in `sparse` or -1 for a dense one, against the
  // shape of the variable; a compact one against the number of entries of each slot, -1 where that is unknown.
  template <typename Context>
  absl::Status CheckGradient(Context* ctx, int i, int sparse_number, const PartialTensorShape& variable,
                             int64_t slot_size) const {
    PartialTensorShape values, named;
    TF_RETURN_IF_ERROR(GetShape(ctx, gradient(i), &values));
    if (IsGathered(i)) {
      const int64_t count = values.num_elements();
      if (count < 0 || slot_size < 0 || count == slot_size) return absl::OkStatus();
      return InvalidArgument("gradient must have an entry for each of a slot, ", slot_size,
                             ", where it is compact. Received: gradient of shape ", values.DebugString());
    }
    if (sparse_number < 0) return CheckSameShape("gradient", values, "variable", variable);
    TF_RETURN_IF_ERROR(GetShape(ctx, rows(sparse_number), &named));
    return CheckSlicesOf(values, named, "variable", variable);
  }

  absl::Status CheckUnmasked(int i) const {
    if (layouts[i].kept == 1) return absl::OkStatus();
    return InvalidArgument("layout must be [1, 1, n] without a mask. Received: layout=", LayoutString(layouts[i]));
  }

  // Compact state of variable i. Sets the number of entries of each of its slots.
  absl::Status CheckIndex(int i, tensorflow::DataType offsets_dtype, const PartialTensorShape& offsets,
                          tensorflow::DataType indices_dtype, const PartialTensorShape& indices,
                          int64_t* slot_size) const {
    TF_RETURN_IF_ERROR(CheckOffsets(offsets, layouts[i].kept));
    TF_RETURN_IF_ERROR(CheckDtype("offsets", offsets_dtype, tensorflow::DT_INT64, offsets));
    const bool integers = indices_dtype == tensorflow::DT_INT32 || indices_dtype == tensorflow::DT_UINT32 ||
                          indices_dtype == tensorflow::DT_INT64;
    if (!integers) {
      return InvalidArgument("indices must be of dtype int32, uint32 or int64. Received: indices of dtype ",
                             tensorflow::DataTypeString(indices_dtype), " and shape ", indices.DebugString());
    }
    return CheckIndices(indices, layouts[i], slot_size);
  }

  static int Size(const std::vector<int64_t>& list) { return static_cast<int>(list.size()); }
};

// --- Reading the attributes

// Checks that a list of variables ascends and has as many as the op has inputs for them.
inline absl::Status CheckPositions(const char* name, const std::vector<int64_t>& list, int32_t length, int32_t count) {
  int64_t last = -1;
  bool ascends = static_cast<int32_t>(list.size()) == length;
  for (const int64_t i : list) {
    ascends = ascends && i > last && i < count;
    last = i;
  }
  if (ascends) return absl::OkStatus();
  return InvalidArgument(name, " must be ", length, " ascending positions of variables. Received: ", name, "=[",
                         absl::StrJoin(list, ", "), "]");
}

// Compact gradients are those of compact state, and none is slices.
inline absl::Status CheckGathered(const FusedAttributes& a) {
  const auto is_sparse = [&a](int64_t i) { return std::binary_search(a.sparse.begin(), a.sparse.end(), i); };
  const bool sparse = std::any_of(a.gathered.begin(), a.gathered.end(), is_sparse);
  if (a.gathered.empty() || (a.compact && !sparse)) return absl::OkStatus();
  return InvalidArgument("gathered must be variables with compact state and not in sparse. Received: gathered=[",
                         absl::StrJoin(a.gathered, ", "), "], sparse=[", absl::StrJoin(a.sparse, ", "),
                         "], compact=", a.compact);
}

inline absl::Status CheckSeeds(const FusedAttributes& a) {
  bool fine = a.seed_slots.size() == a.seed_powers.size() && FusedAttributes::Size(a.seed_slots) <= a.rule->slots;
  for (size_t i = 0; fine && i < a.seed_slots.size(); ++i) {
    fine = a.seed_slots[i] >= 0 && a.seed_slots[i] < a.rule->slots && (a.seed_powers[i] == 1 || a.seed_powers[i] == 2);
  }
  if (fine) return absl::OkStatus();
  return InvalidArgument("seed_slots must be slots of the rule, with powers of 1 or 2. Received: seed_slots=[",
                         absl::StrJoin(a.seed_slots, ", "), "], seed_powers=[", absl::StrJoin(a.seed_powers, ", "),
                         "]");
}

// Reads and checks the layouts of `count` variables and which of them decay.
template <typename Context>
absl::Status GetVariables(Context* context, int32_t count, FusedAttributes* found) {
  std::vector<int64_t> layouts;
  TF_RETURN_IF_ERROR(context->GetAttr("layouts", &layouts));
  TF_RETURN_IF_ERROR(context->GetAttr("decays", &found->decays));
  if (static_cast<int32_t>(layouts.size()) != 3 * count || static_cast<int32_t>(found->decays.size()) != count) {
    return InvalidArgument("layouts and decays must have three numbers and one for each of ", count,
                           " variables. Received: ", layouts.size(), " and ", found->decays.size());
  }
  for (int32_t i = 0; i < count; ++i) {
    MaskLayout layout;
    TF_RETURN_IF_ERROR(ParseLayout({layouts.begin() + 3 * i, layouts.begin() + 3 * i + 3}, &layout));
    if (found->compact) TF_RETURN_IF_ERROR(CheckDoesNotRepeat(layout));
    found->layouts.push_back(layout);
  }
  return absl::OkStatus();
}

// Reads and checks all attributes. Context: one with GetAttr, of a kernel or a shape function.
template <typename Context>
absl::Status GetFusedAttributes(Context* context, FusedAttributes* found) {
  std::string name;
  int32_t count = 0, sparse = 0, masked = 0, seeded = 0, offsets = 0, slots = 0;
  TF_RETURN_IF_ERROR(context->GetAttr("N", &count));
  TF_RETURN_IF_ERROR(context->GetAttr("S", &sparse));
  TF_RETURN_IF_ERROR(context->GetAttr("K", &masked));
  TF_RETURN_IF_ERROR(context->GetAttr("U", &seeded));
  TF_RETURN_IF_ERROR(context->GetAttr("C", &offsets));
  TF_RETURN_IF_ERROR(context->GetAttr("M", &slots));
  TF_RETURN_IF_ERROR(context->GetAttr("T", &found->dtype));
  TF_RETURN_IF_ERROR(context->GetAttr("rule", &name));
  TF_RETURN_IF_ERROR(context->GetAttr("compact", &found->compact));
  TF_RETURN_IF_ERROR(context->GetAttr("sparse", &found->sparse));
  TF_RETURN_IF_ERROR(context->GetAttr("masked", &found->masked));
  TF_RETURN_IF_ERROR(context->GetAttr("seeded", &found->seeded));
  TF_RETURN_IF_ERROR(context->GetAttr("gathered", &found->gathered));
  TF_RETURN_IF_ERROR(context->GetAttr("seed_slots", &found->seed_slots));
  TF_RETURN_IF_ERROR(context->GetAttr("seed_powers", &found->seed_powers));
  found->rule = FindRule(name);
  if (found->rule == nullptr) return InvalidArgument("rule must be a known one. Received: rule=", name);
  TF_RETURN_IF_ERROR(GetVariables(context, count, found));
  TF_RETURN_IF_ERROR(CheckPositions("sparse", found->sparse, sparse, count));
  TF_RETURN_IF_ERROR(CheckPositions("masked", found->masked, masked, count));
  TF_RETURN_IF_ERROR(CheckPositions("seeded", found->seeded, seeded, count));
  TF_RETURN_IF_ERROR(CheckPositions("gathered", found->gathered, FusedAttributes::Size(found->gathered), count));
  TF_RETURN_IF_ERROR(CheckGathered(*found));
  if (offsets != (found->compact ? count : 0) || slots != count * found->rule->slots ||
      (found->compact && masked != count)) {
    return InvalidArgument("slots must be ", found->rule->slots, " for each of ", count,
                           " variables, with compact state also a mask, offsets and indices. Received: ", slots,
                           " slots, ", masked, " masks, ", offsets, " offsets");
  }
  return CheckSeeds(*found);
}

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_FUSED_UPDATE_ATTRIBUTES_H_
