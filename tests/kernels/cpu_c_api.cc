// The CPU kernels as plain C functions, for ctypes. Functions that ../gpu/kernels_c_api.cu has too have its names and
// arguments, so that its tests call both; they return 0, or 1 where offsets or indices are not those of the mask.

#include <string.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <thread>
#include <vector>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/parallel_compact.h"
#include "kernels/cpu/parallel_fused.h"
#include "kernels/cpu/sampled_matmul.h"
#include "kernels/cpu/seed_slots.h"

using freezeops::Float;
using freezeops::MaskLayout;
using freezeops::MaskView;
using freezeops::NamedRule;
namespace cpu = freezeops::cpu;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t kThreads = 3;

MaskView ViewOf(const void* bits, const int64_t* layout) {
  return MaskView{static_cast<const uint8_t*>(bits), MaskLayout{layout[0], layout[1], layout[2]}};
}

int64_t CountOf(const MaskView& mask) { return freezeops::entries(mask.layout); }

void InThreads(int64_t threads, int64_t count, const std::function<void(int64_t, int64_t)>& work) {
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) {
    others.emplace_back([&work, i, count, threads] { work(i * count / threads, (i + 1) * count / threads); });
  }
  work(0, count / threads);
  for (std::thread& thread : others) thread.join();
}

// On threads where there is much to do, so that short calls are quick.
void ParallelFor(int64_t count, int64_t cycles, const std::function<void(int64_t, int64_t)>& work) {
  if (count == 0) return;
  InThreads(count * cycles > 100000 ? std::min(kThreads, count) : 1, count, work);
}

const NamedRule* RuleOf(const char* name) {
  const NamedRule* rule = freezeops::kNamedRules;
  while (strcmp(rule->name, name) != 0) ++rule;
  return rule;
}

cpu::Seeds SeedsOf(const NamedRule& rule, const double* scales, int count, const int* slots, const int* powers) {
  cpu::Seeds seeds = {};
  seeds.count = count;
  for (int i = 0; i < count; ++i) {
    seeds.slots[i] = rule.slot_positions[slots[i]];
    seeds.powers[i] = powers[i];
    seeds.scales[i] = scales[i];
  }
  return seeds;
}

// FusedVariable of ../gpu/library.py. Slots are in the rule's own order.
struct Variable {
  void* variable;
  const void* gradient;
  void* slots[3];
  const uint8_t* bits;
  int64_t layout[3];
  const int64_t* offsets;
  const void* indices;
  int64_t capacity;
  uint8_t* unseeded;
  const uint64_t* named;  // of slices: the addresses of their rows and of their values, see fz_sum_slices
  const void* sums;
  const void* squares;
  int64_t slices;
  int64_t row_size;
  bool wide;
  bool decays;
  bool gathered;
};

cpu::FusedTensor TensorOf(const NamedRule& rule, const Variable& variable) {
  static const uint8_t kAll = 0xff;
  cpu::FusedTensor tensor = {};
  tensor.variable = variable.variable;
  (variable.gathered ? tensor.gathered : tensor.gradient) = variable.gradient;
  for (int j = 0; j < rule.slots; ++j) tensor.slots[rule.slot_positions[j]] = variable.slots[j];
  tensor.mask = ViewOf(variable.bits != nullptr ? variable.bits : &kAll, variable.layout);
  tensor.unseeded = variable.unseeded;
  const bool compact = variable.offsets != nullptr;
  tensor.unseeded_bytes =
      freezeops::mask_bytes(compact ? variable.capacity * variable.layout[2] : CountOf(tensor.mask));
  tensor.decays = variable.decays;
  return tensor;
}

}  // namespace

EXPORT const char* fz_isa() { return cpu::kernels().isa; }

// --- The table of kernels

