// The gradient of SiLU(convolution) in both directions, for the backward passes of conv_pool and expand_gate.
//
// A block processes several runs of the batch's steps for a chunk of channels, so that the gradients of taps and biases
// stay in registers until the end; the results of the blocks are then summed in the order of the blocks. A run is
// extended by REACH steps on either side, whose gradients contribute to the tokens of the run.
#pragma once
#include "conv.cuh"
#include "reduce.cuh"

namespace cellvim {

// Source of the gradient of u.
enum class Adjoint {
  SUM,        // factor * grad[slot]                                       (mean and no pooling)
  MAX,        // grad[slot] if this step is the maximum
  ATTENTION,  // share * grad[slot] + score gradient * score weight
  EXPAND      // D / 2 * gradient before the norm; also accumulates the gradient of D
};

struct AdjointArguments {
  ConvSource conv;
  Plan plan;
  int batch, runs, run_steps, chunks, workers;
  const void *grad;                // (2, B, P, E)
  float factor;                    // SUM: factor on every slot, times slot_weight unless that is null
  const float *slot_weight;        // (samples, P) or null
  const int32_t *best;             // MAX: (2, B, P, E)
  const float *share, *score;      // ATTENTION: (2, B, L)
  const float *row;                // ATTENTION: score weight; EXPAND: D; (2, E)
  const float *mixed;              // EXPAND: (B, stored, E)
  void *grad_x;                    // (B, stored, E)
  float *partial;                  // (workers, ADJOINT_ROWS, E)
};

template <class T, Adjoint MODE, bool WHOLE>
__global__ void __launch_bounds__(64) adjoint_kernel(const __grid_constant__ AdjointArguments a) {
  constexpr int STEPS = 4;
  const int chunk = (int)blockIdx.x % a.chunks, worker = (int)blockIdx.x / a.chunks;
  const int e = (chunk * (int)blockDim.x + (int)threadIdx.x) * VEC, E = a.conv.width, P = a.plan.slots;
  if (e >= E) return;
  const Access access = a.conv.access<WHOLE>(e);
  const Taps taps = load_taps<WHOLE>(a.conv, e);
  Vec row[2], sum_taps[2][TAPS], sum_bias[2], sum_extra[2];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    row[k] = load_row(a.row ? a.row + k * E : nullptr, e, access, 0.0f);
    if (MODE == Adjoint::EXPAND)
#pragma unroll
      for (int i = 0; i < VEC; ++i) row[k][i] *= 0.5f;  // the mean of the directions
    sum_bias[k] = sum_extra[k] = splat(0.0f);
#pragma unroll
    for (int j = 0; j < TAPS; ++j) sum_taps[k][j] = splat(0.0f);
  }

