// The operations of any processor, by which the sampled matrix product is written, see sampled_kernels.h.

#ifndef FREEZEOPS_KERNELS_CPU_DOTS_GENERIC_H_
#define FREEZEOPS_KERNELS_CPU_DOTS_GENERIC_H_

#include <stdint.h>

#include "kernels/common/dtypes.h"

namespace freezeops {
namespace cpu {
namespace {

struct GenericDots {
  // Most processors have registers of four floats; for others the compiler takes them apart.
  typedef float Vector __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr bool kKeepsX = false;

  static FREEZEOPS_METHOD Vector load(const float* floats) {
    Vector loaded;
    __builtin_memcpy(&loaded, floats, sizeof(loaded));
    return loaded;
  }
  static FREEZEOPS_METHOD Vector multiply(Vector a, Vector b) { return a * b; }
  static FREEZEOPS_METHOD Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }

  template <int kCount>
  static FREEZEOPS_METHOD void add_sums(float* sums, const Vector* vectors) {
    for (int k = 0; k < kCount; ++k) {
      sums[k] += (vectors[k][0] + vectors[k][1]) + (vectors[k][2] + vectors[k][3]);
    }
  }

  template <Float kType>
  static FREEZEOPS_METHOD void transpose(float* to, int64_t to_stride, const typename EntryOf<kType>::Type* from,
                                         int64_t from_stride) {
    for (int column = 0; column < 16; ++column) {
      for (int row = 0; row < 16; ++row) {
        to[column * to_stride + row] = static_cast<float>(from[row * from_stride + column]);
      }
    }
  }
};

}  // namespace
}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_DOTS_GENERIC_H_
