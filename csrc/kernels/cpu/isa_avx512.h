// The operations of x86-64 with AVX-512 (F, BW, DQ, VL, VBMI2), by which kernels are written, see mask_kernels.h.

#ifndef FREEZEOPS_KERNELS_CPU_ISA_AVX512_H_
#define FREEZEOPS_KERNELS_CPU_ISA_AVX512_H_

#include <immintrin.h>

#include "kernels/cpu/vectors_avx512.h"
#include "kernels/cpu/words_avx512.h"

namespace freezeops {
namespace cpu {
namespace {

struct Avx512 {
  template <typename U>
  using Words = Avx512Words<U>;
  template <Float kType>
  using Vector = Avx512Vector<kType>;

  static constexpr bool kStreams = true;
  static void stream_zero_line(char* line) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(line), _mm512_setzero_si512());
  }
  static void stream_fence() { _mm_sfence(); }
};

}  // namespace
}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_ISA_AVX512_H_
