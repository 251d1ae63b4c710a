// Names of the native kernels that XLA calls on the CPU; see xla_cpu.cc.

#ifndef FREEZEOPS_OPS_TRAINABLE_ENTRIES_XLA_CALLS_H_
#define FREEZEOPS_OPS_TRAINABLE_ENTRIES_XLA_CALLS_H_

#include "ops/common/xla_calls.h"

namespace freezeops {

inline constexpr char kGatherCall[] = "freezeops_gather_trainable";
inline constexpr char kGatherTwoCall[] = "freezeops_gather_two_trainable";
inline constexpr char kScatterCall[] = "freezeops_scatter_trainable";

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_TRAINABLE_ENTRIES_XLA_CALLS_H_
