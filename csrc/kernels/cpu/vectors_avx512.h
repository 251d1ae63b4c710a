// The vector types of fused updates for AVX-512: 16 lanes of float (also for 16-bit floats), 8 of double.

#ifndef FREEZEOPS_KERNELS_CPU_VECTORS_AVX512_H_
#define FREEZEOPS_KERNELS_CPU_VECTORS_AVX512_H_

#include <immintrin.h>
#include <stdint.h>

#include "kernels/common/vectors_scalar.h"

namespace freezeops {
namespace cpu {
namespace {

// Conversion of entries to floats and back; `rounded` is applied after each operation.
template <Float kType>
struct Format16;

template <>
struct Format16<Float::kFloat32> {
  static __m512 load(const void* entries) { return _mm512_loadu_ps(entries); }
  static __m512 expand(const void* entries, __mmask16 lanes, __mmask16 first) {
    return _mm512_maskz_expand_ps(lanes, _mm512_maskz_loadu_ps(first, entries));
  }
  static void compress(void* entries, __mmask16 lanes, __m512 values) {
    _mm512_storeu_ps(entries, _mm512_maskz_compress_ps(lanes, values));
  }
  static void store(void* entries, __m512 values) { _mm512_storeu_ps(entries, values); }
  static void store(void* entries, __mmask16 lanes, __m512 values) { _mm512_mask_storeu_ps(entries, lanes, values); }
  static __m512 rounded(__m512 values) { return values; }
};

// expand and compress for 16-bit entries.
inline __m256i expand_halves(const void* entries, __mmask16 lanes, __mmask16 first) {
  return _mm256_maskz_expand_epi16(lanes, _mm256_maskz_loadu_epi16(first, entries));
}
inline void compress_halves(void* entries, __mmask16 lanes, __m256i values) {
  _mm256_storeu_si256(static_cast<__m256i*>(entries), _mm256_maskz_compress_epi16(lanes, values));
}

template <>
struct Format16<Float::kFloat16> {
  static constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  static __m512 load(const void* entries) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(entries)));
  }
  static __m512 expand(const void* entries, __mmask16 lanes, __mmask16 first) {
    return _mm512_cvtph_ps(expand_halves(entries, lanes, first));
  }
  static void compress(void* entries, __mmask16 lanes, __m512 values) {
    compress_halves(entries, lanes, narrowed(values));
  }
  // (GCC 12 warns of the intrinsic without lanes.)
  static __m256i narrowed(__m512 values) { return _mm512_maskz_cvtps_ph(0xffff, values, kNearest); }
  static void store(void* entries, __m512 values) {
    _mm256_storeu_si256(static_cast<__m256i*>(entries), narrowed(values));
  }
  static void store(void* entries, __mmask16 lanes, __m512 values) {
    _mm256_mask_storeu_epi16(entries, lanes, narrowed(values));
  }
  static __m512 rounded(__m512 values) { return _mm512_cvtph_ps(narrowed(values)); }
};

