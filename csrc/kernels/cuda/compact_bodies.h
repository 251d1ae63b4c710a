// Bodies of the kernels of compact state: gathering and scattering trainable entries; see warps.h.
//
// By bits, a warp has a block of 2048 whose rank is known, and counts on from there; each entry's place follows from
// the mask alone, so nothing depends on the order in which warps run. Where indices take less memory than the bits, and
// where each bit stands for several entries, entries are found by these.

#ifndef FREEZEOPS_KERNELS_CUDA_COMPACT_BODIES_H_
#define FREEZEOPS_KERNELS_CUDA_COMPACT_BODIES_H_

#include "kernels/cuda/warps.h"

namespace freezeops {
namespace cuda {

// Places between a compact array and a whole one; kScatter says which way.
template <typename U, int kArrays>
struct CompactArrays {
  U* compact[kArrays];
  U* whole[kArrays];
};

// Returns whether indices take less memory than the bits of a mask. The host does not know how many entries are
// trainable, only how many may be.
FREEZEOPS_INLINE bool few_indices(int64_t capacity, int64_t kept, bool wide) {
  return capacity < kept / (wide ? 64 : 32);
}

// One entry for each bit. The first tiles are the blocks of the mask, the others the compact array's rest.
template <typename U, int kArrays, bool kScatter>
struct CompactByBits {
  static constexpr bool kWaits = false;
  static constexpr int kWordsAtOnce = 8;
  static constexpr int kRestInTile = 8192;

  CompactArrays<U, kArrays> arrays;
  const uint8_t* bits;
  int64_t kept;
  const int64_t* offsets;
  int64_t capacity;

  int64_t tiles() const { return rank_blocks(kept) + (kScatter ? 0 : ceil_divide(capacity, kRestInTile)); }

  template <typename Warp>
  FREEZEOPS_METHOD void operator()(const Warp& warp, int64_t tile) const {
    const int lane = warp.lane();
    if (tile >= rank_blocks(kept)) {
      zero_rest((tile - rank_blocks(kept)) * kRestInTile, lane);
      return;
    }
    const int64_t end = min64((tile + 1) * kRankBlockBits, kept);
    int64_t rank = offsets[tile];
    for (int64_t at = tile * kRankBlockBits; at < end; at += 32 * kWordsAtOnce) {
      uint32_t words[kWordsAtOnce];
      load_words<kWordsAtOnce>(bits, mask_bytes(kept), at, words);
      uint32_t some = 0;
      uint32_t all = ~uint32_t{0};
      FREEZEOPS_UNROLL
      for (int i = 0; i < kWordsAtOnce; ++i) {
        words[i] &= low_bits32(end - at - 32 * i);
        some |= words[i];
        all &= words[i];
      }
      if (some == 0) continue;
      constexpr int64_t kEntries = 32 * kWordsAtOnce;
      if (all == ~uint32_t{0} && rank >= 0 && rank + kEntries <= capacity) {
        move_range(lane, at, rank, kEntries);
        rank += kEntries;
        continue;
      }
      // The place of the lane's entry of each word; -1 if its bit is not set or there is no room.
      int64_t places[kWordsAtOnce];
      FREEZEOPS_UNROLL
      for (int i = 0; i < kWordsAtOnce; ++i) {
        const int64_t place = rank + ones_in(words[i] & low_bits32(lane));
        const bool moved = (words[i] >> lane & 1) && place >= 0 && place < capacity;
        places[i] = moved ? place : -1;
        rank += ones_in(words[i]);
      }
      move_entries(at + lane, places);
    }
  }

  // Moves `count` consecutive entries, all trainable, from or to the places from `rank` on.
  FREEZEOPS_METHOD void move_range(int lane, int64_t at, int64_t rank, int64_t count) const {
    FREEZEOPS_UNROLL
    for (int a = 0; a < kArrays; ++a) {
      U* const compact = arrays.compact[a] + rank;
      U* const whole = arrays.whole[a] + at;
      if (kScatter) {
        copy_range(lane, whole, compact, count);
      } else {
        copy_range(lane, compact, whole, count);
      }
    }
  }

  // Moves the lane's entries, 32 apart from `at` on, from or to their places.
  FREEZEOPS_METHOD void move_entries(int64_t at, const int64_t* places) const {
    FREEZEOPS_UNROLL
    for (int a = 0; a < kArrays; ++a) {
      U* const whole = arrays.whole[a] + at;
      U values[kWordsAtOnce];
      FREEZEOPS_UNROLL
      for (int i = 0; i < kWordsAtOnce; ++i) {
        if (places[i] >= 0) values[i] = kScatter ? arrays.compact[a][places[i]] : whole[32 * i];
      }
      FREEZEOPS_UNROLL
      for (int i = 0; i < kWordsAtOnce; ++i) {
        if (places[i] < 0) continue;
        if (kScatter) {
          whole[32 * i] = values[i];
        } else {
          arrays.compact[a][places[i]] = values[i];
        }
      }
    }
  }

