// The CPU kernels: raw pointers and ranges of entries, no TensorFlow.
//
// Every kernel works on the entries [begin, end) of the flattened tensor, so that callers can share the work out among
// threads. Unless said otherwise data pointers point at entry `begin`. `width` is the size of an entry in bytes: 2, 4
// or
// 8. Entries are moved as integers of that width: no bit of a value that is kept ever changes, and nothing outside the
// range is read or written.

#ifndef FREEZEOPS_KERNELS_CPU_KERNELS_H_
#define FREEZEOPS_KERNELS_CPU_KERNELS_H_

#include <stdint.h>

#include "kernels/common/update_rules.h"
#include "kernels/cpu/visits.h"
#include "mask_layout.h"

namespace freezeops {
namespace cpu {

// Where data is likely to be.
enum class Residence {
  kCache,
  kMemory,  // well beyond the cache: whole lines are better written past it
};

// One variable of a fused update. All pointers are to whole tensors.
struct FusedTensor {
  void* variable;
  const void* gradient;  // null: zeros
  const void* gathered;  // compact state: instead of `gradient` that of the trainable entries, in order; else null
  const void* square;    // squares of the gradient where they are not those of its entries (repeated rows); else null
  // In the rule's order; null where the rule has none. Full state: of the variable's size. Compact state: an entry for
  // each trainable entry of the variable, in order.
  void* slots[kMostSlots];
  MaskView mask;
  uint8_t* unseeded;  // a bit for each entry of a slot, set where it waits to be seeded; null: none waits
  int64_t unseeded_bytes;
  bool decays;
};

// The seeding of waiting entries, see seed_entry.h. The first slot decides which entries are due.
struct Seeds {
  int count;
  int slots[kMostSlots];  // positions in FusedTensor::slots
  int powers[kMostSlots];
  double scales[kMostSlots];
};

// What the variables of a step share.
struct FusedStep {
  RuleFlags flags;
  const void* scalars;  // kMostScalars of the variables' type
  Seeds seeds;
};

// The kernels that move, zero and count entries, compiled for one instruction set.
struct MaskKernels {
  // Returns the number of frozen entries.
  int64_t (*count_frozen)(const MaskView& mask, int64_t begin, int64_t end);

  // Returns the number of ones among the mask's bits [begin, end).
  int64_t (*count_ones)(const uint8_t* bits, int64_t begin, int64_t end);

  // Sets the frozen entries of `data` to +0.
  void (*zero_frozen)(int width, void* data, const MaskView& mask, int64_t begin, int64_t end, Residence residence);

  // destination = source where trainable, +0 where frozen. The two must not overlap.
  void (*copy_and_zero_frozen)(int width, void* destination, const void* source, const MaskView& mask, int64_t begin,
                               int64_t end);

  // destination = source at the frozen (or the trainable) entries only.
  void (*copy_frozen)(int width, void* destination, const void* source, const MaskView& mask, int64_t begin,
                      int64_t end);
  void (*copy_trainable)(int width, void* destination, const void* source, const MaskView& mask, int64_t begin,
                         int64_t end);

  // Writes the frozen (or the trainable) entries of `source`, in order, to `destination`, which has room for exactly
  // `count` values, the number of such entries in the range.
  void (*gather_frozen)(int width, void* destination, int64_t count, const void* source, const MaskView& mask,
                        int64_t begin, int64_t end);
  void (*gather_trainable)(int width, void* destination, int64_t count, const void* source, const MaskView& mask,
                           int64_t begin, int64_t end);

  // gather_trainable from two sources at once, which costs less than twice.
  void (*gather_two_trainable)(int width, void* const destinations[2], int64_t count, const void* const sources[2],
                               const MaskView& mask, int64_t begin, int64_t end);

  // The reverse: sets the frozen (or the trainable) entries of `destination` from the `count` values at `source`.
  void (*scatter_frozen)(int width, void* destination, const void* source, int64_t count, const MaskView& mask,
                         int64_t begin, int64_t end);
  void (*scatter_trainable)(int width, void* destination, const void* source, int64_t count, const MaskView& mask,
                            int64_t begin, int64_t end);
};

// The fused updates: one pass over mask bits, gradient, slots and variable. Only trainable entries are written; a word
// of the mask without one costs a look at that word.
struct FusedKernels {
  // Full state: updates the trainable entries among [begin, end).
  void (*update_full)(UpdateRule rule, Float type, const FusedStep& step, const FusedTensor& tensor, int64_t begin,
                      int64_t end);

  // Compact state: likewise; `rank` is the number of trainable entries before `begin`.
  void (*update_compact)(UpdateRule rule, Float type, const FusedStep& step, const FusedTensor& tensor, int64_t begin,
                         int64_t end, int64_t rank);

  // Compact state of a mask of single entries: updates the entries at indices[first] to indices[last - 1]; the slots of
  // indices[i] are at i. Skips indices whose mask bit is 0; returns false if there was any.
  bool (*update_by_index)(UpdateRule rule, Float type, const FusedStep& step, const FusedTensor& tensor,
                          const void* indices, bool wide, int64_t first, int64_t last);

  // sum += row * scale and square += (row * scale)^2, entry by entry.
  void (*add_row)(Float type, void* sum, void* square, const void* row, const void* scale, int64_t width);
};

// The sampled matrix product: entries of x^T dy by a plan. Both operands are transposed, a block of tokens at a time,
// to float32: entry (token, column) is at column * tokens + token.
struct SampledKernels {
  // Returns whether the columns of a block of the plan are columns of its panel. The rest of the plan was checked.
  bool (*columns_are_possible)(const Visits& visits, int64_t block);

  // Transposes `columns` columns, from `first_column` on, of a matrix with `from_stride` entries in a row. It has
  // `tokens` rows, and zeros stand for more, up to `to_stride`: 16, 32, 64, 128 or 256. The type is not float64.
  void (*transpose)(Float type, float* to, int64_t to_stride, const void* from, int64_t first_column,
                    int64_t from_stride, int64_t tokens, int64_t columns);

  // Adds to each entry of a block of the plan, in the order of visits, the product of its row of x and its column of
  // dy. `sums` are those of the block; `tokens` is as `to_stride` above; the plan was checked.
  void (*add_products)(const Visits& visits, int64_t block, const float* x, const float* dy, int64_t tokens,
                       float* sums);
};

// The kernels of one instruction set.
struct KernelTable : MaskKernels, FusedKernels, SampledKernels {
  const char* isa;
};

// Returns the fastest kernels that this machine can run, chosen once. The environment variable FREEZEOPS_ISA (avx512,
// avx2 or generic) asks for a lower set; a higher one is ignored.
const KernelTable& kernels();

// The sets that were compiled, each in several files: in one GCC inlines less, and gathers take half as long again.
extern const MaskKernels kGenericMaskKernels;
extern const FusedKernels kGenericFusedKernels;
extern const SampledKernels kGenericSampledKernels;
#if defined(FREEZEOPS_HAVE_X86_KERNELS)
extern const MaskKernels kAvx2MaskKernels;
extern const FusedKernels kAvx2FusedKernels;
extern const SampledKernels kAvx2SampledKernels;
extern const MaskKernels kAvx512MaskKernels;
extern const FusedKernels kAvx512FusedKernels;
extern const SampledKernels kAvx512SampledKernels;
#endif

// Returns whether every bit of the mask is 1; stops at the first that is not.
bool all_trainable(const MaskView& mask);

}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_KERNELS_H_
