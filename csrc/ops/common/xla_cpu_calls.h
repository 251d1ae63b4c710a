// Names of what XLA calls on the CPU; see xla_cpu_calls.cc.

#ifndef FREEZEOPS_OPS_COMMON_XLA_CPU_CALLS_H_
#define FREEZEOPS_OPS_COMMON_XLA_CPU_CALLS_H_

namespace freezeops {

// TensorFlow 2.19's include folder lacks the header for such calls; there HLO does the work.
#if __has_include("xla/ffi/api/ffi.h")
#define FREEZEOPS_HAVE_XLA_CALLS 1
inline constexpr bool kHaveXlaCalls = true;
#else
inline constexpr bool kHaveXlaCalls = false;
#endif

inline constexpr char kGatherCall[] = "freezeops_gather_trainable";
inline constexpr char kGatherTwoCall[] = "freezeops_gather_two_trainable";
inline constexpr char kScatterCall[] = "freezeops_scatter_trainable";
inline constexpr char kSeedCall[] = "freezeops_seed_slots";
inline constexpr char kFusedCall[] = "freezeops_fused_update";

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_COMMON_XLA_CPU_CALLS_H_
