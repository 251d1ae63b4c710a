// The two 16-bit floats, as far as kernels calculate with them: to float32 and back, rounded to the nearest, ties to
// even. Without a header of CUDA or TensorFlow. Devices have instructions for that, which differ from the code for the
// host in the signs and payloads of NaNs alone.

#ifndef FREEZEOPS_KERNELS_COMMON_FLOAT16_H_
#define FREEZEOPS_KERNELS_COMMON_FLOAT16_H_

#include <stdint.h>

#include "mask_layout.h"

namespace freezeops {

FREEZEOPS_INLINE float float_of_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

FREEZEOPS_INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

struct Bfloat16 {
  uint16_t bits;

  Bfloat16() = default;
  FREEZEOPS_METHOD explicit Bfloat16(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    const uint32_t wide = bits_of_float(value);
    const uint32_t rounded = (wide + 0x7fffu + (wide >> 16 & 1)) >> 16;
    const bool nan = (wide & 0x7fffffffu) > 0x7f800000u;
    bits = static_cast<uint16_t>(nan ? (wide >> 16 & 0x8000u) | 0x7fc0u : rounded);
#endif
  }
  FREEZEOPS_METHOD explicit operator float() const { return float_of_bits(static_cast<uint32_t>(bits) << 16); }
};

struct Half {
  uint16_t bits;

  Half() = default;
  FREEZEOPS_METHOD explicit Half(float value) {
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    const uint32_t wide = bits_of_float(value);
    const uint32_t sign = wide >> 16 & 0x8000u;
    const uint32_t magnitude = wide & 0x7fffffffu;
    uint32_t result;
    if (magnitude > 0x7f800000u) {
      result = 0x7e00u | (magnitude >> 13 & 0x1ffu);
    } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
      result = 0x7c00u;
    } else if (magnitude >= 0x38800000u) {  // normal: at least 2^-14
      result = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
    } else if (magnitude < 0x33000000u) {  // below half of the least subnormal
      result = 0;
    } else {
      // In units of 2^-24: the mantissa shifted down, and what falls off rounded.
      const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
      const int shift = 126 - static_cast<int>(magnitude >> 23);  // 14 to 24
      const uint32_t kept = mantissa >> shift;
      const uint32_t rest = mantissa & ((1u << shift) - 1);
      const uint32_t middle = 1u << (shift - 1);
      result = kept + (rest > middle || (rest == middle && (kept & 1)) ? 1 : 0);
    }
    bits = static_cast<uint16_t>(sign | result);
#endif
  }
  FREEZEOPS_METHOD explicit operator float() const {
#if defined(__CUDA_ARCH__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t exponent = bits >> 10 & 0x1fu;
    const uint32_t mantissa = bits & 0x3ffu;
    if (exponent == 0) {
      const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
      return sign != 0 ? -magnitude : magnitude;
    }
    const uint32_t wide = exponent == 31 ? 0x7f800000u : (exponent + 112) << 23;
    return float_of_bits(sign | wide | mantissa << 13);
#endif
  }
};

}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_COMMON_FLOAT16_H_
