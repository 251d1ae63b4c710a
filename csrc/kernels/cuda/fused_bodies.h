// Bodies of the kernels of fused updates; see update_rules.h for the arithmetic and warps.h for bodies.
//
// Variables of a step are in a table that is an argument of the kernel, and warps share out tiles of all of them: small
// variables go together, large ones are split. In each tile a lane finds out from the mask, or from indices, which
// entries are its own and where their slots are, and only for those it reads gradient, slots and variable.

#ifndef FREEZEOPS_KERNELS_CUDA_FUSED_BODIES_H_
#define FREEZEOPS_KERNELS_CUDA_FUSED_BODIES_H_

#include "kernels/common/seed_entry.h"
#include "kernels/common/vectors_scalar.h"
#include "kernels/cuda/compact_bodies.h"
#include "kernels/cuda/warps.h"

namespace freezeops {
namespace cuda {

// --- Sums of slices

FREEZEOPS_INLINE void atomic_max(uint64_t* target, uint64_t value) {
#if defined(__CUDA_ARCH__)
  static_assert(sizeof(unsigned long long) == sizeof(uint64_t), "");
  atomicMax(reinterpret_cast<unsigned long long*>(target), static_cast<unsigned long long>(value));
#elif !defined(__CUDACC__)
  if (*target < value) *target = value;
#else
  (void)target;
  (void)value;
#endif
}

struct ZeroNamed {
  static constexpr bool kWaits = false;
  static constexpr int kTileNumbers = 2048;
  uint64_t* named;
  int64_t count;

  int64_t tiles() const { return ceil_divide(count, kTileNumbers); }

  template <typename Warp>
  FREEZEOPS_METHOD void operator()(const Warp& warp, int64_t tile) const {
    const int64_t begin = tile * kTileNumbers;
    zero_range(warp.lane(), named + begin, min64(kTileNumbers, count - begin));
  }
};

// A lane for each slice. The largest of some numbers does not depend on their order, so that these atomic operations
// give the same result in every run.
struct NameRows {
  static constexpr bool kWaits = false;
  uint64_t* named;
  const int64_t* indices;
  int64_t count;
  int64_t rows;

  int64_t tiles() const { return ceil_divide(count, kLanes); }

  template <typename Warp>
  FREEZEOPS_METHOD void operator()(const Warp& warp, int64_t tile) const {
    const int64_t slice = tile * kLanes + warp.lane();
    if (slice >= count) return;
    const int64_t row = indices[slice];
    if (row < 0 || row >= rows) return;
    atomic_max(named + 2 * row, static_cast<uint64_t>(count - slice));
    atomic_max(named + 2 * row + 1, static_cast<uint64_t>(slice + 1));
  }
};

// A warp for each piece of each slice: that of the first slice of a row sums up all of them. Between the first and the
// last it looks for others, 32 at a time.
template <Float kType>
struct SumRows {
  static constexpr bool kWaits = true;
  static constexpr int64_t kPiece = 4096;
  using V = Single<kType>;
  using Entry = typename V::Entry;

  RowSums sums;
  const int64_t* indices;
  int64_t rows;
  const Entry* values;
  const Entry* scale;

  FREEZEOPS_METHOD int64_t pieces() const { return ceil_divide(sums.row_size, kPiece); }
  int64_t tiles() const { return sums.slices * pieces(); }

