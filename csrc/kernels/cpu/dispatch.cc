// Chooses the kernels for this machine, once.

#if defined(FREEZEOPS_HAVE_X86_KERNELS)
#include <cpuid.h>
#endif
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/kernels.h"

namespace freezeops {
namespace cpu {
namespace {

#if defined(FREEZEOPS_HAVE_X86_KERNELS)
// Not every compiler's __builtin_cpu_supports knows it.
bool has_f16c() {
  unsigned int a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

KernelTable choose() {
#if defined(FREEZEOPS_HAVE_X86_KERNELS)
  const char* wanted = getenv("FREEZEOPS_ISA");
  if (wanted == nullptr) wanted = "";
  const bool generic_only = strcmp(wanted, "generic") == 0;
  const bool avx2_at_most = generic_only || strcmp(wanted, "avx2") == 0;
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                        __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") &&
                        __builtin_cpu_supports("fma") && has_f16c();
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512vbmi2");
  if (has_avx512 && !avx2_at_most) return {kAvx512MaskKernels, kAvx512FusedKernels, kAvx512SampledKernels, "avx512"};
  if (has_avx2 && !generic_only) return {kAvx2MaskKernels, kAvx2FusedKernels, kAvx2SampledKernels, "avx2"};
#endif
  return {kGenericMaskKernels, kGenericFusedKernels, kGenericSampledKernels, "generic"};
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable chosen = choose();
  return chosen;
}

bool all_trainable(const MaskView& mask) {
  const int64_t kept = mask.layout.kept;
  const int64_t byte_count = mask_bytes(kept);
  int64_t bit = 0;
  constexpr int kWords = 64;  // looked at together, so that the loop is not held up by a test for each
  for (; bit + 64 * kWords <= kept; bit += 64 * kWords) {
    uint64_t words[kWords];
    memcpy(words, mask.bits + bit / 8, sizeof(words));
    uint64_t all = ~uint64_t{0};
    for (int i = 0; i < kWords; ++i) all &= words[i];
    if (all != ~uint64_t{0}) return false;
  }
  for (; bit + 64 <= kept; bit += 64) {
    if (load_bits(mask.bits, byte_count, bit) != ~uint64_t{0}) return false;
  }
  const uint64_t valid = low_bits(kept - bit);
  return bit == kept || (load_bits(mask.bits, byte_count, bit) & valid) == valid;
}

}  // namespace cpu
}  // namespace freezeops
