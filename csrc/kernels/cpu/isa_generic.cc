// The kernels for any processor.

#include "kernels/common/vectors_scalar.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/words_generic.h"

namespace freezeops {
namespace cpu {
namespace {

struct Generic {
  template <typename U>
  using Words = GenericWords<U>;
  template <Float kType>
  using Vector = Single<kType>;

  static constexpr bool kStreams = false;
  static void stream_zero_line(char*) {}
  static void stream_fence() {}
};

}  // namespace

constexpr KernelTable kGenericKernels = kernel_table<Generic>("generic");

}  // namespace cpu
}  // namespace freezeops
