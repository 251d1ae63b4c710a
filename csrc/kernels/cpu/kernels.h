// The CPU kernels: raw pointers and ranges of entries, no TensorFlow.
//
// Every kernel works on the entries [begin, end) of the flattened tensor, so that callers can share the work out among
// threads. Unless said otherwise data pointers point at entry `begin`. Entries are moved as integers of their width
// (2, 4 or 8 bytes): no bit of a value that is kept ever changes, and nothing outside the range is read or written.
//
// A device twin has the same functions with a stream added and no ranges.

#ifndef FREEZEOPS_KERNELS_CPU_KERNELS_H_
#define FREEZEOPS_KERNELS_CPU_KERNELS_H_

#include <stdint.h>

#include "mask_layout.h"

namespace freezeops {

// What a caller knows about where the data is.
enum class Residence {
  kCache,   // small enough that the data may be in the cache
  kMemory,  // well beyond the cache: whole lines are better written past it
};

// One set of kernels, compiled for one instruction set. Arrays are indexed by width_index().
struct KernelTable {
  const char* isa;

  // The number of frozen entries.
  int64_t (*count_frozen)(const MaskView& mask, int64_t begin, int64_t end);

  // Sets the frozen entries of `data` to +0.
  void (*zero_frozen[3])(void* data, const MaskView& mask, int64_t begin, int64_t end, Residence residence);

  // destination = source where trainable, +0 where frozen. The two must not overlap.
  void (*copy_and_zero_frozen[3])(void* destination, const void* source, const MaskView& mask, int64_t begin,
                                  int64_t end);

  // The number of ones among the mask's bits [begin, end).
  int64_t (*count_ones)(const uint8_t* bits, int64_t begin, int64_t end);

  // Writes the frozen (or the trainable) entries of `source`, in order, to `destination`, which has room for exactly
  // `count` values, the number of such entries in the range.
  void (*gather_frozen[3])(void* destination, int64_t count, const void* source, const MaskView& mask, int64_t begin,
                           int64_t end);
  void (*gather_trainable[3])(void* destination, int64_t count, const void* source, const MaskView& mask, int64_t begin,
                              int64_t end);

  // gather_trainable from two sources at once, which costs less than twice.
  void (*gather_two_trainable[3])(void* const destinations[2], int64_t count, const void* const sources[2],
                                  const MaskView& mask, int64_t begin, int64_t end);

  // The reverse: sets the frozen (or the trainable) entries of `destination` from the `count` values at `source`.
  void (*scatter_frozen[3])(void* destination, const void* source, int64_t count, const MaskView& mask, int64_t begin,
                            int64_t end);
  void (*scatter_trainable[3])(void* destination, const void* source, int64_t count, const MaskView& mask,
                               int64_t begin, int64_t end);

  // destination = source at the frozen (or at the trainable) entries only.
  void (*copy_frozen[3])(void* destination, const void* source, const MaskView& mask, int64_t begin, int64_t end);
  void (*copy_trainable[3])(void* destination, const void* source, const MaskView& mask, int64_t begin, int64_t end);
};

// The index in the tables above of a width in bytes (2, 4 or 8), or -1.
FREEZEOPS_INLINE int width_index(int64_t width) { return width == 2 ? 0 : width == 4 ? 1 : width == 8 ? 2 : -1; }

// The fastest kernels that this machine can run, chosen once. The environment variable FREEZEOPS_ISA (avx512, avx2 or
// generic) asks for a lower set than that; a higher one is ignored.
const KernelTable& cpu_kernels();

// The sets that were compiled in.
extern const KernelTable kGenericKernels;
#if defined(FREEZEOPS_HAVE_X86_KERNELS)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
#endif

// Whether every bit of the mask is 1; stops at the first that is not.
bool all_trainable(const MaskView& mask);

}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_KERNELS_H_
