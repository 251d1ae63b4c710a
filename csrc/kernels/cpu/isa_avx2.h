// The operations of x86-64 with AVX2, BMI, BMI2 and F16C, by which kernels are written, see mask_kernels.h.

#ifndef FREEZEOPS_KERNELS_CPU_ISA_AVX2_H_
#define FREEZEOPS_KERNELS_CPU_ISA_AVX2_H_

#include <immintrin.h>

#include "kernels/cpu/vectors_avx2.h"
#include "kernels/cpu/words_avx2.h"

namespace freezeops {
namespace cpu {
namespace {

struct Avx2 {
  template <typename U>
  using Words = Avx2Words<U>;
  template <Float kType>
  using Vector = Avx2Vector<kType>;

  static constexpr bool kStreams = true;
  static void stream_zero_line(char* line) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(line), _mm256_setzero_si256());
    _mm256_stream_si256(reinterpret_cast<__m256i*>(line + 32), _mm256_setzero_si256());
  }
  static void stream_fence() { _mm_sfence(); }
};

}  // namespace
}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_ISA_AVX2_H_
