// The CPU kernels of fused updates: one pass over mask bits, gradient, slots and variable. No TensorFlow.
//
// Only trainable entries are written; a word of the mask without one costs a look at that word.

#ifndef FREEZEOPS_KERNELS_CPU_FUSED_H_
#define FREEZEOPS_KERNELS_CPU_FUSED_H_

#include <stdint.h>

#include "kernels/common/update_rules.h"
#include "mask_layout.h"

namespace freezeops {

// One variable in a step. All pointers are to whole tensors.
struct FusedTensor {
  void* variable;
  const void* gradient;  // null: zeros
  const void* square;    // the gradient's, where it is not the square of each entry; null otherwise
  // In full state of the variable's size; in compact state one entry for each trainable one, in their order. Null where
  // the rule has none.
  void* slots[kMostSlots];
  MaskView mask;
  uint8_t* unseeded;  // one bit for each entry of a slot: whether it waits to be seeded; null: none does
  int64_t unseeded_bytes;
  bool decays;
};

// How waiting entries are seeded, see seed_entry.h: slot numbers in the order in which they are looked at, the first
// second moment first.
struct Seeds {
  int count;
  int slots[kMostSlots];  // among FusedTensor::slots
  int powers[kMostSlots];
  double scales[kMostSlots];
};

// What all variables of a step share.
struct FusedStep {
  RuleFlags flags;
  const void* scalars;  // kMostScalars of the variables' type
  Seeds seeds;
};

enum FusedType { kFloat16, kBfloat16, kFloat32, kFloat64 };
constexpr int kFusedTypes = 4;

// Arrays are indexed by rule and type.
struct FusedKernels {
  // Full state: updates the trainable ones among the entries [begin, end).
  void (*full[kRules][kFusedTypes])(const FusedStep& step, const FusedTensor& tensor, int64_t begin, int64_t end);

  // Compact state: likewise; `rank` is the number of trainable entries before `begin`.
  void (*compact[kRules][kFusedTypes])(const FusedStep& step, const FusedTensor& tensor, int64_t begin, int64_t end,
                                       int64_t rank);

  // Compact state of a mask of single entries: updates those of which indices[i] is the position, first <= i < last.
  // Returns whether each is one of a bit that is set; another is left out.
  bool (*by_index[kRules][kFusedTypes])(const FusedStep& step, const FusedTensor& tensor, const void* indices,
                                        bool wide, int64_t first, int64_t last);

  // sum += row * scale and square += (row * scale)^2, entry by entry.
  void (*add_row[kFusedTypes])(void* sum, void* square, const void* row, const void* scale, int64_t width);
};

// Those for this machine, chosen as cpu_kernels() is.
const FusedKernels& fused_kernels();

extern const FusedKernels kGenericFused;
#if defined(FREEZEOPS_HAVE_X86_KERNELS)
extern const FusedKernels kAvx2Fused;
extern const FusedKernels kAvx512Fused;
#endif

}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_FUSED_H_
