// The native kernels that XLA calls on the CPU to gather and to scatter trainable entries.
//
// XLA fuses a gather into the loop that uses its result, which is then no longer vectorized, and scatters on one
// thread.
//
// Operands of freezeops_gather_trainable: mask, offsets, indices, source [kept, inner]; result [capacity, inner]. Of
// freezeops_gather_two_trainable: a second source, and a second result. Of freezeops_scatter_trainable: destination
// [kept, inner], mask, offsets, indices, compact [capacity, inner]; the result is the destination.

#include "ops/trainable_entries/xla_calls.h"

#if defined(FREEZEOPS_HAVE_XLA_CALLS)

#include "kernels/cpu/parallel_compact.h"
#include "ops/common/layout_attr.h"
#include "ops/common/xla_cpu_pool.h"

namespace freezeops {
namespace {

namespace ffi = ::xla::ffi;

// `whole` is [kept, inner] or [kept]; so is `compact`, with the capacity.
cpu::ParallelCompact ShardsOf(ffi::ThreadPool pool, ffi::AnyBuffer whole, ffi::AnyBuffer mask, ffi::AnyBuffer offsets,
                              ffi::AnyBuffer indices) {
  const auto dims = whole.dimensions();
  const MaskView view{static_cast<const uint8_t*>(mask.untyped_data()), {1, dims[0], dims.size() > 1 ? dims[1] : 1}};
  const cpu::TrainableIndices positions{indices.untyped_data(), indices.element_type() == ffi::DataType::S64};
  return cpu::ParallelCompact(view, static_cast<const int64_t*>(offsets.untyped_data()), positions,
                              indices.dimensions()[0], pool.num_threads(), ParallelForOf(pool));
}

int64_t WidthOf(ffi::AnyBuffer buffer) { return buffer.size_bytes() / buffer.element_count(); }

ffi::Error Gather(ffi::ThreadPool pool, ffi::AnyBuffer mask, ffi::AnyBuffer offsets, ffi::AnyBuffer indices,
                  ffi::AnyBuffer source, ffi::Result<ffi::AnyBuffer> compact) {
  const cpu::ParallelCompact shards = ShardsOf(pool, source, mask, offsets, indices);
  return Checked(shards.Gather({compact->untyped_data()}, {source.untyped_data()}, WidthOf(source)));
}

ffi::Error GatherTwo(ffi::ThreadPool pool, ffi::AnyBuffer mask, ffi::AnyBuffer offsets, ffi::AnyBuffer indices,
                     ffi::AnyBuffer first, ffi::AnyBuffer second, ffi::Result<ffi::AnyBuffer> of_first,
                     ffi::Result<ffi::AnyBuffer> of_second) {
  const cpu::ParallelCompact shards = ShardsOf(pool, first, mask, offsets, indices);
  return Checked(shards.Gather({of_first->untyped_data(), of_second->untyped_data()},
                               {first.untyped_data(), second.untyped_data()}, WidthOf(first)));
}

ffi::Error Scatter(ffi::ThreadPool pool, ffi::AnyBuffer destination, ffi::AnyBuffer mask, ffi::AnyBuffer offsets,
                   ffi::AnyBuffer indices, ffi::AnyBuffer compact, ffi::Result<ffi::AnyBuffer> result) {
  if (result->untyped_data() != destination.untyped_data()) {
    return ffi::Error(ffi::ErrorCode::kInternal, "the result of freezeops_scatter_trainable must be its operand");
  }
  const cpu::ParallelCompact shards = ShardsOf(pool, destination, mask, offsets, indices);
  return Checked(shards.Scatter(result->untyped_data(), compact.untyped_data(), WidthOf(compact)));
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

}  // namespace
}  // namespace freezeops

#endif  // FREEZEOPS_HAVE_XLA_CALLS
