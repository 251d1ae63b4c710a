// Walks over the selected (frozen or trainable) entries of a range, 64 at a time.
//
// Included by files compiled for different instruction sets: everything is in an anonymous namespace and no function
// of the standard library is instantiated (see mask_layout.h).
//
// A visitor has
//   run(position, length)         every entry of [position, position + length) is selected
//   word(position, selected)      64 entries, those of the set bits are selected; neither none nor all
//   tail(position, selected, n)   the same for the last n < 64 entries of the range
//   few(position, block, count)   `count` words of which most have none, one or two selected entries; see visit_few
// Positions count from the start of the range and never go back; entries that are not selected are not reported.

#ifndef FREEZEOPS_KERNELS_CPU_MASK_WALK_H_
#define FREEZEOPS_KERNELS_CPU_MASK_WALK_H_

#include <stdint.h>

#include "kernels/cpu/words_scalar.h"
#include "mask_layout.h"
#if defined(__BMI2__)
#include <immintrin.h>
#endif

namespace freezeops {
namespace cpu {
namespace {

FREEZEOPS_INLINE uint64_t deposit_bits(uint64_t source, uint64_t positions) {
#if defined(__BMI2__)
  return _pdep_u64(source, positions);
#else
  uint64_t result = 0;
  for (; positions != 0; positions &= positions - 1, source >>= 1) {
    if (source & 1) result |= positions & (~positions + 1);
  }
  return result;
#endif
}

// inner == 1 and outer == 1: the mask's own bits.
struct PlainBits {
  PlainBits(const MaskView& mask, int64_t begin)
      : bits_(mask.bits), byte_count_(mask_bytes(mask.layout.kept)), bit_(begin) {}

  __attribute__((always_inline)) uint64_t next() {
    const uint64_t word = load_bits(bits_, byte_count_, bit_);
    bit_ += 64;
    return word;
  }

 private:
  const uint8_t* bits_;
  int64_t byte_count_;
  int64_t bit_;
};

// The bits repeated without end: bit k + kept is bit k.
struct RepeatedBits {
  explicit RepeatedBits(const MaskView& mask)
      : bits_(mask.bits), byte_count_(mask_bytes(mask.layout.kept)), kept_(mask.layout.kept) {
    if (kept_ < 64) {  // two words of the pattern, so that any phase is a shift
      uint64_t pattern = load_bits(bits_, byte_count_, 0) & low_bits(kept_);
      int64_t length = kept_;
      while (2 * length <= 64) {
        pattern |= pattern << length;
        length *= 2;
      }
      low_ = length == 64 ? pattern : pattern | (pattern << length);
      const int64_t phase = 64 % kept_;
      high_ = phase == 0 ? low_ : shifted(pattern, length, phase);
    }
  }

  // 64 bits from bit `bit`, 0 <= bit < kept.
  __attribute__((always_inline)) uint64_t at(int64_t bit) const {
    if (kept_ < 64) return bit == 0 ? low_ : (low_ >> bit) | (high_ << (64 - bit));
    uint64_t word = load_bits(bits_, byte_count_, bit);
    const int64_t left = kept_ - bit;
    if (left < 64) word = (word & low_bits(left)) | (load_bits(bits_, byte_count_, 0) << left);
    return word;
  }

  int64_t kept() const { return kept_; }

 private:
  // 64 bits of a pattern of `length` (32 < length < 64) bits that repeats, from bit `phase` < length on.
  static uint64_t shifted(uint64_t pattern, int64_t length, int64_t phase) {
    uint64_t word = pattern >> phase;
    for (int64_t filled = length - phase; filled < 64; filled += length) word |= pattern << filled;
    return word;
  }

  const uint8_t* bits_;
  int64_t byte_count_;
  int64_t kept_;
  uint64_t low_ = 0;
  uint64_t high_ = 0;
};

// inner == 1, any outer.
struct RepeatedWords {
  RepeatedWords(const MaskView& mask, int64_t begin)
      : bits_(mask), bit_(begin % mask.layout.kept), step_(64 % mask.layout.kept) {}

