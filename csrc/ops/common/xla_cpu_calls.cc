// What XLA calls on the CPU: the native kernels, where they beat the HLO of xla_kernels.cc.
//
// XLA fuses a gather into the loop that uses its result, which is then no longer vectorized, and scatters on one
// thread. Seeding as part of the optimizer's loops slows them down; called, it ends where it sees that nothing waits.
//
// Operands of freezeops_gather_trainable: mask, offsets, indices, source [kept, inner]; result [capacity, inner]. Of
// freezeops_gather_two_trainable: a second source, and a second result. Of freezeops_scatter_trainable: destination
// [kept, inner], mask, offsets, indices, compact [capacity, inner]; the result is the destination. Of
// freezeops_seed_slots: unseeded, gradient, scales, powers, slots...; the results are unseeded and the slots. Of
// freezeops_fused_update: the attributes as numbers, scalars and scales, then the other inputs of FusedUpdate in their
// order, flat; the results are variables, slots and unseeded.

#include "ops/common/xla_cpu_calls.h"

#if defined(FREEZEOPS_HAVE_XLA_CALLS)

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>

#include "kernels/common/seed_entry.h"
#include "kernels/cpu/parallel_compact.h"
#include "kernels/cpu/parallel_fused.h"
#include "ops/common/layout_attr.h"
#include "ops/fused_update/attributes.h"
#include "tensorflow/core/framework/numeric_types.h"
#include "xla/ffi/api/ffi.h"

namespace xla {
namespace ffi {
// Declared here: the header that has it includes much more.
const XLA_FFI_Api* GetXlaFfiApi();
}  // namespace ffi
}  // namespace xla

namespace freezeops {
namespace {

namespace ffi = ::xla::ffi;

// Runs work(first, last) over parts of [0, count) on the calling thread and on those of the pool that are free, where
// that pays.
void ParallelFor(ffi::ThreadPool pool, int64_t count, int64_t cycles_per_unit,
                 const std::function<void(int64_t, int64_t)>& work) {
  constexpr int64_t kLeastCycles = 20000;
  const int64_t threads = pool.num_threads();
  const int64_t parts = std::min({4 * threads, count, count * cycles_per_unit / kLeastCycles + 1});
  if (parts <= 1 || threads <= 1) {
    if (count > 0) work(0, count);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t done = 0;  // guarded by mutex
    std::mutex mutex;
    std::condition_variable all_done;
  };
  // A helper may come to run when all is done and this function has returned: then it must touch nothing but this.
  const auto shared = std::make_shared<Shared>();
  const auto run = [shared, parts, count, &work] {
    int64_t mine = 0;
    for (int64_t i = shared->next++; i < parts; i = shared->next++, ++mine) {
      work(i * count / parts, (i + 1) * count / parts);
    }
    if (mine == 0) return;
    std::lock_guard<std::mutex> lock(shared->mutex);
    shared->done += mine;
    if (shared->done == parts) shared->all_done.notify_all();
  };
  for (int64_t i = 0; i < std::min(threads, parts) - 1; ++i) pool.Schedule(std::function<void()>(run));
  run();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->done == parts; });
}

ffi::Error Checked(bool fits) {
  return fits ? ffi::Error::Success() : ffi::Error(ffi::ErrorCode::kInvalidArgument, kOffsetsMessage);
}

// `whole` is [kept, inner] or [kept]; so is `compact`, with the capacity.
TrainableParts PartsOf(ffi::ThreadPool pool, ffi::AnyBuffer whole, ffi::AnyBuffer mask, ffi::AnyBuffer offsets,
                       ffi::AnyBuffer indices) {
  const auto dims = whole.dimensions();
  const MaskView view{static_cast<const uint8_t*>(mask.untyped_data()), {1, dims[0], dims.size() > 1 ? dims[1] : 1}};
  const TrainableIndices positions{indices.untyped_data(), indices.element_type() == ffi::DataType::S64};
  return TrainableParts(view, static_cast<const int64_t*>(offsets.untyped_data()), positions, indices.dimensions()[0],
                        pool.num_threads(),
                        [pool](int64_t count, int64_t cycles, const std::function<void(int64_t, int64_t)>& work) {
                          ParallelFor(pool, count, cycles, work);
                        });
}

