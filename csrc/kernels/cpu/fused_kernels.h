// Fused updates, written once over the operations of an instruction set (Isa, see mask_kernels.h): the update of
// entries that are at hand. fused_full.h and fused_compact.h find the entries.

#ifndef FREEZEOPS_KERNELS_CPU_FUSED_KERNELS_H_
#define FREEZEOPS_KERNELS_CPU_FUSED_KERNELS_H_

#include <stdint.h>

#include "kernels/common/seed_entry.h"
#include "kernels/cpu/few_entries.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/mask_walk.h"

namespace freezeops {
namespace cpu {
namespace {

// Scattered entries are collected in arrays before they are updated, so that they fill whole vectors: this many at
// most, and the entries of a word more.
constexpr int kCollected = 512;
constexpr int kRoom = kCollected + 64;

// The unsigned integer of kBytes bytes.
template <int kBytes>
struct IntegerOf;
template <>
struct IntegerOf<2> {
  using Type = uint16_t;
};
template <>
struct IntegerOf<4> {
  using Type = uint32_t;
};
template <>
struct IntegerOf<8> {
  using Type = uint64_t;
};

// load_bits() of bits that other threads may be clearing: in compact state two threads' bits may share a byte.
FREEZEOPS_INLINE uint64_t load_shared_bits(const uint8_t* bits, int64_t byte_count, int64_t bit) {
  int64_t byte = bit >> 3;
  const int shift = static_cast<int>(bit & 7);
  uint64_t word = 0;
  uint64_t next = 0;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  // Two aligned words.
  const int before = static_cast<int>(reinterpret_cast<uintptr_t>(bits + byte) & 7);
  if (byte >= before && byte - before + 16 <= byte_count) {
    const uint64_t* const words = reinterpret_cast<const uint64_t*>(bits + byte - before);
    word = __atomic_load_n(words, __ATOMIC_RELAXED);
    const int all = 8 * before + shift;
    if (all == 0) return word;
    next = __atomic_load_n(words + 1, __ATOMIC_RELAXED);
    return (word >> all) | (next << (64 - all));
  }
#endif
  for (int i = 0; i < 9 && byte < byte_count; ++i, ++byte) {
    const uint64_t one = __atomic_load_n(bits + byte, __ATOMIC_RELAXED);
    if (i < 8) {
      word |= one << (8 * i);
    } else {
      next = one;
    }
  }
  return shift == 0 ? word : (word >> shift) | (next << (64 - shift));
}

// Updates entries of one variable. Positions are those of entries in the variable; an entry's slot is at the same
// position in full state, at its rank in compact state.
template <typename Isa, UpdateRule kRule, Float kType>
class Updates {
 public:
  using V = typename Isa::template Vector<kType>;
  using Entry = typename V::Entry;
  using Acc = typename EntryOf<kType>::Acc;
  using U = typename IntegerOf<sizeof(Entry)>::Type;
  static constexpr int kLanes = V::kLanes;
  static constexpr uint32_t kAllLanes = (1u << kLanes) - 1;

  Updates(const FusedStep& step, const FusedTensor& tensor)
      : flags_(step.flags),
        decays_(tensor.decays),
        seeds_(step.seeds.count),
        variable_(static_cast<Entry*>(tensor.variable)),
        gradient_(static_cast<const Entry*>(tensor.gradient)),
        gathered_(static_cast<const Entry*>(tensor.gathered)),
        square_(static_cast<const Entry*>(tensor.square)),
        unseeded_(tensor.unseeded),
        unseeded_bytes_(tensor.unseeded_bytes) {
    const Entry* const scalars = static_cast<const Entry*>(step.scalars);
    for (int i = 0; i < kMostScalars; ++i) scalars_[i] = V::set(scalars[i]);
    for (int i = 0; i < kMostSlots; ++i) slots_[i] = static_cast<Entry*>(tensor.slots[i]);
    for (int i = 0; i < seeds_; ++i) {
      const Seeds& seeds = step.seeds;
      seed_[i] = {slots_[seeds.slots[i]], static_cast<Acc>(seeds.scales[i]), seeds.powers[i]};
    }
  }

  Entry* variable() const { return variable_; }
  const Entry* gradient() const { return gradient_; }
  const Entry* square() const { return square_; }

  // Returns the gradient of consecutive entries from `slot` on: it is there already if it is compact, and otherwise at
  // `found`, which may be null for zeros.
  const Entry* gradient_of(int64_t slot, const Entry* found) const {
    return gathered_ == nullptr ? found : gathered_ + slot;
  }

