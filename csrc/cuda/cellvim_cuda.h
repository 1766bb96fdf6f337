// The C interface of the CUDA kernels: what cellvim/ops/cuda.py calls through ctypes.
//
// The ops take the structs of the CPU's interface, with device pointers in them and nothing to say about threads. A
// call enqueues its kernels on a stream and returns at once: it allocates nothing and waits for nothing, so that it can
// be captured in a CUDA graph. Scratch memory comes from the caller, who asks for its size first.
//
// Indices of a plan lie on the device and are not checked against the sizes: one that is out of range counts as absent.
#pragma once
#include "../cpu/cellvim_cpu.h"

#ifdef __cplusplus
extern "C" {
#pragma GCC visibility push(default)
#endif

#define CELLVIM_CUDA_ABI 1
#define CELLVIM_FLOAT16 2  // beside enum cellvim_dtype; the CPU kernels do not take it

// Beside enum cellvim_status: CELLVIM_CUDA_ERROR + a cudaError_t.
#define CELLVIM_CUDA_ERROR 1000

struct cellvim_cuda_call {
  int32_t device;   // index of the GPU on which all pointers lie
  void *stream;     // cudaStream_t
  void *workspace;  // of cellvim_cuda_*_workspace bytes, 256-byte aligned; null where that is 0
};

int cellvim_cuda_abi(void);
// Number of usable GPUs, or minus a cudaError_t: no driver, a driver that is too old, no device.
int cellvim_cuda_devices(void);
// Compute capability of a GPU, 90 for 9.0, and what a cudaError_t means.
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
