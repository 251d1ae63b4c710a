// The native kernel that XLA calls on the CPU for a fused update.
//
// Operands of freezeops_fused_update: the attributes as numbers, scalars and scales, then the other inputs of
// FusedUpdate in their order, flat; the results are variables, slots and unseeded.

#include "ops/fused_update/xla_calls.h"

#if defined(FREEZEOPS_HAVE_XLA_CALLS)

#include <string>
#include <vector>

#include "kernels/cpu/parallel_fused.h"
#include "ops/common/xla_cpu_pool.h"
#include "ops/fused_update/cpu_step.h"

namespace freezeops {
namespace {

namespace ffi = ::xla::ffi;

using Buffers = std::vector<ffi::AnyBuffer>;

ffi::Error Misfit(const char* name) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                    std::string(name) + " must fit what it belongs to, as in FusedUpdate outside of XLA");
}

template <typename T>
T* DataOf(const ffi::AnyBuffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

int64_t CountOf(const ffi::AnyBuffer& buffer) { return static_cast<int64_t>(buffer.element_count()); }

// A variable's numbers in the attributes `sparse`, `masked` and `seeded`, or -1.
struct Numbers {
  int sparse, masked, seeded;
};

// Checks the operands of variable i and sets `variable`; `slices` is for a gradient that is some.
ffi::Error ReadVariable(const FusedAttributes& a, const Buffers& buffers, int i, const Numbers& numbers,
                        cpu::FusedVariable* variable, cpu::Slices* slices) {
  const MaskLayout& layout = a.layouts[i];
  cpu::FusedTensor& tensor = variable->tensor;
  tensor.decays = a.decays[i];
  tensor.variable = buffers[a.variable(i)].untyped_data();
  const ffi::AnyBuffer& gradient = buffers[a.gradient(i)];
  if (a.IsGathered(i)) {
    tensor.gathered = gradient.untyped_data();
  } else if (numbers.sparse < 0) {
    tensor.gradient = gradient.untyped_data();
    if (CountOf(gradient) != entries(layout)) return Misfit("gradient");
  } else {
    const ffi::AnyBuffer& rows = buffers[a.rows(numbers.sparse)];
    const int64_t width = CountOf(rows) > 0 ? CountOf(gradient) / CountOf(rows) : 1;
    // Rows out of range are skipped, as XLA does.
    *slices = {gradient.untyped_data(), DataOf<const int64_t>(rows), CountOf(rows), width};
    variable->slices = slices;
  }
  tensor.mask = {&kAllTrainable, layout};
  if (numbers.masked >= 0) {
    const ffi::AnyBuffer& mask = buffers[a.mask(numbers.masked)];
    if (CountOf(mask) != mask_bytes(layout.kept)) return Misfit("mask");
    tensor.mask.bits = DataOf<const uint8_t>(mask);
  }
  int64_t slot_size = entries(layout);
  if (a.compact) {
    const ffi::AnyBuffer& offsets = buffers[a.offsets(i)];
    const ffi::AnyBuffer& indices = buffers[a.indices(i)];
    if (CountOf(offsets) != rank_blocks(layout.kept) + 1) return Misfit("offsets");
    variable->offsets = DataOf<const int64_t>(offsets);
    variable->capacity = CountOf(indices);
    variable->indices = {indices.untyped_data(), indices.element_type() == ffi::DataType::S64};
    slot_size = variable->capacity * layout.inner;
  }
  if (a.IsGathered(i) && CountOf(gradient) != slot_size) return Misfit("gradient");
  for (int j = 0; j < a.rule->slots; ++j) {
    const ffi::AnyBuffer& slot = buffers[a.slot(i, j)];
    if (CountOf(slot) != slot_size) return Misfit("slot");
    tensor.slots[a.rule->slot_positions[j]] = slot.untyped_data();
  }
  if (numbers.seeded >= 0) {
    const ffi::AnyBuffer& unseeded = buffers[a.unseeded(numbers.seeded)];
    tensor.unseeded = DataOf<uint8_t>(unseeded);
    tensor.unseeded_bytes = CountOf(unseeded);
    if (tensor.unseeded_bytes != mask_bytes(slot_size)) return Misfit("unseeded");
  }
  return ffi::Error::Success();
}

// Checks that results are where their operands are.
ffi::Error CheckResults(const FusedAttributes& a, const Buffers& buffers, ffi::RemainingRets results) {
  std::vector<int> written;  // operands, in the order of the results
  for (int i = 0; i < a.count(); ++i) written.push_back(a.variable(i));
  for (int i = a.slot(0, 0); i < a.mask(0); ++i) written.push_back(i);
  for (int i = a.unseeded(0); i < a.scalars(); ++i) written.push_back(i);
  for (size_t i = 0; i < written.size(); ++i) {
    auto result = results.get<ffi::AnyBuffer>(i);
    if (result.has_error() || (*result)->untyped_data() != buffers[written[i]].untyped_data()) {
      return ffi::Error(ffi::ErrorCode::kInternal, "the results of freezeops_fused_update must be its operands");
    }
  }
  return ffi::Error::Success();
}

ffi::Error FusedUpdate(ffi::ThreadPool pool, ffi::AnyBuffer settings, ffi::AnyBuffer scalars, ffi::AnyBuffer scales,
                       ffi::RemainingArgs inputs, ffi::RemainingRets results) {
  const FusedAttributes a = Decoded(DataOf<const int64_t>(settings));
  Buffers buffers;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const auto buffer = inputs.get<ffi::AnyBuffer>(i);
    if (buffer.has_error()) return ffi::Error(ffi::ErrorCode::kInternal, "freezeops_fused_update lacks an operand");
    buffers.push_back(*buffer);
  }
  const std::vector<int> sparse = a.NumberIn(a.sparse), masked = a.NumberIn(a.masked), seeded = a.NumberIn(a.seeded);
  std::vector<cpu::FusedVariable> variables(a.count());
  std::vector<cpu::Slices> slices(a.count());
  for (int i = 0; i < a.count(); ++i) {
    const Numbers numbers{sparse[i], masked[i], seeded[i]};
    ffi::Error error = ReadVariable(a, buffers, i, numbers, &variables[i], &slices[i]);
    if (error.failure()) return error;
  }
  ffi::Error error = CheckResults(a, buffers, results);
  if (error.failure()) return error;
  cpu::ParallelFused parallel(*a.rule, FloatOf(scalars.element_type()), scalars.untyped_data(),
                              SeedsOf(a, DataOf<const double>(scales)), pool.num_threads(), ParallelForOf(pool));
  return Checked(parallel.Update(variables));
}

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
