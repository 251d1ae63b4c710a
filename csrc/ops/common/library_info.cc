// Plain C functions that the loader's diagnosis reads through ctypes.

#include "kernels/cpu/kernels.h"
#if defined(FREEZEOPS_HAVE_CUDA)
#include "kernels/cuda/kernels.h"
#endif

#define FREEZEOPS_EXPORT extern "C" __attribute__((visibility("default")))

// The instruction set that the kernels were chosen for.
FREEZEOPS_EXPORT const char* freezeops_isa() { return freezeops::cpu::kernels().isa; }

// The versions of CUDA that the driver supports and that the kernels were compiled for, as 1000 * major + 10 * minor; 0
// where there is no driver, or no CUDA kernel in this library. Neither needs a driver.
FREEZEOPS_EXPORT int freezeops_cuda_driver_version() {
#if defined(FREEZEOPS_HAVE_CUDA)
  return freezeops::cuda::driver_version();
#else
  return 0;
#endif
}

FREEZEOPS_EXPORT int freezeops_cuda_runtime_version() {
#if defined(FREEZEOPS_HAVE_CUDA)
  return freezeops::cuda::runtime_version();
#else
  return 0;
#endif
}
