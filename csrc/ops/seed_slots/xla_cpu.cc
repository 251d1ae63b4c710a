// What XLA calls on the CPU to seed slots: as part of the optimizer's loops seeding slows them down; called, it ends
// where it sees that nothing waits.
//
// Operands of freezeops_seed_slots: unseeded, gradient, scales, powers, slots...; the results are unseeded and the
// slots.

#include "ops/seed_slots/xla_calls.h"

#if defined(FREEZEOPS_HAVE_XLA_CALLS)

#include <algorithm>
#include <vector>

#include "kernels/common/seed_entry.h"
#include "kernels/cpu/kernels.h"
#include "ops/common/xla_cpu_pool.h"
#include "tensorflow/core/framework/numeric_types.h"

namespace freezeops {
namespace {

namespace ffi = ::xla::ffi;

template <typename T, typename Acc>
void Seed(ffi::ThreadPool pool, ffi::AnyBuffer unseeded, ffi::AnyBuffer gradient, ffi::AnyBuffer scales,
          ffi::AnyBuffer powers, const std::vector<void*>& slots) {
  std::vector<SlotSeed<T, Acc>> seeds;
  for (size_t i = 0; i < slots.size(); ++i) {
    seeds.push_back({static_cast<T*>(slots[i]), static_cast<Acc>(static_cast<double*>(scales.untyped_data())[i]),
                     static_cast<int>(static_cast<int64_t*>(powers.untyped_data())[i])});
  }
  const int64_t size = gradient.element_count();
  ParallelFor(pool, unseeded.element_count(), 16, [&](int64_t first, int64_t last) {
    SeedRange(static_cast<uint8_t*>(unseeded.untyped_data()), seeds.data(), static_cast<int>(seeds.size()),
              static_cast<const T*>(gradient.untyped_data()), first * 8, std::min(last * 8, size));
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
  if (cpu_kernels().count_ones(bits, 0, unseeded.element_count() * 8) == 0) return ffi::Error::Success();
  switch (gradient.element_type()) {
    case ffi::DataType::F16:
      Seed<Eigen::half, float>(pool, unseeded, gradient, scales, powers, data);
      break;
    case ffi::DataType::BF16:
      Seed<Eigen::bfloat16, float>(pool, unseeded, gradient, scales, powers, data);
      break;
    case ffi::DataType::F32:
      Seed<float, float>(pool, unseeded, gradient, scales, powers, data);
      break;
    default:
      Seed<double, double>(pool, unseeded, gradient, scales, powers, data);
  }
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