EXPORT int64_t fz_count_frozen(const void* bits, const int64_t* layout, int64_t begin, int64_t end) {
  return cpu::kernels().count_frozen(ViewOf(bits, layout), begin, end);
}
EXPORT int64_t fz_count_ones(const uint8_t* bits, int64_t begin, int64_t end) {
  return cpu::kernels().count_ones(bits, begin, end);
}
EXPORT int fz_all_trainable(const void* bits, const int64_t* layout) {
  return cpu::all_trainable(ViewOf(bits, layout));
}
EXPORT void fz_zero_range(int width, void* data, const void* bits, const int64_t* layout, int64_t begin, int64_t end,
                          int in_memory) {
  cpu::kernels().zero_frozen(width, data, ViewOf(bits, layout), begin, end,
                             in_memory != 0 ? cpu::Residence::kMemory : cpu::Residence::kCache);
}
EXPORT void fz_copy_and_zero_range(int width, void* destination, const void* source, const void* bits,
                                   const int64_t* layout, int64_t begin, int64_t end) {
  cpu::kernels().copy_and_zero_frozen(width, destination, source, ViewOf(bits, layout), begin, end);
}
EXPORT void fz_copy_range(int trainable, int width, void* destination, const void* source, const void* bits,
                          const int64_t* layout, int64_t begin, int64_t end) {
  const auto copy = trainable != 0 ? cpu::kernels().copy_trainable : cpu::kernels().copy_frozen;
  copy(width, destination, source, ViewOf(bits, layout), begin, end);
}
EXPORT void fz_gather_range(int trainable, int width, void* destination, int64_t count, const void* source,
                            const void* bits, const int64_t* layout, int64_t begin, int64_t end) {
  const auto gather = trainable != 0 ? cpu::kernels().gather_trainable : cpu::kernels().gather_frozen;
  gather(width, destination, count, source, ViewOf(bits, layout), begin, end);
}
EXPORT void fz_gather_two_range(int width, void* const* destinations, int64_t count, const void* const* sources,
                                const void* bits, const int64_t* layout, int64_t begin, int64_t end) {
  cpu::kernels().gather_two_trainable(width, destinations, count, sources, ViewOf(bits, layout), begin, end);
}
EXPORT void fz_scatter_range(int trainable, int width, void* destination, const void* source, int64_t count,
                             const void* bits, const int64_t* layout, int64_t begin, int64_t end) {
  const auto scatter = trainable != 0 ? cpu::kernels().scatter_trainable : cpu::kernels().scatter_frozen;
  scatter(width, destination, source, count, ViewOf(bits, layout), begin, end);
}
EXPORT void fz_add_row(int type, void* sum, void* square, const void* row, const void* scale, int64_t width) {
  cpu::kernels().add_row(static_cast<Float>(type), sum, square, row, scale, width);
}
// Updates [begin, end): entries, or with `by_index` trainable entries. `rank`: the trainable entries before `begin`, in
// compact state; -1 in full state.
EXPORT int fz_update_range(int type, const char* name, const void* scalars, const double* scales, int seeds,
                           const int* seed_slots, const int* seed_powers, const Variable* variable, int64_t begin,
                           int64_t end, int64_t rank, int by_index) {
  const NamedRule& rule = *RuleOf(name);
  const Float dtype = static_cast<Float>(type);
  std::vector<char> padded(freezeops::kMostScalars * sizeof(double));
  memcpy(padded.data(), scalars, rule.scalars * freezeops::width_of(dtype));
  const cpu::FusedStep step{rule.flags, padded.data(), SeedsOf(rule, scales, seeds, seed_slots, seed_powers)};
  const cpu::FusedTensor tensor = TensorOf(rule, *variable);
  const cpu::KernelTable& table = cpu::kernels();
  if (by_index != 0) {
    return table.update_by_index(rule.rule, dtype, step, tensor, variable->indices, variable->wide, begin, end) ? 0 : 1;
  }
  if (rank < 0) {
    table.update_full(rule.rule, dtype, step, tensor, begin, end);
  } else {
    table.update_compact(rule.rule, dtype, step, tensor, begin, end, rank);
  }
  return 0;
}

// Always on as many threads as are asked for, as far as there is something for each.
EXPORT int fz_sampled_matmul(int type, void* result, int64_t capacity, const void* x, const void* dy, int64_t tokens,
                             int64_t rows, int64_t columns, const int32_t* plan, int64_t size, int64_t threads) {
  const auto parallel_for = [threads](int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& work) {
    if (count > 0) InThreads(std::min(threads, count), count, work);
  };
  // NaN: what is read before it was written is seen.
  std::vector<float> memory;
  const int64_t most = cpu::MostScratch(tokens, rows, columns, capacity);
  const auto scratch = [&](int64_t floats) -> float* {
    if (floats > most) return nullptr;
    memory.assign(floats, std::numeric_limits<float>::quiet_NaN());
    return memory.data();
  };
  cpu::SampledMatmul product(static_cast<Float>(type), x, dy, tokens, rows, columns, threads, parallel_for, scratch);
  return static_cast<int>(product.Run(plan, size, result, capacity));
}

// --- As ../gpu/kernels_c_api.cu

