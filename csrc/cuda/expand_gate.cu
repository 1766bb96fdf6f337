// expand_gate: expand the scanned steps to the tokens, add the skip, average the directions, normalise and gate.
//
// A block processes a run of steps with all E channels. It alternates between two phases: each thread mixes a few steps
// of four channels into shared memory (the convolution is recomputed from x), then each warp normalises a step over E and
// gates it. x, z and the scanned sequences are read once and the result is written once; there is no other traffic.
#include "conv_adjoint.cuh"
#include "norm.cuh"
#include "ops.cuh"

namespace cellvim {
namespace {

constexpr int STEPS = 4;  // per window

struct GateArguments {
  ConvSource conv;
  Plan plan;
  int batch, norm, runs, run_steps, tile;  // tile: steps in shared memory, a multiple of STEPS
  float eps;
  const void *z, *y;
  int64_t z_batch;
  int z_token;
  const float *skip, *norm_weight, *norm_bias;
  void *out;                               // (B, stored, E)
  const void *grad_out;
  void *grad_z;
  float *mixed;                            // (B, stored, E): gradient before the norm
  float *partial;                          // (blocks, 2, E): gradients of the norm's weight and bias, null without a norm
};

// Mixes `tile` steps starting at `step` into `rows` (tile, E): the mean over the directions of expand(y) + D * u.
template <class T, bool SKIP, bool WHOLE, class Here, class Ahead>
__device__ __forceinline__ void mix_tile(const GateArguments &a, const Taps &taps, const Vec (&skip)[2], int e, int b,
                                         Here &here, Ahead &ahead, Window<T, STEPS, WHOLE> &window, int steps,
                                         float *rows) {
  const Access access = a.conv.access<WHOLE>(e);
  const T *x = (const T *)a.conv.x + b * a.conv.x_batch;
  const int E = a.conv.width, row = E * (int)sizeof(T);
  const T *y_of_sample[2];
  for (int k = 0; k < 2; ++k) y_of_sample[k] = (const T *)a.y + ((int64_t)k * a.batch + b) * a.plan.slots * E + e;
  for (int first = 0; first < steps; first += STEPS) {
    Raw<T> y[STEPS][2];
    bool exists[STEPS];  // tokens that no step visits are zero
#pragma unroll
    for (int t = 0; t < STEPS; ++t, here.next())
      if ((exists[t] = here.exists()))
#pragma unroll
        for (int k = 0; k < 2; ++k) y[t][k] = load_raw(row_at(y_of_sample[k], here.slot(k), row), access);
    if (SKIP) window.turn(x, a.conv, e, ahead);
#pragma unroll
    for (int t = 0; t < STEPS; ++t) {
      const Vec y0 = unpack(y[t][0]), y1 = unpack(y[t][1]);
      Vec mixed;
#pragma unroll
      for (int i = 0; i < VEC; ++i) mixed[i] = 0.5f * (y0[i] + y1[i]);
      if (SKIP && exists[t])
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const Vec u = silu_of_scaled<T>(window.conv(taps, k, t));
#pragma unroll
          for (int i = 0; i < VEC; ++i) mixed[i] = fmaf(skip[k][i], u[i], mixed[i]);
        }
      store(rows + (first + t) * E + e, mixed, access);
    }
  }
}

// Access of a lane to a step's row in shared memory: its i-th value of `count`.
template <bool WHOLE> struct RowOfLane {
  const float *row;
  int width;
  // Whether the i-th channel of the vector at e exists.
  __device__ __forceinline__ bool has(int e, int i) const { return WHOLE || e + i < width; }
  __device__ __forceinline__ int vectors() const {
    const int all = (width + VEC - 1) / VEC, lane = (int)threadIdx.x % 32;
    return (all - lane + 31) / 32;
  }
  __device__ __forceinline__ int place(int c) const { return (c * 32 + (int)threadIdx.x % 32) * VEC; }
};

template <bool WHOLE, class Value>
__device__ __forceinline__ Moments row_moments(const RowOfLane<WHOLE> &lane, int kind, float eps, Value value) {
  if (kind == CELLVIM_NORM_NONE) return {0.0f, 1.0f};
  float mean = 0.0f, square = 0.0f;
  const int vectors = lane.vectors();
  if (kind == CELLVIM_NORM_LAYER) {
#pragma unroll 4
    for (int c = 0; c < vectors; ++c) {
      const Vec v = value(lane.place(c));
      mean += (v[0] + v[1]) + (v[2] + v[3]);
    }
    mean = sum_of_warp(mean) / (float)lane.width;
  }
#pragma unroll 4
  for (int c = 0; c < vectors; ++c) {
    const Vec v = value(lane.place(c));
#pragma unroll
    for (int i = 0; i < VEC; ++i)
      if (lane.has(lane.place(c), i)) square = fmaf(v[i] - mean, v[i] - mean, square);
  }
  return {mean, 1.0f / sqrtf(sum_of_warp(square) / (float)lane.width + eps)};
}

// Bytes of shared memory for the rows of z of a tile, rounded up for alignment.
template <class T> __host__ __device__ int64_t bytes_of_gates(int tile, int width) {
  return ((int64_t)tile * ((width + VEC - 1) / VEC) * (int64_t)sizeof(Raw<T>) + 15) / 16 * 16;
}
// The same for the lists of a run: slots, tokens to write, and tokens of the convolution's window.
inline int64_t bytes_of_lists(int run_steps) {
  return run_steps * (int64_t)sizeof(int2) + (2 * run_steps + 2 * REACH) * (int64_t)sizeof(int);
}

template <class T, bool SKIP, int THREADS, bool WHOLE>
__global__ void __launch_bounds__(THREADS) gate_kernel(const __grid_constant__ GateArguments a) {
  float *rows = reinterpret_cast<float *>(shared_memory);  // (tile, E)
  Raw<T> *gates = reinterpret_cast<Raw<T> *>(rows + (int64_t)a.tile * a.conv.width);  // (tile, E / VEC): z
  int2 *slots = reinterpret_cast<int2 *>(reinterpret_cast<unsigned char *>(gates) +
                                         bytes_of_gates<T>(a.tile, a.conv.width));
  int *tokens = reinterpret_cast<int *>(slots + a.run_steps), *list = tokens + a.run_steps;
  const int b = (int)blockIdx.x / a.runs, first = (int)blockIdx.x % a.runs * a.run_steps;
  const int last = min(first + a.run_steps, a.plan.stored), E = a.conv.width;
  const int e = (int)threadIdx.x * VEC, warp = (int)threadIdx.x / 32, warps = (int)blockDim.x / 32;
  const int groups = (E + VEC - 1) / VEC;
  ListedSlots::fill(a.plan, b, first, a.run_steps, slots);  // mix_tile reads complete groups of STEPS
  ListedTokens::fill(a.plan, b, first - REACH, a.run_steps + 2 * REACH, list);
  for (int i = (int)threadIdx.x; i < last - first; i += (int)blockDim.x) tokens[i] = token_at(a.plan, b, first + i);
  __syncthreads();
  Taps taps;
  Vec skip[2];
  ListedSlots here(slots);
  ListedTokens ahead(list);
  Window<T, STEPS, WHOLE> window;
  if (SKIP && e < E) {
    taps = load_taps<WHOLE>(a.conv, e, SILU_SCALE<T>);
    for (int k = 0; k < 2; ++k) {
      skip[k] = load_row(a.skip + k * E, e, a.conv.access<WHOLE>(e), 0.0f);
      for (int i = 0; i < VEC; ++i) skip[k][i] *= 0.5f;  // the mean of the directions
    }
    window.start((const T *)a.conv.x + b * a.conv.x_batch, a.conv, e, ahead);
  }

  for (int step = first; step < last; step += a.tile) {
    const int steps = min(a.tile, last - step);
    // The gates are copied while the tile is mixed; each lane copies the values that it will read.
    for (int t = warp; t < steps; t += warps) {
      const RowOfLane<WHOLE> lane = {rows + t * E, E};
      const int vectors = lane.vectors();
      const T *z = (const T *)a.z + b * a.z_batch + (int64_t)tokens[step - first + t] * a.z_token;
      for (int c = 0; c < vectors; ++c) {
        const int e = lane.place(c);
        copy_ahead(gates + t * groups + e / VEC, z + e, a.conv.access<WHOLE>(e));
      }
    }
    if (e < E) mix_tile<T, SKIP, WHOLE>(a, taps, skip, e, b, here, ahead, window, steps, rows);
    wait_for_copies();
    __syncthreads();
    for (int t = warp; t < steps; t += warps) {
      const RowOfLane<WHOLE> lane = {rows + t * E, E};
      const int vectors = lane.vectors();
      T *out = (T *)a.out + ((int64_t)b * a.plan.stored + tokens[step - first + t]) * E;
      const auto value = [&](int e) { return load(lane.row + e, a.conv.access<WHOLE>(e)); };
      const Moments m = row_moments(lane, a.norm, a.eps, value);
#pragma unroll 2
      for (int c = 0; c < vectors; ++c) {
        const int e = lane.place(c);
        const Access access = a.conv.access<WHOLE>(e);
        const Vec gate = unpack(gates[t * groups + e / VEC]), mixed = value(e);
        const Vec weight = load_row(a.norm_weight, e, access, 1.0f);
        const Vec bias = load_row(a.norm_bias, e, access, 0.0f);
        Vec result;
#pragma unroll
        for (int i = 0; i < VEC; ++i)
          result[i] = fmaf((mixed[i] - m.mean) * m.scale, weight[i], bias[i]) * silu<T>(gate[i]);
        store(out + e, result, access);
      }
    }
    __syncthreads();
  }
}

// The gradients of z and of the norm's input, and the block's contribution to those of the norm's parameters.
template <class T, bool SKIP, int THREADS, bool WHOLE>
__global__ void __launch_bounds__(THREADS) gate_backward_kernel(const __grid_constant__ GateArguments a) {
  float *rows = reinterpret_cast<float *>(shared_memory);  // (tile, E): mixed, later gradient * normalised
  float *grads = rows + (int64_t)a.tile * a.conv.width;    // (tile, E): gradient of the norm's output
  const int E = a.conv.width, e = (int)threadIdx.x * VEC;
  const int warp = (int)threadIdx.x / 32, warps = (int)blockDim.x / 32;
  const Access mine = a.conv.access<WHOLE>(e);
  Taps taps;
  Vec skip[2], sum_weight = splat(0.0f), sum_bias = splat(0.0f);
  if (SKIP && e < E) {
    taps = load_taps<WHOLE>(a.conv, e, SILU_SCALE<T>);
    for (int k = 0; k < 2; ++k) {
      skip[k] = load_row(a.skip + k * E, e, mine, 0.0f);
      for (int i = 0; i < VEC; ++i) skip[k][i] *= 0.5f;
    }
  }

  for (int64_t item = blockIdx.x; item < (int64_t)a.batch * a.runs; item += gridDim.x) {
    const int b = (int)(item / a.runs), first = (int)(item % a.runs) * a.run_steps;
    const int last = min(first + a.run_steps, a.plan.stored);
    Cursor here(a.plan, b, first), ahead(a.plan, b, first - REACH);
    Window<T, STEPS, WHOLE> window;
    if (SKIP && e < E && first < last) window.start((const T *)a.conv.x + b * a.conv.x_batch, a.conv, e, ahead);
    for (int step = first; step < last; step += a.tile) {
      const int steps = min(a.tile, last - step);
      if (e < E) mix_tile<T, SKIP, WHOLE>(a, taps, skip, e, b, here, ahead, window, steps, rows);
      __syncthreads();
      for (int t = warp; t < steps; t += warps) {
        const RowOfLane<WHOLE> lane = {rows + t * E, E};
        const int token = token_at(a.plan, b, step + t), vectors = lane.vectors();
        const int64_t at = ((int64_t)b * a.plan.stored + token) * E;
        const T *z = (const T *)a.z + b * a.z_batch + (int64_t)token * a.z_token, *grad_out = (const T *)a.grad_out + at;
        const auto value = [&](int e) { return load(lane.row + e, a.conv.access<WHOLE>(e)); };
        const Moments m = row_moments(lane, a.norm, a.eps, value);
        float mean = 0.0f, projection = 0.0f;
#pragma unroll 2
        for (int c = 0; c < vectors; ++c) {
          const int e = lane.place(c);
          const Access access = a.conv.access<WHOLE>(e);
          const Vec mixed = value(e), gates = load(z + e, access), g = load(grad_out + e, access);
          const Vec weight = load_row(a.norm_weight, e, access, 1.0f), bias = load_row(a.norm_bias, e, access, 0.0f);
          Vec grad_z, g_normed, normalised;
#pragma unroll
          for (int i = 0; i < VEC; ++i) {
            const float s = sigmoid<T>(gates[i]), gated = gates[i] * s;
            normalised[i] = (mixed[i] - m.mean) * m.scale;
            grad_z[i] = g[i] * fmaf(normalised[i], weight[i], bias[i]) * fmaf(gated, 1.0f - s, s);
            g_normed[i] = g[i] * gated;
            if (i < access.count) {
              mean = fmaf(g_normed[i], weight[i], mean);
              projection = fmaf(g_normed[i] * weight[i], normalised[i], projection);
            }
          }
          store((T *)a.grad_z + at + e, grad_z, access);
          store(grads + t * E + e, g_normed, access);
          store(rows + t * E + e, normalised, access);
        }
        mean = sum_of_warp(mean) / (float)E, projection = sum_of_warp(projection) / (float)E;
#pragma unroll 2
        for (int c = 0; c < vectors; ++c) {
          const int e = lane.place(c);
          const Access access = a.conv.access<WHOLE>(e);
          const Vec normalised = value(e), g = load((const float *)grads + t * E + e, access);
          const Vec weight = load_row(a.norm_weight, e, access, 1.0f);
          Vec grad, product;
#pragma unroll
          for (int i = 0; i < VEC; ++i) {
            grad[i] = norm_gradient(g[i] * weight[i], normalised[i], m, mean, projection, a.norm);
            product[i] = g[i] * normalised[i];
          }
          store(a.mixed + at + e, grad, access);
          store(rows + t * E + e, product, access);
        }
      }
      __syncthreads();
      if (a.partial && e < E)
        for (int t = 0; t < steps; ++t) {
          const Vec product = load((const float *)rows + t * E + e, mine);
          const Vec g = load((const float *)grads + t * E + e, mine);
#pragma unroll
          for (int i = 0; i < VEC; ++i) sum_weight[i] += product[i], sum_bias[i] += g[i];
        }
      __syncthreads();
    }
  }
  if (a.partial && e < E) {
    store(a.partial + (int64_t)blockIdx.x * 2 * E + e, sum_weight, mine);
    store(a.partial + ((int64_t)blockIdx.x * 2 + 1) * E + e, sum_bias, mine);
  }
}

struct SlotSumArguments {
  Plan plan;
  int batch, width, chunks;
  bool whole, is_shared;  // is_shared: both directions have the same slots
  const float *mixed;     // (B, stored, E)
  void *out;              // (2, B, P, E)
};

// Gradient of y: half the sum over a slot's tokens. Block: (direction unless shared, sample, slot, chunk of channels).
template <class T> __global__ void __launch_bounds__(128) slot_sum_kernel(const __grid_constant__ SlotSumArguments a) {
  int item = (int)blockIdx.x;
  const int chunk = item % a.chunks;
  item /= a.chunks;
  const int p = item % a.plan.slots, b = item / a.plan.slots % a.batch, k = item / a.plan.slots / a.batch;
  const int e = (chunk * (int)blockDim.x + (int)threadIdx.x) * VEC;
  if (e >= a.width) return;
  const Access access = {a.whole && e + VEC <= a.width, min(a.width - e, VEC)};
  const Members members(a.plan, k, b, p);
  Vec total = splat(0.0f);
#pragma unroll 4
  for (int i = 0; i < members.count(); ++i) {
    const int token = token_at(a.plan, b, members.step(i));
    const Vec v = load(a.mixed + ((int64_t)b * a.plan.stored + token) * a.width + e, access);
#pragma unroll
    for (int j = 0; j < VEC; ++j) total[j] = fmaf(0.5f, v[j], total[j]);
  }
  const int64_t line = ((int64_t)k * a.batch + b) * a.plan.slots + p;
  store((T *)a.out + line * a.width + e, total, access);
  if (a.is_shared) store((T *)a.out + (line + (int64_t)a.batch * a.plan.slots) * a.width + e, total, access);
}

constexpr int MOST_CHANNELS = 4096;  // a block of 1024 threads
constexpr int TILE_BYTES = 48 * 1024;

template <class T, bool SKIP, int THREADS>
int run(const cellvim_expand_gate &a, GateArguments g, bool is_backward, const cellvim_cuda_call &call,
        Workspace &workspace, bool is_counting) {
  const int threads = divide_up(g.conv.width, VEC * 32) * 32, warps = threads / 32, tiles = is_backward ? 2 : 1;
  // Every warp gets the same number of steps of a tile, unless that is more than three steps each.
  const int fits = TILE_BYTES / (g.conv.width * tiles * (int)sizeof(float)) / STEPS * STEPS;
  int tile = clamp(fits, STEPS, 16);
  for (int even = tile; even >= STEPS; even -= STEPS)
    if (even % warps == 0) {
      tile = even;
      break;
    }
  g.tile = tile;
  g.run_steps = divide_up(96, tile) * tile;
  g.runs = divide_up(g.plan.stored, g.run_steps);
  const int64_t items = (int64_t)g.batch * g.runs;
  const size_t shared = (size_t)tiles * tile * g.conv.width * sizeof(float);
  constexpr bool CAN = SKIP && THREADS < 1024;  // the others are rare: one kernel for all widths
  const bool whole = CAN && g.conv.whole;
  if (!is_backward) {
    if (is_counting) return CELLVIM_OK;
    const size_t more = (size_t)(bytes_of_gates<T>(tile, g.conv.width) + bytes_of_lists(g.run_steps));
    return launch(call, whole ? gate_kernel<T, SKIP, THREADS, CAN> : gate_kernel<T, SKIP, THREADS, false>, items,
                  threads, shared + more, g);
  }
  const int64_t workers = clamp<int64_t>(items, 1, 4 * multiprocessors(call.device));
  if (g.norm != CELLVIM_NORM_NONE) g.partial = workspace.take<float>(workers * 2 * a.width);
  g.mixed = a.grad_mixed;
  AdjointArguments adjoint = {};
  int adjoint_threads = 0;
  if (SKIP) {
    adjoint.conv = g.conv, adjoint.plan = g.plan, adjoint.batch = g.batch;
    adjoint.row = a.skip, adjoint.mixed = g.mixed, adjoint.grad_x = a.grad_x;
    adjoint_threads = plan_adjoint(adjoint, call.device, workspace);
  }
  if (is_counting) return CELLVIM_OK;
  CELLVIM_TRY(launch(call,
                     whole ? gate_backward_kernel<T, SKIP, THREADS, CAN> : gate_backward_kernel<T, SKIP, THREADS, false>,
                     workers, threads, shared, g));
  if (g.norm != CELLVIM_NORM_NONE) {
    CELLVIM_TRY(sum_rows(call, g.partial, workers, 2 * a.width, 0, a.width, a.grad_norm_weight));
    CELLVIM_TRY(sum_rows(call, g.partial, workers, 2 * a.width, a.width, a.width, a.grad_norm_bias));
  }
  const Chunks chunks = chunks_of(a.width, 128);
  const SlotSumArguments sums = {g.plan,        g.batch,          g.conv.width, chunks.count,
                                 g.conv.whole, !g.plan.indexed, g.mixed,      a.grad_y};
  CELLVIM_TRY(launch(call, slot_sum_kernel<T>, (sums.is_shared ? 1 : 2) * a.batch * g.plan.slots * chunks.count,
                     chunks.threads, 0, sums));
  if constexpr (SKIP) {
    CELLVIM_TRY((run_adjoint<T, Adjoint::EXPAND>(adjoint, adjoint_threads, call)));
    return sum_adjoint(call, adjoint.partial, adjoint.workers, a.width, a.taps, 0.5f, a.grad_weight, a.grad_bias,
                       a.grad_skip);
  }
  return CELLVIM_OK;
}

template <class T, bool SKIP>
int run(const cellvim_expand_gate &a, const GateArguments &g, bool is_backward, const cellvim_cuda_call &call,
        Workspace &workspace, bool is_counting) {
  // Fewer threads per block leave more registers for each.
  if (a.width <= 256 * VEC) return run<T, SKIP, 256>(a, g, is_backward, call, workspace, is_counting);
  if (a.width <= 512 * VEC) return run<T, SKIP, 512>(a, g, is_backward, call, workspace, is_counting);
  if (a.width <= 640 * VEC) return run<T, SKIP, 640>(a, g, is_backward, call, workspace, is_counting);  // Huge
  return run<T, SKIP, 1024>(a, g, is_backward, call, workspace, is_counting);
}

}  // namespace

