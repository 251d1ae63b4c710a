// Launchers of the kernels that zero or copy entries under a mask.

#include "kernels/common/dtypes.h"
#include "kernels/cuda/mask_bodies.h"

namespace freezeops {
namespace cuda {
namespace {

// Tensors with at least this many entries give a large device enough to do in tiles of 4096.
constexpr int64_t kLeastForLongTiles = int64_t{1} << 24;

template <Action kAction>
int act(int width, void* destination, const void* source, const MaskView& mask, Stream stream) {
  const int64_t count = entries(mask.layout);
  if (count == 0) return 0;
  return with_width(width, [&](auto zero) {
    using U = decltype(zero);
    const Arrays<U> arrays{static_cast<U*>(destination), static_cast<const U*>(source)};
    const MaskLayout& layout = mask.layout;
    if (layout.outer == 1 && layout.inner == 1) {
      const bool aligned = bytes_past_16(destination) == 0 && bytes_past_16(source) == 0;
      return launch(MaskPlain<U, kAction>{arrays, mask.bits, count, count >= kLeastForLongTiles, aligned}, stream);
    }
    if (layout.inner >= kLongRowBytes / static_cast<int64_t>(sizeof(U))) {
      const RowTiling tiling = tile_rows(layout.outer * layout.kept, layout.inner);
      return launch(MaskRows<U, kAction>{arrays, mask, tiling}, stream);
    }
    return launch(MaskGeneral<U, kAction>{arrays, mask}, stream);
  });
}

template <Action kAction>
int act_on_slices(int width, void* destination, const void* source, const Slices& slices, const MaskView& mask,
                  Stream stream) {
  if (slices.count == 0 || slices.row_size == 0) return 0;
  return with_width(width, [&](auto zero) {
    return with_index(slices.wide, [&](auto index) {
      using U = decltype(zero);
      using Index = decltype(index);
      const Arrays<U> arrays{static_cast<U*>(destination), static_cast<const U*>(source)};
      const Index* const indices = static_cast<const Index*>(slices.indices);
      if (slices.row_size >= kLongRowBytes / static_cast<int64_t>(sizeof(U))) {
        const bool bit_per_row = mask.layout.inner % slices.row_size == 0;
        return launch(MaskSliceRows<U, Index, kAction>{arrays, mask, indices, slices.rows,
                                                       tile_rows(slices.count, slices.row_size), bit_per_row},
                      stream);
      }
      return launch(MaskSliceEntries<U, Index, kAction>{arrays, mask, indices, slices.rows, slices.row_size,
                                                        slices.count * slices.row_size},
                    stream);
    });
  });
}

}  // namespace

int zero_frozen(int width, void* data, const MaskView& mask, Stream stream) {
  return act<Action::kZeroFrozen>(width, data, data, mask, stream);
}

int copy_and_zero_frozen(int width, void* destination, const void* source, const MaskView& mask, Stream stream) {
  return act<Action::kCopyAndZeroFrozen>(width, destination, source, mask, stream);
}

int copy_frozen(int width, void* destination, const void* source, const MaskView& mask, Stream stream) {
  return act<Action::kCopyFrozen>(width, destination, source, mask, stream);
}

int mask_slices(int width, void* destination, const void* source, const Slices& slices, const MaskView& mask,
                Stream stream) {
  return destination == source
             ? act_on_slices<Action::kZeroFrozen>(width, destination, source, slices, mask, stream)
             : act_on_slices<Action::kCopyAndZeroFrozen>(width, destination, source, slices, mask, stream);
}

}  // namespace cuda
}  // namespace freezeops
