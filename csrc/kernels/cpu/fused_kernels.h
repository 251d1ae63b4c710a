// Fused updates, written once over vectors and word operations; each instruction set's file includes this after its
// own Words (see mask_kernels.h) and Vector (see vectors_scalar.h).

#ifndef FREEZEOPS_KERNELS_CPU_FUSED_KERNELS_H_
#define FREEZEOPS_KERNELS_CPU_FUSED_KERNELS_H_

#include <stdint.h>

#include "kernels/common/seed_entry.h"
#include "kernels/cpu/few_entries.h"
#include "kernels/cpu/fused.h"
#include "kernels/cpu/mask_walk.h"

namespace freezeops {
namespace {

// Trainable entries that are brought together before they are updated, so that they fill whole vectors.
constexpr int kTogether = 512;
constexpr int kRoom = kTogether + 64;

// Compact state: of how many entries one must be trainable for words to be updated where they are.
constexpr int kInPlace = 4;

// How wide an integer moves an entry.
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

// load_bits() of bits that other threads clear meanwhile, each thread its own: in compact state two may share a byte.
FREEZEOPS_INLINE uint64_t load_shared_bits(const uint8_t* bits, int64_t byte_count, int64_t bit) {
  int64_t byte = bit >> 3;
  const int shift = static_cast<int>(bit & 7);
  uint64_t word = 0;
  uint64_t next = 0;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  // Two words that lie as words must.
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

// The updates of one variable. Positions are those of entries in the variable; an entry's slot is at the same position
// in full state, at its rank in compact state.
template <Rule kRule, FusedType kType>
class Updates {
 public:
  using V = Vector<kType>;
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

  // Asks for the lines of an entry: with its slots, which are elsewhere, or without.
  template <bool kSlots>
  void prefetch(int64_t entry) const {
    __builtin_prefetch(variable_ + entry, 1);
    if (gradient_ != nullptr) __builtin_prefetch(gradient_ + entry);
    if (!kSlots) return;
    for (int i = 0; i < kMostSlots; ++i) {
      if (slots_[i] != nullptr) __builtin_prefetch(slots_[i] + entry, 1);
    }
  }

  // `count` entries that follow each other, as their slots do from `slot` on.
  void consecutive(Entry* w, const Entry* g, const Entry* square, int64_t slot, int64_t count) const {
    Entry* s[kMostSlots];
    for (int i = 0; i < kMostSlots; ++i) s[i] = slots_[i] == nullptr ? nullptr : slots_[i] + slot;
    all(w, g, square, s, count);
  }

  // Those of a word of 64 entries from `position` on, in full state.
  void word(int64_t position, uint64_t selected) const {
    for (int i = 0; i < 64; i += kLanes) {
      const uint32_t lanes = static_cast<uint32_t>(selected >> i) & kAllLanes;
      if (lanes == 0) continue;
      const int64_t at = position + i;
      Entry* s[kMostSlots];
      for (int j = 0; j < kMostSlots; ++j) s[j] = slots_[j] == nullptr ? nullptr : slots_[j] + at;
      update<true>(variable_ + at, from(gradient_, at), from(square_, at), s, lanes);
    }
  }

  // Those at `base + entries[i]`, in full state: brought together, updated, and put back.
  void scattered(int64_t base, const uint16_t* entries, int count) const {
    Entry w[kRoom], g[kRoom], square[kRoom], of_slots[kMostSlots][kRoom];
    Entry* s[kMostSlots];
    bring(w, variable_ + base, entries, count);
    if (gradient_ != nullptr) bring(g, gradient_ + base, entries, count);
    if (square_ != nullptr) bring(square, square_ + base, entries, count);
    for (int i = 0; i < kMostSlots; ++i) {
      s[i] = slots_[i] == nullptr ? nullptr : of_slots[i];
      if (s[i] != nullptr) bring(s[i], slots_[i] + base, entries, count);
    }
    all(w, gradient_ == nullptr ? nullptr : g, square_ == nullptr ? nullptr : square, s, count);
    put(variable_ + base, w, entries, count);
    for (int i = 0; i < kMostSlots; ++i) {
      if (s[i] != nullptr) put(slots_[i] + base, s[i], entries, count);
    }
  }

  // Those of a word of 64 entries from `position` on, in compact state, with the slots of the first one at `slot`. What
  // becomes of the slots goes to `new_slots`, with room for 64 and a vector more. Returns how many there were.
  int word_of_ranks(int64_t position, uint64_t selected, int64_t slot, Entry* const* new_slots) const {
    int count = 0;
    for (int i = 0; i < 64; i += kLanes) {
      const uint32_t lanes = static_cast<uint32_t>(selected >> i) & kAllLanes;
      const int64_t at = position + i;
      V value = V::load(variable_ + at);
      const V gradient = gradient_ == nullptr ? V::set(Entry(Acc(0))) : V::load(gradient_ + at);
      const V squared = square_ == nullptr ? gradient * gradient : V::load(square_ + at);
      V s[kMostSlots] = {gradient, gradient, gradient};  // those that the rule has are loaded
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

  // What word_of_ranks() made of `count` slots from `slot` on.
  void put_slots(int64_t slot, Entry* const* new_slots, int count) const {
    for (int j = 0; j < kMostSlots; ++j) {
      if (slots_[j] != nullptr) __builtin_memcpy(slots_[j] + slot, new_slots[j], count * sizeof(Entry));
    }
  }

  // Whether none of `count` slots from `slot` on, at most 64, waits to be seeded.
  bool none_waits(int64_t slot, int count) const {
    return !seeds() || (load_shared_bits(unseeded_, unseeded_bytes_, slot) & low_bits(count)) == 0;
  }

  // Seeding, before the update: of slots that wait for it.

  bool seeds() const { return unseeded_ != nullptr && seeds_ > 0; }

  // The selected ones of up to 64 slots from `slot` on.
  void seed(int64_t slot, uint64_t selected, const Entry* g, const Entry* square) const {
    uint64_t waiting = load_shared_bits(unseeded_, unseeded_bytes_, slot) & selected;
    for (; waiting != 0; waiting &= waiting - 1) {
      const int i = __builtin_ctzll(waiting);
      seed_one(slot + i, g == nullptr ? Entry(Acc(0)) : g[i], square == nullptr ? nullptr : square + i);
    }
  }

  // `count` slots from `slot` on.
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

  static void bring(Entry* to, const Entry* data, const uint16_t* entries, int count) {
    for (int i = 0; i < count; ++i) to[i] = data[entries[i]];
  }
  static void put(Entry* data, const Entry* values, const uint16_t* entries, int count) {
    for (int i = 0; i < count; ++i) data[entries[i]] = values[i];
  }

 private:
  __attribute__((noinline)) void all(Entry* w, const Entry* g, const Entry* square, Entry* const* slots,
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
    if (count > 0) rest(w, g, square, s, static_cast<int>(count));
  }

  // Fewer than a vector: nothing behind them is read or written.
  __attribute__((noinline)) void rest(Entry* w, const Entry* g, const Entry* square, Entry* const* s, int count) const {
    Entry padded[3 + kMostSlots][kLanes] = {};
    Entry* of_slots[kMostSlots];
    for (int i = 0; i < count; ++i) padded[0][i] = w[i];
    for (int i = 0; i < count && g != nullptr; ++i) padded[1][i] = g[i];
    for (int i = 0; i < count && square != nullptr; ++i) padded[2][i] = square[i];
    for (int j = 0; j < kMostSlots; ++j) {
      of_slots[j] = s[j] == nullptr ? nullptr : padded[3 + j];
      for (int i = 0; i < count && s[j] != nullptr; ++i) padded[3 + j][i] = s[j][i];
    }
    update<false>(padded[0], g == nullptr ? nullptr : padded[1], square == nullptr ? nullptr : padded[2], of_slots,
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
    V s[kMostSlots] = {gradient, gradient, gradient};  // those that the rule has are loaded
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
  const Entry* square_;
  Entry* slots_[kMostSlots];
  uint8_t* unseeded_;
  int64_t unseeded_bytes_;
  V scalars_[kMostScalars];
  SlotSeed<Entry, Acc> seed_[kMostSlots];
};

// Entries of a block, to be used when their lines have come; see FewEntries.
FREEZEOPS_INLINE void add_bits(FewEntries* few, int64_t offset, uint64_t selected) {
  for (; selected != 0; selected &= selected - 1) {
    few->entries[few->count++] = static_cast<uint16_t>(offset + __builtin_ctzll(selected));
  }
}

// What walk() calls, as calls: its code is there once and not for each rule and type.
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

template <Rule kRule, FusedType kType>
struct FullVisitor final : AnyVisitor {
  using Of = Updates<kRule, kType>;
  const Of& updates;
  int64_t begin;
  FewEntries waiting;

  FullVisitor(const Of& updates, int64_t begin) : updates(updates), begin(begin) {}

  void run(int64_t position, int64_t length) override {
    const int64_t at = begin + position;
    const auto g = Of::from(updates.gradient(), at);
    const auto square = Of::from(updates.square(), at);
    if (updates.seeds()) updates.seed_run(at, length, g, square);
    updates.consecutive(updates.variable() + at, g, square, at, length);
  }
  void word(int64_t position, uint64_t selected) override {
    const int64_t at = begin + position;
    if (updates.seeds()) updates.seed(at, selected, Of::from(updates.gradient(), at), Of::from(updates.square(), at));
    updates.word(at, selected);
  }
  void tail(int64_t position, uint64_t selected, int64_t) override {
    FewEntries last;
    add_bits(&last, 0, selected);
    last.position = position;
    finish(last);
  }
  void few(int64_t position, const uint64_t* block, int count) override {
    FewEntries next;
    next.position = position;
    for (int i = 0; i < count; ++i) {
      for (uint64_t word = block[i]; word != 0; word &= word - 1) {
        const int entry = 64 * i + __builtin_ctzll(word);
        next.entries[next.count++] = static_cast<uint16_t>(entry);
        updates.template prefetch<true>(begin + position + entry);
      }
    }
    finish(waiting);
    waiting = next;
  }
  void finish(const FewEntries& few) {
    const int64_t base = begin + few.position;
    for (int i = 0; i < few.count && updates.seeds(); ++i) {
      const int64_t at = base + few.entries[i];
      updates.seed(at, 1, Of::from(updates.gradient(), at), Of::from(updates.square(), at));
    }
    updates.scattered(base, few.entries, few.count);
  }
};

template <Rule kRule, FusedType kType>
struct CompactVisitor final : AnyVisitor {
  using Of = Updates<kRule, kType>;
  using Entry = typename Of::Entry;
  using U = typename Of::U;

  const Of& updates;
  int64_t begin;
  int64_t rank;
  FewEntries waiting = {};
  // Words whose entries are brought together, and how many there are.
  int words = 0;
  int count = 0;
  int64_t positions[kTogether];
  uint64_t bits[kTogether];
  Entry w[kRoom], g[kRoom], square[kRoom];
  // Or, where many of a word's entries are trainable, new slots of words that are updated where they are: to bring them
  // together would take longer than to calculate for the others in vain.
  const bool in_place;
  int new_count = 0;
  Entry of_new_slots[kMostSlots][kRoom];
  Entry* const new_slots[kMostSlots] = {of_new_slots[0], of_new_slots[1], of_new_slots[2]};

  CompactVisitor(const Of& updates, int64_t begin, int64_t rank, bool in_place)
      : updates(updates), begin(begin), rank(rank), in_place(in_place) {}

  static U* as_integers(Entry* data) { return reinterpret_cast<U*>(data); }
  static const U* as_integers(const Entry* data) { return reinterpret_cast<const U*>(data); }

  void compress(Entry* to, const Entry* from, uint64_t selected) {
    Words<U>::compress(as_integers(to) + count, as_integers(to) + kRoom, as_integers(from), selected);
  }
  const Entry* own(const Entry* source, const Entry* together) const { return source == nullptr ? nullptr : together; }

  void update_together() {
    const Entry* const gradient = own(updates.gradient(), g);
    const Entry* const squares = own(updates.square(), square);
    if (updates.seeds()) updates.seed_run(rank, count, gradient, squares);
    updates.consecutive(w, gradient, squares, rank, count);
    rank += count;
  }

  void finish_words() {
    if (words == 0) return;
    update_together();
    const U* values = as_integers(w);
    for (int i = 0; i < words; ++i) {
      values =
          Words<U>::expand(as_integers(updates.variable() + positions[i]), values, as_integers(w) + kRoom, bits[i]);
    }
    words = count = 0;
  }
  void finish_in_place() {
    if (new_count == 0) return;
    updates.put_slots(rank, new_slots, new_count);
    rank += new_count;
    new_count = 0;
  }
  void finish_few() {
    if (waiting.count == 0) return;
    const int64_t base = begin + waiting.position;
    count = waiting.count;
    Of::bring(w, updates.variable() + base, waiting.entries, count);
    if (updates.gradient() != nullptr) Of::bring(g, updates.gradient() + base, waiting.entries, count);
    if (updates.square() != nullptr) Of::bring(square, updates.square() + base, waiting.entries, count);
    update_together();
    Of::put(updates.variable() + base, w, waiting.entries, count);
    waiting.count = count = 0;
  }

  void run(int64_t position, int64_t length) override {
    finish();
    const int64_t at = begin + position;
    const auto gradient = Of::from(updates.gradient(), at);
    const auto squares = Of::from(updates.square(), at);
    if (updates.seeds()) updates.seed_run(rank, length, gradient, squares);
    updates.consecutive(updates.variable() + at, gradient, squares, rank, length);
    rank += length;
  }
  void word(int64_t position, uint64_t selected) override {
    finish_few();
    const int64_t at = begin + position;
    if constexpr (Of::V::kExpands) {
      if (in_place && updates.none_waits(rank + count + new_count, count_bits(selected))) {
        finish_words();
        Entry* const next[kMostSlots] = {new_slots[0] + new_count, new_slots[1] + new_count, new_slots[2] + new_count};
        new_count += updates.word_of_ranks(at, selected, rank + new_count, next);
        if (new_count > kTogether - 64) finish_in_place();
        return;
      }
    }
    finish_in_place();
    compress(w, updates.variable() + at, selected);
    if (updates.gradient() != nullptr) compress(g, updates.gradient() + at, selected);
    if (updates.square() != nullptr) compress(square, updates.square() + at, selected);
    prefetch_ahead(updates.variable() + at);
    if (updates.gradient() != nullptr) prefetch_ahead(updates.gradient() + at);
    positions[words] = at;
    bits[words++] = selected;
    count += count_bits(selected);
    if (count > kTogether - 64 || words == kTogether) finish_words();
  }
  void tail(int64_t position, uint64_t selected, int64_t) override {
    finish();
    waiting.position = position;
    add_bits(&waiting, 0, selected);
  }
  void few(int64_t position, const uint64_t* block, int blocks) override {
    finish_words();
    finish_in_place();
    FewEntries next;
    next.position = position;
    for (int i = 0; i < blocks; ++i) {
      for (uint64_t word = block[i]; word != 0; word &= word - 1) {
        const int entry = 64 * i + __builtin_ctzll(word);
        next.entries[next.count++] = static_cast<uint16_t>(entry);
        updates.template prefetch<false>(begin + position + entry);
      }
    }
    finish_few();
    waiting = next;
  }
  // At most one of these has anything to do: their ranks follow each other.
  void finish() {
    finish_few();
    finish_words();
    finish_in_place();
  }
};

template <Rule kRule, FusedType kType>
void update_full(const FusedStep& step, const FusedTensor& tensor, int64_t begin, int64_t end) {
  const Updates<kRule, kType> updates(step, tensor);
  FullVisitor<kRule, kType> visitor(updates, begin);
  walk_trainable(tensor.mask, begin, end, visitor);
  visitor.finish(visitor.waiting);
}

template <Rule kRule, FusedType kType>
void update_compact(const FusedStep& step, const FusedTensor& tensor, int64_t begin, int64_t end, int64_t rank) {
  const Updates<kRule, kType> updates(step, tensor);
  const bool in_place = count_trainable(tensor.mask, begin, end) > (end - begin) / kInPlace;
  CompactVisitor<kRule, kType> visitor(updates, begin, rank, in_place);
  walk_trainable(tensor.mask, begin, end, visitor);
  visitor.finish();
}

template <Rule kRule, FusedType kType, typename Index>
bool update_by_index(const FusedStep& step, const FusedTensor& tensor, const Index* indices, int64_t first,
                     int64_t last) {
  using Of = Updates<kRule, kType>;
  using Entry = typename Of::Entry;
  constexpr int64_t kAhead = 64;  // entries whose lines are on their way
  const Of updates(step, tensor);
  const uint64_t kept = static_cast<uint64_t>(tensor.mask.layout.kept);
  Entry w[kTogether], g[kTogether], square[kTogether];
  bool all_fit = true;
  for (; first < last; first += kTogether) {
    const int count = static_cast<int>(last - first < kTogether ? last - first : kTogether);
    const Index* const at = indices + first;
    bool fit = true;
    for (int i = 0; i < count; ++i) {
      const uint64_t entry = static_cast<uint64_t>(at[i]);
      fit = fit && entry < kept && bit_is_set(tensor.mask.bits, static_cast<int64_t>(entry));
      if (first + i + kAhead < last && static_cast<uint64_t>(at[i + kAhead]) < kept) {
        updates.template prefetch<false>(static_cast<int64_t>(at[i + kAhead]));
      }
      if (!fit) break;
      w[i] = updates.variable()[entry];
      if (updates.gradient() != nullptr) g[i] = updates.gradient()[entry];
      if (updates.square() != nullptr) square[i] = updates.square()[entry];
    }
    if (!fit) {
      all_fit = false;
      continue;
    }
    const Entry* const gradient = updates.gradient() == nullptr ? nullptr : g;
    const Entry* const squares = updates.square() == nullptr ? nullptr : square;
    if (updates.seeds()) updates.seed_run(first, count, gradient, squares);
    updates.consecutive(w, gradient, squares, first, count);
    for (int i = 0; i < count; ++i) updates.variable()[at[i]] = w[i];
  }
  return all_fit;
}

template <Rule kRule, FusedType kType>
bool update_by_any_index(const FusedStep& step, const FusedTensor& tensor, const void* indices, bool wide,
                         int64_t first, int64_t last) {
  return wide ? update_by_index<kRule, kType>(step, tensor, static_cast<const int64_t*>(indices), first, last)
              : update_by_index<kRule, kType>(step, tensor, static_cast<const int32_t*>(indices), first, last);
}

template <FusedType kType>
void add_row(void* sum, void* square, const void* row, const void* scale, int64_t width) {
  using V = Vector<kType>;
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

}  // namespace
}  // namespace freezeops

#define FREEZEOPS_FUSED_TYPES(FUNCTION, RULE) \
  {FUNCTION<RULE, kFloat16>, FUNCTION<RULE, kBfloat16>, FUNCTION<RULE, kFloat32>, FUNCTION<RULE, kFloat64>}
#define FREEZEOPS_FUSED_RULES(FUNCTION)                                                              \
  {FREEZEOPS_FUSED_TYPES(FUNCTION, Rule::kSgd),     FREEZEOPS_FUSED_TYPES(FUNCTION, Rule::kAdam),    \
   FREEZEOPS_FUSED_TYPES(FUNCTION, Rule::kNadam),   FREEZEOPS_FUSED_TYPES(FUNCTION, Rule::kRmsprop), \
   FREEZEOPS_FUSED_TYPES(FUNCTION, Rule::kAdagrad), FREEZEOPS_FUSED_TYPES(FUNCTION, Rule::kLion)}
#define FREEZEOPS_DEFINE_FUSED_KERNELS(NAME)                             \
  const FusedKernels NAME = {FREEZEOPS_FUSED_RULES(update_full),         \
                             FREEZEOPS_FUSED_RULES(update_compact),      \
                             FREEZEOPS_FUSED_RULES(update_by_any_index), \
                             {add_row<kFloat16>, add_row<kBfloat16>, add_row<kFloat32>, add_row<kFloat64>}}

#endif  // FREEZEOPS_KERNELS_CPU_FUSED_KERNELS_H_
