// The vector types of fused updates for AVX2 and F16C: 8 lanes of float (also for 16-bit floats), 4 of double.

#ifndef FREEZEOPS_KERNELS_CPU_VECTORS_AVX2_H_
#define FREEZEOPS_KERNELS_CPU_VECTORS_AVX2_H_

#include <immintrin.h>
#include <stdint.h>

#include "kernels/common/vectors_scalar.h"

namespace freezeops {
namespace cpu {
namespace {

// All bits set in the lanes of the set bits.
FREEZEOPS_INLINE __m256i spread8(uint32_t lanes) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(lanes)), each), each);
}

FREEZEOPS_INLINE void store_blended(void* entries, uint32_t lanes, __m128i values) {
  const __m128i each = _mm_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128);
  const __m128i mask = _mm_cmpeq_epi16(_mm_and_si128(_mm_set1_epi16(static_cast<short>(lanes)), each), each);
  __m128i* const to = static_cast<__m128i*>(entries);
  _mm_storeu_si128(to, _mm_blendv_epi8(_mm_loadu_si128(to), values, mask));
}

// Conversion of entries to floats and back; `rounded` is applied after each operation.
template <Float kType>
struct Format8;

template <>
struct Format8<Float::kFloat32> {
  static __m256 load(const void* entries) { return _mm256_loadu_ps(static_cast<const float*>(entries)); }
  static void store(void* entries, __m256 values) { _mm256_storeu_ps(static_cast<float*>(entries), values); }
  static void store(void* entries, uint32_t lanes, __m256 values) {
    _mm256_maskstore_ps(static_cast<float*>(entries), spread8(lanes), values);
  }
  static __m256 rounded(__m256 values) { return values; }
};

template <>
struct Format8<Float::kFloat16> {
  static constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT;
  static __m256 load(const void* entries) {
    return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(entries)));
  }
  static void store(void* entries, __m256 values) {
    _mm_storeu_si128(static_cast<__m128i*>(entries), _mm256_cvtps_ph(values, kNearest));
  }
  static void store(void* entries, uint32_t lanes, __m256 values) {
    store_blended(entries, lanes, _mm256_cvtps_ph(values, kNearest));
  }
  static __m256 rounded(__m256 values) { return _mm256_cvtph_ps(_mm256_cvtps_ph(values, kNearest)); }
};

template <>
struct Format8<Float::kBfloat16> {
  static __m256 load(const void* entries) {
    const __m128i bits = _mm_loadu_si128(static_cast<const __m128i*>(entries));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  // Values are rounded already.
  static __m128i narrowed(__m256 values) {
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(values), 16);
    const __m256i packed = _mm256_packus_epi32(high, high);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
  static void store(void* entries, __m256 values) {
    _mm_storeu_si128(static_cast<__m128i*>(entries), narrowed(values));
  }
  static void store(void* entries, uint32_t lanes, __m256 values) { store_blended(entries, lanes, narrowed(values)); }
  static __m256 rounded(__m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 is_nan = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
    const __m256 chosen = _mm256_blendv_ps(_mm256_castsi256_ps(up), _mm256_castsi256_ps(quiet), is_nan);
    return _mm256_and_ps(chosen, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xffff0000))));
  }
};

template <Float kType>
struct Avx2Vector {
  using Entry = typename EntryOf<kType>::Type;
  using Format = Format8<kType>;
  static constexpr int kLanes = 8;
  static constexpr bool kExpands = false;
  __m256 values;

  static Avx2Vector of(__m256 values) { return {Format::rounded(values)}; }
  static Avx2Vector set(Entry entry) { return {_mm256_set1_ps(static_cast<float>(entry))}; }
  static Avx2Vector load(const Entry* entries) { return {Format::load(entries)}; }
  void store(Entry* entries) const { Format::store(entries, values); }
  void store(Entry* entries, uint32_t lanes) const { Format::store(entries, lanes, values); }

