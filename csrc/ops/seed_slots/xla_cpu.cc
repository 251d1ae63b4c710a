// The native kernel that XLA calls on the CPU to seed slots: seeding in the optimizer's loops slows them down; called,
// it ends where it sees that nothing waits.
//
// Operands of freezeops_seed_slots: unseeded, gradient, scales, powers, slots...; the results are unseeded and the
// slots.

#include "ops/seed_slots/xla_calls.h"

#if defined(FREEZEOPS_HAVE_XLA_CALLS)

#include <algorithm>
#include <vector>

#include "kernels/common/dtypes.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/seed_slots.h"
#include "ops/common/xla_cpu_pool.h"

namespace freezeops {
namespace {

namespace ffi = ::xla::ffi;

template <Float kType>
void Seed(ffi::ThreadPool pool, ffi::AnyBuffer unseeded, ffi::AnyBuffer gradient, ffi::AnyBuffer scales,
          ffi::AnyBuffer powers, const std::vector<void*>& slots) {
  using Entry = typename EntryOf<kType>::Type;
  using Acc = typename EntryOf<kType>::Acc;
  std::vector<SlotSeed<kType>> seeds;
  for (size_t i = 0; i < slots.size(); ++i) {
    seeds.push_back({static_cast<Entry*>(slots[i]), static_cast<Acc>(static_cast<double*>(scales.untyped_data())[i]),
                     static_cast<int>(static_cast<int64_t*>(powers.untyped_data())[i])});
  }
  const int64_t size = gradient.element_count();
  ParallelFor(pool, unseeded.element_count(), 16, [&](int64_t first, int64_t last) {
    cpu::SeedRange(static_cast<uint8_t*>(unseeded.untyped_data()), seeds,
                   static_cast<const Entry*>(gradient.untyped_data()), first * 8, std::min(last * 8, size));
  });
}

ffi::Error SeedSlots(ffi::ThreadPool pool, ffi::AnyBuffer unseeded, ffi::AnyBuffer gradient, ffi::AnyBuffer scales,
                     ffi::AnyBuffer powers, ffi::RemainingArgs slots, ffi::RemainingRets results) {
  std::vector<void*> data;
  for (size_t i = 0; i < slots.size(); ++i) {
    const auto slot = slots.get<ffi::AnyBuffer>(i);
    auto result = results.get<ffi::AnyBuffer>(i + 1);
    if (slot.has_error() || result.has_error() || slot->untyped_data() != (*result)->untyped_data()) {
      return ffi::Error(ffi::ErrorCode::kInternal, "the results of freezeops_seed_slots must be its operands");
    }
    data.push_back(slot->untyped_data());
  }
  // As in every step but those after an unfreezing: no bit is set.
  const uint8_t* const bits = static_cast<const uint8_t*>(unseeded.untyped_data());
  if (cpu::kernels().count_ones(bits, 0, unseeded.element_count() * 8) == 0) return ffi::Error::Success();
  with_float(FloatOf(gradient.element_type()),
             [&](auto type) { Seed<decltype(type)::value>(pool, unseeded, gradient, scales, powers, data); });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kSeed, SeedSlots,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .RemainingArgs()
                           .RemainingRets());
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kSeedCall, "Host", kSeed);

}  // namespace
}  // namespace freezeops

#endif  // FREEZEOPS_HAVE_XLA_CALLS
