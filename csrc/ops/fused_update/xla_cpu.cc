// What XLA calls on the CPU for a fused update.
//
// Operands of freezeops_fused_update: the attributes as numbers, scalars and scales, then the other inputs of
// FusedUpdate in their order, flat; the results are variables, slots and unseeded.

#include "ops/fused_update/xla_calls.h"

#if defined(FREEZEOPS_HAVE_XLA_CALLS)

#include <functional>
#include <string>
#include <vector>

#include "kernels/cpu/parallel_fused.h"
#include "ops/common/xla_cpu_pool.h"
#include "ops/fused_update/attributes.h"

namespace freezeops {
namespace {

namespace ffi = ::xla::ffi;

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
