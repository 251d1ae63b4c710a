// Helpers of the native kernels that XLA calls on the CPU: XLA's threads, dtypes and errors.

#ifndef FREEZEOPS_OPS_COMMON_XLA_CPU_POOL_H_
#define FREEZEOPS_OPS_COMMON_XLA_CPU_POOL_H_

#include "ops/common/xla_calls.h"

#if defined(FREEZEOPS_HAVE_XLA_CALLS)

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

#include "kernels/common/dtypes.h"
#include "ops/common/checks.h"
#include "xla/ffi/api/ffi.h"

namespace xla {
namespace ffi {
// Declared here: the header that has it includes much more.
const XLA_FFI_Api* GetXlaFfiApi();
}  // namespace ffi
}  // namespace xla

namespace freezeops {

// Runs work(first, last) over parts of [0, count) on the calling thread and on those of the pool that are free, where
// that pays.
inline void ParallelFor(xla::ffi::ThreadPool pool, int64_t count, int64_t cycles_per_unit,
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

// ParallelFor as the kernels' parallel classes take it.
inline auto ParallelForOf(xla::ffi::ThreadPool pool) {
  return [pool](int64_t count, int64_t cycles_per_unit, const std::function<void(int64_t, int64_t)>& work) {
    ParallelFor(pool, count, cycles_per_unit, work);
  };
}

// The dtype is one of the ops' attribute T.
inline Float FloatOf(xla::ffi::DataType type) {
  switch (type) {
    case xla::ffi::DataType::F16:
      return Float::kFloat16;
    case xla::ffi::DataType::BF16:
      return Float::kBfloat16;
    case xla::ffi::DataType::F32:
      return Float::kFloat32;
    default:
      return Float::kFloat64;
  }
}

// The result of a call whose offsets and indices were checked.
inline xla::ffi::Error Checked(bool fits) {
  return fits ? xla::ffi::Error::Success() : xla::ffi::Error(xla::ffi::ErrorCode::kInvalidArgument, kOffsetsMessage);
}

}  // namespace freezeops

#endif  // FREEZEOPS_HAVE_XLA_CALLS

#endif  // FREEZEOPS_OPS_COMMON_XLA_CPU_POOL_H_
