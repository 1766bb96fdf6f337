// Launching of kernels and allocation in workspaces: the host code that all ops share.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

#include "cellvim_cuda.h"
#include "numbers.cuh"

namespace cellvim {

extern __shared__ __align__(16) unsigned char shared_memory[];

template <class N> inline N divide_up(N a, N b) { return (a + b - 1) / b; }
template <class N> inline N clamp(N value, N low, N high) { return value < low ? low : value > high ? high : value; }

// Enqueues a kernel; the grid is one-dimensional.
template <class... P, class... A>
int launch(const cellvim_cuda_call &call, void (*kernel)(P...), int64_t blocks, int threads, size_t shared,
           A... arguments) {
  if (blocks <= 0) return CELLVIM_OK;
  if (blocks > 0x7fffffff) return CELLVIM_BAD_ARGUMENT;
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    if (error != cudaSuccess) return CELLVIM_CUDA_ERROR + (int)error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)blocks);
  config.blockDim = dim3((unsigned)threads);
  config.dynamicSmemBytes = shared;
  config.stream = (cudaStream_t)call.stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? CELLVIM_OK : CELLVIM_CUDA_ERROR + (int)error;
}

inline int zero(const cellvim_cuda_call &call, void *from, int64_t bytes) {
  if (bytes <= 0) return CELLVIM_OK;
  const cudaError_t error = cudaMemsetAsync(from, 0, (size_t)bytes, (cudaStream_t)call.stream);
  return error == cudaSuccess ? CELLVIM_OK : CELLVIM_CUDA_ERROR + (int)error;
}

#define CELLVIM_TRY(call)                            \
  do {                                               \
    const int status_ = (call);                      \
    if (status_ != CELLVIM_OK) return status_;       \
  } while (0)

// Allocates parts of the workspace. With a null base it only adds up sizes, which therefore always match their use.
class Workspace {
 public:
  explicit Workspace(void *base) : base_((char *)base) {}
  template <class N> N *take(int64_t count) {
    const int64_t at = used_;
    used_ += divide_up<int64_t>(count * (int64_t)sizeof(N), 256) * 256;
    return base_ ? (N *)(base_ + at) : nullptr;
  }
  int64_t used() const { return used_; }

 private:
  char *base_;
  int64_t used_ = 0;
};

// Number of multiprocessors of a GPU (132 on an H200), read once.
int multiprocessors(int device);

inline bool is_aligned(const void *p, size_t bytes) { return (uintptr_t)p % bytes == 0; }
inline size_t size_of(int32_t dtype) { return dtype == CELLVIM_FLOAT32 ? 4 : 2; }

// Number of threads per block, with VEC channels each, that leaves few idle in the last chunk.
struct Chunks {
  int threads, count;
};
inline Chunks chunks_of(int64_t width, int most) {
  const int groups = (int)divide_up<int64_t>(width, VEC);
  Chunks best = {32, divide_up(groups, 32)};
  for (int threads = 64; threads <= most; threads += 32) {
    const int count = divide_up(groups, threads);
    if (count * threads <= best.count * best.threads) best = {threads, count};
  }
  return best;
}

}  // namespace cellvim