  template <typename Warp>
  FREEZEOPS_METHOD void operator()(const Warp& warp, int64_t tile) const {
    const int lane = warp.lane();
    const int64_t first = tile / pieces();
    const int64_t row = indices[first];
    if (row < 0 || row >= rows) return;                                             // no lane goes on
    if (sums.named[2 * row] != static_cast<uint64_t>(sums.slices - first)) return;  // likewise
    const int64_t end = static_cast<int64_t>(sums.named[2 * row + 1]);
    const int64_t begin = (tile - first * pieces()) * kPiece;
    const int64_t length = min64(kPiece, sums.row_size - begin);
    Entry* const total = static_cast<Entry*>(sums.sums) + first * sums.row_size + begin;
    Entry* const squares = static_cast<Entry*>(sums.squares) + first * sums.row_size + begin;
    for (int64_t at = first; at < end; at += kLanes) {
      const int64_t mine = at + lane;
      uint32_t same = warp.ballot(mine < end && indices[mine] == row);
      for (; same != 0; same &= same - 1) {
        const int64_t slice = at + lowest_one(same);
        const Entry* const from = values + slice * sums.row_size + begin;
        for (int64_t j = lane; j < length; j += kLanes) {
          V value = V::load(from + j);
          if (scale != nullptr) value = value * V::load(scale);
          const V square = value * value;
          const V zero = {0};
          ((slice == first ? zero : V::load(total + j)) + value).store(total + j);
          ((slice == first ? zero : V::load(squares + j)) + square).store(squares + j);
        }
      }
    }
  }
};

// Returns the position of an entry's sum; -1 if no slice names its row.
FREEZEOPS_INLINE int64_t place_of_sum(const RowSums& sums, int64_t entry) {
  constexpr int64_t kNarrow = int64_t{1} << 32;
  const int64_t row = entry < kNarrow && sums.row_size < kNarrow
                          ? static_cast<int64_t>(static_cast<uint32_t>(entry) / static_cast<uint32_t>(sums.row_size))
                          : entry / sums.row_size;
  const int64_t first = sums.slices - static_cast<int64_t>(sums.named[2 * row]);
  return first == sums.slices ? -1 : first * sums.row_size + (entry - row * sums.row_size);
}

// The gradient of an entry, and its square; of slices the sums of the two.
template <typename V>
FREEZEOPS_INLINE void load_gradient(const FusedVariable& variable, int64_t entry, int64_t slot, V* gradient,
                                    V* square) {
  using Entry = typename V::Entry;
  if (variable.rows.named == nullptr) {
    *gradient = V::load(static_cast<const Entry*>(variable.gradient) + (variable.gathered ? slot : entry));
    *square = *gradient * *gradient;
    return;
  }
  *gradient = *square = {0};
  const int64_t place = place_of_sum(variable.rows, entry);
  if (place < 0) return;
  *gradient = V::load(static_cast<const Entry*>(variable.rows.sums) + place);
  *square = V::load(static_cast<const Entry*>(variable.rows.squares) + place);
}

// --- The variables of a step

// Arguments of a kernel are 4 KB at most.
constexpr int kMostTogether = 24;

struct FusedTable {
  RuleFlags flags;
  int scalars;
  int seeds;
  int seed_slots[kMostSlots];
  int seed_powers[kMostSlots];
  int count;
  const void* scalar;
  const double* scales;
  FusedVariable variables[kMostTogether];
  int64_t ends[kMostTogether];  // the number of tiles up to the end of each

  int64_t tiles() const { return count == 0 ? 0 : ends[count - 1]; }

  // Adds a variable with a number of tiles.
  void add(const FusedVariable& variable, int64_t tiles_of_it) {
    variables[count] = variable;
    ends[count] = tiles() + tiles_of_it;
    ++count;
  }

  // Returns the variable that a tile belongs to. `tile` becomes its number there.
  FREEZEOPS_METHOD int find(int64_t* tile) const {
    int found = 0;
    while (*tile >= ends[found]) ++found;
    if (found > 0) *tile -= ends[found - 1];
    return found;
  }
};

static_assert(sizeof(FusedTable) + sizeof(int64_t) <= 4096, "the arguments of a kernel must have room for the table");

FREEZEOPS_INLINE bool is_compact(const FusedVariable& variable) { return variable.offsets != nullptr; }

// In compact state: whether trainable entries are found by the mask and the ranks of its blocks, else by their indices.
FREEZEOPS_INLINE bool found_by_bits(const FusedVariable& variable) {
  const MaskLayout& layout = variable.mask.layout;
  return layout.inner == 1 && !few_indices(variable.capacity, layout.kept, variable.wide);
}

// The entries of each slot.
FREEZEOPS_INLINE int64_t slot_size(const FusedVariable& variable) {
  const MaskLayout& layout = variable.mask.layout;
  return is_compact(variable) ? variable.capacity * layout.inner : entries(layout);
}

// Returns the position of an entry: number `within` of the `inner` entries of the index at `place`; -1 for none, or for
// one that is not trainable.
FREEZEOPS_INLINE int64_t entry_of_index(const FusedVariable& variable, int64_t place, int64_t within) {
  const MaskLayout& layout = variable.mask.layout;
  const int64_t index = variable.wide ? kept_index(static_cast<const int64_t*>(variable.indices), place, layout.kept)
                                      : kept_index(static_cast<const int32_t*>(variable.indices), place, layout.kept);
  return index < 0 || !bit_is_set(variable.mask.bits, index) ? -1 : index * layout.inner + within;
}

// --- Seeding

// Before the update, for slots that wait: in nearly every step no bit is set, and they are all that is read. Words of
// bits belong to one warp each, which in compact state they would not if the update did this.
template <Float kType>
struct SeedWaiting {
  static constexpr bool kWaits = true;
  static constexpr int kWordsInTile = 128;
  using V = Single<kType>;
  using Entry = typename V::Entry;
  using Acc = typename V::Acc;

