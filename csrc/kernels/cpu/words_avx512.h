// Operations on words of 64 entries with AVX-512 (F, BW, DQ, VL, VBMI2): bits are lane masks as they
// are.
//
// Compress and expand stay in registers: their forms that write to memory are microcoded and slow on some processors.

#ifndef FREEZEOPS_KERNELS_CPU_WORDS_AVX512_H_
#define FREEZEOPS_KERNELS_CPU_WORDS_AVX512_H_

#include <immintrin.h>

#include "kernels/cpu/words_scalar.h"

namespace freezeops {
namespace cpu {
namespace {

// Below this many selected entries a loop over them beats compressing or expanding all 64.
constexpr int kFewToMove = 3;

template <int kWidth>
struct Avx512Lanes;

template <>
struct Avx512Lanes<2> {
  using Mask = __mmask32;
  static constexpr int kCount = 32;
  static FREEZEOPS_METHOD __m512i load(Mask mask, const void* data) { return _mm512_maskz_loadu_epi16(mask, data); }
  static FREEZEOPS_METHOD void store(void* data, Mask mask, __m512i value) {
    _mm512_mask_storeu_epi16(data, mask, value);
  }
  static FREEZEOPS_METHOD __m512i compress(Mask mask, __m512i value) {
    return _mm512_maskz_compress_epi16(mask, value);
  }
  static FREEZEOPS_METHOD __m512i expand(Mask mask, __m512i value) { return _mm512_maskz_expand_epi16(mask, value); }
};

template <>
struct Avx512Lanes<4> {
  using Mask = __mmask16;
  static constexpr int kCount = 16;
  static FREEZEOPS_METHOD __m512i load(Mask mask, const void* data) { return _mm512_maskz_loadu_epi32(mask, data); }
  static FREEZEOPS_METHOD void store(void* data, Mask mask, __m512i value) {
    _mm512_mask_storeu_epi32(data, mask, value);
  }
  static FREEZEOPS_METHOD __m512i compress(Mask mask, __m512i value) {
    return _mm512_maskz_compress_epi32(mask, value);
  }
  static FREEZEOPS_METHOD __m512i expand(Mask mask, __m512i value) { return _mm512_maskz_expand_epi32(mask, value); }
};

template <>
struct Avx512Lanes<8> {
  using Mask = __mmask8;
  static constexpr int kCount = 8;
  static FREEZEOPS_METHOD __m512i load(Mask mask, const void* data) { return _mm512_maskz_loadu_epi64(mask, data); }
  static FREEZEOPS_METHOD void store(void* data, Mask mask, __m512i value) {
    _mm512_mask_storeu_epi64(data, mask, value);
  }
  static FREEZEOPS_METHOD __m512i compress(Mask mask, __m512i value) {
    return _mm512_maskz_compress_epi64(mask, value);
  }
  static FREEZEOPS_METHOD __m512i expand(Mask mask, __m512i value) { return _mm512_maskz_expand_epi64(mask, value); }
};

template <typename U>
struct Avx512Words {
  using L = Avx512Lanes<sizeof(U)>;
  using Mask = typename L::Mask;

  static FREEZEOPS_METHOD void zero(U* data, uint64_t selected) {
    // Few entries: single stores need no line that has no selected entry.
    if (count_bits(selected) <= kFewBits) return ScalarWords<U>::zero_bits(data, selected);
    for (int i = 0; i < 64; i += L::kCount) {
      L::store(data + i, static_cast<Mask>(selected >> i), _mm512_setzero_si512());
    }
  }

  static FREEZEOPS_METHOD void copy(U* destination, const U* source, uint64_t selected) {
    if (count_bits(selected) <= kFewBits) return ScalarWords<U>::copy_bits(destination, source, selected);
    for (int i = 0; i < 64; i += L::kCount) {
      const Mask mask = static_cast<Mask>(selected >> i);
      L::store(destination + i, mask, L::load(mask, source + i));
    }
  }

  static FREEZEOPS_METHOD void copy_or_zero(U* destination, const U* source, uint64_t zeroed) {
    for (int i = 0; i < 64; i += L::kCount) {
      _mm512_storeu_si512(destination + i, L::load(static_cast<Mask>(~(zeroed >> i)), source + i));
    }
  }

  static FREEZEOPS_METHOD U* compress(U* destination, const U* destination_end, const U* source, uint64_t selected) {
    if (count_bits(selected) <= kFewToMove) return ScalarWords<U>::compress_bits(destination, source, selected);
    for (int i = 0; i < 64; i += L::kCount) {
      const Mask mask = static_cast<Mask>(selected >> i);
      const int count = count_bits(mask);
      const __m512i values = L::compress(mask, L::load(mask, source + i));
      if (destination_end - destination >= L::kCount) {
        _mm512_storeu_si512(destination, values);  // what is too much is overwritten by the values that follow
      } else {
        L::store(destination, static_cast<Mask>(low_bits(count)), values);
      }
      destination += count;
    }
    return destination;
  }

  static FREEZEOPS_METHOD const U* expand(U* destination, const U* source, const U* source_end, uint64_t selected) {
    if (count_bits(selected) <= kFewToMove) return ScalarWords<U>::expand_bits(destination, source, selected);
    for (int i = 0; i < 64; i += L::kCount) {
      const Mask mask = static_cast<Mask>(selected >> i);
      const int count = count_bits(mask);
      const __m512i values = source_end - source >= L::kCount ? _mm512_loadu_si512(source)
                                                              : L::load(static_cast<Mask>(low_bits(count)), source);
      L::store(destination + i, mask, L::expand(mask, values));
      source += count;
    }
    return source;
  }
};

}  // namespace
}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_WORDS_AVX512_H_
