// The kernels of the sampled matrix product, written once over the operations of an instruction set.
//
// Dots is a struct (dots_*.h) with
//
// - Vector, kLanes: floats that are worked on together;
// - kKeepsX: whether there are registers for all of a row of x beside those for the products of 8 columns;
// - load(floats), multiply(a, b), multiply_add(a, b, c) = a * b + c;
// - template <int kCount> add_sums(sums, vectors): sums[k] += all lanes of vectors[k], for kCount of 1 to 8;
// - template <Float kType> transpose(to, to_stride, from, from_stride): 16 x 16 entries, as floats.
//
// In the anonymous namespace, as mask_kernels.h says.

#ifndef FREEZEOPS_KERNELS_CPU_SAMPLED_KERNELS_H_
#define FREEZEOPS_KERNELS_CPU_SAMPLED_KERNELS_H_

#include <stdint.h>

#include "kernels/common/dtypes.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/visits.h"

namespace freezeops {
namespace cpu {
namespace {

constexpr int64_t kTile = 16;

// Prefetches the lines of a tile into the second-level cache: in the first one those of rows that lie a power of two
// apart would push each other out.
template <typename Entry>
FREEZEOPS_INLINE void prefetch_tile(const Entry* from, int64_t stride, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) __builtin_prefetch(from + row * stride, 0, 2);
}

// A tile at the edge: entries beyond `tokens` are zeros.
template <typename Entry>
FREEZEOPS_INLINE void transpose_edge(float* to, int64_t to_stride, const Entry* from, int64_t from_stride,
                                     int64_t tokens, int64_t columns) {
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t token = 0; token < kTile; ++token) {
      to[column * to_stride + token] = token < tokens ? static_cast<float>(from[token * from_stride + column]) : 0.0f;
    }
  }
}

template <typename Dots, Float kType>
void transpose_as(float* to, int64_t to_stride, const typename EntryOf<kType>::Type* from, int64_t from_stride,
                  int64_t tokens, int64_t columns) {
  for (int64_t column = 0; column < columns; column += kTile) {
    prefetch_tile(from + column, from_stride, Visits::least(tokens, kTile));
  }
  for (int64_t token = 0; token < to_stride; token += kTile) {
    const int64_t there = tokens - token;  // may be less than none
    const int64_t ahead = Visits::least(there - kTile, kTile);
    const auto* const row = from + Visits::least(token, tokens) * from_stride;
    const auto* const next_tiles = row + kTile * from_stride;
    int64_t next_token = 0, next_column = 0;
    for (int64_t column = 0; column < columns; column += kTile) {
      float* const tile = to + column * to_stride + token;
      // As many lines of the next tiles as these have, one row after the other, as the processor itself prefetches.
      for (int64_t i = 0; i < kTile && next_token < ahead; ++i) {
        __builtin_prefetch(next_tiles + next_token * from_stride + next_column, 0, 2);
        next_column += kTile;
        if (next_column >= columns) {
          next_column = 0;
          ++next_token;
        }
      }
      if (there >= kTile && columns - column >= kTile) {
        Dots::template transpose<kType>(tile, to_stride, row + column, from_stride);
      } else {
        transpose_edge(tile, to_stride, row + column, from_stride, there, Visits::least(columns - column, kTile));
      }
    }
  }
}

template <typename Dots>
void transpose(Float type, float* to, int64_t to_stride, const void* from, int64_t first_column, int64_t from_stride,
               int64_t tokens, int64_t columns) {
  const auto work = [&](auto constant) {
    constexpr Float kType = decltype(constant)::value;
    const auto* const entries = static_cast<const typename EntryOf<kType>::Type*>(from);
    transpose_as<Dots, kType>(to, to_stride, entries + first_column, from_stride, tokens, columns);
  };
  if (type == Float::kFloat16) return work(std::integral_constant<Float, Float::kFloat16>());
  if (type == Float::kBfloat16) return work(std::integral_constant<Float, Float::kBfloat16>());
  work(std::integral_constant<Float, Float::kFloat32>());
}

// A row of x: in registers, or loaded where it is used.
template <typename Dots, int kSteps>
struct RowOfX {
  using Vector = typename Dots::Vector;
  Vector kept[Dots::kKeepsX ? kSteps : 1];
  const float* row;

