// The attributes as the CPU kernels take them, for the OpKernel and for XLA's call.

#ifndef FREEZEOPS_OPS_FUSED_UPDATE_CPU_STEP_H_
#define FREEZEOPS_OPS_FUSED_UPDATE_CPU_STEP_H_

#include "kernels/cpu/kernels.h"
#include "ops/fused_update/attributes.h"

namespace freezeops {

inline cpu::Seeds SeedsOf(const FusedAttributes& a, const double* scales) {
  cpu::Seeds seeds = {};
  seeds.count = FusedAttributes::Size(a.seed_slots);
  for (int i = 0; i < seeds.count; ++i) {
    seeds.slots[i] = a.rule->slot_positions[a.seed_slots[i]];
    seeds.powers[i] = static_cast<int>(a.seed_powers[i]);
    seeds.scales[i] = scales[i];
  }
  return seeds;
}

// The bits of variables without a mask, which have one bit.
inline constexpr uint8_t kAllTrainable = 0xff;

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_FUSED_UPDATE_CPU_STEP_H_
