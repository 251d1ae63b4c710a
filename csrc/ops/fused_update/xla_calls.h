// The native kernel that XLA calls on the CPU, see xla_cpu.cc: its name, and the attributes as an operand.

#ifndef FREEZEOPS_OPS_FUSED_UPDATE_XLA_CALLS_H_
#define FREEZEOPS_OPS_FUSED_UPDATE_XLA_CALLS_H_

#include <cstdint>
#include <vector>

#include "ops/common/xla_calls.h"
#include "ops/fused_update/attributes.h"

namespace freezeops {

inline constexpr char kFusedCall[] = "freezeops_fused_update";

// Goes over the attributes (all but the dtype) as numbers, in one order for writing and reading. `number` takes an
// int64_t&, `list` a vector&.
template <typename Number, typename List>
void ForEachAttribute(FusedAttributes* a, const Number& number, const List& list) {
  int64_t rule = a->rule == nullptr ? 0 : a->rule - kNamedRules, compact = a->compact ? 1 : 0;
  number(&rule);
  number(&compact);
  std::vector<int64_t> layouts;
  for (const MaskLayout& layout : a->layouts) layouts.insert(layouts.end(), {layout.outer, layout.kept, layout.inner});
  std::vector<int64_t> decays(a->decays.begin(), a->decays.end());
  for (std::vector<int64_t>* each :
       {&layouts, &decays, &a->sparse, &a->masked, &a->seeded, &a->gathered, &a->seed_slots, &a->seed_powers}) {
    list(each);
  }
  a->rule = kNamedRules + rule;
  a->compact = compact != 0;
  a->layouts.clear();
  for (size_t i = 0; i + 3 <= layouts.size(); i += 3) {
    a->layouts.push_back({layouts[i], layouts[i + 1], layouts[i + 2]});
  }
  a->decays.assign(decays.begin(), decays.end());
}

// Each list after its length.
inline std::vector<int64_t> Encoded(FusedAttributes attributes) {
  std::vector<int64_t> numbers;
  ForEachAttribute(
      &attributes, [&](const int64_t* number) { numbers.push_back(*number); },
      [&](const std::vector<int64_t>* list) {
        numbers.push_back(static_cast<int64_t>(list->size()));
        numbers.insert(numbers.end(), list->begin(), list->end());
      });
  return numbers;
}

inline FusedAttributes Decoded(const int64_t* numbers) {
  FusedAttributes attributes;
  ForEachAttribute(
      &attributes, [&](int64_t* number) { *number = *numbers++; },
      [&](std::vector<int64_t>* list) {
        const int64_t length = *numbers++;
        list->assign(numbers, numbers + length);
        numbers += length;
      });
  return attributes;
}

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_FUSED_UPDATE_XLA_CALLS_H_
