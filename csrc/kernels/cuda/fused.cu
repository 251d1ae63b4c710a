// Launchers of the kernels of fused updates. Compiled without fused multiply-add, so that values are the CPU's.

#include "kernels/cuda/fused_bodies.h"

namespace freezeops {
namespace cuda {
namespace {

// Runs a body over variables, as many at a time as a table has room for.
template <typename Body>
int launch_over(const FusedStep& step, const FusedVariable* variables, int64_t count, Stream stream) {
  Body body{};
  FusedTable& table = body.table;
  table.flags = step.rule->flags;
  table.scalars = step.rule->scalars;
  table.scalar = step.scalars;
  table.seeds = step.seeds;
  table.scales = step.scales;
  for (int i = 0; i < step.seeds; ++i) {
    table.seed_slots[i] = step.seed_slots[i];
    table.seed_powers[i] = step.seed_powers[i];
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t tiles = Body::tiles_of(variables[i]);
    if (tiles > 0) table.add(variables[i], tiles);
    if (table.count < kMostTogether && i + 1 < count) continue;
    const int error = launch(body, stream);
    if (error != 0) return error;
    table.count = 0;
  }
  return 0;
}

}  // namespace

int sum_slices(Float type, const RowSums& sums, const int64_t* indices, int64_t rows, const void* values,
               const void* scale, Stream stream) {
  if (rows == 0 || sums.row_size == 0) return 0;
  const int cleared = launch(ZeroNamed{sums.named, 2 * rows}, stream);
  if (cleared != 0 || sums.slices == 0) return cleared;
  const int named = launch(NameRows{sums.named, indices, sums.slices, rows}, stream);
  if (named != 0) return named;
  return with_float(type, [&](auto constant) {
    using Body = SumRows<decltype(constant)::value>;
    using Entry = typename Body::Entry;
    return launch(Body{sums, indices, rows, static_cast<const Entry*>(values), static_cast<const Entry*>(scale)},
                  stream);
  });
}

int fused_update(Float type, const FusedStep& step, const FusedVariable* variables, int64_t count, Stream stream) {
  return with_float(type, [&](auto constant) {
    constexpr Float kType = decltype(constant)::value;
    if (step.seeds > 0) {
      const int error = launch_over<SeedWaiting<kType>>(step, variables, count, stream);
      if (error != 0) return error;
    }
    return with_rule(step.rule->rule, [&](auto rule) {
      return launch_over<UpdateFused<decltype(rule)::value, kType>>(step, variables, count, stream);
    });
  });
}

}  // namespace cuda
}  // namespace freezeops