  FusedTable table;

  static int64_t tiles_of(const FusedVariable& variable) {
    return variable.unseeded == nullptr ? 0 : ceil_divide(slot_size(variable), 32 * kWordsInTile);
  }
  int64_t tiles() const { return table.tiles(); }

  template <typename Warp>
  FREEZEOPS_METHOD void operator()(const Warp& warp, int64_t tile) const {
    const FusedVariable& variable = table.variables[table.find(&tile)];
    const int lane = warp.lane();
    const int64_t size = slot_size(variable);
    const int64_t bytes = mask_bytes(size);
    const int64_t begin = tile * 32 * kWordsInTile;
    uint32_t any = 0;
    for (int i = lane; i < kWordsInTile; i += kLanes) any |= word_at(variable, size, begin + 32 * i);
    if (warp.all(any == 0)) return;
    for (int64_t at = begin; at < min64(begin + 32 * kWordsInTile, size); at += 32) {
      const uint32_t word = word_at(variable, size, at);
      const bool seeded = (word >> lane & 1) && seed(variable, at + lane);
      const uint32_t left = word & ~warp.ballot(seeded);
      // Each lane a byte: the bits may end within a word.
      if (left != word && lane < 4 && at / 8 + lane < bytes) {
        variable.unseeded[at / 8 + lane] = static_cast<uint8_t>(left >> (8 * lane));
      }
    }
  }

  FREEZEOPS_METHOD static uint32_t word_at(const FusedVariable& variable, int64_t size, int64_t bit) {
    return load_word(variable.unseeded, mask_bytes(size), bit) & low_bits32(size - bit);
  }

  // Returns whether the slot's bit is to be cleared.
  FREEZEOPS_METHOD bool seed(const FusedVariable& variable, int64_t slot) const {
    int64_t entry = slot;
    if (is_compact(variable)) {
      const int64_t place = slot / variable.mask.layout.inner;
      entry = entry_of_index(variable, place, slot - place * variable.mask.layout.inner);
      if (entry < 0) return false;
    } else if (variable.mask.bits != nullptr &&
               !bit_is_set(variable.mask.bits, bit_of_entry(variable.mask.layout, entry))) {
      return false;
    }
    V gradient, summed;
    load_gradient(variable, entry, slot, &gradient, &summed);
    const Acc value = gradient.value;
    Acc square = value * value;
    // Gradients of repeated rows may cancel; their squares do not, see reference.seed_slots.
    if (variable.rows.named != nullptr && summed.value > square) square = summed.value;
    SlotSeed<kType> slots[kMostSlots];
    FREEZEOPS_UNROLL
    for (int i = 0; i < kMostSlots; ++i) {
      if (i >= table.seeds) break;
      slots[i] = {static_cast<Entry*>(variable.slots[table.seed_slots[i]]), static_cast<Acc>(table.scales[i]),
                  table.seed_powers[i]};
    }
    return SeedEntry(slots, table.seeds, slot, value, square);
  }
};

// --- Updating

// Finds a lane's trainable entries of a tile, in groups: one of each of `kAtOnce` words.
//
// Five ways in one class, chosen once for each tile: divisions of 64 bits are slow on a device, so each way
// divides as rarely and as narrowly as it can.
template <int kAtOnce>
class TileWalk {
 public:
  static constexpr int kTileEntries = 512;
  static constexpr int kGroup = kAtOnce * kLanes;

