// The second stage of sums over blocks.
#include "reduce.cuh"

namespace cellvim {
namespace {

constexpr int COLUMNS = 32, ROWS = 8;

// A block sums COLUMNS columns; each thread adds every ROWS-th partial result. Only the first COLUMNS threads of the block
// get the total.
__device__ __forceinline__ float sum_column(const float *partial, int64_t count, int64_t stride, bool exists) {
  float *scratch = reinterpret_cast<float *>(shared_memory);  // ROWS * COLUMNS
  float total = 0.0f;
  if (exists)
#pragma unroll 8
    for (int64_t s = threadIdx.x / COLUMNS; s < count; s += ROWS) total += partial[s * stride];
  scratch[threadIdx.x] = total;
  __syncthreads();
  total = 0.0f;
  for (int r = 0; r < ROWS; ++r) total += scratch[r * COLUMNS + (int)threadIdx.x % COLUMNS];
  return total;
}

__global__ void __launch_bounds__(COLUMNS *ROWS)
    sum_kernel(const float *partial, int64_t count, int64_t stride, int64_t columns, float *out) {
  const int64_t column = (int64_t)blockIdx.x * COLUMNS + threadIdx.x % COLUMNS;
  const float total = sum_column(partial + column, count, stride, column < columns);
  if (threadIdx.x < COLUMNS && column < columns) out[column] = total;
}

__global__ void __launch_bounds__(COLUMNS *ROWS)
    sum_adjoint_kernel(const float *partial, int64_t count, int width, int taps, float extra_factor, float *grad_weight,
                       float *grad_bias, float *grad_extra) {
  const int64_t columns = (int64_t)ADJOINT_ROWS * width, column = (int64_t)blockIdx.x * COLUMNS + threadIdx.x % COLUMNS;
  const float total = sum_column(partial + column, count, columns, column < columns);
  if (threadIdx.x >= COLUMNS || column >= columns) return;
  const int row = (int)(column / width), e = (int)(column % width);
  if (row < 8) {
    const int tap = row % 4 - (4 - taps);
    if (tap >= 0 && grad_weight) grad_weight[((int64_t)(row / 4) * width + e) * taps + tap] = total;
  } else if (row < 10) {
    if (grad_bias) grad_bias[(row - 8) * width + e] = total;
  } else if (grad_extra) {
    grad_extra[(row - 10) * width + e] = extra_factor * total;
  }
}

}  // namespace

int sum_rows(const cellvim_cuda_call &call, const float *partial, int64_t count, int64_t stride, int64_t from,
             int64_t columns, float *out) {
  if (!out) return CELLVIM_OK;
  return launch(call, sum_kernel, divide_up<int64_t>(columns, COLUMNS), COLUMNS * ROWS, COLUMNS * ROWS * sizeof(float),
                partial + from, count, stride, columns, out);
}

int sum_adjoint(const cellvim_cuda_call &call, const float *partial, int64_t count, int64_t width, int64_t taps,
                float extra_factor, float *grad_weight, float *grad_bias, float *grad_extra) {
  return launch(call, sum_adjoint_kernel, divide_up<int64_t>(ADJOINT_ROWS * width, COLUMNS), COLUMNS * ROWS,
                COLUMNS * ROWS * sizeof(float), partial, count, (int)width, (int)taps, extra_factor, grad_weight,
                grad_bias, grad_extra);
}

}  // namespace cellvim
