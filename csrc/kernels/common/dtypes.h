// From a width in bytes to the integers of that width.

#ifndef FREEZEOPS_KERNELS_COMMON_DTYPES_H_
#define FREEZEOPS_KERNELS_COMMON_DTYPES_H_

#include <stdint.h>

namespace freezeops {
namespace cuda {

// Calls work(U{}) for the unsigned integers U of `width` bytes.
template <typename Work>
int with_width(int width, const Work& work) {
  if (width == 2) return work(uint16_t{});
  if (width == 4) return work(uint32_t{});
  return work(uint64_t{});
}

// Calls work(Index{}).
template <typename Work>
int with_index(bool wide, const Work& work) {
  return wide ? work(int64_t{}) : work(int32_t{});
}

}  // namespace cuda
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_COMMON_DTYPES_H_
