// Entries far from each other, whose lines are prefetched before they are used.

#ifndef FREEZEOPS_KERNELS_CPU_FEW_ENTRIES_H_
#define FREEZEOPS_KERNELS_CPU_FEW_ENTRIES_H_

#include <stdint.h>

#include "kernels/cpu/mask_walk.h"
#include "mask_layout.h"

namespace freezeops {
namespace cpu {
namespace {

// Prefetches the lines of a later word: the processor's own prefetching ends with each page, which comes soon where
// most of a page is passed over.
template <typename U>
FREEZEOPS_INLINE void prefetch_ahead(const U* word) {
  constexpr int64_t kAheadBytes = 2048;
  const char* ahead = reinterpret_cast<const char*>(word) + kAheadBytes;
  for (int64_t line = 0; line < 64 * static_cast<int64_t>(sizeof(U)); line += 64) __builtin_prefetch(ahead + line);
}

// The selected entries of a block that has few. They are used one block later, when their lines have come.
struct FewEntries {
  int64_t position = 0;
  int count = 0;
  uint16_t entries[kFewInBlock + 2];
};

}  // namespace
}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_FEW_ENTRIES_H_