  // Zeroes the places behind the last trainable entry.
  FREEZEOPS_METHOD void zero_rest(int64_t begin, int lane) const {
    const int64_t total = offsets[rank_blocks(kept)];
    const int64_t first = begin > total ? begin : total;
    const int64_t end = min64(begin + kRestInTile, capacity);
    if (first >= end) return;
    FREEZEOPS_UNROLL
    for (int a = 0; a < kArrays; ++a) zero_range(lane, arrays.compact[a] + first, end - first);
  }
};

// The kept index at a place of a compact array, or -1 where there is none.
template <typename Index>
FREEZEOPS_INLINE int64_t kept_index(const Index* indices, int64_t place, int64_t kept) {
  const int64_t index = static_cast<int64_t>(indices[place]);
  return index >= 0 && index < kept ? index : -1;
}

// Entries that are found by their indices; `inner` for each.
template <typename U, typename Index, int kArrays, bool kScatter>
struct CompactByIndex {
  static constexpr bool kWaits = false;
  static constexpr int kTileEntries = 512;
  static constexpr int kAtOnce = 4;

  CompactArrays<U, kArrays> arrays;
  const uint8_t* bits;
  int64_t kept;
  int64_t inner;
  const Index* indices;
  int64_t capacity;

  int64_t tiles() const { return ceil_divide(capacity * inner, kTileEntries); }

  template <typename Warp>
  FREEZEOPS_METHOD void operator()(const Warp& warp, int64_t tile) const {
    const int64_t begin = tile * kTileEntries;
    const int length = static_cast<int>(min64(kTileEntries, capacity * inner - begin));
    const int64_t first_place = inner == 1 ? begin : begin / inner;
    const uint32_t offset = static_cast<uint32_t>(begin - first_place * inner);
    for (int first = warp.lane(); first < length; first += kAtOnce * kLanes) {
      // The position of each entry in the whole array.
      int64_t entries[kAtOnce];
      FREEZEOPS_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const int ahead = first + i * kLanes;
        entries[i] = -1;
        if (ahead >= length) continue;
        const uint32_t passed = offset + static_cast<uint32_t>(ahead);
        const uint32_t places = inner == 1 ? passed : passed / static_cast<uint32_t>(inner);
        const int64_t index = kept_index(indices, first_place + places, kept);
        if (index < 0 || (kScatter && !bit_is_set(bits, index))) continue;
        entries[i] = index * inner + (passed - places * static_cast<uint32_t>(inner));
      }
      FREEZEOPS_UNROLL
      for (int a = 0; a < kArrays; ++a) {
        U* const compact = arrays.compact[a] + begin + first;
        U values[kAtOnce];
        FREEZEOPS_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          values[i] = 0;
          if (entries[i] >= 0) values[i] = kScatter ? compact[i * kLanes] : arrays.whole[a][entries[i]];
        }
        FREEZEOPS_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          if (kScatter) {
            if (entries[i] >= 0) arrays.whole[a][entries[i]] = values[i];
          } else if (first + i * kLanes < length) {
            compact[i * kLanes] = values[i];
          }
        }
      }
    }
  }
};

// Rows of at least kLongRowBytes, found by index.
template <typename U, typename Index, int kArrays, bool kScatter>
struct CompactRows {
  static constexpr bool kWaits = false;
  CompactArrays<U, kArrays> arrays;
  const uint8_t* bits;
  int64_t kept;
  const Index* indices;
  RowTiling tiling;  // of the compact array

  int64_t tiles() const { return tiling.tiles(); }

  template <typename Warp>
  FREEZEOPS_METHOD void operator()(const Warp& warp, int64_t tile) const {
    const RowTiling::Tile part = tiling.at(tile);
    const int64_t length = part.end - part.begin;
    for (int i = 0; i < part.rows; ++i) {
      const int64_t place = part.row + i;
      const int64_t index = kept_index(indices, place, kept);
      FREEZEOPS_UNROLL
      for (int a = 0; a < kArrays; ++a) {
        U* const compact = arrays.compact[a] + place * tiling.row_size + part.begin;
        U* const whole = arrays.whole[a] + index * tiling.row_size + part.begin;
        if (kScatter) {
          if (index >= 0 && bit_is_set(bits, index)) copy_range(warp.lane(), whole, compact, length);
        } else if (index >= 0) {
          copy_range(warp.lane(), compact, whole, length);
        } else {
          zero_range(warp.lane(), compact, length);
        }
      }
    }
  }
};

struct RankOfBits {
  static constexpr bool kWaits = false;
  int64_t* ranks;
  const int64_t* bits;
  int64_t count;
  const uint8_t* mask;
  int64_t kept;
  const int64_t* offsets;
  int64_t last;

  int64_t tiles() const { return ceil_divide(count, kLanes); }

  template <typename Warp>
  FREEZEOPS_METHOD void operator()(const Warp& warp, int64_t tile) const {
    const int64_t i = tile * kLanes + warp.lane();
    if (i >= count) return;
    const int64_t bit = min64(bits[i], kept - 1);
    const int64_t rank = min64(rank_of_bit(mask, kept, offsets, bit > 0 ? bit : 0), last);
    ranks[i] = rank > 0 ? rank : 0;
  }
};

}  // namespace cuda
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CUDA_COMPACT_BODIES_H_