  // Positions of entries, -1 for none, and of their slots.
  struct Group {
    int64_t entries[kAtOnce];
    int64_t slots[kAtOnce];
  };

  static int64_t tiles_of(const FusedVariable& variable) {
    if (entries(variable.mask.layout) == 0) return 0;
    if (is_compact(variable) && found_by_bits(variable)) return rank_blocks(variable.mask.layout.kept);
    return ceil_divide(slot_size(variable), kTileEntries);
  }

  FREEZEOPS_METHOD TileWalk(const FusedVariable& variable, int64_t tile, int lane)
      : variable_(variable), lane_(lane), start_{0, 0}, rank_(0) {
    const MaskView& mask = variable.mask;
    const MaskLayout& layout = mask.layout;
    if (is_compact(variable) && found_by_bits(variable)) {
      way_ = Way::kByBits;
      begin_ = tile * kRankBlockBits;
      length_ = static_cast<int>(min64(kRankBlockBits, layout.kept - begin_));
      rank_ = variable.offsets[tile];
      return;
    }
    begin_ = tile * kTileEntries;
    length_ = static_cast<int>(min64(kTileEntries, slot_size(variable) - begin_));
    if (is_compact(variable)) {
      way_ = Way::kByIndex;
      start_.bit = layout.inner == 1 ? begin_ : begin_ / layout.inner;
      start_.offset = begin_ - start_.bit * layout.inner;
    } else if (mask.bits == nullptr) {
      way_ = Way::kAll;
    } else if (layout.outer == 1 && layout.inner == 1) {
      way_ = Way::kPlain;
    } else {
      way_ = Way::kGeneral;
      start_ = position_of(layout, begin_);
      if (layout.inner < kTileEntries) return;
      // Two rows at most.
      const bool first = bit_is_set(mask.bits, start_.bit);
      const bool last = bit_is_set(mask.bits, bit_at(length_ - 1));
      if (first && last) way_ = Way::kAll;
      if (!first && !last) length_ = 0;
    }
  }

  FREEZEOPS_METHOD int length() const { return length_; }

  // Finds the group `at` entries into the tile, a multiple of kGroup; groups are asked for in turn. Returns whether
  // there is any entry.
  FREEZEOPS_METHOD bool next(int at, Group* group) {
    uint32_t words[kAtOnce];
    if (way_ == Way::kPlain || way_ == Way::kByBits) {
      const MaskView& mask = variable_.mask;
      load_words<kAtOnce>(mask.bits, mask_bytes(mask.layout.kept), begin_ + at, words);
      uint32_t some = 0;
      FREEZEOPS_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        words[i] &= low_bits32(length_ - at - 32 * i);
        some |= words[i];
      }
      if (some == 0) return false;
    }
    bool any = false;
    FREEZEOPS_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const int ahead = at + i * kLanes + lane_;
      int64_t entry = -1;
      int64_t slot = begin_ + ahead;
      if (way_ == Way::kPlain) {
        if (words[i] >> lane_ & 1) entry = slot;
      } else if (way_ == Way::kByBits) {
        if (words[i] >> lane_ & 1) entry = slot;
        slot = rank_ + ones_in(words[i] & low_bits32(lane_));
        rank_ += ones_in(words[i]);
        if (slot < 0 || slot >= variable_.capacity) entry = -1;
      } else if (ahead < length_) {
        entry = entry_at(ahead);
      }
      group->entries[i] = entry;
      group->slots[i] = slot;
      any = any || entry >= 0;
    }
    return any;
  }

 private:
  enum class Way { kAll, kPlain, kGeneral, kByBits, kByIndex };

  // Returns the number of rows that begin up to an entry; a division of 32 bits suffices but for rows that are longer
  // than any tile.
  FREEZEOPS_METHOD int64_t rows_passed(int ahead) const {
    const int64_t inner = variable_.mask.layout.inner;
    const int64_t passed = start_.offset + ahead;
    if (inner == 1) return passed;
    if (inner >= int64_t{1} << 30) return passed >= inner;
    return static_cast<uint32_t>(passed) / static_cast<uint32_t>(inner);
  }

