// Sums in a fixed order: over the lanes of a warp, and over the partial results of blocks.
#pragma once
#include "launch.cuh"

namespace cellvim {

constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(ALL_LANES, value, lane);
  return value;
}

// out[i] = sum over s of partial[s][from + i], i < columns, of rows `stride` apart; nothing is done if `out` is null.
int sum_rows(const cellvim_cuda_call &call, const float *partial, int64_t count, int64_t stride, int64_t from,
             int64_t columns, float *out);

// Four weights of a row, or `otherwise` if there is no row.
__device__ __forceinline__ Vec load_row(const float *row, int e, Access access, float otherwise) {
  if (row && access.whole) return load(row + e, access);
  Vec v = splat(otherwise);
  if (row)
#pragma unroll
    for (int i = 0; i < VEC; ++i)
      if (i < access.count) v[i] = row[e + i];
  return v;
}

// Partial sums of a convolution's gradients, (count, ADJOINT_ROWS, E) -> grad_weight (2, E, taps), grad_bias (2, E) and
// grad_extra (2, E), each of which may be null.
constexpr int ADJOINT_ROWS = 2 * 4 + 4;
int sum_adjoint(const cellvim_cuda_call &call, const float *partial, int64_t count, int64_t width, int64_t taps,
                float extra_factor, float *grad_weight, float *grad_bias, float *grad_extra);

}  // namespace cellvim
