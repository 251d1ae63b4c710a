// Calls of CUDA's runtime. cudaDeviceProp is not used: that struct differs between versions of CUDA and is misread in
// silence where the header and the library do not agree.

#include <cuda_runtime_api.h>

#include "kernels/cuda/kernels.h"

namespace freezeops {
namespace cuda {

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

int copy_bytes(void* destination, const void* source, int64_t bytes, Stream stream) {
  if (bytes == 0) return 0;
  const cudaError_t error =
      cudaMemcpyAsync(destination, source, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream);
  if (error != cudaSuccess) cudaGetLastError();  // so that the next launch does not report it again
  return error;
}

}  // namespace cuda
}  // namespace freezeops
