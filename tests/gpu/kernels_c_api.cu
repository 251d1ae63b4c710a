// The CUDA kernels as plain C functions, for ctypes. All kernels are in this one translation unit, so that a compiler
// of any kind makes the library: nvcc for a GPU; any other runs the same code on the host, see kernels/cuda/warps.h.

#include <string.h>

#include <algorithm>
#include <vector>

#include "kernels/cuda/compact.cu"
#include "kernels/cuda/fused.cu"
#include "kernels/cuda/mask.cu"
#include "kernels/cuda/seed.cu"
#if defined(__CUDACC__)
#include "kernels/cuda/runtime.cu"
#endif

using freezeops::MaskLayout;
using freezeops::MaskView;
namespace cuda = freezeops::cuda;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

MaskView view(const void* bits, const int64_t* layout) {
  return MaskView{static_cast<const uint8_t*>(bits), MaskLayout{layout[0], layout[1], layout[2]}};
}

}  // namespace

#if defined(__CUDACC__)
EXPORT const char* fz_error_text(int error) { return cuda::error_text(error); }
EXPORT int fz_copy_bytes(void* destination, const void* source, int64_t bytes, cuda::Stream stream) {
  return cuda::copy_bytes(destination, source, bytes, stream);
}
// An error on purpose: a kernel that no device can start.
namespace {
__global__ void nothing() {}
}  // namespace
EXPORT int fz_failing_launch(cuda::Stream stream) {
  nothing<<<1, 1 << 20, 0, stream>>>();
  return cudaGetLastError();
}
#endif

