// The ops. With `bytes` they only compute the size of their workspace; without, they enqueue their kernels.
#pragma once
#include "cellvim_cuda.h"
#include "numbers.cuh"

namespace cellvim {

int add_norm(const cellvim_add_norm &, bool is_backward, const cellvim_cuda_call &, int64_t *bytes);
int conv_pool(const cellvim_conv_pool &, bool is_backward, const cellvim_cuda_call &, int64_t *bytes);
int pooled_scan(const cellvim_pooled_scan &, bool is_backward, const cellvim_cuda_call &, int64_t *bytes);
int expand_gate(const cellvim_expand_gate &, bool is_backward, const cellvim_cuda_call &, int64_t *bytes);

// Calls run(T{}) for the type of the tokens.
template <class Run> int for_type(int32_t dtype, Run run) {
  switch (dtype) {
    case CELLVIM_FLOAT32: return run(float{});
    case CELLVIM_BFLOAT16: return run(bf16{});
    case CELLVIM_FLOAT16: return run(half{});
  }
  return CELLVIM_BAD_ARGUMENT;
}

}  // namespace cellvim