int64_t WidthOf(ffi::AnyBuffer buffer) { return buffer.size_bytes() / buffer.element_count(); }

ffi::Error Gather(ffi::ThreadPool pool, ffi::AnyBuffer mask, ffi::AnyBuffer offsets, ffi::AnyBuffer indices,
                  ffi::AnyBuffer source, ffi::Result<ffi::AnyBuffer> compact) {
  const TrainableParts parts = PartsOf(pool, source, mask, offsets, indices);
  return Checked(parts.Gather({compact->untyped_data()}, {source.untyped_data()}, WidthOf(source)));
}

ffi::Error GatherTwo(ffi::ThreadPool pool, ffi::AnyBuffer mask, ffi::AnyBuffer offsets, ffi::AnyBuffer indices,
                     ffi::AnyBuffer first, ffi::AnyBuffer second, ffi::Result<ffi::AnyBuffer> of_first,
                     ffi::Result<ffi::AnyBuffer> of_second) {
  const TrainableParts parts = PartsOf(pool, first, mask, offsets, indices);
  return Checked(parts.Gather({of_first->untyped_data(), of_second->untyped_data()},
                              {first.untyped_data(), second.untyped_data()}, WidthOf(first)));
}

ffi::Error Scatter(ffi::ThreadPool pool, ffi::AnyBuffer destination, ffi::AnyBuffer mask, ffi::AnyBuffer offsets,
                   ffi::AnyBuffer indices, ffi::AnyBuffer compact, ffi::Result<ffi::AnyBuffer> result) {
  if (result->untyped_data() != destination.untyped_data()) {
    return ffi::Error(ffi::ErrorCode::kInternal, "the result of freezeops_scatter_trainable must be its operand");
  }
  const TrainableParts parts = PartsOf(pool, destination, mask, offsets, indices);
  return Checked(parts.Scatter(result->untyped_data(), compact.untyped_data(), WidthOf(compact)));
}

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

FusedType FusedTypeOf(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F16:
      return kFloat16;
    case ffi::DataType::BF16:
      return kBfloat16;
    case ffi::DataType::F32:
      return kFloat32;
    default:
      return kFloat64;
  }
}