EXPORT int fz_zero_frozen(int width, void* data, const void* bits, const int64_t* layout, cuda::Stream stream) {
  return cuda::zero_frozen(width, data, view(bits, layout), stream);
}
EXPORT int fz_copy_and_zero_frozen(int width, void* destination, const void* source, const void* bits,
                                   const int64_t* layout, cuda::Stream stream) {
  return cuda::copy_and_zero_frozen(width, destination, source, view(bits, layout), stream);
}
EXPORT int fz_copy_frozen(int width, void* destination, const void* source, const void* bits, const int64_t* layout,
                          cuda::Stream stream) {
  return cuda::copy_frozen(width, destination, source, view(bits, layout), stream);
}
EXPORT int fz_mask_slices(int width, void* destination, const void* source, const void* indices, int wide,
                          int64_t count, int64_t rows, int64_t row_size, const void* bits, const int64_t* layout,
                          cuda::Stream stream) {
  return cuda::mask_slices(width, destination, source, {indices, wide != 0, count, rows, row_size}, view(bits, layout),
                           stream);
}
EXPORT int fz_gather_trainable(int width, int arrays, void* const* compact, const void* const* sources,
                               const void* bits, const int64_t* layout, const int64_t* offsets, const void* indices,
                               int wide, int64_t capacity, cuda::Stream stream) {
  return cuda::gather_trainable(width, arrays, compact, sources,
                                {view(bits, layout), offsets, indices, wide != 0, capacity}, stream);
}
EXPORT int fz_scatter_trainable(int width, void* destination, const void* compact, const void* bits,
                                const int64_t* layout, const int64_t* offsets, const void* indices, int wide,
                                int64_t capacity, cuda::Stream stream) {
  return cuda::scatter_trainable(width, destination, compact,
                                 {view(bits, layout), offsets, indices, wide != 0, capacity}, stream);
}
EXPORT int fz_rank_of_bits(int64_t* ranks, const int64_t* bits, int64_t count, const uint8_t* mask, int64_t kept,
                           const int64_t* offsets, int64_t last, cuda::Stream stream) {
  return cuda::rank_of_bits(ranks, bits, count, mask, kept, offsets, last, stream);
}
EXPORT int fz_seed_slots(int type, uint8_t* unseeded, int64_t size, void* const* slots, const int* powers, int count,
                         const double* scales, const void* values, const int64_t* indices, int64_t slices,
                         int64_t row_size, cuda::Stream stream) {
  cuda::SeedArguments arguments{};
  arguments.unseeded = unseeded;
  arguments.size = size;
  for (int i = 0; i < count; ++i) {
    arguments.slots[i] = slots[i];
    arguments.powers[i] = powers[i];
  }
  arguments.count = count;
  arguments.scales = scales;
  arguments.values = values;
  arguments.indices = indices;
  arguments.slices = slices;
  arguments.row_size = row_size;
  return cuda::seed_slots(static_cast<freezeops::Float>(type), arguments, stream);
}
EXPORT int fz_sum_slices(int type, uint64_t* named, void* sums, void* squares, int64_t slices, int64_t row_size,
                         const int64_t* indices, int64_t rows, const void* values, const void* scale,
                         cuda::Stream stream) {
  return cuda::sum_slices(static_cast<freezeops::Float>(type), {named, sums, squares, slices, row_size}, indices, rows,
                          values, scale, stream);
}
EXPORT int fz_bytes_of_fused_variable() { return sizeof(cuda::FusedVariable); }
// Slots of variables and those that are seeded are in the rule's own order.
EXPORT int fz_fused_update(int type, const char* name, const void* scalars, const double* scales, int seeds,
                           const int* seed_slots, const int* seed_powers, const cuda::FusedVariable* variables,
                           int64_t count, cuda::Stream stream) {
  const freezeops::NamedRule* rule = freezeops::kNamedRules;
  while (strcmp(rule->name, name) != 0) ++rule;
  cuda::FusedStep step{rule, scalars, scales, seeds, {}, {}};
  for (int i = 0; i < seeds; ++i) {
    step.seed_slots[i] = rule->slot_positions[seed_slots[i]];
    step.seed_powers[i] = seed_powers[i];
  }
  std::vector<cuda::FusedVariable> placed(variables, variables + count);
  for (int64_t i = 0; i < count; ++i) {
    std::fill_n(placed[i].slots, freezeops::kMostSlots, nullptr);
    for (int j = 0; j < rule->slots; ++j) placed[i].slots[rule->slot_positions[j]] = variables[i].slots[j];
  }
  return cuda::fused_update(static_cast<freezeops::Float>(type), step, placed.data(), count, stream);
}
#if !defined(__CUDACC__)
// The index arithmetic of mask_layout.h by itself.
EXPORT void fz_layout(const uint8_t* bits, const int64_t* layout, int64_t start, int ahead, int64_t* results) {
  const MaskLayout shape{layout[0], layout[1], layout[2]};
  const freezeops::RowPosition position = freezeops::position_of(shape, start);
  results[0] = freezeops::bit_of_entry(shape, start + ahead);
  results[1] = freezeops::bit_ahead(shape, position, ahead);
  const int64_t bit = results[0];
  results[2] = freezeops::load_word(bits, freezeops::mask_bytes(shape.kept), bit);
  results[3] = freezeops::load_repeated(bits, shape.kept, bit, 32);
  results[4] = static_cast<int64_t>(freezeops::load_bits(bits, freezeops::mask_bytes(shape.kept), bit));
}
// The entries that the lanes of a warp find `at` entries on in a tile of a fused update, and their slots: of each lane
// one for each of four words.
EXPORT void fz_walk_tile(const cuda::FusedVariable* variable, int64_t tile, int at, int64_t* entries, int64_t* slots) {
  using Walk = cuda::TileWalk<4>;
  for (int lane = 0; lane < cuda::kLanes; ++lane) {
    Walk walk(*variable, tile, lane);
    Walk::Group group = {};
    bool any = false;
    for (int each = 0; each <= at; each += Walk::kGroup) any = each < walk.length() && walk.next(each, &group);
    for (int i = 0; i < 4; ++i) {
      entries[i * cuda::kLanes + lane] = any ? group.entries[i] : -1;
      slots[i * cuda::kLanes + lane] = group.slots[i];
    }
  }
}
EXPORT uint32_t fz_float16(int brain, uint32_t bits, int back) {
  using freezeops::bits_of_float;
  using freezeops::float_of_bits;
  if (back != 0) {
    return brain != 0 ? freezeops::Bfloat16(float_of_bits(bits)).bits : freezeops::Half(float_of_bits(bits)).bits;
  }
  freezeops::Bfloat16 b;
  freezeops::Half h;
  b.bits = h.bits = static_cast<uint16_t>(bits);
  return bits_of_float(brain != 0 ? static_cast<float>(b) : static_cast<float>(h));
}
#endif
