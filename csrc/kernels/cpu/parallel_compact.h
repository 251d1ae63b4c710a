// Gathers and scatters the trainable entries of a variable in parallel (compact state).
//
// Not for files that are compiled for different instruction sets: it uses the standard library.

#ifndef FREEZEOPS_KERNELS_CPU_PARALLEL_COMPACT_H_
#define FREEZEOPS_KERNELS_CPU_PARALLEL_COMPACT_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "kernels/common/dtypes.h"
#include "kernels/cpu/kernels.h"

namespace freezeops {
namespace cpu {

// A function (count, cycles per unit, work) that calls work(first, last) over ranges that cover [0, count), in parallel
// where that pays.
using ParallelForFunction = std::function<void(int64_t, int64_t, const std::function<void(int64_t, int64_t)>&)>;

// Returns the number of ones before a bit, given the number before each block; any number if these are wrong.
inline int64_t RankOf(const uint8_t* bits, const int64_t* offsets, int64_t bit) {
  const int64_t block = bit / kRankBlockBits;
  const int64_t within = kernels().count_ones(bits, block * kRankBlockBits, bit);
  return static_cast<int64_t>(static_cast<uint64_t>(offsets[block]) + static_cast<uint64_t>(within));
}

// The positions of the trainable bits, ascending.
struct TrainableIndices {
  const void* data;
  bool wide;  // int64_t, else int32_t
};

// Returns whether indices take less memory than the bits. Entries are then moved by index: at a density of 0.01 in half
// the time. (A fused update moves more for each entry, and goes by index up to a higher density, see parallel_fused.h.)
inline bool IndicesAreSmaller(const MaskLayout& layout, int64_t total, TrainableIndices indices) {
  return layout.inner == 1 && total < layout.kept / (indices.wide ? 64 : 32);
}

// A mask divided into shards, with the rank at which each begins. Entries are found by the bits, a word at a time, or
// by their indices.
class ParallelCompact {
 public:
  // `mask` has a layout that does not repeat; `offsets` has rank_blocks(kept) + 1 values, `indices` has `capacity`.
  ParallelCompact(const MaskView& mask, const int64_t* offsets, TrainableIndices indices, int64_t capacity,
                  int64_t threads, ParallelForFunction parallel_for)
      : mask_(mask), indices_(indices), capacity_(capacity), parallel_for_(std::move(parallel_for)) {
    const int64_t kept = mask.layout.kept;
    constexpr int64_t kLeastEntries = 16384;
    const int64_t total = offsets[rank_blocks(kept)];
    by_index_ = total >= 0 && total <= capacity && IndicesAreSmaller(mask.layout, total, indices);
    if (by_index_) {
      ranks_ = {0, total};
      fits_ = true;  // as far as can be said before the indices are looked at
      return;
    }
    const int64_t wanted =
        std::min({entries(mask.layout) / kLeastEntries + 1, 8 * threads, std::max<int64_t>(kept, 1)});
    shard_bits_ = (kept + wanted - 1) / wanted;
    // Whole words, where a word's entries are few.
    if (mask.layout.inner < 64 || shard_bits_ > 512) shard_bits_ = (shard_bits_ + 63) / 64 * 64;
    shard_bits_ = std::max<int64_t>(shard_bits_, 1);
    const int64_t shards = (kept + shard_bits_ - 1) / shard_bits_;
    ranks_.resize(shards + 1, 0);
    for (int64_t i = 0; i < shards; ++i) ranks_[i] = RankOf(mask.bits, offsets, i * shard_bits_);
    ranks_[shards] = offsets[rank_blocks(kept)];

    // Counted again: what follows reads and writes as many values as the offsets say.
    std::atomic<bool> fits(ranks_[0] == 0 && ranks_[shards] <= capacity_);
    parallel_for_(shards, shard_bits_ / 16 + 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        if (kernels().count_ones(mask_.bits, i * shard_bits_, end_bit(i)) != count(i)) fits = false;
      }
    });
    fits_ = fits;
  }

  int64_t total() const { return ranks_.back(); }
  int64_t capacity() const { return capacity_; }

