// Bodies of the kernels that zero or copy entries under a mask; see warps.h.
//
// Neighbouring lanes have neighbouring entries, so that of what is frozen in a piece of memory each 32-byte sector is
// asked for once. The mask is read by all lanes of a warp at the same place. Where the frozen entries of the 512 bytes
// that a warp looks at are whole pieces of 16 bytes, these are moved as such.

#ifndef FREEZEOPS_KERNELS_CUDA_MASK_BODIES_H_
#define FREEZEOPS_KERNELS_CUDA_MASK_BODIES_H_

#include "kernels/cuda/warps.h"

namespace freezeops {
namespace cuda {

enum class Action { kZeroFrozen, kCopyAndZeroFrozen, kCopyFrozen };

// What an action does with an entry: which are read at the source, and which are written. Those that are written and
// not read become zero.
template <Action kAction>
FREEZEOPS_INLINE bool reads(bool trainable) {
  return kAction == Action::kCopyAndZeroFrozen ? trainable : kAction == Action::kCopyFrozen ? !trainable : false;
}
template <Action kAction>
FREEZEOPS_INLINE bool writes(bool trainable) {
  return kAction == Action::kCopyAndZeroFrozen || !trainable;
}

template <typename U>
struct Arrays {
  U* destination;
  const U* source;
};

// All lanes: the action on `count` entries from `begin` on that are all trainable, or all frozen.
template <Action kAction, typename U>
FREEZEOPS_INLINE void act_on_range(int lane, const Arrays<U>& arrays, int64_t begin, int64_t count, bool trainable) {
  if (!writes<kAction>(trainable)) return;
  if (reads<kAction>(trainable)) {
    copy_range(lane, arrays.destination + begin, arrays.source + begin, count);
  } else {
    zero_range(lane, arrays.destination + begin, count);
  }
}

// Returns whether in each group of kGroup (2, 4 or 8) bits of a word all are equal.
template <int kGroup>
FREEZEOPS_INLINE bool in_whole_groups(uint32_t word) {
  constexpr uint32_t kWithinGroup = kGroup == 2 ? 0x55555555u : kGroup == 4 ? 0x77777777u : 0x7f7f7f7fu;
  return ((word ^ (word >> 1)) & kWithinGroup) == 0;
}

// One bit for each entry, in order. A tile is 32 or 128 entries for each lane to look at the mask of.
template <typename U, Action kAction>
struct MaskPlain {
  static constexpr bool kWaits = true;
  static constexpr int kWords = in_bytes16<U>();  // of 32 entries: together 512 bytes

  Arrays<U> arrays;
  const uint8_t* bits;
  int64_t count;
  bool long_tiles;
  bool aligned;  // to 16 bytes

  FREEZEOPS_METHOD int64_t tile_entries() const { return long_tiles ? 4096 : 1024; }
  int64_t tiles() const { return ceil_divide(count, tile_entries()); }

  // Returns whether the bits that the lane looks at in a tile's mask are all ones.
  FREEZEOPS_METHOD bool sees_no_frozen(int64_t begin, int lane) const {
    if (!long_tiles) {
      const int64_t at = begin + 32 * lane;
      const uint32_t valid = low_bits32(count - at);
      return (load_word(bits, mask_bytes(count), at) & valid) == valid;
    }
    uint32_t words[4];
    const int64_t at = begin + 128 * lane;
    load_words<4>(bits, mask_bytes(count), at, words);
    bool none = true;
    FREEZEOPS_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint32_t valid = low_bits32(count - at - 32 * i);
      none = none && (words[i] & valid) == valid;
    }
    return none;
  }

  template <typename Warp>
  FREEZEOPS_METHOD void operator()(const Warp& warp, int64_t tile) const {
    const int lane = warp.lane();
    const int64_t begin = tile * tile_entries();
    const int64_t end = min64(begin + tile_entries(), count);
    if (kAction != Action::kCopyAndZeroFrozen && warp.all(sees_no_frozen(begin, lane))) return;
    for (int64_t group = begin; group < end; group += 32 * kWords) {
      uint32_t words[kWords];
      load_words<kWords>(bits, mask_bytes(count), group, words);
      bool whole = aligned && group + 32 * kWords <= end;
      FREEZEOPS_UNROLL
      for (int i = 0; i < kWords; ++i) whole = whole && in_whole_groups<in_bytes16<U>()>(words[i]);
      if (whole) {
        act_on_vector(group + lane * in_bytes16<U>());
      } else {
        act_on_entries(group + lane, end, words, lane);
      }
    }
  }

