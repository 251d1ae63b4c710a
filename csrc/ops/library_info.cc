// Plain C functions that the loader's diagnosis reads through ctypes.

#include "kernels/kernels.h"

#define FREEZEOPS_EXPORT extern "C" __attribute__((visibility("default")))

// The instruction set that the kernels were chosen for.
FREEZEOPS_EXPORT const char* freezeops_isa() { return freezeops::cpu_kernels().isa; }