  // Prefetches an entry of the variable and the gradient, and in full state (kSlots) of the slots.
  template <bool kSlots>
  void prefetch(int64_t entry) const {
    __builtin_prefetch(variable_ + entry, 1);
    if (gradient_ != nullptr) __builtin_prefetch(gradient_ + entry);
    if (!kSlots) return;
    for (int i = 0; i < kMostSlots; ++i) {
      if (slots_[i] != nullptr) __builtin_prefetch(slots_[i] + entry, 1);
    }
  }

  // Updates `count` consecutive entries, whose slots are consecutive from `slot` on.
  void update_run(Entry* w, const Entry* g, const Entry* square, int64_t slot, int64_t count) const {
    Entry* s[kMostSlots];
    for (int i = 0; i < kMostSlots; ++i) s[i] = slots_[i] == nullptr ? nullptr : slots_[i] + slot;
    update_all(w, g, square, s, count);
  }

  // Updates the selected entries of one 64-entry word (full state).
  void update_word(int64_t position, uint64_t selected) const {
    for (int i = 0; i < 64; i += kLanes) {
      const uint32_t lanes = static_cast<uint32_t>(selected >> i) & kAllLanes;
      if (lanes == 0) continue;
      const int64_t at = position + i;
      Entry* s[kMostSlots];
      for (int j = 0; j < kMostSlots; ++j) s[j] = slots_[j] == nullptr ? nullptr : slots_[j] + at;
      update<true>(variable_ + at, from(gradient_, at), from(square_, at), s, lanes);
    }
  }

  // Updates the entries at `base + entries[i]` (full state): collected, updated and put back.
  void update_scattered(int64_t base, const uint16_t* entries, int count) const {
    Entry w[kRoom], g[kRoom], square[kRoom], slot_values[kMostSlots][kRoom];
    Entry* s[kMostSlots];
    collect(w, variable_ + base, entries, count);
    if (gradient_ != nullptr) collect(g, gradient_ + base, entries, count);
    if (square_ != nullptr) collect(square, square_ + base, entries, count);
    for (int i = 0; i < kMostSlots; ++i) {
      s[i] = slots_[i] == nullptr ? nullptr : slot_values[i];
      if (s[i] != nullptr) collect(s[i], slots_[i] + base, entries, count);
    }
    update_all(w, gradient_ == nullptr ? nullptr : g, square_ == nullptr ? nullptr : square, s, count);
    put(variable_ + base, w, entries, count);
    for (int i = 0; i < kMostSlots; ++i) {
      if (s[i] != nullptr) put(slots_[i] + base, s[i], entries, count);
    }
  }

  // Updates the selected entries of one 64-entry word (compact state; not with a compact gradient). `slot`: slot of the
  // first selected entry. Writes the new slots to `new_slots`, which have room for 64 entries and a vector more.
  // Returns the number of entries.
  int update_word_compact(int64_t position, uint64_t selected, int64_t slot, Entry* const* new_slots) const {
    int count = 0;
    for (int i = 0; i < 64; i += kLanes) {
      const uint32_t lanes = static_cast<uint32_t>(selected >> i) & kAllLanes;
      const int64_t at = position + i;
      V value = V::load(variable_ + at);
      const V gradient = gradient_ == nullptr ? V::set(Entry(Acc(0))) : V::load(gradient_ + at);
      const V squared = square_ == nullptr ? gradient * gradient : V::load(square_ + at);
      V s[kMostSlots] = {gradient, gradient, gradient};  // the rule's are loaded
      for (int j = 0; j < kMostSlots; ++j) {
        if (slots_[j] != nullptr) s[j] = V::expand(slots_[j] + slot + count, lanes);
      }
      update_entry<kRule>(flags_, decays_, scalars_, value, gradient, squared, s);
      value.store(variable_ + at, lanes);
      for (int j = 0; j < kMostSlots; ++j) {
        if (slots_[j] != nullptr) s[j].compress(new_slots[j] + count, lanes);
      }
      count += count_bits(lanes);
    }
    return count;
  }

  // Writes `count` slots that update_word_compact() returned, from `slot` on.
  void put_slots(int64_t slot, Entry* const* new_slots, int count) const {
    for (int j = 0; j < kMostSlots; ++j) {
      if (slots_[j] != nullptr) __builtin_memcpy(slots_[j] + slot, new_slots[j], count * sizeof(Entry));
    }
  }

