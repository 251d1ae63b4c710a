// Bit order of packed masks and the (outer, kept, inner) arithmetic.
//
// A mask holds one bit per "kept" index, little bit order: bit k is bit k % 8 of byte k / 8, 1 = trainable, 0 = frozen.
// Entry (o * kept + k) * inner + j of the flattened tensor uses bit k.
//
// Everything here is a plain aggregate or a function that is always inlined: this header is shared by files compiled
// for different instruction sets, and a function with external linkage could be taken from the wrong one by the linker.

#ifndef FREEZEOPS_MASK_LAYOUT_H_
#define FREEZEOPS_MASK_LAYOUT_H_

#include <stdint.h>

#if defined(__CUDACC__)
#define FREEZEOPS_INLINE static __host__ __device__ __forceinline__
#else
#define FREEZEOPS_INLINE static inline __attribute__((always_inline, unused))
#endif

namespace freezeops {

struct MaskLayout {
  int64_t outer;
  int64_t kept;
  int64_t inner;
};

// A packed mask in memory: `bits` has mask_bytes(layout.kept) bytes.
struct MaskView {
  const uint8_t* bits;
  MaskLayout layout;
};

// Compact state: ranks are counted once per mask for blocks of this many bits.
constexpr int64_t kRankBlockBits = 2048;

FREEZEOPS_INLINE int64_t rank_blocks(int64_t kept) { return kept / kRankBlockBits + (kept % kRankBlockBits != 0); }

FREEZEOPS_INLINE int64_t mask_bytes(int64_t kept) { return kept / 8 + (kept % 8 != 0); }

FREEZEOPS_INLINE int64_t entries(const MaskLayout& layout) { return layout.outer * layout.kept * layout.inner; }

// The mask bit that governs `entry`; the layout must not be empty.
FREEZEOPS_INLINE int64_t bit_of_entry(const MaskLayout& layout, int64_t entry) {
  return entry / layout.inner % layout.kept;
}

FREEZEOPS_INLINE bool bit_is_set(const uint8_t* bits, int64_t bit) { return (bits[bit >> 3] >> (bit & 7)) & 1; }

// A word whose lowest `count` bits are set, 0 <= count <= 64.
FREEZEOPS_INLINE uint64_t low_bits(int64_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// The next 64 bits from bit `bit` on, without reading past the `byte_count` bytes of the mask (zeros come instead).
FREEZEOPS_INLINE uint64_t load_bits(const uint8_t* bits, int64_t byte_count, int64_t bit) {
  const int64_t byte = bit >> 3;
  const int shift = static_cast<int>(bit & 7);
  uint64_t word = 0;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ && !defined(__CUDACC__)
  if (byte + 9 <= byte_count) {
    __builtin_memcpy(&word, bits + byte, 8);
    if (shift != 0) word = (word >> shift) | (static_cast<uint64_t>(bits[byte + 8]) << (64 - shift));
    return word;
  }
#endif
  for (int i = 0; i < 8 && byte + i < byte_count; ++i) word |= static_cast<uint64_t>(bits[byte + i]) << (8 * i);
  word >>= shift;
  if (shift != 0 && byte + 8 < byte_count) word |= static_cast<uint64_t>(bits[byte + 8]) << (64 - shift);
  return word;
}

}  // namespace freezeops

#endif  // FREEZEOPS_MASK_LAYOUT_H_
