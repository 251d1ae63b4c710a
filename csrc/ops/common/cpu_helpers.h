// Helpers of the CPU OpKernels: work divided among threads, buffers of variables.

#ifndef FREEZEOPS_OPS_COMMON_CPU_HELPERS_H_
#define FREEZEOPS_OPS_COMMON_CPU_HELPERS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>

#include "kernels/cpu/kernels.h"
#include "ops/common/op_kernels.h"
#include "ops/common/tf_compat.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/util/work_sharder.h"

namespace freezeops {

// Tensors larger than this are taken to be in memory, not in the cache.
constexpr int64_t kBeyondCacheBytes = int64_t{32} << 20;

inline cpu::Residence ResidenceOf(int64_t bytes) {
  return bytes > kBeyondCacheBytes ? cpu::Residence::kMemory : cpu::Residence::kCache;
}

// Pointer arithmetic in entries of `width` bytes.
inline char* At(void* data, int64_t entry, int64_t width) { return static_cast<char*>(data) + entry * width; }
inline const char* At(const void* data, int64_t entry, int64_t width) {
  return static_cast<const char*>(data) + entry * width;
}

// Runs work(first, last) over parts of [0, count), in parallel where that pays.
inline void ParallelFor(tensorflow::OpKernelContext* ctx, int64_t count, int64_t cycles_per_unit,
                        const std::function<void(int64_t, int64_t)>& work) {
  const auto& workers = *ctx->device()->tensorflow_cpu_worker_threads();
  tensorflow::Shard(workers.num_threads, workers.workers, count, cycles_per_unit, work);
}

// ParallelFor as the kernels' parallel classes take it.
inline auto ParallelForOf(tensorflow::OpKernelContext* ctx) {
  return [ctx](int64_t count, int64_t cycles_per_unit, const std::function<void(int64_t, int64_t)>& work) {
    ParallelFor(ctx, count, cycles_per_unit, work);
  };
}

// Runs work(begin, end) over ranges of the `count` entries. Ranges begin at multiples of 64 entries, so that no two
// threads share a mask word or (in aligned tensors) a cache line.
inline void ParallelForEntries(tensorflow::OpKernelContext* ctx, int64_t count, int64_t width,
                               const std::function<void(int64_t, int64_t)>& work) {
  const int64_t words = count / 64 + (count % 64 != 0);
  // About 8 bytes a cycle.
  ParallelFor(ctx, words, 64 * width / 8,
              [&](int64_t first, int64_t last) { work(first * 64, std::min(last * 64, count)); });
}

// Gives a variable's value a buffer of its own, where a read shares it: in copy-on-read mode no read does, otherwise
// one that does must not see what is written. The variable's lock is held.
inline absl::Status Unshare(tensorflow::OpKernelContext* ctx, tensorflow::Tensor* value) {
  if (value->RefCountIsOne()) return absl::OkStatus();
  tensorflow::AllocatorAttributes attributes;
  attributes.set_gpu_compatible(true);
  attributes.set_nic_compatible(true);
  tensorflow::Tensor copy;
  TF_RETURN_IF_ERROR(ctx->allocate_temp(value->dtype(), value->shape(), &copy, attributes));
  const int64_t width = tensorflow::DataTypeSize(value->dtype());
  const void* from = value->data();
  void* to = copy.data();
  ParallelForEntries(ctx, value->NumElements(), width, [&](int64_t begin, int64_t end) {
    std::memcpy(At(to, begin, width), At(from, begin, width), (end - begin) * width);
  });
  *value = copy;
  return absl::OkStatus();
}

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_COMMON_CPU_HELPERS_H_
