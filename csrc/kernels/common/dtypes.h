// The types of entries: floats that kernels calculate with, integers that entries are moved as.

#ifndef FREEZEOPS_KERNELS_COMMON_DTYPES_H_
#define FREEZEOPS_KERNELS_COMMON_DTYPES_H_

#include <stdint.h>

#include <type_traits>

#include "kernels/common/float16.h"

namespace freezeops {

enum class Float { kFloat16, kBfloat16, kFloat32, kFloat64 };

// The storage type of a float, and the type that kernels calculate in: float for 16-bit floats, each result rounded.
template <Float kType>
struct EntryOf;
template <>
struct EntryOf<Float::kFloat16> {
  using Type = Half;
  using Acc = float;
};
template <>
struct EntryOf<Float::kBfloat16> {
  using Type = Bfloat16;
  using Acc = float;
};
template <>
struct EntryOf<Float::kFloat32> {
  using Type = float;
  using Acc = float;
};
template <>
struct EntryOf<Float::kFloat64> {
  using Type = double;
  using Acc = double;
};

// Bytes of an entry.
FREEZEOPS_INLINE int width_of(Float type) { return type == Float::kFloat64 ? 8 : type == Float::kFloat32 ? 4 : 2; }

// The dispatchers call work(constant) with a value, or a type, that is known while compiling. They are static: files
// for different instruction sets must not share an instance.

// Calls work(std::integral_constant<Float, ...>).
template <typename Work>
static inline auto with_float(Float type, const Work& work) {
  switch (type) {
    case Float::kFloat16:
      return work(std::integral_constant<Float, Float::kFloat16>());
    case Float::kBfloat16:
      return work(std::integral_constant<Float, Float::kBfloat16>());
    case Float::kFloat32:
      return work(std::integral_constant<Float, Float::kFloat32>());
    default:
      return work(std::integral_constant<Float, Float::kFloat64>());
  }
}

// Calls work(U()) for the unsigned integer U of `width` bytes: 2, 4 or 8.
template <typename Work>
static inline auto with_width(int width, const Work& work) {
  if (width == 2) return work(uint16_t());
  if (width == 4) return work(uint32_t());
  return work(uint64_t());
}

// Calls work(Index()) for int64_t or int32_t.
template <typename Work>
static inline auto with_index(bool wide, const Work& work) {
  return wide ? work(int64_t()) : work(int32_t());  // NOLINT(bugprone-branch-clone): the types differ
}

}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_COMMON_DTYPES_H_
