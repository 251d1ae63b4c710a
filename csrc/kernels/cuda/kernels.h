// The CUDA kernels: raw pointers to device memory and a stream, no TensorFlow and no header of CUDA.
//
// Every function starts its work on the stream and returns at once: 0, or the cudaError_t of a launch that failed, for
// error_text. Nothing is started for empty input. Widths are those of the entries in bytes (2, 4 or 8); entries are
// moved as integers, so that no bit of a value that is kept ever changes. Sizes have 64 bits. Pointers need no more
// alignment than an entry has; where they have 16 bytes, masks of single entries and of long rows move 16 bytes at a
// time; other layouts, and entries found by index, go one by one.
//
// The kernels' bodies are in *_bodies.h, which are compiled for the host as well (see warps.h) and tested there.

#ifndef FREEZEOPS_KERNELS_CUDA_KERNELS_H_
#define FREEZEOPS_KERNELS_CUDA_KERNELS_H_

#include <stdint.h>

#include "kernels/common/dtypes.h"
#include "kernels/common/update_rules.h"
#include "mask_layout.h"

struct CUstream_st;

namespace freezeops {
namespace cuda {

using Stream = CUstream_st*;

// Returns the text of an error number.
const char* error_text(int error);

// The versions of CUDA that the driver supports and that this was compiled for, as 1000 * major + 10 * minor; 0 where
// there is no driver.
int driver_version();
int runtime_version();

// --- Whole tensors

// Sets the frozen entries of `data` to +0. Reads the mask, and nothing else.
int zero_frozen(int width, void* data, const MaskView& mask, Stream stream);

// destination = source where trainable, +0 where frozen. The two must not overlap.
int copy_and_zero_frozen(int width, void* destination, const void* source, const MaskView& mask, Stream stream);

// destination = source at the frozen entries only; others are neither read nor written.
int copy_frozen(int width, void* destination, const void* source, const MaskView& mask, Stream stream);

// destination = source.
int copy_bytes(void* destination, const void* source, int64_t bytes, Stream stream);

// --- Slices

// Rows of a tensor, as in an IndexedSlices.
struct Slices {
  const void* indices;  // `count` of them, in device memory
  bool wide;            // int64_t, else int32_t
  int64_t count;
  int64_t rows;  // of the tensor
  int64_t row_size;
};

// Like copy_and_zero_frozen for the rows that are named; in place where destination == source. A row whose index is
// out of range is zero: to report it, the host would have to wait for the device.
int mask_slices(int width, void* destination, const void* source, const Slices& slices, const MaskView& mask,
                Stream stream);

// --- Compact state

// The trainable entries of a tensor, by mask and by index, all in device memory. Where these do not agree, nothing is
// read or written out of bounds, and no frozen entry is written.
struct TrainableIndex {
  MaskView mask;           // of a layout that does not repeat
  const int64_t* offsets;  // rank_blocks(kept) + 1 of them
  const void* indices;     // `capacity` of them; from the number of ones on, each is at least `kept`
  bool wide;               // int64_t, else int32_t
  int64_t capacity;
};

// Sets compact[a] to the trainable entries of sources[a], then zeros up to the capacity, for one or two arrays.
int gather_trainable(int width, int arrays, void* const* compact, const void* const* sources,
                     const TrainableIndex& index, Stream stream);

// Sets the trainable entries of `destination` from `compact`.
int scatter_trainable(int width, void* destination, const void* compact, const TrainableIndex& index, Stream stream);

// ranks[i] = the number of ones before bits[i], at most `last` and at least 0. A bit that is out of range is taken as
// the nearest that is not.
int rank_of_bits(int64_t* ranks, const int64_t* bits, int64_t count, const uint8_t* mask, int64_t kept,
                 const int64_t* offsets, int64_t last, Stream stream);

// --- Seeding

constexpr int kMostSeededSlots = 8;

// See seed_entry.h. With dense gradients bits are cleared; with slices they are not: entries whose first slot is not
// zero are passed over whatever their bit says.
struct SeedArguments {
  uint8_t* unseeded;
  int64_t size;  // of each slot
  void* slots[kMostSeededSlots];
  int powers[kMostSeededSlots];
  int count;               // of slots
  const double* scales;    // in device memory
  const void* values;      // the gradient, or its slices'
  const int64_t* indices;  // nullptr for a dense gradient. One that is out of range is passed over.
  int64_t slices;
  int64_t row_size;
};

int seed_slots(Float type, const SeedArguments& arguments, Stream stream);

// --- Fused updates

// The sums of slices, in memory that the caller allocates and nobody reads but fused_update.
struct RowSums {
  // For each row of the tensor two numbers, both zero if no slice names it: the number of slices less the first that
  // does, and one more than the last that does.
  uint64_t* named;
  // As large as the slices' values. What is summed for a row is where the first slice that names it is.
  void* sums;
  void* squares;  // the sums of the squares
  int64_t slices;
  int64_t row_size;
};

// Bytes of RowSums::named.
FREEZEOPS_INLINE int64_t named_bytes(int64_t rows) { return 2 * rows * static_cast<int64_t>(sizeof(uint64_t)); }

// Fills what `sums` points to, from `values` of one row for each index, both in device memory. Slices of a row add up
// in their order, and so do their squares; each is multiplied before by `scale`, in device memory; nullptr for nothing.
// A slice whose index is not in [0, rows) is passed over.
int sum_slices(Float type, const RowSums& sums, const int64_t* indices, int64_t rows, const void* values,
               const void* scale, Stream stream);

// One variable of a step, all in device memory; see cpu::FusedTensor.
struct FusedVariable {
  void* variable;
  const void* gradient;  // nullptr with slices
  // In full state of the variable's size; in compact state of capacity * inner entries. nullptr where the rule has
  // none.
  void* slots[kMostSlots];
  MaskView mask;           // bits == nullptr: every entry is trainable
  const int64_t* offsets;  // of compact state, see TrainableIndex; nullptr in full state
  const void* indices;
  int64_t capacity;
  uint8_t* unseeded;  // nullptr: no slot waits to be seeded
  RowSums rows;       // instead of a gradient where `named` is not nullptr
  bool wide;          // indices of int64_t, else int32_t
  bool decays;
  bool gathered;  // compact state: the gradient is that of the trainable entries, in order, and has a slot's size
};

// What the variables of a step share. Seeds are as in cpu::Seeds.
struct FusedStep {
  const NamedRule* rule;
  const void* scalars;   // those of the rule, of the variables' type, in device memory
  const double* scales;  // one for each slot that is seeded, in device memory
  int seeds;
  int seed_slots[kMostSlots];
  int seed_powers[kMostSlots];
};

// Updates the trainable entries of variables and their slots. What waits is seeded before, by a kernel of its own: a
// look at its bits. Variables are taken together, as many as the arguments of a kernel have room for.
int fused_update(Float type, const FusedStep& step, const FusedVariable* variables, int64_t count, Stream stream);

}  // namespace cuda
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CUDA_KERNELS_H_