  __attribute__((always_inline)) uint64_t next() {
    const uint64_t word = bits_.at(bit_);
    bit_ += step_;
    if (bit_ >= bits_.kept()) bit_ -= bits_.kept();
    return word;
  }

 private:
  RepeatedBits bits_;
  int64_t bit_;
  int64_t step_;
};

// 1 < inner < 64: each bit is spread over `inner` entries.
struct SpreadWords {
  SpreadWords(const MaskView& mask, int64_t begin)
      : bits_(mask),
        inner_(mask.layout.inner),
        rows_per_word_(64 / mask.layout.inner),
        rest_per_word_(64 % mask.layout.inner),
        bit_(bit_of_entry(mask.layout, begin)),
        offset_(begin % mask.layout.inner) {
    for (int64_t start = 0; start < 64; start += inner_) row_starts_ |= uint64_t{1} << start;
  }

  __attribute__((always_inline)) uint64_t next() {
    uint64_t rows = bits_.at(bit_);
    uint64_t word = 0;
    int64_t first_start = 0;
    if (offset_ != 0) {  // the rest of a row that began in the word before
      first_start = inner_ - offset_;
      if (rows & 1) word = low_bits(first_start);
      rows >>= 1;
    }
    // A bit at each row's start, times a word of `inner` ones: rows do not overlap, so nothing carries.
    word |= deposit_bits(rows, row_starts_ << first_start) * low_bits(inner_);
    bit_ += rows_per_word_;
    offset_ += rest_per_word_;
    if (offset_ >= inner_) {
      offset_ -= inner_;
      ++bit_;
    }
    if (bit_ >= bits_.kept()) bit_ %= bits_.kept();
    return word;
  }

