// The operations of x86-64 with AVX-512 (F, BW, DQ, VL), by which the sampled matrix product is written, see
// sampled_kernels.h.

#ifndef FREEZEOPS_KERNELS_CPU_DOTS_AVX512_H_
#define FREEZEOPS_KERNELS_CPU_DOTS_AVX512_H_

#include <immintrin.h>
#include <stdint.h>

#include "kernels/common/dtypes.h"
#include "kernels/cpu/sums_avx2.h"
#include "kernels/cpu/vectors_avx512.h"

namespace freezeops {
namespace cpu {
namespace {

struct Avx512Dots {
  using Vector = __m512;
  static constexpr int kLanes = 16;
  static constexpr bool kKeepsX = true;  // 16 of the 32 registers at most

  static FREEZEOPS_METHOD Vector load(const float* floats) { return _mm512_loadu_ps(floats); }
  static FREEZEOPS_METHOD Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
  static FREEZEOPS_METHOD Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

  template <int kCount>
  static FREEZEOPS_METHOD void add_sums(float* sums, const Vector* vectors) {
    __m256 halves[kCount];
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) {
      halves[k] = _mm256_add_ps(_mm512_castps512_ps256(vectors[k]), _mm512_extractf32x8_ps(vectors[k], 1));
    }
    add_sums_of_eight<kCount>(sums, halves);
  }

  template <Float kType>
  static FREEZEOPS_METHOD void transpose(float* to, int64_t to_stride, const typename EntryOf<kType>::Type* from,
                                         int64_t from_stride) {
    __m512 a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = Format16<kType>::load(from + i * from_stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
      a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
      a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
      a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    // Now a[4 * i + j] holds, for rows 4 * i to 4 * i + 3, columns j, 4 + j, 8 + j and 12 + j.
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512 low = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x44),
                   low_end = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xee);
      const __m512 high = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x44);
      const __m512 high_end = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xee);
      _mm512_storeu_ps(to + j * to_stride, _mm512_shuffle_f32x4(low, high, 0x88));
      _mm512_storeu_ps(to + (4 + j) * to_stride, _mm512_shuffle_f32x4(low, high, 0xdd));
      _mm512_storeu_ps(to + (8 + j) * to_stride, _mm512_shuffle_f32x4(low_end, high_end, 0x88));
      _mm512_storeu_ps(to + (12 + j) * to_stride, _mm512_shuffle_f32x4(low_end, high_end, 0xdd));
    }
  }
};

}  // namespace
}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_DOTS_AVX512_H_
