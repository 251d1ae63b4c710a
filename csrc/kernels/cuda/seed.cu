// Launchers of the kernels that seed slots. Compiled without fused multiply-add, so that values are the CPU's.

#include "kernels/common/float16.h"
#include "kernels/cuda/seed_bodies.h"

namespace freezeops {
namespace cuda {
namespace {

template <typename T, typename Acc>
int seed(const SeedArguments& arguments, Stream stream) {
  const SeedTarget<T, Acc> target{arguments};
  if (arguments.indices == nullptr) return launch(SeedDense<T, Acc>{target}, stream);
  return arguments.row_size == 0 ? 0 : launch(SeedSlices<T, Acc>{target}, stream);
}

}  // namespace

int seed_slots(Float type, const SeedArguments& arguments, Stream stream) {
  switch (type) {
    case Float::kHalf:
      return seed<Half, float>(arguments, stream);
    case Float::kBfloat16:
      return seed<Bfloat16, float>(arguments, stream);
    case Float::kFloat:
      return seed<float, float>(arguments, stream);
    default:
      return seed<double, double>(arguments, stream);
  }
}

}  // namespace cuda
}  // namespace freezeops
