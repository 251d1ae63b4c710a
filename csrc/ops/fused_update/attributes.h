// What the kernels of FusedUpdate (CPU, XLA, GPU) read from its attributes in the same way.

#ifndef FREEZEOPS_OPS_FUSED_UPDATE_ATTRIBUTES_H_
#define FREEZEOPS_OPS_FUSED_UPDATE_ATTRIBUTES_H_

#include <cstring>
#include <string>
#include <vector>

#include "kernels/cpu/fused.h"
#include "ops/common/layout_attr.h"
#include "ops/common/op_checks.h"
#include "tensorflow/core/framework/types.h"

namespace freezeops {

inline const NamedRule* FindRule(const std::string& name) {
  for (const NamedRule& rule : kNamedRules) {
    if (name == rule.name) return &rule;
  }
  return nullptr;
}

// The op's attributes, checked against each other; and where in its flat list of inputs each one is.
struct FusedAttributes {
  const NamedRule* rule = nullptr;
  tensorflow::DataType dtype = tensorflow::DT_INVALID;
  std::vector<MaskLayout> layouts;  // one for each variable
  std::vector<bool> decays;         // likewise
  bool compact = false;
  std::vector<int64_t> sparse;  // which variables have slices for gradients
  std::vector<int64_t> masked;  // which have a mask; every entry of the others is trainable
  std::vector<int64_t> seeded;  // which have entries that may wait to be seeded
  std::vector<int64_t> seed_slots, seed_powers;

  int count() const { return static_cast<int>(layouts.size()); }

  // Positions of inputs.
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

  // For each variable its number in a list of variables, or -1.
  std::vector<int> NumberIn(const std::vector<int64_t>& list) const {
    std::vector<int> numbers(count(), -1);
    for (int i = 0; i < Size(list); ++i) numbers[list[i]] = i;
    return numbers;
  }

  Seeds SeedsWith(const double* scales) const {
    Seeds seeds = {};
    seeds.count = Size(seed_slots);
    for (int i = 0; i < seeds.count; ++i) {
      seeds.slots[i] = rule->places[seed_slots[i]];
      seeds.powers[i] = static_cast<int>(seed_powers[i]);
      seeds.scales[i] = scales[i];
    }
    return seeds;
  }

  // What the kernels check in the same way, from shapes.
  absl::Status CheckNumbers(const tensorflow::TensorShape& scalars_shape,
                            const tensorflow::TensorShape& scales_shape) const {
    if (scalars_shape.dims() != 1 || scalars_shape.dim_size(0) != rule->scalars) {
      return InvalidArgument("scalars must be the ", rule->scalars, " of rule ", rule->name,
                             ". Received: scalars of shape ", scalars_shape.DebugString());
    }
    if (scales_shape.dims() == 1 && scales_shape.dim_size(0) == Size(seed_slots)) return absl::OkStatus();
    return InvalidArgument("scales must be as many as seed_slots, ", seed_slots.size(), ". Received: scales of shape ",
                           scales_shape.DebugString());
  }
  absl::Status CheckUnmasked(int i) const {
    if (layouts[i].kept == 1) return absl::OkStatus();
    return InvalidArgument("layout must be [1, 1, n] without a mask. Received: layout=", LayoutString(layouts[i]));
  }

  // `rows` is set where the gradient is slices, whose indices are of shape `indices`; null where it is dense.
  static absl::Status CheckGradient(const tensorflow::TensorShape& variable, const tensorflow::TensorShape& gradient,
                                    const tensorflow::TensorShape* indices, GradientRows* rows) {
    if (indices != nullptr) return CheckSlicesOf(gradient, *indices, "variable", variable, rows);
    return CheckSameShape("gradient", gradient, "variable", variable);
  }

  // Of compact state, for variable i. Sets the number of entries of each of its slots.
  absl::Status CheckIndex(int i, tensorflow::DataType offsets_dtype, const tensorflow::TensorShape& offsets_shape,
                          tensorflow::DataType indices_dtype, const tensorflow::TensorShape& indices_shape,
                          int64_t* slot_size) const {
    TF_RETURN_IF_ERROR(CheckOffsets(offsets_shape, layouts[i].kept));
    if (offsets_dtype != tensorflow::DT_INT64) {
      return InvalidArgument("offsets must be of dtype int64. Received: offsets of dtype ",
                             tensorflow::DataTypeString(offsets_dtype));
    }
    return CheckIndices(indices_dtype, indices_shape, layouts[i], slot_size);
  }

  static int Size(const std::vector<int64_t>& list) { return static_cast<int>(list.size()); }

