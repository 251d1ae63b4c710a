// Compact state on the CPU: how gathering and scattering trainable entries is shared out among threads.
//
// Not for files that are compiled for different instruction sets: it uses the standard library.

#ifndef FREEZEOPS_KERNELS_TRAINABLE_PARTS_H_
#define FREEZEOPS_KERNELS_TRAINABLE_PARTS_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "kernels/kernels.h"

namespace freezeops {

// Runs work(first, last) over parts of [0, count), in parallel where that pays: (count, cycles per unit, work).
using ParallelForFunction = std::function<void(int64_t, int64_t, const std::function<void(int64_t, int64_t)>&)>;

// The number of ones before a bit, given those before each block.
inline int64_t RankOf(const uint8_t* bits, const int64_t* offsets, int64_t bit) {
  const int64_t block = bit / kRankBlockBits;
  return offsets[block] + cpu_kernels().count_ones(bits, block * kRankBlockBits, bit);
}

// The positions of the trainable bits, ascending, of either type.
struct TrainableIndices {
  const void* data;
  bool wide;  // int64_t, else int32_t
};

// The parts of a mask that the threads work on, and the rank at which each begins.
//
// Entries are found by the bits, a word at a time. Where there are so few that their indices take less memory than the
// bits, by these: at a density of 0.01 that takes half the time.
class TrainableParts {
 public:
  // `mask` has a layout that does not repeat; `offsets` has rank_blocks(kept) + 1 values, `indices` has `capacity`.
  TrainableParts(const MaskView& mask, const int64_t* offsets, TrainableIndices indices, int64_t capacity,
                 int64_t threads, ParallelForFunction parallel_for)
      : mask_(mask), indices_(indices), capacity_(capacity), parallel_for_(std::move(parallel_for)) {
    const int64_t kept = mask.layout.kept;
    constexpr int64_t kLeastEntries = 16384;
    const int64_t total = offsets[rank_blocks(kept)];
    by_index_ = mask.layout.inner == 1 && total >= 0 && total <= capacity && total < kept / (indices.wide ? 64 : 32);
    if (by_index_) {
      ranks_ = {0, total};
      fits_ = indices_.wide ? IndicesFit<int64_t>() : IndicesFit<int32_t>();
      return;
    }
    const int64_t wanted =
        std::min({entries(mask.layout) / kLeastEntries + 1, 8 * threads, std::max<int64_t>(kept, 1)});
    part_bits_ = (kept + wanted - 1) / wanted;
    // Whole words, where a word's entries are few.
    if (mask.layout.inner < 64 || part_bits_ > 512) part_bits_ = (part_bits_ + 63) / 64 * 64;
    part_bits_ = std::max<int64_t>(part_bits_, 1);
    const int64_t parts = (kept + part_bits_ - 1) / part_bits_;
    ranks_.resize(parts + 1, 0);
    for (int64_t i = 0; i < parts; ++i) ranks_[i] = RankOf(mask.bits, offsets, i * part_bits_);
    ranks_[parts] = offsets[rank_blocks(kept)];

    // Counted again: what follows reads and writes as many values as the offsets say.
    std::atomic<bool> fits(ranks_[0] == 0 && ranks_[parts] <= capacity_);
    parallel_for_(parts, part_bits_ / 16 + 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        if (cpu_kernels().count_ones(mask_.bits, i * part_bits_, end_bit(i)) != count(i)) fits = false;
      }
    });
    fits_ = fits;
  }

  // Whether the offsets are those of the mask, and the capacity is enough. If not, nothing else must be called.
  bool fits() const { return fits_; }
  int64_t total() const { return ranks_.back(); }
  int64_t capacity() const { return capacity_; }

  // compact = the trainable entries of `source`, of `width` bytes each, then zeros up to the capacity.
  void Gather(void* compact, const void* source, int64_t width) const {
    if (by_index_) {
      ByIndex<false>(compact, const_cast<void*>(source), width);
      std::memset(static_cast<char*>(compact) + total() * width, 0, (capacity_ - total()) * width);
      return;
    }
    const int64_t inner = mask_.layout.inner;
    const auto gather = cpu_kernels().gather_trainable[width_index(width)];
    char* const to = static_cast<char*>(compact);
    const char* const from = static_cast<const char*>(source);
    ForEach(width, [&](int64_t i) {
      gather(to + ranks_[i] * inner * width, count(i) * inner, from + begin(i) * width, mask_, begin(i), end(i));
    });
    const int64_t used = total() * inner * width;
    const int64_t rest = capacity_ * inner * width - used;
    if (rest > 0) std::memset(to + used, 0, rest);
  }

  // The trainable entries of `destination` = those of `compact`.
  void Scatter(void* destination, const void* compact, int64_t width) const {
    if (by_index_) return ByIndex<true>(const_cast<void*>(compact), destination, width);
    const int64_t inner = mask_.layout.inner;
    const auto scatter = cpu_kernels().scatter_trainable[width_index(width)];
    char* const to = static_cast<char*>(destination);
    const char* const from = static_cast<const char*>(compact);
    ForEach(width, [&](int64_t i) {
      scatter(to + begin(i) * width, from + ranks_[i] * inner * width, count(i) * inner, mask_, begin(i), end(i));
    });
  }

 private:
  int64_t count(int64_t part) const { return ranks_[part + 1] - ranks_[part]; }
  int64_t end_bit(int64_t part) const { return std::min((part + 1) * part_bits_, mask_.layout.kept); }
  int64_t begin(int64_t part) const { return part * part_bits_ * mask_.layout.inner; }
  int64_t end(int64_t part) const { return end_bit(part) * mask_.layout.inner; }

  // Whether each index is that of a one among the bits, so that no other entry can be written.
  template <typename Index>
  bool IndicesFit() const {
    const Index* const indices = static_cast<const Index*>(indices_.data);
    std::atomic<bool> fits(true);
    parallel_for_(total(), 4, [&](int64_t first, int64_t last) {
      bool all = true;
      for (int64_t i = first; i < last; ++i) {
        const uint64_t bit = static_cast<uint64_t>(indices[i]);
        all = all && bit < static_cast<uint64_t>(mask_.layout.kept) && bit_is_set(mask_.bits, bit);
      }
      if (!all) fits = false;
    });
    return fits;
  }

  // compact[i] = whole[indices[i]], or the reverse.
  template <bool kScatter>
  void ByIndex(void* compact, void* whole, int64_t width) const {
    switch (width) {
      case 2:
        return indices_.wide ? Move<kScatter, uint16_t, int64_t>(compact, whole)
                             : Move<kScatter, uint16_t, int32_t>(compact, whole);
      case 4:
        return indices_.wide ? Move<kScatter, uint32_t, int64_t>(compact, whole)
                             : Move<kScatter, uint32_t, int32_t>(compact, whole);
      default:
        return indices_.wide ? Move<kScatter, uint64_t, int64_t>(compact, whole)
                             : Move<kScatter, uint64_t, int32_t>(compact, whole);
    }
  }

  template <bool kScatter, typename U, typename Index>
  void Move(void* compact, void* whole) const {
    constexpr int64_t kAhead = 32;  // entries whose lines are on their way
    U* const few = static_cast<U*>(compact);
    U* const all = static_cast<U*>(whole);
    const Index* const indices = static_cast<const Index*>(indices_.data);
    parallel_for_(total(), 16, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        __builtin_prefetch(all + indices[std::min(i + kAhead, last - 1)], kScatter);
        if (kScatter) {
          all[indices[i]] = few[i];
        } else {
          few[i] = all[indices[i]];
        }
      }
    });
  }

  // Runs work(part) for each part with a trainable entry.
  void ForEach(int64_t width, const std::function<void(int64_t)>& work) const {
    const int64_t cycles = std::max<int64_t>(part_bits_ * mask_.layout.inner * width / 8, 1);
    parallel_for_(static_cast<int64_t>(ranks_.size()) - 1, cycles, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        if (count(part) > 0) work(part);
      }
    });
  }

  MaskView mask_;
  TrainableIndices indices_;
  int64_t capacity_ = 0;
  bool by_index_ = false;
  ParallelForFunction parallel_for_;
  int64_t part_bits_ = 1;
  std::vector<int64_t> ranks_;
  bool fits_ = false;
};

}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_TRAINABLE_PARTS_H_
