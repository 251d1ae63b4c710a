// Launchers of the kernels of compact state.

#include "kernels/common/dtypes.h"
#include "kernels/cuda/compact_bodies.h"

namespace freezeops {
namespace cuda {
namespace {

template <typename U, int kArrays, bool kScatter>
int move_trainable(void* const* compact, void* const* whole, const TrainableIndex& index, Stream stream) {
  CompactArrays<U, kArrays> arrays;
  for (int a = 0; a < kArrays; ++a) {
    arrays.compact[a] = static_cast<U*>(compact[a]);
    arrays.whole[a] = static_cast<U*>(whole[a]);
  }
  const uint8_t* const bits = index.mask.bits;
  const int64_t kept = index.mask.layout.kept;
  const int64_t inner = index.mask.layout.inner;
  if (index.capacity == 0 || inner == 0) return 0;
  if (inner == 1 && !few_indices(index.capacity, kept, index.wide)) {
    return launch(CompactByBits<U, kArrays, kScatter>{arrays, bits, kept, index.offsets, index.capacity}, stream);
  }
  return with_index(index.wide, [&](auto type) {
    using Index = decltype(type);
    const Index* const indices = static_cast<const Index*>(index.indices);
    if (inner >= kLongRowBytes / static_cast<int64_t>(sizeof(U))) {
      return launch(
          CompactRows<U, Index, kArrays, kScatter>{arrays, bits, kept, indices, tile_rows(index.capacity, inner)},
          stream);
    }
    return launch(CompactByIndex<U, Index, kArrays, kScatter>{arrays, bits, kept, inner, indices, index.capacity},
                  stream);
  });
}

}  // namespace

int gather_trainable(int width, int arrays, void* const* compact, const void* const* sources,
                     const TrainableIndex& index, Stream stream) {
  // Sources are only read: kScatter is false.
  void* const whole[2] = {const_cast<void*>(sources[0]), const_cast<void*>(sources[arrays - 1])};
  return with_width(width, [&](auto zero) {
    using U = decltype(zero);
    return arrays == 2 ? move_trainable<U, 2, false>(compact, whole, index, stream)
                       : move_trainable<U, 1, false>(compact, whole, index, stream);
  });
}

int scatter_trainable(int width, void* destination, const void* compact, const TrainableIndex& index, Stream stream) {
  void* const from = const_cast<void*>(compact);
  return with_width(
      width, [&](auto zero) { return move_trainable<decltype(zero), 1, true>(&from, &destination, index, stream); });
}

int rank_of_bits(int64_t* ranks, const int64_t* bits, int64_t count, const uint8_t* mask, int64_t kept,
                 const int64_t* offsets, int64_t last, Stream stream) {
  return launch(RankOfBits{ranks, bits, count, mask, kept, offsets, last}, stream);
}

}  // namespace cuda
}  // namespace freezeops