template <>
struct Format16<Float::kBfloat16> {
  static __m512 widened(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static __m512 load(const void* entries) { return widened(_mm256_loadu_si256(static_cast<const __m256i*>(entries))); }
  static __m512 expand(const void* entries, __mmask16 lanes, __mmask16 first) {
    return widened(expand_halves(entries, lanes, first));
  }
  static void compress(void* entries, __mmask16 lanes, __m512 values) {
    compress_halves(entries, lanes, narrowed(values));
  }
  // Values are rounded already.
  static __m256i narrowed(__m512 values) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(values), 16));
  }
  static void store(void* entries, __m512 values) {
    _mm256_storeu_si256(static_cast<__m256i*>(entries), narrowed(values));
  }
  static void store(void* entries, __mmask16 lanes, __m512 values) {
    _mm256_mask_storeu_epi16(entries, lanes, narrowed(values));
  }
  static __m512 rounded(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i chosen = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q), quiet);
    return _mm512_castsi512_ps(_mm512_and_si512(chosen, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
};

template <Float kType>
struct Avx512Vector {
  using Entry = typename EntryOf<kType>::Type;
  using Format = Format16<kType>;
  static constexpr int kLanes = 16;
  static constexpr bool kExpands = true;
  __m512 values;

  static Avx512Vector of(__m512 values) { return {Format::rounded(values)}; }
  static Avx512Vector set(Entry entry) { return {_mm512_set1_ps(static_cast<float>(entry))}; }
  static Avx512Vector load(const Entry* entries) { return {Format::load(entries)}; }
  void store(Entry* entries) const { Format::store(entries, values); }
  void store(Entry* entries, uint32_t lanes) const { Format::store(entries, static_cast<__mmask16>(lanes), values); }
  static Avx512Vector expand(const Entry* entries, uint32_t lanes) {
    const uint32_t first = _bzhi_u32(~0u, _mm_popcnt_u32(lanes));
    return {Format::expand(entries, static_cast<__mmask16>(lanes), static_cast<__mmask16>(first))};
  }
  void compress(Entry* entries, uint32_t lanes) const {
    Format::compress(entries, static_cast<__mmask16>(lanes), values);
  }

  friend Avx512Vector operator+(Avx512Vector a, Avx512Vector b) { return of(_mm512_add_ps(a.values, b.values)); }
  friend Avx512Vector operator-(Avx512Vector a, Avx512Vector b) { return of(_mm512_sub_ps(a.values, b.values)); }
  friend Avx512Vector operator*(Avx512Vector a, Avx512Vector b) { return of(_mm512_mul_ps(a.values, b.values)); }
  friend Avx512Vector operator/(Avx512Vector a, Avx512Vector b) { return of(_mm512_div_ps(a.values, b.values)); }
  friend Avx512Vector square_root(Avx512Vector a) { return of(_mm512_sqrt_ps(a.values)); }
  // NaN wherever one of the two is: the processor takes the second one then.
  friend Avx512Vector maximum(Avx512Vector a, Avx512Vector b) {
    const __mmask16 first = _mm512_cmp_ps_mask(a.values, a.values, _CMP_UNORD_Q);
    return {_mm512_mask_mov_ps(_mm512_max_ps(a.values, b.values), first, a.values)};
  }
  friend Avx512Vector sign_of(Avx512Vector a) {
    const __m512 zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1.0f);
    __m512 sign = _mm512_mask_mov_ps(a.values, _mm512_cmp_ps_mask(a.values, zero, _CMP_EQ_OQ), zero);
    sign = _mm512_mask_mov_ps(sign, _mm512_cmp_ps_mask(a.values, zero, _CMP_GT_OQ), one);
    return {_mm512_mask_sub_ps(sign, _mm512_cmp_ps_mask(a.values, zero, _CMP_LT_OQ), zero, one)};
  }
};

template <>
struct Avx512Vector<Float::kFloat64> {
  using Entry = double;
  static constexpr int kLanes = 8;
  static constexpr bool kExpands = true;
  __m512d values;

  static Avx512Vector set(double entry) { return {_mm512_set1_pd(entry)}; }
  static Avx512Vector load(const double* entries) { return {_mm512_loadu_pd(entries)}; }
  void store(double* entries) const { _mm512_storeu_pd(entries, values); }
  void store(double* entries, uint32_t lanes) const {
    _mm512_mask_storeu_pd(entries, static_cast<__mmask8>(lanes), values);
  }
  static Avx512Vector expand(const double* entries, uint32_t lanes) {
    const uint32_t first = _bzhi_u32(~0u, _mm_popcnt_u32(lanes));
    const __m512d loaded = _mm512_maskz_loadu_pd(static_cast<__mmask8>(first), entries);
    return {_mm512_maskz_expand_pd(static_cast<__mmask8>(lanes), loaded)};
  }
  void compress(double* entries, uint32_t lanes) const {
    _mm512_storeu_pd(entries, _mm512_maskz_compress_pd(static_cast<__mmask8>(lanes), values));
  }

  friend Avx512Vector operator+(Avx512Vector a, Avx512Vector b) { return {_mm512_add_pd(a.values, b.values)}; }
  friend Avx512Vector operator-(Avx512Vector a, Avx512Vector b) { return {_mm512_sub_pd(a.values, b.values)}; }
  friend Avx512Vector operator*(Avx512Vector a, Avx512Vector b) { return {_mm512_mul_pd(a.values, b.values)}; }
  friend Avx512Vector operator/(Avx512Vector a, Avx512Vector b) { return {_mm512_div_pd(a.values, b.values)}; }
  friend Avx512Vector square_root(Avx512Vector a) { return {_mm512_sqrt_pd(a.values)}; }
  friend Avx512Vector maximum(Avx512Vector a, Avx512Vector b) {
    const __mmask8 first = _mm512_cmp_pd_mask(a.values, a.values, _CMP_UNORD_Q);
    return {_mm512_mask_mov_pd(_mm512_max_pd(a.values, b.values), first, a.values)};
  }
  friend Avx512Vector sign_of(Avx512Vector a) {
    const __m512d zero = _mm512_setzero_pd(), one = _mm512_set1_pd(1.0);
    __m512d sign = _mm512_mask_mov_pd(a.values, _mm512_cmp_pd_mask(a.values, zero, _CMP_EQ_OQ), zero);
    sign = _mm512_mask_mov_pd(sign, _mm512_cmp_pd_mask(a.values, zero, _CMP_GT_OQ), one);
    return {_mm512_mask_sub_pd(sign, _mm512_cmp_pd_mask(a.values, zero, _CMP_LT_OQ), zero, one)};
  }
};

}  // namespace
}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_VECTORS_AVX512_H_