  friend Avx2Vector operator+(Avx2Vector a, Avx2Vector b) { return of(_mm256_add_ps(a.values, b.values)); }
  friend Avx2Vector operator-(Avx2Vector a, Avx2Vector b) { return of(_mm256_sub_ps(a.values, b.values)); }
  friend Avx2Vector operator*(Avx2Vector a, Avx2Vector b) { return of(_mm256_mul_ps(a.values, b.values)); }
  friend Avx2Vector operator/(Avx2Vector a, Avx2Vector b) { return of(_mm256_div_ps(a.values, b.values)); }
  friend Avx2Vector square_root(Avx2Vector a) { return of(_mm256_sqrt_ps(a.values)); }
  // NaN wherever one of the two is: the processor takes the second one then.
  friend Avx2Vector maximum(Avx2Vector a, Avx2Vector b) {
    const __m256 larger = _mm256_max_ps(a.values, b.values);
    return {_mm256_blendv_ps(larger, a.values, _mm256_cmp_ps(a.values, a.values, _CMP_UNORD_Q))};
  }
  friend Avx2Vector sign_of(Avx2Vector a) {
    const __m256 zero = _mm256_setzero_ps(), one = _mm256_set1_ps(1.0f), minus_one = _mm256_set1_ps(-1.0f);
    __m256 sign = _mm256_blendv_ps(a.values, zero, _mm256_cmp_ps(a.values, zero, _CMP_EQ_OQ));
    sign = _mm256_blendv_ps(sign, one, _mm256_cmp_ps(a.values, zero, _CMP_GT_OQ));
    return {_mm256_blendv_ps(sign, minus_one, _mm256_cmp_ps(a.values, zero, _CMP_LT_OQ))};
  }
};

template <>
struct Avx2Vector<Float::kFloat64> {
  using Entry = double;
  static constexpr int kLanes = 4;
  static constexpr bool kExpands = false;
  __m256d values;

  static Avx2Vector set(double entry) { return {_mm256_set1_pd(entry)}; }
  static Avx2Vector load(const double* entries) { return {_mm256_loadu_pd(entries)}; }
  void store(double* entries) const { _mm256_storeu_pd(entries, values); }
  void store(double* entries, uint32_t lanes) const {
    const __m256i each = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i mask =
        _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(static_cast<int64_t>(lanes)), each), each);
    _mm256_maskstore_pd(entries, mask, values);
  }

  friend Avx2Vector operator+(Avx2Vector a, Avx2Vector b) { return {_mm256_add_pd(a.values, b.values)}; }
  friend Avx2Vector operator-(Avx2Vector a, Avx2Vector b) { return {_mm256_sub_pd(a.values, b.values)}; }
  friend Avx2Vector operator*(Avx2Vector a, Avx2Vector b) { return {_mm256_mul_pd(a.values, b.values)}; }
  friend Avx2Vector operator/(Avx2Vector a, Avx2Vector b) { return {_mm256_div_pd(a.values, b.values)}; }
  friend Avx2Vector square_root(Avx2Vector a) { return {_mm256_sqrt_pd(a.values)}; }
  friend Avx2Vector maximum(Avx2Vector a, Avx2Vector b) {
    const __m256d larger = _mm256_max_pd(a.values, b.values);
    return {_mm256_blendv_pd(larger, a.values, _mm256_cmp_pd(a.values, a.values, _CMP_UNORD_Q))};
  }
  friend Avx2Vector sign_of(Avx2Vector a) {
    const __m256d zero = _mm256_setzero_pd(), one = _mm256_set1_pd(1.0), minus_one = _mm256_set1_pd(-1.0);
    __m256d sign = _mm256_blendv_pd(a.values, zero, _mm256_cmp_pd(a.values, zero, _CMP_EQ_OQ));
    sign = _mm256_blendv_pd(sign, one, _mm256_cmp_pd(a.values, zero, _CMP_GT_OQ));
    return {_mm256_blendv_pd(sign, minus_one, _mm256_cmp_pd(a.values, zero, _CMP_LT_OQ))};
  }
};

}  // namespace
}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_VECTORS_AVX2_H_
