// The C interface: version, devices and ops.
#include "launch.cuh"
#include "ops.cuh"

namespace cellvim {

int multiprocessors(int device) {
  constexpr int MOST = 64;
  static int known[MOST];
  if (device < 0 || device >= MOST) return 1;
  if (!known[device]) {
    int count = 0;
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess || count < 1) return 1;
    known[device] = count;
  }
  return known[device];
}

namespace {

// The caller's device is current while an op runs.
template <class Op> int on_device(const cellvim_cuda_call *call, Op op) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess && before != call->device) error = cudaSetDevice(call->device);
  if (error != cudaSuccess) return CELLVIM_CUDA_ERROR + (int)error;
  const int status = op();
  if (before != call->device) cudaSetDevice(before);
  return status;
}

}  // namespace
}  // namespace cellvim

#define CELLVIM_OP(name)                                                                                           \
  int64_t cellvim_cuda_##name##_workspace(const cellvim_##name *a, int is_backward, int device) {                  \
    cellvim_cuda_call call = {};                                                                                   \
    call.device = device;                                                                                          \
    int64_t bytes = 0;                                                                                             \
    const int status = cellvim::name(*a, is_backward != 0, call, &bytes);                                          \
    return status == CELLVIM_OK ? bytes : -status;                                                                 \
  }                                                                                                                \
  int cellvim_cuda_##name(const cellvim_##name *a, const cellvim_cuda_call *call) {                                \
    return cellvim::on_device(call, [&] { return cellvim::name(*a, false, *call, nullptr); });                     \
  }                                                                                                                \
  int cellvim_cuda_##name##_backward(const cellvim_##name *a, const cellvim_cuda_call *call) {                     \
    return cellvim::on_device(call, [&] { return cellvim::name(*a, true, *call, nullptr); });                      \
  }

extern "C" {

int cellvim_cuda_abi(void) { return CELLVIM_CUDA_ABI; }

int cellvim_cuda_devices(void) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return error == cudaSuccess ? count : -(int)error;
}

int cellvim_cuda_capability(int device) {
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
    return 0;
  return 10 * major + minor;
}

const char *cellvim_cuda_error_name(int error) { return cudaGetErrorString((cudaError_t)error); }

CELLVIM_OP(add_norm)
CELLVIM_OP(conv_pool)
CELLVIM_OP(pooled_scan)
CELLVIM_OP(expand_gate)

}  // extern "C"
