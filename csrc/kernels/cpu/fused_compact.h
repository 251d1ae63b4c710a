// Fused updates in compact state: slots have an entry for each trainable entry of the variable, in order.

#ifndef FREEZEOPS_KERNELS_CPU_FUSED_COMPACT_H_
#define FREEZEOPS_KERNELS_CPU_FUSED_COMPACT_H_

#include <stdint.h>

#include "kernels/cpu/fused_kernels.h"

namespace freezeops {
namespace cpu {
namespace {

// From this density on (one entry in so many) words are updated in place: to collect their entries would take longer
// than to calculate for the others in vain.
constexpr int kInPlace = 4;

// Entries collected from the variable, the gradient and its squares. Their slots are consecutive, and so is a compact
// gradient, which is read where it is.
template <typename Of>
struct Collected {
  using Entry = typename Of::Entry;
  int count = 0;
  Entry w[kRoom], g[kRoom], square[kRoom];

  // Updates them; `slot` is that of the first.
  void update(const Of& updates, int64_t slot) {
    const Entry* const gradient = updates.gradient_of(slot, updates.gradient() == nullptr ? nullptr : g);
    const Entry* const squares = updates.square() == nullptr ? nullptr : square;
    if (updates.seeds()) updates.seed_run(slot, count, gradient, squares);
    updates.update_run(w, gradient, squares, slot, count);
  }
};

// Words of the variable whose selected entries are collected.
template <typename Isa, typename Of>
class CollectedWords {
 public:
  using Entry = typename Of::Entry;
  using U = typename Of::U;

  void add(const Of& updates, Collected<Of>* entries, int64_t at, uint64_t selected) {
    compress(entries->w, entries->count, updates.variable() + at, selected);
    if (updates.gradient() != nullptr) compress(entries->g, entries->count, updates.gradient() + at, selected);
    if (updates.square() != nullptr) compress(entries->square, entries->count, updates.square() + at, selected);
    prefetch_ahead(updates.variable() + at);
    if (updates.gradient() != nullptr) prefetch_ahead(updates.gradient() + at);
    positions_[words_] = at;
    bits_[words_++] = selected;
    entries->count += count_bits(selected);
  }

  bool full(const Collected<Of>& entries) const { return entries.count > kCollected - 64 || words_ == kCollected; }

  // Updates the entries and puts them back. Returns their number.
  int finish(const Of& updates, Collected<Of>* entries, int64_t rank) {
    if (words_ == 0) return 0;
    entries->update(updates, rank);
    const U* const end = as_integers(entries->w) + kRoom;
    const U* values = as_integers(entries->w);
    for (int i = 0; i < words_; ++i) {
      U* const to = as_integers(updates.variable() + positions_[i]);
      values = Isa::template Words<U>::expand(to, values, end, bits_[i]);
    }
    const int count = entries->count;
    words_ = entries->count = 0;
    return count;
  }

 private:
  static U* as_integers(Entry* data) { return reinterpret_cast<U*>(data); }
  static const U* as_integers(const Entry* data) { return reinterpret_cast<const U*>(data); }

  static void compress(Entry* to, int count, const Entry* from, uint64_t selected) {
    Isa::template Words<U>::compress(as_integers(to) + count, as_integers(to) + kRoom, as_integers(from), selected);
  }

  int words_ = 0;
  int64_t positions_[kCollected];
  uint64_t bits_[kCollected];
};

// The new slots of words that are updated in place, until they are written together.
template <typename Of>
class WordsInPlace {
 public:
  using Entry = typename Of::Entry;

  int count() const { return count_; }

  void add(const Of& updates, int64_t at, uint64_t selected, int64_t rank) {
    Entry* const next[kMostSlots] = {slots_[0] + count_, slots_[1] + count_, slots_[2] + count_};
    count_ += updates.update_word_compact(at, selected, rank + count_, next);
  }

  bool full() const { return count_ > kCollected - 64; }

  // Writes the slots. Returns the number of entries.
  int finish(const Of& updates, int64_t rank) {
    const int count = count_;
    if (count == 0) return 0;
    Entry* const slots[kMostSlots] = {slots_[0], slots_[1], slots_[2]};
    updates.put_slots(rank, slots, count);
    count_ = 0;
    return count;
  }

 private:
  static_assert(kMostSlots == 3, "one array for each slot");
  int count_ = 0;
  Entry slots_[kMostSlots][kRoom];
};

// Updates entries in three ways: in words whose entries are collected, in words in place where most are trainable, and
// by entry in blocks with few. At most one way has entries pending, as their slots are consecutive from `rank_` on.
template <typename Isa, UpdateRule kRule, Float kType>
class CompactVisitor final : public AnyVisitor {
 public:
  using Of = Updates<Isa, kRule, kType>;

  CompactVisitor(const Of& updates, int64_t begin, int64_t rank, bool in_place)
      : updates_(updates), begin_(begin), rank_(rank), in_place_(in_place) {}