  // The first entry's bit stands for all. It is read again: picked from the words, these would be kept in memory.
  FREEZEOPS_METHOD void act_on_vector(int64_t entry) const {
    const bool trainable = bit_is_set(bits, entry);
    if (!writes<kAction>(trainable)) return;
    Bytes16 value{0, 0};
    if (reads<kAction>(trainable)) value = *reinterpret_cast<const Bytes16*>(arrays.source + entry);
    *reinterpret_cast<Bytes16*>(arrays.destination + entry) = value;
  }

  // The lane's entry in each word.
  FREEZEOPS_METHOD void act_on_entries(int64_t entry, int64_t end, const uint32_t* words, int lane) const {
    U values[kWords];
    FREEZEOPS_UNROLL
    for (int i = 0; i < kWords; ++i) {
      values[i] = 0;
      const bool there = entry + 32 * i < end;
      if (there && reads<kAction>(words[i] >> lane & 1)) values[i] = arrays.source[entry + 32 * i];
    }
    FREEZEOPS_UNROLL
    for (int i = 0; i < kWords; ++i) {
      const bool there = entry + 32 * i < end;
      if (there && writes<kAction>(words[i] >> lane & 1)) arrays.destination[entry + 32 * i] = values[i];
    }
  }
};

// A bit for each row of at least kLongRowBytes; the mask may repeat.
template <typename U, Action kAction>
struct MaskRows {
  static constexpr bool kWaits = false;
  Arrays<U> arrays;
  MaskView mask;
  RowTiling tiling;

  int64_t tiles() const { return tiling.tiles(); }

  template <typename Warp>
  FREEZEOPS_METHOD void operator()(const Warp& warp, int64_t tile) const {
    const RowTiling::Tile part = tiling.at(tile);
    const int64_t bit = mask.layout.outer == 1 ? part.row : part.row % mask.layout.kept;
    const uint32_t word = load_repeated(mask.bits, mask.layout.kept, bit, part.rows);
    uint32_t left = low_bits32(part.rows);
    if (kAction != Action::kCopyAndZeroFrozen) left &= ~word;
    for (; left != 0; left &= left - 1) {
      const int row = lowest_one(left);
      act_on_range<kAction>(warp.lane(), arrays, (part.row + row) * tiling.row_size + part.begin, part.end - part.begin,
                            word >> row & 1);
    }
  }
};

// Any other layout.
template <typename U, Action kAction>
struct MaskGeneral {
  static constexpr bool kWaits = true;
  static constexpr int kTileEntries = 2048;
  static constexpr int kAtOnce = 4;

  Arrays<U> arrays;
  MaskView mask;

  int64_t tiles() const { return ceil_divide(entries(mask.layout), kTileEntries); }

  // Returns whether the bits that the lane looks at in a tile's mask are all ones.
  FREEZEOPS_METHOD bool sees_no_frozen(const RowPosition& start, int length, int lane) const {
    const int64_t kept = mask.layout.kept;
    const int64_t rows = (start.offset + length - 1) / static_cast<int>(mask.layout.inner) + 1;
    const int bits = static_cast<int>(min64(rows, kept));
    bool none = true;
    for (int i = 32 * lane; i < bits; i += 32 * kLanes) {
      const int64_t bit = start.bit + i < kept ? start.bit + i : start.bit + i - kept;
      const int looked_at = static_cast<int>(min64(32, bits - i));
      const uint32_t valid = low_bits32(looked_at);
      none = none && load_repeated(mask.bits, kept, bit, looked_at) == valid;
    }
    return none;
  }

