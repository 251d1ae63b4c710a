// The native kernel that XLA calls on the CPU for SampledMatmul.
//
// Operands of freezeops_sampled_matmul: x, dy, visits; results [capacity], and floats that nobody reads, to work in.

#include "ops/sampled_matmul/xla_calls.h"

#if defined(FREEZEOPS_HAVE_XLA_CALLS)

#include "kernels/cpu/sampled_matmul.h"
#include "ops/common/xla_cpu_pool.h"

namespace freezeops {
namespace {

namespace ffi = ::xla::ffi;

ffi::Error SampledMatmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer dy, ffi::AnyBuffer visits,
                         ffi::Result<ffi::AnyBuffer> compact, ffi::Result<ffi::AnyBuffer> scratch) {
  const auto room = [&](int64_t floats) {
    return floats <= static_cast<int64_t>(scratch->element_count()) ? static_cast<float*>(scratch->untyped_data())
                                                                    : nullptr;
  };
  cpu::SampledMatmul product(FloatOf(x.element_type()), x.untyped_data(), dy.untyped_data(), x.dimensions()[0],
                             x.dimensions()[1], dy.dimensions()[1], pool.num_threads(), ParallelForOf(pool), room);
  const cpu::SampledResult result =
      product.Run(static_cast<const int32_t*>(visits.untyped_data()), visits.element_count(), compact->untyped_data(),
                  compact->element_count());
  switch (result) {
    case cpu::SampledResult::kNotThePlan:
      return ffi::Error(ffi::ErrorCode::kInvalidArgument, cpu::kVisitsMessage);
    case cpu::SampledResult::kNoMemory:
      return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory to transpose x and dy in");
    default:
      return ffi::Error::Success();
  }
}

XLA_FFI_DEFINE_HANDLER(kSampledMatmul, SampledMatmul,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>());
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kSampledMatmulCall, "Host", kSampledMatmul);

}  // namespace
}  // namespace freezeops

#endif  // FREEZEOPS_HAVE_XLA_CALLS