  FREEZEOPS_METHOD int64_t bit_at(int ahead) const {
    const int64_t kept = variable_.mask.layout.kept;
    const int64_t bit = start_.bit + rows_passed(ahead);
    if (bit < kept) return bit;
    // Past the end at most once, unless the mask is short.
    const int64_t again = bit - kept;
    return again < kept ? again : static_cast<uint32_t>(again) % static_cast<uint32_t>(kept);
  }

  FREEZEOPS_METHOD int64_t entry_at(int ahead) const {
    if (way_ == Way::kByIndex) {
      const int64_t passed = rows_passed(ahead);
      const int64_t within = start_.offset + ahead - passed * variable_.mask.layout.inner;
      return entry_of_index(variable_, start_.bit + passed, within);
    }
    return way_ == Way::kAll || bit_is_set(variable_.mask.bits, bit_at(ahead)) ? begin_ + ahead : -1;
  }

  const FusedVariable& variable_;
  int lane_;
  Way way_;
  int64_t begin_;  // an entry; in compact state by index a slot
  int length_;
  RowPosition start_;  // of the first in its row; in compact state `bit` is its place among the indices
  int64_t rank_;       // by bits: of the next word
};

template <UpdateRule kRule, Float kType>
struct UpdateFused {
  static constexpr bool kWaits = false;
  using V = Single<kType>;
  using Entry = typename V::Entry;
  // Words on their way together: 128 entries of each tensor, 64 of the widest.
  static constexpr int kAtOnce = sizeof(Entry) == 8 ? 2 : 4;
  using Walk = TileWalk<kAtOnce>;

  FusedTable table;

  static int64_t tiles_of(const FusedVariable& variable) { return Walk::tiles_of(variable); }
  int64_t tiles() const { return table.tiles(); }

  template <typename Warp>
  FREEZEOPS_METHOD void operator()(const Warp& warp, int64_t tile) const {
    const FusedVariable& variable = table.variables[table.find(&tile)];
    Walk walk(variable, tile, warp.lane());
    V c[kMostScalars] = {};
    bool loaded = false;
    for (int at = 0; at < walk.length(); at += Walk::kGroup) {
      typename Walk::Group group;
      if (!walk.next(at, &group)) continue;
      if (!loaded) load_scalars(variable, c);
      loaded = true;
      update(variable, c, group);
    }
  }

  FREEZEOPS_METHOD void load_scalars(const FusedVariable& variable, V* c) const {
    const Entry* const from = static_cast<const Entry*>(table.scalar);
    FREEZEOPS_UNROLL
    for (int i = 0; i < kMostScalars; ++i) {
      if (i < table.scalars) c[i] = V::load(from + i);
    }
    // Slices were multiplied before they were summed.
    if (kRule == UpdateRule::kSgd && variable.rows.named != nullptr) c[kRate] = {1};
  }

  FREEZEOPS_METHOD void update(const FusedVariable& variable, const V* c, const typename Walk::Group& group) const {
    V w[kAtOnce] = {}, g[kAtOnce] = {}, square[kAtOnce] = {}, s[kAtOnce][kMostSlots] = {};
    Entry* const weights = static_cast<Entry*>(variable.variable);
    FREEZEOPS_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (group.entries[i] < 0) continue;
      w[i] = V::load(weights + group.entries[i]);
      load_gradient(variable, group.entries[i], group.slots[i], &g[i], &square[i]);
      FREEZEOPS_UNROLL
      for (int j = 0; j < kMostSlots; ++j) {
        if (variable.slots[j] != nullptr) s[i][j] = V::load(static_cast<Entry*>(variable.slots[j]) + group.slots[i]);
      }
    }
    FREEZEOPS_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (group.entries[i] < 0) continue;
      update_entry<kRule>(table.flags, variable.decays, c, w[i], g[i], square[i], s[i]);
      w[i].store(weights + group.entries[i]);
      FREEZEOPS_UNROLL
      for (int j = 0; j < kMostSlots; ++j) {
        if (variable.slots[j] != nullptr) s[i][j].store(static_cast<Entry*>(variable.slots[j]) + group.slots[i]);
      }
    }
  }
};

}  // namespace cuda
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CUDA_FUSED_BODIES_H_