  void run(int64_t position, int64_t length) override {
    finish();
    const int64_t at = begin_ + position;
    const auto gradient = updates_.gradient_of(rank_, Of::from(updates_.gradient(), at));
    const auto squares = Of::from(updates_.square(), at);
    if (updates_.seeds()) updates_.seed_run(rank_, length, gradient, squares);
    updates_.update_run(updates_.variable() + at, gradient, squares, rank_, length);
    rank_ += length;
  }
  void word(int64_t position, uint64_t selected) override {
    finish_few();
    const int64_t at = begin_ + position;
    if constexpr (Of::V::kExpands) {
      if (in_place_ && updates_.none_waits(rank_ + entries_.count + dense_.count(), count_bits(selected))) {
        finish_words();
        dense_.add(updates_, at, selected, rank_);
        if (dense_.full()) finish_in_place();
        return;
      }
    }
    finish_in_place();
    words_.add(updates_, &entries_, at, selected);
    if (words_.full(entries_)) finish_words();
  }
  void tail(int64_t position, uint64_t selected, int64_t) override {
    finish();
    few_.position = position;
    add_bits(&few_, 0, selected);
  }
  void few(int64_t position, const uint64_t* block, int words) override {
    finish_words();
    finish_in_place();
    FewEntries next;
    collect_block<false>(&next, updates_, begin_, position, block, words);
    finish_few();
    few_ = next;
  }
  void finish() {
    finish_few();
    finish_words();
    finish_in_place();
  }

 private:
  void finish_words() { rank_ += words_.finish(updates_, &entries_, rank_); }
  void finish_in_place() { rank_ += dense_.finish(updates_, rank_); }
  void finish_few() {
    if (few_.count == 0) return;
    const int64_t base = begin_ + few_.position;
    const auto collect = [&](auto* to, const auto* data) {
      if (data != nullptr) Of::collect(to, data + base, few_.entries, few_.count);
    };
    collect(entries_.w, updates_.variable());
    collect(entries_.g, updates_.gradient());
    collect(entries_.square, updates_.square());
    entries_.count = few_.count;
    entries_.update(updates_, rank_);
    Of::put(updates_.variable() + base, entries_.w, few_.entries, few_.count);
    rank_ += few_.count;
    few_.count = entries_.count = 0;
  }

  const Of& updates_;
  int64_t begin_;
  int64_t rank_;  // the slot of the first entry that is pending, or comes next
  const bool in_place_;
  FewEntries few_ = {};
  CollectedWords<Isa, Of> words_;
  WordsInPlace<Of> dense_;
  Collected<Of> entries_;
};

template <typename Isa, UpdateRule kRule, Float kType>
__attribute__((noinline)) void update_compact_of(const FusedStep& step, const FusedTensor& tensor, int64_t begin,
                                                 int64_t end, int64_t rank) {
  const Updates<Isa, kRule, kType> updates(step, tensor);
  // A compact gradient would have to be spread over the word first: at densities of 0.3, 0.5 and 0.95 this took 11, 15
  // and 22 ms for 16M entries of Adam, and with entries collected 5, 7 and 10 ms (an EPYC with AVX-512).
  const bool in_place =
      tensor.gathered == nullptr && count_trainable(tensor.mask, begin, end) > (end - begin) / kInPlace;
  CompactVisitor<Isa, kRule, kType> visitor(updates, begin, rank, in_place);
  walk_trainable(tensor.mask, begin, end, visitor);
  visitor.finish();
}

template <typename Isa>
void update_compact(UpdateRule rule, Float type, const FusedStep& step, const FusedTensor& tensor, int64_t begin,
                    int64_t end, int64_t rank) {
  with_rule(rule, [&](auto kind) {
    with_float(type, [&](auto dtype) {
      update_compact_of<Isa, decltype(kind)::value, decltype(dtype)::value>(step, tensor, begin, end, rank);
    });
  });
}

template <typename Isa, UpdateRule kRule, Float kType, typename Index>
__attribute__((noinline)) bool update_by_index_of(const FusedStep& step, const FusedTensor& tensor,
                                                  const Index* indices, int64_t first, int64_t last) {
  using Of = Updates<Isa, kRule, kType>;
  constexpr int64_t kAhead = 64;  // entries whose lines are on their way
  const Of updates(step, tensor);
  const uint64_t kept = static_cast<uint64_t>(tensor.mask.layout.kept);
  Collected<Of> entries;
  bool all_fit = true;
  for (; first < last; first += kCollected) {
    entries.count = static_cast<int>(last - first < kCollected ? last - first : kCollected);
    const Index* const at = indices + first;
    bool fit = true;
    for (int i = 0; i < entries.count; ++i) {
      const uint64_t entry = static_cast<uint64_t>(at[i]);
      fit = fit && entry < kept && bit_is_set(tensor.mask.bits, static_cast<int64_t>(entry));
      if (first + i + kAhead < last && static_cast<uint64_t>(at[i + kAhead]) < kept) {
        updates.template prefetch<false>(static_cast<int64_t>(at[i + kAhead]));
      }
      if (!fit) break;
      entries.w[i] = updates.variable()[entry];
      if (updates.gradient() != nullptr) entries.g[i] = updates.gradient()[entry];
      if (updates.square() != nullptr) entries.square[i] = updates.square()[entry];
    }
    if (!fit) {
      all_fit = false;
      continue;
    }
    entries.update(updates, first);
    for (int i = 0; i < entries.count; ++i) updates.variable()[at[i]] = entries.w[i];
  }
  return all_fit;
}

template <typename Isa>
bool update_by_index(UpdateRule rule, Float type, const FusedStep& step, const FusedTensor& tensor, const void* indices,
                     bool wide, int64_t first, int64_t last) {
  return with_rule(rule, [&](auto kind) {
    return with_float(type, [&](auto dtype) {
      return with_index(wide, [&](auto index) {
        constexpr UpdateRule kRule = decltype(kind)::value;
        constexpr Float kType = decltype(dtype)::value;
        const auto* const positions = static_cast<const decltype(index)*>(indices);
        return update_by_index_of<Isa, kRule, kType>(step, tensor, positions, first, last);
      });
    });
  });
}

}  // namespace
}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_FUSED_COMPACT_H_