EXPORT int fz_zero_frozen(int width, void* data, const void* bits, const int64_t* layout, void*) {
  const MaskView mask = ViewOf(bits, layout);
  cpu::kernels().zero_frozen(width, data, mask, 0, CountOf(mask), cpu::Residence::kCache);
  return 0;
}
EXPORT int fz_copy_and_zero_frozen(int width, void* destination, const void* source, const void* bits,
                                   const int64_t* layout, void*) {
  const MaskView mask = ViewOf(bits, layout);
  cpu::kernels().copy_and_zero_frozen(width, destination, source, mask, 0, CountOf(mask));
  return 0;
}
EXPORT int fz_copy_frozen(int width, void* destination, const void* source, const void* bits, const int64_t* layout,
                          void*) {
  const MaskView mask = ViewOf(bits, layout);
  cpu::kernels().copy_frozen(width, destination, source, mask, 0, CountOf(mask));
  return 0;
}
EXPORT int fz_gather_trainable(int width, int arrays, void* const* compact, const void* const* sources,
                               const void* bits, const int64_t* layout, const int64_t* offsets, const void* indices,
                               int wide, int64_t capacity, void*) {
  const cpu::ParallelCompact shards(ViewOf(bits, layout), offsets, {indices, wide != 0}, capacity, kThreads,
                                    ParallelFor);
  const std::vector<void*> to(compact, compact + arrays);
  const std::vector<const void*> from(sources, sources + arrays);
  return shards.Gather(to, from, width) ? 0 : 1;
}
EXPORT int fz_scatter_trainable(int width, void* destination, const void* compact, const void* bits,
                                const int64_t* layout, const int64_t* offsets, const void* indices, int wide,
                                int64_t capacity, void*) {
  const cpu::ParallelCompact shards(ViewOf(bits, layout), offsets, {indices, wide != 0}, capacity, kThreads,
                                    ParallelFor);
  return shards.Scatter(destination, compact, width) ? 0 : 1;
}
EXPORT int fz_rank_of_bits(int64_t* ranks, const int64_t* bits, int64_t count, const uint8_t* mask, int64_t kept,
                           const int64_t* offsets, int64_t last, void*) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t bit = std::clamp<int64_t>(bits[i], 0, kept - 1);
    ranks[i] = std::max<int64_t>(std::min(cpu::RankOf(mask, offsets, bit), last), 0);
  }
  return 0;
}
EXPORT int fz_seed_slots(int type, uint8_t* unseeded, int64_t size, void* const* data, const int* powers, int count,
                         const double* scales, const void* values, const int64_t* indices, int64_t slices,
                         int64_t row_size, void*) {
  freezeops::with_float(static_cast<Float>(type), [&](auto constant) {
    constexpr Float kType = decltype(constant)::value;
    using Entry = typename freezeops::EntryOf<kType>::Type;
    using Acc = typename freezeops::EntryOf<kType>::Acc;
    std::vector<freezeops::SlotSeed<kType>> slots;
    slots.reserve(count);
    for (int i = 0; i < count; ++i) {
      slots.push_back({static_cast<Entry*>(data[i]), static_cast<Acc>(scales[i]), powers[i]});
    }
    const Entry* const gradient = static_cast<const Entry*>(values);
    if (indices == nullptr) {
      ParallelFor(freezeops::mask_bytes(size), 1000, [&](int64_t first, int64_t last) {
        cpu::SeedRange(unseeded, slots, gradient, 8 * first, std::min(8 * last, size));
      });
    } else {
      cpu::SeedRows(unseeded, slots, gradient, indices, slices, row_size);
    }
  });
  return 0;
}
// Slices are summed by the update; here it is only noted where they are.
EXPORT int fz_sum_slices(int, uint64_t* named, void*, void*, int64_t, int64_t, const int64_t* indices, int64_t,
                         const void* values, const void*, void*) {
  named[0] = reinterpret_cast<uintptr_t>(indices);
  named[1] = reinterpret_cast<uintptr_t>(values);
  return 0;
}
EXPORT int fz_bytes_of_fused_variable() { return sizeof(Variable); }
EXPORT int fz_fused_update(int type, const char* name, const void* scalars, const double* scales, int seeds,
                           const int* seed_slots, const int* seed_powers, const Variable* variables, int64_t count,
                           void*) {
  const NamedRule& rule = *RuleOf(name);
  std::vector<cpu::FusedVariable> all(count);
  std::vector<cpu::Slices> slices(count);
  for (int64_t i = 0; i < count; ++i) {
    const Variable& variable = variables[i];
    all[i].tensor = TensorOf(rule, variable);
    all[i].offsets = variable.offsets;
    all[i].indices = {variable.indices, variable.wide};
    all[i].capacity = variable.capacity;
    if (variable.named == nullptr) continue;
    slices[i] = {reinterpret_cast<const void*>(variable.named[1]), reinterpret_cast<const int64_t*>(variable.named[0]),
                 variable.slices, variable.row_size};
    all[i].slices = &slices[i];
  }
  cpu::ParallelFused parallel(rule, static_cast<Float>(type), scalars,
                              SeedsOf(rule, scales, seeds, seed_slots, seed_powers), kThreads, ParallelFor);
  return parallel.Update(all) ? 0 : 1;
}