  // All but the dtype as numbers, and back: for kernels that XLA calls.
  std::vector<int64_t> Encoded() const {
    std::vector<int64_t> numbers = {rule - kNamedRules, count(),      compact,         Size(sparse),
                                    Size(masked),       Size(seeded), Size(seed_slots)};
    for (const MaskLayout& layout : layouts) {
      numbers.insert(numbers.end(), {layout.outer, layout.kept, layout.inner});
    }
    numbers.insert(numbers.end(), decays.begin(), decays.end());
    for (const auto* list : {&sparse, &masked, &seeded, &seed_slots, &seed_powers}) {
      numbers.insert(numbers.end(), list->begin(), list->end());
    }
    return numbers;
  }
  static FusedAttributes Decoded(const int64_t* numbers) {
    FusedAttributes decoded;
    decoded.rule = kNamedRules + numbers[0];
    decoded.compact = numbers[2] != 0;
    const int64_t* next = numbers + 7;
    for (int64_t i = 0; i < numbers[1]; ++i, next += 3) decoded.layouts.push_back({next[0], next[1], next[2]});
    decoded.decays.assign(next, next + numbers[1]);
    next += numbers[1];
    const auto read = [&next](std::vector<int64_t>* list, int64_t size) {
      list->assign(next, next + size);
      next += size;
    };
    read(&decoded.sparse, numbers[3]);
    read(&decoded.masked, numbers[4]);
    read(&decoded.seeded, numbers[5]);
    read(&decoded.seed_slots, numbers[6]);
    read(&decoded.seed_powers, numbers[6]);
    return decoded;
  }
};

inline FusedType FusedTypeOf(tensorflow::DataType dtype) {
  switch (dtype) {
    case tensorflow::DT_HALF:
      return kFloat16;
    case tensorflow::DT_BFLOAT16:
      return kBfloat16;
    case tensorflow::DT_FLOAT:
      return kFloat32;
    default:
      return kFloat64;
  }
}

// Context has GetAttr (kernels, shape functions).
template <typename Context>
absl::Status GetFusedAttributes(Context* context, FusedAttributes* found) {
  std::string name;
  int32_t count = 0;
  std::vector<int64_t> layouts;
  TF_RETURN_IF_ERROR(context->GetAttr("rule", &name));
  TF_RETURN_IF_ERROR(context->GetAttr("T", &found->dtype));
  TF_RETURN_IF_ERROR(context->GetAttr("N", &count));
  TF_RETURN_IF_ERROR(context->GetAttr("layouts", &layouts));
  TF_RETURN_IF_ERROR(context->GetAttr("decays", &found->decays));
  TF_RETURN_IF_ERROR(context->GetAttr("compact", &found->compact));
  TF_RETURN_IF_ERROR(context->GetAttr("sparse", &found->sparse));
  TF_RETURN_IF_ERROR(context->GetAttr("masked", &found->masked));
  TF_RETURN_IF_ERROR(context->GetAttr("seeded", &found->seeded));
  TF_RETURN_IF_ERROR(context->GetAttr("seed_slots", &found->seed_slots));
  TF_RETURN_IF_ERROR(context->GetAttr("seed_powers", &found->seed_powers));
  found->rule = FindRule(name);
  if (found->rule == nullptr) return InvalidArgument("rule must be a known one. Received: rule=", name);
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
  const auto lengths = {
      std::make_pair("sparse", std::make_pair("S", &found->sparse)),
      std::make_pair("masked", std::make_pair("K", &found->masked)),
      std::make_pair("seeded", std::make_pair("U", &found->seeded)),
  };
  for (const auto& [what, list] : lengths) {
    int32_t length = 0;
    TF_RETURN_IF_ERROR(context->GetAttr(list.first, &length));
    int64_t last = -1;
    for (const int64_t i : *list.second) {
      if (i <= last || i >= count) last = count;
      last = std::max(last, i);
    }
    if (static_cast<int32_t>(list.second->size()) != length || last >= count) {
      return InvalidArgument(what, " must be ", length, " ascending positions of variables. Received: ", what, "=[",
                             absl::StrJoin(*list.second, ", "), "]");
    }
  }
  int32_t of_offsets = 0, of_slots = 0;
  TF_RETURN_IF_ERROR(context->GetAttr("C", &of_offsets));
  TF_RETURN_IF_ERROR(context->GetAttr("M", &of_slots));
  if (of_offsets != (found->compact ? count : 0) || of_slots != count * found->rule->slots ||
      (found->compact && static_cast<int32_t>(found->masked.size()) != count)) {
    return InvalidArgument("slots must be ", found->rule->slots, " for each of ", count,
                           " variables, with compact state also a mask, offsets and indices. Received: ", of_slots,
                           " slots, ", found->masked.size(), " masks, ", of_offsets, " offsets");
  }
  bool fine = found->seed_slots.size() == found->seed_powers.size();
  for (size_t i = 0; fine && i < found->seed_slots.size(); ++i) {
    fine = found->seed_slots[i] >= 0 && found->seed_slots[i] < found->rule->slots &&
           (found->seed_powers[i] == 1 || found->seed_powers[i] == 2);
  }
  if (!fine || static_cast<int>(found->seed_slots.size()) > found->rule->slots) {
    return InvalidArgument("seed_slots must be slots of the rule, with powers of 1 or 2. Received: seed_slots=[",
                           absl::StrJoin(found->seed_slots, ", "), "], seed_powers=[",
                           absl::StrJoin(found->seed_powers, ", "), "]");
  }
  return absl::OkStatus();
}

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_FUSED_UPDATE_ATTRIBUTES_H_