  // Sets each compact array to the trainable entries of its source, of `width` bytes each, then zeros up to the
  // capacity. There are one or two. Returns whether offsets and indices are those of the mask, and the capacity is
  // enough.
  bool Gather(const std::vector<void*>& compact, const std::vector<const void*>& sources, int64_t width) const {
    if (!fits_) return false;
    const int64_t inner = mask_.layout.inner;
    const KernelTable& table = kernels();
    const int entry_width = static_cast<int>(width);
    const size_t arrays = sources.size();
    if (by_index_) {
      if (!ByIndex<false>(compact, sources, width)) return false;
    } else {
      ForEach(width * static_cast<int64_t>(arrays), [&](int64_t i) {
        void* to[2];
        const void* from[2];
        for (size_t a = 0; a < arrays; ++a) {
          to[a] = static_cast<char*>(compact[a]) + ranks_[i] * inner * width;
          from[a] = static_cast<const char*>(sources[a]) + begin(i) * width;
        }
        if (arrays == 2) {
          table.gather_two_trainable(entry_width, to, count(i) * inner, from, mask_, begin(i), end(i));
        } else {
          table.gather_trainable(entry_width, to[0], count(i) * inner, from[0], mask_, begin(i), end(i));
        }
      });
    }
    const int64_t used = total() * inner * width;
    const int64_t rest = capacity_ * inner * width - used;
    if (rest > 0) {
      for (void* array : compact) std::memset(static_cast<char*>(array) + used, 0, rest);
    }
    return true;
  }

  // Sets the trainable entries of `destination` from `compact`. Returns as Gather does; never writes another entry.
  bool Scatter(void* destination, const void* compact, int64_t width) const {
    if (!fits_) return false;
    if (by_index_) return ByIndex<true>({const_cast<void*>(compact)}, {destination}, width);
    const int64_t inner = mask_.layout.inner;
    const auto scatter = kernels().scatter_trainable;
    char* const to = static_cast<char*>(destination);
    const char* const from = static_cast<const char*>(compact);
    ForEach(width, [&](int64_t i) {
      scatter(static_cast<int>(width), to + begin(i) * width, from + ranks_[i] * inner * width, count(i) * inner, mask_,
              begin(i), end(i));
    });
    return true;
  }

 private:
  // Any number before it was compared with the bits.
  int64_t count(int64_t shard) const {
    return static_cast<int64_t>(static_cast<uint64_t>(ranks_[shard + 1]) - static_cast<uint64_t>(ranks_[shard]));
  }
  int64_t end_bit(int64_t shard) const { return std::min((shard + 1) * shard_bits_, mask_.layout.kept); }
  int64_t begin(int64_t shard) const { return shard * shard_bits_ * mask_.layout.inner; }
  int64_t end(int64_t shard) const { return end_bit(shard) * mask_.layout.inner; }

  // compact[i] = whole[indices[i]] for each array, or the reverse. Returns whether each index is one of a bit and,
  // where entries are written, of a bit that is set: another is left out.
  template <bool kScatter>
  bool ByIndex(const std::vector<void*>& compact, const std::vector<const void*>& whole, int64_t width) const {
    const auto move = [&](auto value, auto index) {
      using U = decltype(value);
      using Index = decltype(index);
      constexpr int64_t kAhead = 32;  // entries whose lines are on their way
      const Index* const indices = static_cast<const Index*>(indices_.data);
      const uint64_t kept = static_cast<uint64_t>(mask_.layout.kept);
      std::atomic<bool> fits(true);
      parallel_for_(total(), 16 * static_cast<int64_t>(whole.size()), [&](int64_t first, int64_t last) {
        bool all_fit = true;
        for (size_t a = 0; a < whole.size(); ++a) {
          U* const few = static_cast<U*>(compact[a]);
          U* const all = static_cast<U*>(const_cast<void*>(whole[a]));
          for (int64_t i = first; i < last; ++i) {
            const uint64_t ahead = static_cast<uint64_t>(indices[std::min(i + kAhead, last - 1)]);
            __builtin_prefetch(all + (ahead < kept ? ahead : 0), kScatter);
            const uint64_t entry = static_cast<uint64_t>(indices[i]);
            if (entry >= kept || (kScatter && !bit_is_set(mask_.bits, static_cast<int64_t>(entry)))) {
              all_fit = false;
            } else if (kScatter) {
              all[entry] = few[i];
            } else {
              few[i] = all[entry];
            }
          }
        }
        if (!all_fit) fits = false;
      });
      return fits.load();
    };
    return with_width(static_cast<int>(width), [&](auto value) {
      return with_index(indices_.wide, [&](auto index) { return move(value, index); });
    });
  }

  // Runs work(shard) for each shard with a trainable entry.
  void ForEach(int64_t width, const std::function<void(int64_t)>& work) const {
    const int64_t cycles = std::max<int64_t>(shard_bits_ * mask_.layout.inner * width / 8, 1);
    parallel_for_(static_cast<int64_t>(ranks_.size()) - 1, cycles, [&](int64_t first, int64_t last) {
      for (int64_t shard = first; shard < last; ++shard) {
        if (count(shard) > 0) work(shard);
      }
    });
  }

  MaskView mask_;
  TrainableIndices indices_;
  int64_t capacity_ = 0;
  bool by_index_ = false;
  ParallelForFunction parallel_for_;
  int64_t shard_bits_ = 1;
  std::vector<int64_t> ranks_;
  bool fits_ = false;
};

}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_PARALLEL_COMPACT_H_
