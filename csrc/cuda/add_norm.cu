// add_norm: residual addition and normalisation. A warp holds a row of D in registers, so that each value is read and
// written once. In the backward pass a warp accumulates the gradients of the weights over all of its rows.
#include "norm.cuh"
#include "ops.cuh"

namespace cellvim {
namespace {

constexpr int WARPS = 4;

struct NormArguments {
  int64_t rows;
  int width, kind;
  float eps;
  bool whole;
  const void *hidden;
  const float *residual, *weight, *bias;
  void *normed;
  float *total;
  const void *grad_normed;
  const float *grad_total;
  float *grad_residual;
  void *grad_hidden;
  float *partial;  // (blocks, 2, D)

  // How a lane accesses its c-th vector, and the position of the vector in the row.
  __device__ __forceinline__ int place(int c) const { return (c * 32 + (int)threadIdx.x % 32) * VEC; }
  __device__ __forceinline__ Access access(int e) const { return {whole && e + VEC <= width, min(width - e, VEC)}; }
};

// Rows of up to VECTORS * 128 values.
template <class T, int VECTORS>
__global__ void __launch_bounds__(WARPS * 32) add_norm_kernel(const __grid_constant__ NormArguments a) {
  const int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32, at = row * a.width;
  if (row >= a.rows) return;
  Vec value[VECTORS];
#pragma unroll
  for (int c = 0; c < VECTORS; ++c) {
    const int e = a.place(c);
    value[c] = splat(0.0f);
    if (e >= a.width) continue;
    value[c] = load((const T *)a.hidden + at + e, a.access(e));
    if (a.residual) {
      const Vec r = load(a.residual + at + e, a.access(e));
#pragma unroll
      for (int i = 0; i < VEC; ++i) value[c][i] += r[i];
    }
  }
  Moments m = {0.0f, 1.0f};
  if (a.kind == CELLVIM_NORM_LAYER) {
#pragma unroll
    for (int c = 0; c < VECTORS; ++c) m.mean += (value[c][0] + value[c][1]) + (value[c][2] + value[c][3]);
    m.mean = sum_of_warp(m.mean) / (float)a.width;
  }
  float square = 0.0f;
#pragma unroll
  for (int c = 0; c < VECTORS; ++c)
#pragma unroll
    for (int i = 0; i < VEC; ++i)
      if (a.place(c) + i < a.width) square = fmaf(value[c][i] - m.mean, value[c][i] - m.mean, square);
  m.scale = 1.0f / sqrtf(sum_of_warp(square) / (float)a.width + a.eps);
#pragma unroll
  for (int c = 0; c < VECTORS; ++c) {
    const int e = a.place(c);
    if (e >= a.width) continue;
    store(a.total + at + e, value[c], a.access(e));
    const Vec weight = load_row(a.weight, e, a.access(e), 1.0f), bias = load_row(a.bias, e, a.access(e), 0.0f);
    Vec out;
#pragma unroll
    for (int i = 0; i < VEC; ++i) out[i] = fmaf((value[c][i] - m.mean) * m.scale, weight[i], bias[i]);
    store((T *)a.normed + at + e, out, a.access(e));
  }
}

template <class T, int VECTORS>
__global__ void __launch_bounds__(WARPS * 32) add_norm_backward_kernel(const __grid_constant__ NormArguments a) {
  const int warp = (int)threadIdx.x / 32;
  Vec sum_weight[VECTORS], sum_bias[VECTORS];
#pragma unroll
  for (int c = 0; c < VECTORS; ++c) sum_weight[c] = sum_bias[c] = splat(0.0f);

  for (int64_t row = (int64_t)blockIdx.x * WARPS + warp; row < a.rows; row += (int64_t)gridDim.x * WARPS) {
    const int64_t at = row * a.width;
    Vec value[VECTORS], grad[VECTORS];  // the row, later normalised; the gradient of the normalised row
#pragma unroll
    for (int c = 0; c < VECTORS; ++c) {
      const int e = a.place(c);
      value[c] = grad[c] = splat(0.0f);
      if (e >= a.width) continue;
      value[c] = load((const float *)a.total + at + e, a.access(e));
      if (a.grad_normed) grad[c] = load((const T *)a.grad_normed + at + e, a.access(e));
    }
    Moments m = {0.0f, 1.0f};
    if (a.kind == CELLVIM_NORM_LAYER) {
#pragma unroll
      for (int c = 0; c < VECTORS; ++c) m.mean += (value[c][0] + value[c][1]) + (value[c][2] + value[c][3]);
      m.mean = sum_of_warp(m.mean) / (float)a.width;
    }
    float square = 0.0f;
#pragma unroll
    for (int c = 0; c < VECTORS; ++c)
#pragma unroll
      for (int i = 0; i < VEC; ++i)
        if (a.place(c) + i < a.width) square = fmaf(value[c][i] - m.mean, value[c][i] - m.mean, square);
    m.scale = 1.0f / sqrtf(sum_of_warp(square) / (float)a.width + a.eps);

    float mean = 0.0f, projection = 0.0f;
#pragma unroll
    for (int c = 0; c < VECTORS; ++c) {
      const int e = a.place(c);
      const Vec weight = e < a.width ? load_row(a.weight, e, a.access(e), 0.0f) : splat(0.0f);
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        value[c][i] = (value[c][i] - m.mean) * m.scale;
        sum_weight[c][i] = fmaf(grad[c][i], value[c][i], sum_weight[c][i]);
        sum_bias[c][i] += grad[c][i];
        grad[c][i] *= weight[i];
        mean += grad[c][i];
        projection = fmaf(grad[c][i], value[c][i], projection);
      }
    }
    mean = sum_of_warp(mean) / (float)a.width;
    projection = sum_of_warp(projection) / (float)a.width;
#pragma unroll
    for (int c = 0; c < VECTORS; ++c) {
      const int e = a.place(c);
      if (e >= a.width) continue;
      Vec out = a.grad_total ? load(a.grad_total + at + e, a.access(e)) : splat(0.0f);
#pragma unroll
      for (int i = 0; i < VEC; ++i) out[i] += norm_gradient(grad[c][i], value[c][i], m, mean, projection, a.kind);
      store(a.grad_residual + at + e, out, a.access(e));
      if (a.grad_hidden) store((T *)a.grad_hidden + at + e, out, a.access(e));
    }
  }