int expand_gate(const cellvim_expand_gate &a, bool is_backward, const cellvim_cuda_call &call, int64_t *bytes) {
  if (a.taps < 1 || a.taps > TAPS || a.width > MOST_CHANNELS) return CELLVIM_BAD_ARGUMENT;
  Workspace workspace(call.workspace);
  GateArguments g = {};
  CELLVIM_TRY(make_plan(a.plan, is_backward, workspace, g.plan));
  g.conv = conv_source(a.x, a.x_batch, a.x_token, a.width, a.taps, a.dtype, a.weight, a.bias);
  const size_t vector = VEC * size_of(a.dtype);
  g.conv.whole &= a.z_batch % VEC == 0 && a.z_token % VEC == 0 && is_aligned(a.z, vector) && is_aligned(a.y, vector) &&
                  is_aligned(a.out, vector) && is_aligned(a.grad_out, vector) && is_aligned(a.grad_x, vector) &&
                  is_aligned(a.grad_z, vector) && is_aligned(a.grad_y, vector) && is_aligned(a.grad_mixed, 16) &&
                  is_aligned(a.skip, 16) && is_aligned(a.norm_weight, 16) && is_aligned(a.norm_bias, 16);
  g.batch = (int)a.batch, g.norm = a.norm, g.eps = a.eps;
  g.z = a.z, g.z_batch = a.z_batch, g.z_token = (int)a.z_token, g.y = a.y;
  g.skip = a.skip, g.norm_weight = a.norm_weight, g.norm_bias = a.norm_bias;
  g.out = a.out, g.grad_out = a.grad_out, g.grad_z = a.grad_z;
  if (!bytes) CELLVIM_TRY(fill_tables(a.plan, is_backward, g.plan, call));
  const int status = for_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    return a.skip ? run<T, true>(a, g, is_backward, call, workspace, bytes != nullptr)
                  : run<T, false>(a, g, is_backward, call, workspace, bytes != nullptr);
  });
  if (bytes) *bytes = workspace.used();
  return status;
}

}  // namespace cellvim
