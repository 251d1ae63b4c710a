// Operations on words of 64 entries with AVX2, BMI and BMI2: bits become lane masks, values are AND-ed
// or blended.

#ifndef FREEZEOPS_KERNELS_CPU_WORDS_AVX2_H_
#define FREEZEOPS_KERNELS_CPU_WORDS_AVX2_H_

#include <immintrin.h>

#include "kernels/cpu/words_scalar.h"

namespace freezeops {
namespace cpu {
namespace {

template <int kWidth>
struct Avx2Lanes;

template <>
struct Avx2Lanes<2> {
  static constexpr int kCount = 16;
  static FREEZEOPS_METHOD __m256i mask(uint64_t bits) {
    const __m256i lane_bits = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384,
                                                static_cast<int16_t>(0x8000));
    const __m256i all = _mm256_set1_epi16(static_cast<int16_t>(bits));
    return _mm256_cmpeq_epi16(_mm256_and_si256(all, lane_bits), lane_bits);
  }
};

template <>
struct Avx2Lanes<4> {
  static constexpr int kCount = 8;
  static FREEZEOPS_METHOD __m256i mask(uint64_t bits) {
    const __m256i lane_bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i all = _mm256_set1_epi32(static_cast<int32_t>(bits));
    return _mm256_cmpeq_epi32(_mm256_and_si256(all, lane_bits), lane_bits);
  }
};

template <>
struct Avx2Lanes<8> {
  static constexpr int kCount = 4;
  static FREEZEOPS_METHOD __m256i mask(uint64_t bits) {
    const __m256i lane_bits = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i all = _mm256_set1_epi64x(static_cast<int64_t>(bits));
    return _mm256_cmpeq_epi64(_mm256_and_si256(all, lane_bits), lane_bits);
  }
};

template <typename U>
FREEZEOPS_INLINE __m256i load(const U* data) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
}

template <typename U>
FREEZEOPS_INLINE void store(U* data, __m256i value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(data), value);
}

template <typename U>
struct Avx2Words : ScalarWords<U> {
  using L = Avx2Lanes<sizeof(U)>;

  static FREEZEOPS_METHOD void zero(U* data, uint64_t selected) {
    if (count_bits(selected) <= kFewBits) return ScalarWords<U>::zero_bits(data, selected);
    for (int i = 0; i < 64; i += L::kCount) {
      store(data + i, _mm256_andnot_si256(L::mask(selected >> i), load(data + i)));
    }
  }

  static FREEZEOPS_METHOD void copy(U* destination, const U* source, uint64_t selected) {
    if (count_bits(selected) <= kFewBits) return ScalarWords<U>::copy_bits(destination, source, selected);
    for (int i = 0; i < 64; i += L::kCount) {
      store(destination + i, _mm256_blendv_epi8(load(destination + i), load(source + i), L::mask(selected >> i)));
    }
  }

  static FREEZEOPS_METHOD void copy_or_zero(U* destination, const U* source, uint64_t zeroed) {
    for (int i = 0; i < 64; i += L::kCount) {
      store(destination + i, _mm256_andnot_si256(L::mask(zeroed >> i), load(source + i)));
    }
  }
};

}  // namespace
}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_WORDS_AVX2_H_
