// Sums of the lanes of several vectors at once, with AVX.

#ifndef FREEZEOPS_KERNELS_CPU_SUMS_AVX2_H_
#define FREEZEOPS_KERNELS_CPU_SUMS_AVX2_H_

#include <immintrin.h>
#include <stdint.h>

#include "mask_layout.h"

namespace freezeops {
namespace cpu {
namespace {

// In each half of 128 bits: the sums of the halves of a, b, c and d. (Shuffles and additions: hadd takes more.)
FREEZEOPS_INLINE __m256 sums_of_halves(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
}

FREEZEOPS_INLINE __m128 added_halves(__m256 halves) {
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

// sums[k] += the lanes of vectors[k], for kCount of 1 to 8. Nothing beside those sums is read or written: it may belong
// to another thread.
template <int kCount>
FREEZEOPS_INLINE void add_sums_of_eight(float* sums, const __m256* vectors) {
  if (kCount == 8) {
    const __m256 first = sums_of_halves(vectors[0], vectors[1 % kCount], vectors[2 % kCount], vectors[3 % kCount]);
    const __m256 second =
        sums_of_halves(vectors[4 % kCount], vectors[5 % kCount], vectors[6 % kCount], vectors[7 % kCount]);
    const __m256 all =
        _mm256_add_ps(_mm256_permute2f128_ps(first, second, 0x20), _mm256_permute2f128_ps(first, second, 0x31));
    _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_loadu_ps(sums), all));
  } else if (kCount >= 4) {
    const __m128 four =
        added_halves(sums_of_halves(vectors[0], vectors[1 % kCount], vectors[2 % kCount], vectors[3 % kCount]));
    _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), four));
    if (kCount > 4) add_sums_of_eight<kCount % 4 == 0 ? 1 : kCount % 4>(sums + 4, vectors + 4);
  } else if (kCount == 1) {
    __m128 sum = added_halves(vectors[0]);
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    sum = _mm_add_ss(sum, _mm_movehdup_ps(sum));
    _mm_store_ss(sums, _mm_add_ss(_mm_load_ss(sums), sum));
  } else {
    const __m256 zero = _mm256_setzero_ps();
    const __m128 some =
        added_halves(sums_of_halves(vectors[0], vectors[1 % kCount], kCount == 3 ? vectors[2 % kCount] : zero, zero));
    __m64* const pair = reinterpret_cast<__m64*>(sums);
    _mm_storel_pi(pair, _mm_add_ps(_mm_loadl_pi(_mm_setzero_ps(), pair), some));
    if (kCount == 3) _mm_store_ss(sums + 2, _mm_add_ss(_mm_load_ss(sums + 2), _mm_movehl_ps(some, some)));
  }
}

}  // namespace
}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_SUMS_AVX2_H_
