// Launchers of the kernels that seed slots. Compiled without fused multiply-add, so that values are the CPU's.

#include "kernels/cuda/seed_bodies.h"

namespace freezeops {
namespace cuda {

int seed_slots(Float type, const SeedArguments& arguments, Stream stream) {
  return with_float(type, [&](auto constant) {
    constexpr Float kType = decltype(constant)::value;
    const SeedTarget<kType> target{arguments};
    if (arguments.indices == nullptr) return launch(SeedDense<kType>{target}, stream);
    return arguments.row_size == 0 ? 0 : launch(SeedSlices<kType>{target}, stream);
  });
}

}  // namespace cuda
}  // namespace freezeops
