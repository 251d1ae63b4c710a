// Names of what XLA calls on the CPU; see xla_cpu_calls.cc.

#ifndef FREEZEOPS_OPS_XLA_CPU_CALLS_H_
#define FREEZEOPS_OPS_XLA_CPU_CALLS_H_

namespace freezeops {

inline constexpr char kGatherCall[] = "freezeops_gather_trainable";
inline constexpr char kGatherTwoCall[] = "freezeops_gather_two_trainable";
inline constexpr char kScatterCall[] = "freezeops_scatter_trainable";
inline constexpr char kSeedCall[] = "freezeops_seed_slots";

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_XLA_CPU_CALLS_H_
