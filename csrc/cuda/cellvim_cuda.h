// The C interface of the CUDA kernels, which cellvim/ops/cuda.py calls through ctypes.
//
// The ops take the structs of the CPU interface with device pointers; the number of threads is ignored. A call enqueues
// its kernels on a stream and returns immediately. It neither allocates nor synchronises, so that it can be captured in
// a CUDA graph. The caller queries the size of the scratch memory and provides it.
//
// The indices of a plan are on the device and are not validated: an index out of range is treated as missing.
#pragma once
#include "../cpu/cellvim_cpu.h"

#ifdef __cplusplus
extern "C" {
#pragma GCC visibility push(default)
#endif

#define CELLVIM_CUDA_ABI 1
#define CELLVIM_FLOAT16 2  // extends enum cellvim_dtype; not supported by the CPU kernels

// Extends enum cellvim_status: CELLVIM_CUDA_ERROR + a cudaError_t.
#define CELLVIM_CUDA_ERROR 1000

struct cellvim_cuda_call {
  int32_t device;   // index of the GPU of all pointers
  void *stream;     // cudaStream_t
  void *workspace;  // of cellvim_cuda_*_workspace bytes, 256-byte aligned; null if that is 0
};

int cellvim_cuda_abi(void);
// Number of usable GPUs, or a negated cudaError_t: no driver, a driver that is too old, no device.
int cellvim_cuda_devices(void);
// Compute capability of a GPU (90 for 9.0), and the name of a cudaError_t.
int cellvim_cuda_capability(int device);
const char *cellvim_cuda_error_name(int error);

int64_t cellvim_cuda_add_norm_workspace(const struct cellvim_add_norm *, int is_backward, int device);
int64_t cellvim_cuda_conv_pool_workspace(const struct cellvim_conv_pool *, int is_backward, int device);
int64_t cellvim_cuda_pooled_scan_workspace(const struct cellvim_pooled_scan *, int is_backward, int device);
int64_t cellvim_cuda_expand_gate_workspace(const struct cellvim_expand_gate *, int is_backward, int device);

int cellvim_cuda_add_norm(const struct cellvim_add_norm *, const struct cellvim_cuda_call *);
int cellvim_cuda_add_norm_backward(const struct cellvim_add_norm *, const struct cellvim_cuda_call *);
int cellvim_cuda_conv_pool(const struct cellvim_conv_pool *, const struct cellvim_cuda_call *);
int cellvim_cuda_conv_pool_backward(const struct cellvim_conv_pool *, const struct cellvim_cuda_call *);
int cellvim_cuda_pooled_scan(const struct cellvim_pooled_scan *, const struct cellvim_cuda_call *);
int cellvim_cuda_pooled_scan_backward(const struct cellvim_pooled_scan *, const struct cellvim_cuda_call *);
int cellvim_cuda_expand_gate(const struct cellvim_expand_gate *, const struct cellvim_cuda_call *);
int cellvim_cuda_expand_gate_backward(const struct cellvim_expand_gate *, const struct cellvim_cuda_call *);

#ifdef __cplusplus
#pragma GCC visibility pop
}
#endif