  // Sums of the block, in the order of its warps.
  float *shared = reinterpret_cast<float *>(shared_memory);  // (2, D)
  for (int turn = 0; turn < WARPS; ++turn) {
    if (turn == warp)
#pragma unroll
      for (int c = 0; c < VECTORS; ++c)
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          const int e = a.place(c) + i;
          if (e >= a.width) continue;
          shared[e] = turn ? shared[e] + sum_weight[c][i] : sum_weight[c][i];
          shared[a.width + e] = turn ? shared[a.width + e] + sum_bias[c][i] : sum_bias[c][i];
        }
    __syncthreads();
  }
  for (int i = (int)threadIdx.x; i < 2 * a.width; i += WARPS * 32)
    a.partial[(int64_t)blockIdx.x * 2 * a.width + i] = shared[i];
}

// Calls run with the number of vectors of a row per lane.
template <class Run> int for_width(int64_t width, Run run) {
  const int64_t vectors = divide_up<int64_t>(width, 32 * VEC);
  if (vectors <= 2) return run(std::integral_constant<int, 2>{});
  if (vectors <= 3) return run(std::integral_constant<int, 3>{});
  if (vectors <= 6) return run(std::integral_constant<int, 6>{});
  if (vectors <= 10) return run(std::integral_constant<int, 10>{});
  if (vectors <= 32) return run(std::integral_constant<int, 32>{});  // wider than any named model; spills registers
  return CELLVIM_BAD_ARGUMENT;
}

}  // namespace

int add_norm(const cellvim_add_norm &a, bool is_backward, const cellvim_cuda_call &call, int64_t *bytes) {
  NormArguments n = {};
  n.rows = a.rows, n.width = (int)a.width, n.kind = a.kind, n.eps = a.eps;
  n.hidden = a.hidden, n.residual = a.residual, n.weight = a.weight, n.bias = a.bias;
  n.normed = a.normed, n.total = a.total;
  n.grad_normed = a.grad_normed, n.grad_total = a.grad_total;
  n.grad_residual = a.grad_residual, n.grad_hidden = a.grad_hidden;
  const size_t vector = VEC * size_of(a.dtype);
  n.whole = a.width % VEC == 0 && is_aligned(a.hidden, vector) && is_aligned(a.normed, vector) &&
            is_aligned(a.residual, 16) && is_aligned(a.total, 16) && is_aligned(a.grad_normed, vector) &&
            is_aligned(a.grad_total, 16) && is_aligned(a.grad_residual, 16) && is_aligned(a.grad_hidden, vector) &&
            is_aligned(a.weight, 16) && is_aligned(a.bias, 16);
  Workspace workspace(call.workspace);
  const int64_t most = 4 * multiprocessors(call.device), blocks = divide_up<int64_t>(a.rows, WARPS);
  const int64_t workers = clamp<int64_t>(blocks, 1, most);
  if (is_backward) n.partial = workspace.take<float>(workers * 2 * a.width);
  if (bytes) {
    *bytes = workspace.used();
    return CELLVIM_OK;
  }
  if (a.width < 1) return CELLVIM_OK;
  return for_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    return for_width(a.width, [&](auto vectors) {
      constexpr int VECTORS = decltype(vectors)::value;
      if (!is_backward) return launch(call, add_norm_kernel<T, VECTORS>, blocks, WARPS * 32, 0, n);
      CELLVIM_TRY(launch(call, add_norm_backward_kernel<T, VECTORS>, workers, WARPS * 32,
                         2 * a.width * sizeof(float), n));
      // Columns 0 … D − 1 belong to the weight, the others to the bias.
      CELLVIM_TRY(sum_rows(call, n.partial, workers, 2 * a.width, 0, a.width, a.grad_weight));
      return sum_rows(call, n.partial, workers, 2 * a.width, a.width, a.width, a.grad_bias);
    });
  });
}

}  // namespace cellvim
