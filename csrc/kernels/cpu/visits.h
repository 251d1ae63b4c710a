// The plan of the sampled matrix product, a vector of int32 that freezeops/masks/visits.py makes and describes.
//
// Anything may stand in it: what a call is given is checked whole before it is used.

#ifndef FREEZEOPS_KERNELS_CPU_VISITS_H_
#define FREEZEOPS_KERNELS_CPU_VISITS_H_

#include <stdint.h>

namespace freezeops {
namespace cpu {

constexpr int64_t kVisitsHead = 8;  // HEAD in freezeops/masks/visits.py

// A block of tokens has this many at most.
constexpr int64_t kMostTokens = 256;

// Where a block of the plan begins: its first group, visit and entry.
struct BlockStart {
  int32_t group, visit, entry;
};

// Visits of a block that have the same count of entries.
struct VisitGroup {
  int32_t count, visits;
};

// The head of a plan, and where its parts are.
struct Visits {
  int64_t tokens, panel, chunk, rows, columns, entries, visits, groups;
  int64_t chunks, panels;
  const BlockStart* starts;  // one for each block, and the end
  const VisitGroup* group;
  const int32_t* row;        // of each visit
  const int32_t* rank;       // of its first entry
  const uint16_t* in_panel;  // the column of each entry

  int64_t blocks() const { return chunks * panels; }
  int64_t rows_of(int64_t chunk_number) const { return least(chunk, rows - chunk_number * chunk); }
  int64_t columns_of(int64_t panel_number) const { return least(panel, columns - panel_number * panel); }
  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
};

}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_VISITS_H_