  FREEZEOPS_METHOD explicit RowOfX(const float* row) : row(row) {
    if (Dots::kKeepsX) {
#pragma GCC unroll 16
      for (int step = 0; step < kSteps; ++step) kept[step] = Dots::load(row + step * Dots::kLanes);
    }
  }
  FREEZEOPS_METHOD Vector at(int step) const {
    return Dots::kKeepsX ? kept[Dots::kKeepsX ? step : 0] : Dots::load(row + step * Dots::kLanes);
  }
};

// sums[k] += the product of a row of x with column k, for kCount columns.
template <typename Dots, int kSteps, int kCount>
FREEZEOPS_INLINE void add_dots(const RowOfX<Dots, kSteps>& x, const float* dy, const uint16_t* columns, float* sums) {
  using Vector = typename Dots::Vector;
  constexpr int64_t kStride = kSteps * Dots::kLanes;
  const float* from[kCount];
  Vector dots[kCount];
  for (int k = 0; k < kCount; ++k) from[k] = dy + columns[k] * kStride;
  const Vector first = x.at(0);
#pragma GCC unroll 8
  for (int k = 0; k < kCount; ++k) dots[k] = Dots::multiply(first, Dots::load(from[k]));
#pragma GCC unroll 16
  for (int step = 1; step < kSteps; ++step) {
    const Vector each = x.at(step);
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) {
      dots[k] = Dots::multiply_add(each, Dots::load(from[k] + step * Dots::kLanes), dots[k]);
    }
  }
  Dots::template add_sums<kCount>(sums, dots);
}

// The visits of a group, whose count is kRest more than a multiple of 8.
template <typename Dots, int kSteps, int kRest>
void add_group(VisitGroup group, const int32_t* rows, const uint16_t* columns, const float* x, const float* dy,
               float* sums) {
  for (int32_t visit = 0; visit < group.visits; ++visit) {
    const RowOfX<Dots, kSteps> row(x + rows[visit] * int64_t{kSteps * Dots::kLanes});
    for (int32_t left = group.count; left >= 8; left -= 8, columns += 8, sums += 8) {
      add_dots<Dots, kSteps, 8>(row, dy, columns, sums);
    }
    if (kRest > 0) {
      add_dots<Dots, kSteps, kRest == 0 ? 1 : kRest>(row, dy, columns, sums);
      columns += kRest;
      sums += kRest;
    }
  }
}

template <typename Dots, int kSteps>
void add_groups(const Visits& visits, int64_t block, const float* x, const float* dy, float* sums) {
  using AddGroup = decltype(&add_group<Dots, kSteps, 0>);
  static constexpr AddGroup kByRest[] = {
      add_group<Dots, kSteps, 0>, add_group<Dots, kSteps, 1>, add_group<Dots, kSteps, 2>, add_group<Dots, kSteps, 3>,
      add_group<Dots, kSteps, 4>, add_group<Dots, kSteps, 5>, add_group<Dots, kSteps, 6>, add_group<Dots, kSteps, 7>};
  const BlockStart start = visits.starts[block], end = visits.starts[block + 1];
  const int32_t* row = visits.row + start.visit;
  const uint16_t* columns = visits.in_panel + start.entry;
  for (int32_t i = start.group; i < end.group; ++i) {
    const VisitGroup group = visits.group[i];
    kByRest[group.count % 8](group, row, columns, x, dy, sums);
    const int64_t entries = int64_t{group.visits} * group.count;
    row += group.visits;
    columns += entries;
    sums += entries;
  }
}

template <typename Dots>
void add_products(const Visits& visits, int64_t block, const float* x, const float* dy, int64_t tokens, float* sums) {
  const float* const panel = dy + block % visits.panels * visits.panel * tokens;
  switch (tokens) {
    case 16:
      return add_groups<Dots, 16 / Dots::kLanes>(visits, block, x, panel, sums);
    case 32:
      return add_groups<Dots, 32 / Dots::kLanes>(visits, block, x, panel, sums);
    case 64:
      return add_groups<Dots, 64 / Dots::kLanes>(visits, block, x, panel, sums);
    case 128:
      return add_groups<Dots, 128 / Dots::kLanes>(visits, block, x, panel, sums);
    default:
      return add_groups<Dots, kMostTokens / Dots::kLanes>(visits, block, x, panel, sums);
  }
}

bool columns_are_possible(const Visits& visits, int64_t block) {
  uint16_t largest = 0;
  for (int64_t entry = visits.starts[block].entry; entry < visits.starts[block + 1].entry; ++entry) {
    largest = visits.in_panel[entry] > largest ? visits.in_panel[entry] : largest;
  }
  return largest < visits.columns_of(block % visits.panels);
}

}  // namespace
}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_SAMPLED_KERNELS_H_