  // Returns whether none of `count` <= 64 slots from `slot` on waits to be seeded.
  bool none_waits(int64_t slot, int count) const {
    return !seeds() || (load_shared_bits(unseeded_, unseeded_bytes_, slot) & low_bits(count)) == 0;
  }

  // Returns whether slots may wait to be seeded, which is done before the update.
  bool seeds() const { return unseeded_ != nullptr && seeds_ > 0; }

  // Seeds the selected among up to 64 slots from `slot` on.
  void seed(int64_t slot, uint64_t selected, const Entry* g, const Entry* square) const {
    uint64_t waiting = load_shared_bits(unseeded_, unseeded_bytes_, slot) & selected;
    for (; waiting != 0; waiting &= waiting - 1) {
      const int i = __builtin_ctzll(waiting);
      seed_one(slot + i, g == nullptr ? Entry(Acc(0)) : g[i], square == nullptr ? nullptr : square + i);
    }
  }

  // Seeds `count` slots from `slot` on.
  void seed_run(int64_t slot, int64_t count, const Entry* g, const Entry* square) const {
    for (int64_t i = 0; i < count; i += 64) seed(slot + i, low_bits(count - i), from(g, i), from(square, i));
  }

  void seed_one(int64_t slot, Entry g, const Entry* square) const {
    const Acc value = static_cast<Acc>(g);
    Acc of_square = value * value;
    // Gradients of repeated rows may cancel; their squares do not, see reference.seed_slots.
    if (square != nullptr && static_cast<Acc>(*square) > of_square) of_square = static_cast<Acc>(*square);
    if (SeedEntry(seed_, seeds_, slot, value, of_square)) {
      // In compact state two threads may share a byte.
      __atomic_fetch_and(unseeded_ + slot / 8, static_cast<uint8_t>(~(1u << slot % 8)), __ATOMIC_RELAXED);
    }
  }

  static const Entry* from(const Entry* data, int64_t at) { return data == nullptr ? nullptr : data + at; }

  static void collect(Entry* to, const Entry* data, const uint16_t* entries, int count) {
    for (int i = 0; i < count; ++i) to[i] = data[entries[i]];
  }
  static void put(Entry* data, const Entry* values, const uint16_t* entries, int count) {
    for (int i = 0; i < count; ++i) data[entries[i]] = values[i];
  }

 private:
  __attribute__((noinline)) void update_all(Entry* w, const Entry* g, const Entry* square, Entry* const* slots,
                                            int64_t count) const {
    Entry* s[kMostSlots] = {slots[0], slots[1], slots[2]};
    for (; count >= kLanes; count -= kLanes) {
      update<false>(w, g, square, s, kAllLanes);
      w += kLanes;
      if (g != nullptr) g += kLanes;
      if (square != nullptr) square += kLanes;
      for (int i = 0; i < kMostSlots; ++i) {
        if (s[i] != nullptr) s[i] += kLanes;
      }
    }
    if (count > 0) update_remainder(w, g, square, s, static_cast<int>(count));
  }

  // Updates fewer entries than a vector has, by way of padded arrays: nothing behind the entries is read or written.
  __attribute__((noinline)) void update_remainder(Entry* w, const Entry* g, const Entry* square, Entry* const* s,
                                                  int count) const {
    Entry padded[3 + kMostSlots][kLanes] = {};
    Entry* slot_values[kMostSlots];
    for (int i = 0; i < count; ++i) padded[0][i] = w[i];
    for (int i = 0; i < count && g != nullptr; ++i) padded[1][i] = g[i];
    for (int i = 0; i < count && square != nullptr; ++i) padded[2][i] = square[i];
    for (int j = 0; j < kMostSlots; ++j) {
      slot_values[j] = s[j] == nullptr ? nullptr : padded[3 + j];
      for (int i = 0; i < count && s[j] != nullptr; ++i) padded[3 + j][i] = s[j][i];
    }
    update<false>(padded[0], g == nullptr ? nullptr : padded[1], square == nullptr ? nullptr : padded[2], slot_values,
                  kAllLanes);
    for (int i = 0; i < count; ++i) w[i] = padded[0][i];
    for (int j = 0; j < kMostSlots; ++j) {
      for (int i = 0; i < count && s[j] != nullptr; ++i) s[j][i] = padded[3 + j][i];
    }
  }