 private:
  RepeatedBits bits_;
  int64_t inner_;
  int64_t rows_per_word_;
  int64_t rest_per_word_;
  int64_t bit_;
  int64_t offset_;
  uint64_t row_starts_ = 0;
};

// Words are read this many at a time, so that a block in which all or none are selected is one step.
constexpr int kBlockWords = 32;
// A block with at most this many selected entries is visited by few(): whether a word has none, one or two cannot be
// foreseen there, and a branch on it would be wrong every other time.
constexpr int kFewInBlock = 2 * kBlockWords;

template <bool kTrainable, typename Words, typename Visitor>
FREEZEOPS_INLINE void walk_words(Words words, int64_t length, Visitor& visitor) {
  int64_t run_start = -1;
  int64_t position = 0;
  const auto end_run = [&](int64_t end) {
    if (run_start >= 0) visitor.run(run_start, end - run_start);
    run_start = -1;
  };
  const auto visit = [&](uint64_t selected) {
    if (selected == ~uint64_t{0}) {
      if (run_start < 0) run_start = position;
    } else {
      end_run(position);
      if (selected != 0) visitor.word(position, selected);
    }
  };
  while (position + 64 * kBlockWords <= length) {
    uint64_t block[kBlockWords];
    int total = 0;
    for (int i = 0; i < kBlockWords; ++i) {
      const uint64_t word = words.next();
      block[i] = kTrainable ? word : ~word;
      total += count_bits(block[i]);
    }
    if (total == 64 * kBlockWords) {
      if (run_start < 0) run_start = position;
      position += 64 * kBlockWords;
    } else if (total <= kFewInBlock) {
      end_run(position);
      if (total != 0) visitor.few(position, block, kBlockWords);
      position += 64 * kBlockWords;
    } else {
      for (int i = 0; i < kBlockWords; ++i, position += 64) visit(block[i]);
    }
  }
  for (; position + 64 <= length; position += 64) {
    const uint64_t word = words.next();
    visit(kTrainable ? word : ~word);
  }
  if (position < length) {
    const uint64_t valid = low_bits(length - position);
    const uint64_t word = words.next();
    const uint64_t selected = (kTrainable ? word : ~word) & valid;
    if (selected == valid) {
      if (run_start < 0) run_start = position;
    } else {
      end_run(position);
      if (selected != 0) visitor.tail(position, selected, length - position);
    }
  }
  end_run(length);
}

// Calls visit(entry, any) twice for each word, for its first two selected entries: `any` says whether there is one (the
// entry is then one of the word's, and not to be used, if not). Calls more(position, selected) for words with a third.
template <typename Visit, typename More>
FREEZEOPS_INLINE void visit_few(int64_t position, const uint64_t* block, int count, const Visit& visit,
                                const More& more) {
  for (int i = 0; i < count; ++i, position += 64) {
    const uint64_t first = block[i];
    const uint64_t second = first & (first - 1);
    const uint64_t third = second & (second - 1);
    visit(position + (first != 0 ? __builtin_ctzll(first) : 0), first != 0);
    visit(position + (second != 0 ? __builtin_ctzll(second) : 0), second != 0);
    if (__builtin_expect(third != 0, 0)) more(position, third);
  }
}

// inner >= 64: row after row.
template <bool kTrainable, typename Visitor>
FREEZEOPS_INLINE void walk_rows(const MaskView& mask, int64_t begin, int64_t end, Visitor& visitor) {
  const int64_t inner = mask.layout.inner;
  const int64_t kept = mask.layout.kept;
  const int64_t length = end - begin;
  int64_t bit = bit_of_entry(mask.layout, begin);
  int64_t run_start = -1;
  int64_t row_end = inner - begin % inner;
  for (int64_t position = 0; position < length; position = row_end, row_end += inner) {
    if (bit_is_set(mask.bits, bit) == kTrainable) {
      if (run_start < 0) run_start = position;
    } else if (run_start >= 0) {
      visitor.run(run_start, position - run_start);
      run_start = -1;
    }
    if (++bit == kept) bit = 0;
  }
  if (run_start >= 0) visitor.run(run_start, length - run_start);
}

template <bool kTrainable, typename Visitor>
void walk(const MaskView& mask, int64_t begin, int64_t end, Visitor& visitor) {
  if (begin >= end) return;
  const MaskLayout& layout = mask.layout;
  if (layout.inner >= 64) {
    walk_rows<kTrainable>(mask, begin, end, visitor);
  } else if (layout.inner > 1) {
    walk_words<kTrainable>(SpreadWords(mask, begin), end - begin, visitor);
  } else if (layout.outer > 1) {
    walk_words<kTrainable>(RepeatedWords(mask, begin), end - begin, visitor);
  } else {
    walk_words<kTrainable>(PlainBits(mask, begin), end - begin, visitor);
  }
}

// The number of trainable entries: no branch on what the bits are.
template <typename Words>
FREEZEOPS_INLINE int64_t count_words(Words words, int64_t length) {
  int64_t count = 0;
  for (; length >= 64; length -= 64) count += count_bits(words.next());
  return length > 0 ? count + count_bits(words.next() & low_bits(length)) : count;
}

FREEZEOPS_INLINE int64_t count_trainable(const MaskView& mask, int64_t begin, int64_t end) {
  if (begin >= end) return 0;
  const int64_t inner = mask.layout.inner;
  // The rows that the range covers, one bit each; the first and the last may be there in part.
  const int64_t first = begin / inner;
  const int64_t last = (end - 1) / inner;
  const MaskView rows{mask.bits, {mask.layout.outer, mask.layout.kept, 1}};
  const int64_t count = rows.layout.outer > 1 ? count_words(RepeatedWords(rows, first), last - first + 1)
                                              : count_words(PlainBits(rows, first), last - first + 1);
  const int64_t before = bit_is_set(mask.bits, first % rows.layout.kept) ? begin - first * inner : 0;
  const int64_t after = bit_is_set(mask.bits, last % rows.layout.kept) ? (last + 1) * inner - end : 0;
  return count * inner - before - after;
}

}  // namespace
}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_MASK_WALK_H_
