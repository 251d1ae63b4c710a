// The kernels that move, zero and count entries, written once over the operations of an instruction set.
//
// Isa is a struct (isa_*.h) with
//
// - template <typename U> Words: zero, copy, copy_or_zero, compress and expand on 64 entries, see words_scalar.h;
// - template <Float kType> Vector: vectors of floats, see vectors_scalar.h;
// - kStreams: whether it can write past the cache. Then stream_zero_line(char*) writes zeros to 64 bytes from a
// multiple
//   of 64 on, and stream_fence() orders those writes before what follows.
//
// It is in the anonymous namespace of each file that includes it, as all here is: no function compiled for one
// instruction set can be taken for that of another.

#ifndef FREEZEOPS_KERNELS_CPU_MASK_KERNELS_H_
#define FREEZEOPS_KERNELS_CPU_MASK_KERNELS_H_

#include <stdint.h>

#include "kernels/common/dtypes.h"
#include "kernels/cpu/few_entries.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/mask_walk.h"
#include "kernels/cpu/words_scalar.h"

namespace freezeops {
namespace cpu {
namespace {

// Runs of at least this many bytes go to the library's memcpy and memset. Where runs are short and many these took
// twice the time of a loop here; files are compiled so that the loops stay loops (-fno-tree-loop-distribute-patterns).
constexpr int64_t kLeastForLibrary = int64_t{1} << 20;

template <typename U>
FREEZEOPS_INLINE void copy_run(U* destination, const U* source, int64_t length) {
  char* to = reinterpret_cast<char*>(destination);
  const char* from = reinterpret_cast<const char*>(source);
  int64_t bytes = length * static_cast<int64_t>(sizeof(U));
  if (bytes < kLeastForLibrary) {
    for (; bytes >= 64; bytes -= 64, to += 64, from += 64) __builtin_memcpy(to, from, 64);
  }
  if (bytes > 0) __builtin_memcpy(to, from, bytes);
}

template <typename U>
FREEZEOPS_INLINE void zero_run(U* data, int64_t length) {
  char* to = reinterpret_cast<char*>(data);
  int64_t bytes = length * static_cast<int64_t>(sizeof(U));
  if (bytes < kLeastForLibrary) {
    for (; bytes >= 64; bytes -= 64, to += 64) __builtin_memset(to, 0, 64);
  }
  if (bytes > 0) __builtin_memset(to, 0, bytes);
}

// Zeroes memory past the cache.
template <typename Isa>
FREEZEOPS_INLINE void stream_zero(void* data, int64_t bytes) {
  char* p = static_cast<char*>(data);
  const int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(p) & 63);
  if (Isa::kStreams && bytes >= head + 64) {
    __builtin_memset(p, 0, head);
    p += head;
    bytes -= head;
    for (; bytes >= 64; p += 64, bytes -= 64) Isa::stream_zero_line(p);
  }
  __builtin_memset(p, 0, bytes);
}

template <typename U, int kArrays>
FREEZEOPS_INLINE void collect_few(FewEntries* few, int64_t position, const uint64_t* block, int words,
                                  const U* const arrays[kArrays]) {
  few->position = position;
  int count = 0;
  int64_t last = position;
  // Written whether there is one or not: whether a word has none, one or two cannot be foreseen.
  const auto add = [&](int64_t entry, bool any) {
    few->entries[count] = static_cast<uint16_t>(entry);
    count += any;
    last = any ? position + entry : last;
    for (int a = 0; a < kArrays; ++a) __builtin_prefetch(arrays[a] + last);
  };
  visit_few(0, block, words, add, [&](int64_t first, uint64_t more) {
    for (; more != 0; more &= more - 1) add(first + __builtin_ctzll(more), true);
  });
  few->count = count;
}

template <typename Isa, typename U>
struct ZeroVisitor {
  U* data;
  int64_t least_streamed;  // entries; shorter runs are written through the cache
  void run(int64_t position, int64_t length) {
    if (length >= least_streamed) {
      stream_zero<Isa>(data + position, length * static_cast<int64_t>(sizeof(U)));
    } else {
      zero_run(data + position, length);
    }
  }
  void word(int64_t position, uint64_t selected) { Isa::template Words<U>::zero(data + position, selected); }
  void tail(int64_t position, uint64_t selected, int64_t) { ScalarWords<U>::zero_bits(data + position, selected); }
  void few(int64_t position, const uint64_t* block, int count) {
    U nowhere;
    visit_few(
        position, block, count, [&](int64_t entry, bool any) { *(any ? data + entry : &nowhere) = 0; },
        [&](int64_t at, uint64_t more) { ScalarWords<U>::zero_bits(data + at, more); });
  }
};

// Sees the frozen entries; what lies between them is copied as it is.
template <typename Isa, typename U>
struct CopyAndZeroVisitor {
  U* destination;
  const U* source;
  int64_t done = 0;
  void copy_until(int64_t position) { copy_run(destination + done, source + done, position - done); }
  void run(int64_t position, int64_t length) {
    copy_until(position);
    zero_run(destination + position, length);
    done = position + length;
  }
  void word(int64_t position, uint64_t selected) {
    copy_until(position);
    Isa::template Words<U>::copy_or_zero(destination + position, source + position, selected);
    done = position + 64;
  }
  void tail(int64_t position, uint64_t selected, int64_t length) {
    copy_until(position);
    for (int64_t i = 0; i < length; ++i) {
      destination[position + i] = (selected >> i) & 1 ? U{0} : source[position + i];
    }
    done = position + length;
  }
  void few(int64_t position, const uint64_t* block, int count) {
    for (int i = 0; i < count; ++i) {
      if (block[i] != 0) word(position + 64 * i, block[i]);
    }
  }
};

// From one or two arrays of one mask.
template <typename Isa, typename U, int kArrays>
struct GatherVisitor {
  U* destination[kArrays];
  const U* destination_end[kArrays];
  const U* source[kArrays];
  FewEntries waiting;
  FREEZEOPS_METHOD void finish() {
    for (int a = 0; a < kArrays; ++a) {
      const U* from = source[a] + waiting.position;
      for (int i = 0; i < waiting.count; ++i) *destination[a]++ = from[waiting.entries[i]];
    }
    waiting.count = 0;
  }
  void run(int64_t position, int64_t length) {
    finish();
    for (int a = 0; a < kArrays; ++a) {
      copy_run(destination[a], source[a] + position, length);
      destination[a] += length;
    }
  }
  FREEZEOPS_METHOD void word(int64_t position, uint64_t selected) {
    finish();
    for (int a = 0; a < kArrays; ++a) {
      prefetch_ahead(source[a] + position);
      destination[a] =
          Isa::template Words<U>::compress(destination[a], destination_end[a], source[a] + position, selected);
    }
  }
  void tail(int64_t position, uint64_t selected, int64_t) {
    finish();
    for (int a = 0; a < kArrays; ++a) {
      destination[a] = ScalarWords<U>::compress_bits(destination[a], source[a] + position, selected);
    }
  }
  void few(int64_t position, const uint64_t* block, int count) {
    FewEntries next;
    collect_few<U, kArrays>(&next, position, block, count, source);
    finish();
    waiting = next;
  }
};

template <typename Isa, typename U>
struct ScatterVisitor {
  U* destination;
  const U* source;
  const U* source_end;
  FewEntries waiting;
  FREEZEOPS_METHOD void finish() {
    U* to = destination + waiting.position;
    for (int i = 0; i < waiting.count; ++i) to[waiting.entries[i]] = *source++;
    waiting.count = 0;
  }
  void run(int64_t position, int64_t length) {
    finish();
    copy_run(destination + position, source, length);
    source += length;
  }
  FREEZEOPS_METHOD void word(int64_t position, uint64_t selected) {
    finish();
    prefetch_ahead(destination + position);
    source = Isa::template Words<U>::expand(destination + position, source, source_end, selected);
  }
  void tail(int64_t position, uint64_t selected, int64_t) {
    finish();
    source = ScalarWords<U>::expand_bits(destination + position, source, selected);
  }
  void few(int64_t position, const uint64_t* block, int count) {
    FewEntries next;
    const U* const arrays[1] = {destination};
    collect_few<U, 1>(&next, position, block, count, arrays);
    finish();
    waiting = next;
  }
};

template <typename Isa, typename U>
struct CopyVisitor {
  U* destination;
  const U* source;
  void run(int64_t position, int64_t length) { copy_run(destination + position, source + position, length); }
  void word(int64_t position, uint64_t selected) {
    Isa::template Words<U>::copy(destination + position, source + position, selected);
  }
  void tail(int64_t position, uint64_t selected, int64_t) {
    ScalarWords<U>::copy_bits(destination + position, source + position, selected);
  }
  void few(int64_t position, const uint64_t* block, int count) {
    U nowhere;
    visit_few(
        position, block, count,
        [&](int64_t entry, bool any) { *(any ? destination + entry : &nowhere) = source[entry]; },
        [&](int64_t at, uint64_t more) { ScalarWords<U>::copy_bits(destination + at, source + at, more); });
  }
};

int64_t count_frozen(const MaskView& mask, int64_t begin, int64_t end) {
  return begin < end ? end - begin - count_trainable(mask, begin, end) : 0;
}

int64_t count_ones(const uint8_t* bits, int64_t begin, int64_t end) {
  // Whole words by themselves: blocks of ranks are counted in every step, and are of nothing else.
  int64_t count = 0;
  for (; begin % 8 == 0 && begin + 64 <= end; begin += 64) {
    uint64_t word;
    __builtin_memcpy(&word, bits + begin / 8, sizeof(word));
    count += count_bits(word);
  }
  return begin < end ? count + count_words(PlainBits({bits, {1, end, 1}}, begin), end - begin) : count;
}

// The kernels for each width are functions of their own: together in one, GCC inlines less of them.

template <typename Isa, typename U>
__attribute__((noinline)) void zero_frozen_of(U* data, const MaskView& mask, int64_t begin, int64_t end,
                                              Residence residence) {
  // Writing past the cache saves reading the lines first, but mixed with ordinary stores to neighbouring lines short
  // pieces of it are several times slower than no such writes at all (measured at 99 % random).
  constexpr int64_t kNever = int64_t{1} << 62;
  const bool in_memory = residence == Residence::kMemory;
  const int64_t least_bytes = mask.layout.inner >= 64 ? 256 : 4096;
  ZeroVisitor<Isa, U> visitor{data, in_memory ? least_bytes / static_cast<int64_t>(sizeof(U)) : kNever};
  walk<false>(mask, begin, end, visitor);
  if (Isa::kStreams && in_memory) Isa::stream_fence();
}

template <typename Isa>
void zero_frozen(int width, void* data, const MaskView& mask, int64_t begin, int64_t end, Residence residence) {
  with_width(width,
             [&](auto zero) { zero_frozen_of<Isa>(static_cast<decltype(zero)*>(data), mask, begin, end, residence); });
}

template <typename Isa, typename U>
__attribute__((noinline)) void copy_and_zero_frozen_of(U* destination, const U* source, const MaskView& mask,
                                                       int64_t begin, int64_t end) {
  CopyAndZeroVisitor<Isa, U> visitor{destination, source};
  walk<false>(mask, begin, end, visitor);
  visitor.copy_until(end - begin);
}

template <typename Isa>
void copy_and_zero_frozen(int width, void* destination, const void* source, const MaskView& mask, int64_t begin,
                          int64_t end) {
  with_width(width, [&](auto zero) {
    using U = decltype(zero);
    copy_and_zero_frozen_of<Isa>(static_cast<U*>(destination), static_cast<const U*>(source), mask, begin, end);
  });
}

template <typename Isa, bool kTrainable, typename U>
__attribute__((noinline)) void copy_selected_of(U* destination, const U* source, const MaskView& mask, int64_t begin,
                                                int64_t end) {
  CopyVisitor<Isa, U> visitor{destination, source};
  walk<kTrainable>(mask, begin, end, visitor);
}

template <typename Isa, bool kTrainable>
void copy_selected(int width, void* destination, const void* source, const MaskView& mask, int64_t begin, int64_t end) {
  with_width(width, [&](auto zero) {
    using U = decltype(zero);
    copy_selected_of<Isa, kTrainable>(static_cast<U*>(destination), static_cast<const U*>(source), mask, begin, end);
  });
}

template <typename Isa, bool kTrainable, typename U>
__attribute__((noinline)) void gather_of(U* destination, int64_t count, const U* source, const MaskView& mask,
                                         int64_t begin, int64_t end) {
  GatherVisitor<Isa, U, 1> visitor{{destination}, {destination + count}, {source}, {}};
  walk<kTrainable>(mask, begin, end, visitor);
  visitor.finish();
}

template <typename Isa, bool kTrainable>
void gather(int width, void* destination, int64_t count, const void* source, const MaskView& mask, int64_t begin,
            int64_t end) {
  with_width(width, [&](auto zero) {
    using U = decltype(zero);
    gather_of<Isa, kTrainable>(static_cast<U*>(destination), count, static_cast<const U*>(source), mask, begin, end);
  });
}

template <typename Isa, typename U>
__attribute__((noinline)) void gather_two_of(void* const destinations[2], int64_t count, const void* const sources[2],
                                             const MaskView& mask, int64_t begin, int64_t end) {
  U* const first = static_cast<U*>(destinations[0]);
  U* const second = static_cast<U*>(destinations[1]);
  GatherVisitor<Isa, U, 2> visitor{{first, second},
                                   {first + count, second + count},
                                   {static_cast<const U*>(sources[0]), static_cast<const U*>(sources[1])},
                                   {}};
  walk<true>(mask, begin, end, visitor);
  visitor.finish();
}

template <typename Isa>
void gather_two(int width, void* const destinations[2], int64_t count, const void* const sources[2],
                const MaskView& mask, int64_t begin, int64_t end) {
  with_width(width,
             [&](auto zero) { gather_two_of<Isa, decltype(zero)>(destinations, count, sources, mask, begin, end); });
}

template <typename Isa, bool kTrainable, typename U>
__attribute__((noinline)) void scatter_of(U* destination, const U* source, int64_t count, const MaskView& mask,
                                          int64_t begin, int64_t end) {
  ScatterVisitor<Isa, U> visitor{destination, source, source + count, {}};
  walk<kTrainable>(mask, begin, end, visitor);
  visitor.finish();
}

template <typename Isa, bool kTrainable>
void scatter(int width, void* destination, const void* source, int64_t count, const MaskView& mask, int64_t begin,
             int64_t end) {
  with_width(width, [&](auto zero) {
    using U = decltype(zero);
    scatter_of<Isa, kTrainable>(static_cast<U*>(destination), static_cast<const U*>(source), count, mask, begin, end);
  });
}

}  // namespace
}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_MASK_KERNELS_H_