  template <bool kSome>
  __attribute__((always_inline)) void update(Entry* w, const Entry* g, const Entry* square, Entry* const* slots,
                                             uint32_t lanes) const {
    V value = V::load(w);
    const V gradient = g == nullptr ? V::set(Entry(Acc(0))) : V::load(g);
    const V squared = square == nullptr ? gradient * gradient : V::load(square);
    V s[kMostSlots] = {gradient, gradient, gradient};  // the rule's are loaded
    if (slots[0] != nullptr) s[0] = V::load(slots[0]);
    if (slots[1] != nullptr) s[1] = V::load(slots[1]);
    if (slots[2] != nullptr) s[2] = V::load(slots[2]);
    update_entry<kRule>(flags_, decays_, scalars_, value, gradient, squared, s);
    const auto store = [lanes](const V& vector, Entry* to) {
      if (kSome) {
        vector.store(to, lanes);
      } else {
        vector.store(to);
      }
    };
    store(value, w);
    if (slots[0] != nullptr) store(s[0], slots[0]);
    if (slots[1] != nullptr) store(s[1], slots[1]);
    if (slots[2] != nullptr) store(s[2], slots[2]);
  }

  RuleFlags flags_;
  bool decays_;
  int seeds_;
  Entry* variable_;
  const Entry* gradient_;
  const Entry* gathered_;
  const Entry* square_;
  Entry* slots_[kMostSlots];
  uint8_t* unseeded_;
  int64_t unseeded_bytes_;
  V scalars_[kMostScalars];
  SlotSeed<kType> seed_[kMostSlots];
};

// Adds the selected entries of a word, `offset` entries from the block's start; see FewEntries.
FREEZEOPS_INLINE void add_bits(FewEntries* few, int64_t offset, uint64_t selected) {
  for (; selected != 0; selected &= selected - 1) {
    few->entries[few->count++] = static_cast<uint16_t>(offset + __builtin_ctzll(selected));
  }
}

// A visitor of walk() behind virtual functions: the code of walk() is there once, and not for each rule and type.
class AnyVisitor {
 public:
  virtual void run(int64_t position, int64_t length) = 0;
  virtual void word(int64_t position, uint64_t selected) = 0;
  virtual void tail(int64_t position, uint64_t selected, int64_t length) = 0;
  virtual void few(int64_t position, const uint64_t* block, int count) = 0;

 protected:
  ~AnyVisitor() = default;
};

__attribute__((noinline)) void walk_trainable(const MaskView& mask, int64_t begin, int64_t end, AnyVisitor& visitor) {
  walk<true>(mask, begin, end, visitor);
}

// Collects the entries of a block of which few are selected, and prefetches them.
template <bool kSlots, typename Of>
FREEZEOPS_INLINE void collect_block(FewEntries* few, const Of& updates, int64_t begin, int64_t position,
                                    const uint64_t* block, int words) {
  few->position = position;
  few->count = 0;
  for (int i = 0; i < words; ++i) {
    for (uint64_t word = block[i]; word != 0; word &= word - 1) {
      const int entry = 64 * i + __builtin_ctzll(word);
      few->entries[few->count++] = static_cast<uint16_t>(entry);
      updates.template prefetch<kSlots>(begin + position + entry);
    }
  }
}

template <typename Isa, Float kType>
void add_row_of(void* sum, void* square, const void* row, const void* scale, int64_t width) {
  using V = typename Isa::template Vector<kType>;
  using Entry = typename V::Entry;
  Entry* const to = static_cast<Entry*>(sum);
  Entry* const to_square = static_cast<Entry*>(square);
  const Entry* const from = static_cast<const Entry*>(row);
  const V factor = V::set(*static_cast<const Entry*>(scale));
  const auto add = [factor](Entry* total, Entry* squares, const Entry* values) {
    const V scaled = V::load(values) * factor;
    (V::load(total) + scaled).store(total);
    (V::load(squares) + scaled * scaled).store(squares);
  };
  int64_t i = 0;
  for (; i + V::kLanes <= width; i += V::kLanes) add(to + i, to_square + i, from + i);
  if (i == width) return;
  Entry padded[3][V::kLanes] = {};
  for (int64_t j = i; j < width; ++j) {
    padded[0][j - i] = to[j];
    padded[1][j - i] = to_square[j];
    padded[2][j - i] = from[j];
  }
  add(padded[0], padded[1], padded[2]);
  for (int64_t j = i; j < width; ++j) {
    to[j] = padded[0][j - i];
    to_square[j] = padded[1][j - i];
  }
}

template <typename Isa>
void add_row(Float type, void* sum, void* square, const void* row, const void* scale, int64_t width) {
  with_float(type, [&](auto constant) { add_row_of<Isa, decltype(constant)::value>(sum, square, row, scale, width); });
}

}  // namespace
}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_FUSED_KERNELS_H_