  template <typename Warp>
  FREEZEOPS_METHOD void operator()(const Warp& warp, int64_t tile) const {
    const int lane = warp.lane();
    const int64_t begin = tile * kTileEntries;
    const int length = static_cast<int>(min64(kTileEntries, entries(mask.layout) - begin));
    const RowPosition start = position_of(mask.layout, begin);
    if (kAction != Action::kCopyAndZeroFrozen && warp.all(sees_no_frozen(start, length, lane))) return;
    for (int first = lane; first < length; first += kAtOnce * kLanes) {
      U values[kAtOnce];
      bool written[kAtOnce];
      FREEZEOPS_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const int ahead = first + i * kLanes;
        values[i] = 0;
        written[i] = false;
        if (ahead >= length) continue;
        const bool trainable = bit_is_set(mask.bits, bit_ahead(mask.layout, start, ahead));
        written[i] = writes<kAction>(trainable);
        if (reads<kAction>(trainable)) values[i] = arrays.source[begin + ahead];
      }
      FREEZEOPS_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        if (written[i]) arrays.destination[begin + first + i * kLanes] = values[i];
      }
    }
  }
};

// The rows that `indices` name. kInPlace: destination and source are the same, and only what is frozen is written.
template <typename U, typename Index, Action kAction>
struct MaskSliceRows {
  static constexpr bool kWaits = false;
  Arrays<U> arrays;
  MaskView mask;
  const Index* indices;
  int64_t rows;  // of the tensor
  RowTiling tiling;
  bool bit_per_row;

  int64_t tiles() const { return tiling.tiles(); }

  template <typename Warp>
  FREEZEOPS_METHOD void operator()(const Warp& warp, int64_t tile) const {
    const RowTiling::Tile part = tiling.at(tile);
    const int lane = warp.lane();
    const int64_t row_size = tiling.row_size;
    const bool plain = mask.layout.outer == 1 && mask.layout.inner == 1;
    for (int i = 0; i < part.rows; ++i) {
      const int64_t slice = part.row + i;
      const int64_t row = static_cast<int64_t>(indices[slice]);
      const bool exists = row >= 0 && row < rows;
      if (!exists || bit_per_row) {
        const bool trainable = exists && bit_is_set(mask.bits, bit_of_entry(mask.layout, row * row_size));
        act_on_range<kAction>(lane, arrays, slice * row_size + part.begin, part.end - part.begin, trainable);
        continue;
      }
      for (int64_t j = part.begin + lane; j < part.end; j += kLanes) {
        const int64_t entry = row * row_size + j;
        const bool trainable = bit_is_set(mask.bits, plain ? entry : bit_of_entry(mask.layout, entry));
        if (!writes<kAction>(trainable)) continue;
        const int64_t at = slice * row_size + j;
        arrays.destination[at] = reads<kAction>(trainable) ? arrays.source[at] : U{0};
      }
    }
  }
};

// Slices with short rows: entry by entry.
template <typename U, typename Index, Action kAction>
struct MaskSliceEntries {
  static constexpr bool kWaits = false;
  static constexpr int kTileEntries = 512;

  Arrays<U> arrays;
  MaskView mask;
  const Index* indices;
  int64_t rows;
  int64_t row_size;
  int64_t count;  // entries of all slices

  int64_t tiles() const { return ceil_divide(count, kTileEntries); }

  template <typename Warp>
  FREEZEOPS_METHOD void operator()(const Warp& warp, int64_t tile) const {
    const int64_t begin = tile * kTileEntries;
    const int64_t end = min64(begin + kTileEntries, count);
    const int64_t first_slice = begin / row_size;
    const uint32_t offset = static_cast<uint32_t>(begin - first_slice * row_size);
    const bool plain = mask.layout.outer == 1 && mask.layout.inner == 1;
    for (int64_t at = begin + warp.lane(); at < end; at += kLanes) {
      const uint32_t passed = offset + static_cast<uint32_t>(at - begin);
      const uint32_t slices = passed / static_cast<uint32_t>(row_size);
      const int64_t row = static_cast<int64_t>(indices[first_slice + slices]);
      bool trainable = row >= 0 && row < rows;
      if (trainable) {
        const int64_t entry = row * row_size + (passed - slices * static_cast<uint32_t>(row_size));
        trainable = bit_is_set(mask.bits, plain ? entry : bit_of_entry(mask.layout, entry));
      }
      if (!writes<kAction>(trainable)) continue;
      arrays.destination[at] = reads<kAction>(trainable) ? arrays.source[at] : U{0};
    }
  }
};

}  // namespace cuda
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CUDA_MASK_BODIES_H_
