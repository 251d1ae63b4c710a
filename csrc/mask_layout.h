// Bit order of packed masks and the (outer, kept, inner) arithmetic.
//
// A mask holds one bit per "kept" index, little bit order: bit k is bit k % 8 of byte k / 8, 1 = trainable, 0 = frozen.
// Entry (o * kept + k) * inner + j of the flattened tensor uses bit k.
//
// Everything here is a plain aggregate or a function that is always inlined: files for different instruction sets share
// this header, and the linker could take a function with external linkage from the wrong one.

#ifndef FREEZEOPS_MASK_LAYOUT_H_
#define FREEZEOPS_MASK_LAYOUT_H_

#include <stdint.h>

#if defined(__CUDACC__)
#define FREEZEOPS_INLINE static __host__ __device__ __forceinline__
#define FREEZEOPS_METHOD __host__ __device__ __forceinline__
#else
#define FREEZEOPS_INLINE static inline __attribute__((always_inline, unused))
#define FREEZEOPS_METHOD inline __attribute__((always_inline))
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

// --- 32 bits at a time, for warps

FREEZEOPS_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

FREEZEOPS_INLINE int64_t ceil_divide(int64_t a, int64_t b) { return a / b + (a % b != 0); }

FREEZEOPS_INLINE int ones_in(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

FREEZEOPS_INLINE int lowest_one(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __ffs(static_cast<int>(word)) - 1;
#else
  return __builtin_ctz(word);
#endif
}

// A word whose lowest `count` bits are set; none for a count below 0.
FREEZEOPS_INLINE uint32_t low_bits32(int64_t count) {
  return count >= 32 ? ~uint32_t{0} : count <= 0 ? 0 : (uint32_t{1} << count) - 1;
}

// The next 32 bits from bit `bit` on, without reading past the `byte_count` bytes of the mask (zeros come instead).
FREEZEOPS_INLINE uint32_t load_word(const uint8_t* bits, int64_t byte_count, int64_t bit) {
  const int64_t byte = bit >> 3;
  const int shift = static_cast<int>(bit & 7);
  if (shift == 0 && byte + 4 <= byte_count && (reinterpret_cast<uintptr_t>(bits + byte) & 3) == 0) {
#if defined(__CUDA_ARCH__)
    return *reinterpret_cast<const uint32_t*>(bits + byte);
#elif defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    uint32_t word;
    __builtin_memcpy(&word, bits + byte, 4);
    return word;
#endif
  }
  uint64_t five = 0;
  for (int i = 0; i < 5 && byte + i < byte_count; ++i) five |= static_cast<uint64_t>(bits[byte + i]) << (8 * i);
  return static_cast<uint32_t>(five >> shift);
}

// The next `count` <= 32 bits from bit `bit` < kept on of a mask that repeats without end: bit `kept` is bit 0 again.
FREEZEOPS_INLINE uint32_t load_repeated(const uint8_t* bits, int64_t kept, int64_t bit, int count) {
  const int64_t byte_count = mask_bytes(kept);
  uint32_t word = 0;
  for (int filled = 0; filled < count;) {
    const int taken = static_cast<int>(min64(count - filled, kept - bit));
    word |= (load_word(bits, byte_count, bit) & low_bits32(taken)) << filled;
    filled += taken;
    bit = 0;
  }
  return word;
}

// The position of an entry in a layout: the mask bit that governs it, and the offset in that bit's row of `inner`
// entries.
struct RowPosition {
  int64_t bit;
  int64_t offset;
};

FREEZEOPS_INLINE RowPosition position_of(const MaskLayout& layout, int64_t entry) {
  const int64_t row = entry / layout.inner;
  return RowPosition{layout.outer == 1 ? row : row % layout.kept, entry - row * layout.inner};
}

// The bit of the entry that comes `ahead` after one at `position`; ahead + inner must be below 2^31. One division of
// 32 bits, where bit_of_entry takes two of 64.
FREEZEOPS_INLINE int64_t bit_ahead(const MaskLayout& layout, const RowPosition& position, int ahead) {
  const uint32_t passed = static_cast<uint32_t>(position.offset + ahead);
  const uint32_t rows = layout.inner == 1 ? passed : passed / static_cast<uint32_t>(layout.inner);
  const int64_t bit = position.bit + rows;
  if (bit < layout.kept) return bit;
  // Past the end at most once, unless the mask is short.
  const int64_t again = bit - layout.kept;
  return again < layout.kept ? again : static_cast<uint32_t>(again) % static_cast<uint32_t>(layout.kept);
}

// The number of ones before `bit`, given those before each block; bit <= kept.
FREEZEOPS_INLINE int64_t rank_of_bit(const uint8_t* bits, int64_t kept, const int64_t* offsets, int64_t bit) {
  const int64_t block = bit / kRankBlockBits;
  int64_t rank = offsets[block];
  for (int64_t at = block * kRankBlockBits; at < bit; at += 32) {
    rank += ones_in(load_word(bits, mask_bytes(kept), at) & low_bits32(bit - at));
  }
  return rank;
}

}  // namespace freezeops

#endif  // FREEZEOPS_MASK_LAYOUT_H_
