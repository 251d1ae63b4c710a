// Name of the native kernel that XLA calls on the CPU; see xla_cpu.cc.

#ifndef FREEZEOPS_OPS_SAMPLED_MATMUL_XLA_CALLS_H_
#define FREEZEOPS_OPS_SAMPLED_MATMUL_XLA_CALLS_H_

#include "ops/common/xla_calls.h"

namespace freezeops {

inline constexpr char kSampledMatmulCall[] = "freezeops_sampled_matmul";

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_SAMPLED_MATMUL_XLA_CALLS_H_