ffi::Error FusedUpdate(ffi::ThreadPool pool, ffi::AnyBuffer settings, ffi::AnyBuffer scalars, ffi::AnyBuffer scales,
                       ffi::RemainingArgs inputs, ffi::RemainingRets results) {
  const FusedAttributes a = FusedAttributes::Decoded(static_cast<const int64_t*>(settings.untyped_data()));
  std::vector<ffi::AnyBuffer> buffers;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const auto buffer = inputs.get<ffi::AnyBuffer>(i);
    if (buffer.has_error()) return ffi::Error(ffi::ErrorCode::kInternal, "freezeops_fused_update lacks an operand");
    buffers.push_back(*buffer);
  }
  const auto wrong = [](const char* what) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                      std::string(what) + " must fit what it belongs to, as in FusedUpdate outside of XLA");
  };
  const std::vector<int> sparse = a.NumberIn(a.sparse), masked = a.NumberIn(a.masked), seeded = a.NumberIn(a.seeded);
  static const uint8_t kAll = 0xff;
  std::vector<FusedVariable> variables(a.count());
  std::vector<Slices> slices(a.count());
  std::vector<const void*> written;  // in the order of the results
  for (int i = 0; i < a.count(); ++i) {
    const MaskLayout& layout = a.layouts[i];
    const int64_t size = entries(layout);
    FusedVariable& variable = variables[i];
    FusedTensor& tensor = variable.tensor;
    tensor.decays = a.decays[i];
    tensor.variable = buffers[a.variable(i)].untyped_data();
    const ffi::AnyBuffer& gradient = buffers[a.gradient(i)];
    const int64_t count = gradient.element_count();
    if (sparse[i] < 0) {
      tensor.gradient = gradient.untyped_data();
      if (count != size) return wrong("gradient");
    } else {
      const ffi::AnyBuffer& rows = buffers[a.rows(sparse[i])];
      const int64_t named = rows.element_count();
      const int64_t width = named > 0 ? count / named : 1;
      // Rows out of range are passed over, as XLA does.
      slices[i] = {gradient.untyped_data(), static_cast<const int64_t*>(rows.untyped_data()), named, width};
      variable.slices = &slices[i];
    }
    tensor.mask = {&kAll, layout};
    if (masked[i] >= 0) {
      const ffi::AnyBuffer& mask = buffers[a.mask(masked[i])];
      if (static_cast<int64_t>(mask.element_count()) != mask_bytes(layout.kept)) return wrong("mask");
      tensor.mask.bits = static_cast<const uint8_t*>(mask.untyped_data());
    }
    int64_t slot_size = size;
    if (a.compact) {
      const ffi::AnyBuffer& offsets = buffers[a.offsets(i)];
      const ffi::AnyBuffer& indices = buffers[a.indices(i)];
      if (static_cast<int64_t>(offsets.element_count()) != rank_blocks(layout.kept) + 1) return wrong("offsets");
      variable.offsets = static_cast<const int64_t*>(offsets.untyped_data());
      variable.capacity = indices.element_count();
      variable.indices = {indices.untyped_data(), indices.element_type() == ffi::DataType::S64};
      slot_size = variable.capacity * layout.inner;
    }
    for (int j = 0; j < a.rule->slots; ++j) {
      const ffi::AnyBuffer& slot = buffers[a.slot(i, j)];
      if (static_cast<int64_t>(slot.element_count()) != slot_size) return wrong("slot");
      tensor.slots[a.rule->places[j]] = slot.untyped_data();
    }
    if (seeded[i] >= 0) {
      const ffi::AnyBuffer& unseeded = buffers[a.unseeded(seeded[i])];
      tensor.unseeded = static_cast<uint8_t*>(unseeded.untyped_data());
      tensor.unseeded_bytes = unseeded.element_count();
      if (tensor.unseeded_bytes != mask_bytes(slot_size)) return wrong("unseeded");
    }
  }
  for (int i = 0; i < a.count(); ++i) written.push_back(buffers[a.variable(i)].untyped_data());
  for (int i = a.slot(0, 0); i < a.mask(0); ++i) written.push_back(buffers[i].untyped_data());
  for (int i = a.unseeded(0); i < a.scalars(); ++i) written.push_back(buffers[i].untyped_data());
  for (size_t i = 0; i < written.size(); ++i) {
    auto result = results.get<ffi::AnyBuffer>(i);
    if (result.has_error() || (*result)->untyped_data() != written[i]) {
      return ffi::Error(ffi::ErrorCode::kInternal, "the results of freezeops_fused_update must be its operands");
    }
  }
  FusedParts parts(*a.rule, FusedTypeOf(scalars.element_type()), scalars.untyped_data(),
                   a.SeedsWith(static_cast<const double*>(scales.untyped_data())), pool.num_threads(),
                   [pool](int64_t count, int64_t cycles, const std::function<void(int64_t, int64_t)>& work) {
                     ParallelFor(pool, count, cycles, work);
                   });
  return Checked(parts.Update(variables));
}

auto Bind() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>();
}

XLA_FFI_DEFINE_HANDLER(kGather, Gather, Bind().Ret<ffi::AnyBuffer>());
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kGatherCall, "Host", kGather);

XLA_FFI_DEFINE_HANDLER(kGatherTwo, GatherTwo, Bind().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kGatherTwoCall, "Host", kGatherTwo);

XLA_FFI_DEFINE_HANDLER(kScatter, Scatter, Bind().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kScatterCall, "Host", kScatter);

XLA_FFI_DEFINE_HANDLER(kSeed, SeedSlots, Bind().RemainingArgs().RemainingRets());
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kSeedCall, "Host", kSeed);

XLA_FFI_DEFINE_HANDLER(kFused, FusedUpdate,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .RemainingArgs()
                           .RemainingRets());
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kFusedCall, "Host", kFused);

}  // namespace
}  // namespace freezeops

#endif  // FREEZEOPS_HAVE_XLA_CALLS
