// The operations of x86-64 with AVX2, FMA and F16C, by which the sampled matrix product is written, see
// sampled_kernels.h.

#ifndef FREEZEOPS_KERNELS_CPU_DOTS_AVX2_H_
#define FREEZEOPS_KERNELS_CPU_DOTS_AVX2_H_

#include <immintrin.h>
#include <stdint.h>

#include "kernels/common/dtypes.h"
#include "kernels/cpu/sums_avx2.h"
#include "kernels/cpu/vectors_avx2.h"

namespace freezeops {
namespace cpu {
namespace {

struct Avx2Dots {
  using Vector = __m256;
  static constexpr int kLanes = 8;
  static constexpr bool kKeepsX = false;

  static FREEZEOPS_METHOD Vector load(const float* floats) { return _mm256_loadu_ps(floats); }
  static FREEZEOPS_METHOD Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
  static FREEZEOPS_METHOD Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

  template <int kCount>
  static FREEZEOPS_METHOD void add_sums(float* sums, const Vector* vectors) {
    add_sums_of_eight<kCount>(sums, vectors);
  }

  template <Float kType>
  static FREEZEOPS_METHOD void transpose(float* to, int64_t to_stride, const typename EntryOf<kType>::Type* from,
                                         int64_t from_stride) {
    for (int row = 0; row < 16; row += 8) {
      for (int column = 0; column < 16; column += 8) {
        transpose_eight<kType>(to + column * to_stride + row, to_stride, from + row * from_stride + column,
                               from_stride);
      }
    }
  }

  // 8 x 8 entries.
  template <Float kType>
  static FREEZEOPS_METHOD void transpose_eight(float* to, int64_t to_stride, const typename EntryOf<kType>::Type* from,
                                               int64_t from_stride) {
    __m256 a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) a[i] = Format8<kType>::load(from + i * from_stride);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
      b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
      a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
      a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
      a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
      _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
  }
};

}  // namespace
}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_DOTS_AVX2_H_
