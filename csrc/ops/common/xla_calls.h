// Says whether XLA can call native kernels on the CPU.

#ifndef FREEZEOPS_OPS_COMMON_XLA_CALLS_H_
#define FREEZEOPS_OPS_COMMON_XLA_CALLS_H_

namespace freezeops {

// TensorFlow 2.19's include folder lacks the header for such calls; there HLO does the work.
#if __has_include("xla/ffi/api/ffi.h")
#define FREEZEOPS_HAVE_XLA_CALLS 1
inline constexpr bool kHaveXlaCalls = true;
#else
inline constexpr bool kHaveXlaCalls = false;
#endif

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_COMMON_XLA_CALLS_H_