  for (int64_t item = worker; item < (int64_t)a.batch * a.runs; item += a.workers) {
    const int b = (int)(item / a.runs), first = (int)(item % a.runs) * a.run_steps;
    const int last = min(first + a.run_steps, a.plan.steps_of(b));
    if (first >= last) continue;
    const T *x = (const T *)a.conv.x + b * a.conv.x_batch;
    T *out = (T *)a.grad_x + (int64_t)b * a.plan.stored * E + e;
    const float *mixed_of_sample = a.mixed + (int64_t)b * a.plan.stored * E + e;
    Cursor here(a.plan, b, first - REACH), ahead(a.plan, b, first - 2 * REACH);
    Window<T, STEPS, WHOLE> window;
    window.start(x, a.conv, e, ahead);
    Vec grad_x[STEPS + 2 * REACH];  // of the tokens in the window
#pragma unroll
    for (int j = 0; j < STEPS + 2 * REACH; ++j) grad_x[j] = splat(0.0f);

    for (int step = first - REACH; step < last + REACH; step += STEPS) {
      window.turn(x, a.conv, e, ahead);
#pragma unroll
      for (int j = 0; j < 2 * REACH; ++j) grad_x[j] = grad_x[STEPS + j];
#pragma unroll
      for (int j = 2 * REACH; j < STEPS + 2 * REACH; ++j) grad_x[j] = splat(0.0f);
#pragma unroll
      for (int t = 0; t < STEPS; ++t, here.next()) {
        const int s = step + t;
        if (here.exists()) {
          const bool is_own = s >= first && s < last;
          Vec mixed;
          if (MODE == Adjoint::EXPAND)
            mixed = load(row_at(mixed_of_sample, window.token[t + REACH], E * (int)sizeof(float)), access);
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const Vec c = window.conv(taps, k, t);
            const int64_t line = (int64_t)k * a.batch + b;
            const int64_t at = (line * P + here.slot(k)) * E + e;
            Vec grad, share_of_row = row[k];
            float factor = 1.0f, score = 0.0f;
            if (MODE != Adjoint::EXPAND) grad = load((const T *)a.grad + at, access);
            if (MODE == Adjoint::SUM)
              factor = a.slot_weight ? a.factor * a.slot_weight[(int64_t)a.plan.sample(b) * P + here.slot(k)] : a.factor;
            if (MODE == Adjoint::ATTENTION)
              factor = a.share[line * a.plan.length + s], score = a.score[line * a.plan.length + s];
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
              const float sigma = sigmoid<T>(c[i]), u = c[i] * sigma;
              float du;
              if (MODE == Adjoint::EXPAND) {
                du = row[k][i] * mixed[i];
                if (is_own) sum_extra[k][i] = fmaf(mixed[i], u, sum_extra[k][i]);
              } else if (MODE == Adjoint::MAX) {
                const bool wins = i < access.count && a.best[at + i] == s;
                du = wins ? grad[i] : 0.0f;
              } else {
                du = factor * grad[i];
                if (MODE == Adjoint::ATTENTION) {
                  du = fmaf(score, share_of_row[i], du);
                  if (is_own) sum_extra[k][i] = fmaf(score, u, sum_extra[k][i]);
                }
              }
              const float d = du * fmaf(u, 1.0f - sigma, sigma);
#pragma unroll
              for (int j = 0; j < TAPS; ++j) {
                const int at_token = k ? t + 2 * REACH - j : t + j;
                grad_x[at_token][i] = fmaf(taps.w[k][j][i], d, grad_x[at_token][i]);
                if (is_own) sum_taps[k][j][i] = fmaf(d, window.x[at_token][i], sum_taps[k][j][i]);
              }
              if (is_own) sum_bias[k][i] += d;
            }
          }
        }
        if (s - REACH >= first && s - REACH < last)
          store(row_at(out, window.token[t], E * (int)sizeof(T)), grad_x[t], access);
      }
    }
  }

  float *partial = a.partial + (int64_t)worker * ADJOINT_ROWS * E + e;
  const Access plain = {a.conv.whole && access.whole, access.count};
#pragma unroll
  for (int k = 0; k < 2; ++k) {
#pragma unroll
    for (int j = 0; j < TAPS; ++j) store(partial + (k * TAPS + j) * E, sum_taps[k][j], plain);
    store(partial + (2 * TAPS + k) * E, sum_bias[k], plain);
    store(partial + (2 * TAPS + 2 + k) * E, sum_extra[k], plain);
  }
}

// Chooses the size of the grid, and allocates the partial sums in the workspace.
inline int plan_adjoint(AdjointArguments &a, int device, Workspace &workspace) {
  const Chunks chunks = chunks_of(a.conv.width, 64);
  a.chunks = chunks.count;
  const int parts = a.plan.length / 96 > 1 ? a.plan.length / 96 : 1;
  a.run_steps = divide_up(a.plan.length, parts) > 0 ? divide_up(a.plan.length, parts) : 1;
  a.runs = divide_up(a.plan.length, a.run_steps);
  const int64_t items = (int64_t)a.batch * a.runs;
  const int most = divide_up(4 * multiprocessors(device), a.chunks);  // four blocks of 64 threads per multiprocessor
  a.workers = (int)clamp<int64_t>(items, 1, most);
  a.partial = workspace.take<float>((int64_t)a.workers * ADJOINT_ROWS * a.conv.width);
  return chunks.threads;
}

template <class T, Adjoint MODE> int run_adjoint(const AdjointArguments &a, int threads, const cellvim_cuda_call &call) {
  if (a.plan.indexed)
    CELLVIM_TRY(zero(call, a.grad_x, (int64_t)a.batch * a.plan.stored * a.conv.width * (int64_t)sizeof(T)));
  constexpr bool CAN = MODE == Adjoint::SUM || MODE == Adjoint::EXPAND;
  const bool whole = CAN && a.conv.whole;
  return launch(call, whole ? adjoint_kernel<T, MODE, CAN> : adjoint_kernel<T, MODE, false>,
                (int64_t)a.workers * a.chunks, threads, 0, a);
}

}  // namespace cellvim
