// pooled_scan: softplus, discretisation and the selective scan in both directions, with the states in registers.
//
// Four lanes share a channel and have a quarter of the states each; each computes the length of every fourth step for all
// four. Long sequences are scanned in parallel chunks: first the contribution of every chunk to its last state, then the
// states between chunks, then the outputs. The backward pass keeps the states of one short segment in registers and
// recomputes them from checkpoints; the gradients of B and C are summed over channels by lanes, warps and blocks.
#include "ops.cuh"
#include "reduce.cuh"

namespace cellvim {
namespace {

constexpr int MAX_STATES = 64;
constexpr int CHUNK = 128;     // steps per chunk of a long sequence
constexpr int LONG = 512;      // length of a long sequence; independent of the batch, as results must be
constexpr int STAGE = 16;      // steps whose B and C are staged in shared memory at a time
constexpr int FORWARD_THREADS = 128, BACKWARD_THREADS = 256;  // four per channel

struct ScanArguments {
  int batch, steps, width, states, groups;
  int chunks, chunk_steps;
  const void *pooled, *delta;
  int64_t pooled_stride[3], delta_stride[3];
  const float *delta_bias, *a, *b, *c;
  int64_t b_stride[3], c_stride[3];
  void *out;
  float *state;     // (2, B, chunks, E, N): contribution of a chunk to its last state, then the state before it
  float *duration;  // (2, B, chunks, E): sum of the step lengths
  const void *grad_out;
  void *grad_pooled, *grad_delta;
  float *checkpoint;           // (2, B, segments, E, padded N): states before each segment
  float *partial_a, *partial_bias;  // (B, 2, E, N), (B, 2, E)
  float *partial_bc;           // (groups, 2, B, P, 2 N): gradients of B and C
};

// Sums each of four values over four neighbouring lanes; lane i gets the i-th sum.
__device__ __forceinline__ float sum_of_four_lanes(const float (&v)[4]) {
  const bool high = threadIdx.x & 2, odd = threadIdx.x & 1;
  const float first = (high ? v[2] : v[0]) + __shfl_xor_sync(ALL_LANES, high ? v[0] : v[2], 2);
  const float second = (high ? v[3] : v[1]) + __shfl_xor_sync(ALL_LANES, high ? v[1] : v[3], 2);
  return (odd ? second : first) + __shfl_xor_sync(ALL_LANES, odd ? first : second, 1);
}

// state = decay * state + drive with decay = exp(step * rate). Small steps stay exact in float32.
template <class T> struct Decay {
  float factor;
  __device__ __forceinline__ static float rate(float a) { return a * LOG2E; }
  __device__ __forceinline__ Decay(float step, float rate) : factor(exp2_approximate(step * rate)) {}
  __device__ __forceinline__ float advance(float state, float drive) const { return fmaf(factor, state, drive); }
  __device__ __forceinline__ float apply(float value) const { return factor * value; }
};
template <> struct Decay<float> {
  SplitExp exp;
  __device__ __forceinline__ static float rate(float a) { return a; }
  __device__ __forceinline__ Decay(float step, float rate) : exp(split_exp(step * rate)) {}
  __device__ __forceinline__ float advance(float state, float drive) const {
    const float scaled = exp.scale * state;
    return scaled + fmaf(exp.rest, scaled, drive);
  }
  __device__ __forceinline__ float apply(float value) const {
    const float scaled = exp.scale * value;
    return fmaf(exp.rest, scaled, scaled);
  }
};

// Stages B and C of `count` steps in the order of the scan, (count, 2, N); zeros after step `end`.
__device__ __forceinline__ void stage_bc(const ScanArguments &a, int k, int b, int first, int count, int end,
                                         float *staged) {
  const int N = a.states;
  for (int i = (int)threadIdx.x; i < count * 2 * N; i += (int)blockDim.x) {
    const int step = i / (2 * N), which = i / N % 2, n = i % N;
    const int t = k ? a.steps - 1 - (first + step) : first + step;
    const float *from = which ? a.c + k * a.c_stride[0] + b * a.c_stride[1] + t * a.c_stride[2]
                              : a.b + k * a.b_stride[0] + b * a.b_stride[1] + t * a.b_stride[2];
    staged[i] = first + step < end ? from[n] : 0.0f;
  }
}

// The values of B or C of a staged step for the states of a lane; zero beyond the last state.
template <int OWN> struct States {
  float v[OWN];
  __device__ __forceinline__ States(const float *step, int lane, int states) {
    const float *from = step + lane * OWN;
    if (states == 4 * OWN) {
#pragma unroll
      for (int s = 0; s < OWN; s += 4) {
        const float4 four = *reinterpret_cast<const float4 *>(from + s);
        v[s] = four.x, v[s + 1] = four.y, v[s + 2] = four.z, v[s + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int s = 0; s < OWN; ++s) v[s] = lane * OWN + s < states ? from[s] : 0.0f;
    }
  }
};

// OWN: number of states per lane. FINAL: only the contribution of the chunk to its last state.
template <class T, int OWN, bool FINAL>
__global__ void __launch_bounds__(FORWARD_THREADS) scan_kernel(const __grid_constant__ ScanArguments a) {
  float *staged = reinterpret_cast<float *>(shared_memory);
  int item = (int)blockIdx.x;
  const int group = item % a.groups;
  item /= a.groups;
  const int chunk = item % a.chunks;
  item /= a.chunks;
  const int b = item % a.batch, k = item / a.batch, lane = (int)threadIdx.x % 4, N = a.states;
  const int base = (int)(threadIdx.x % 32 & ~3u);
  const int wanted = (group * FORWARD_THREADS + (int)threadIdx.x) / 4;
  const bool exists = wanted < a.width;
  const int e = exists ? wanted : a.width - 1;  // all threads participate in barriers and shuffles
  const T *pooled = (const T *)a.pooled + k * a.pooled_stride[0] + b * a.pooled_stride[1] + e;
  const T *delta = (const T *)a.delta + k * a.delta_stride[0] + b * a.delta_stride[1] + e;
  const float bias = a.delta_bias[k * a.width + e];
  const int64_t line = ((int64_t)k * a.batch + b) * a.chunks + chunk;

  float rate[OWN], state[OWN], duration = 0.0f;
#pragma unroll
  for (int s = 0; s < OWN; ++s) {
    const int n = lane * OWN + s;
    rate[s] = n < N ? Decay<T>::rate(a.a[((int64_t)k * a.width + e) * N + n]) : 0.0f;
    state[s] = !FINAL && a.state && n < N ? a.state[(line * a.width + e) * N + n] : 0.0f;
  }

  const int begin = chunk * a.chunk_steps, end = min(begin + a.chunk_steps, a.steps);
  for (int first = begin; first < end; first += STAGE) {
    __syncthreads();
    stage_bc(a, k, b, first, STAGE, end, staged);
    __syncthreads();
    for (int quad = 0; quad < STAGE && first + quad < end; quad += 4) {
      const int step = first + quad + lane, t = k ? a.steps - 1 - step : step;  // the step of this lane, of four
      float my_length = 0.0f, my_drive = 0.0f;
      [[maybe_unused]] float y[4];
      if (step < end) {
        my_length = softplus(to_float(delta[t * a.delta_stride[2]]) + bias);
        my_drive = my_length * to_float(pooled[t * a.pooled_stride[2]]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float length = __shfl_sync(ALL_LANES, my_length, base + i);
        const float drive = __shfl_sync(ALL_LANES, my_drive, base + i);
        const float *bc = staged + (quad + i) * 2 * N;
        const States<OWN> of_b(bc, lane, N);
        duration += length;
#pragma unroll
        for (int s = 0; s < OWN; ++s) state[s] = Decay<T>(length, rate[s]).advance(state[s], drive * of_b.v[s]);
        if constexpr (!FINAL) {
          const States<OWN> of_c(bc + N, lane, N);
          y[i] = 0.0f;
#pragma unroll
          for (int s = 0; s < OWN; ++s) y[i] = fmaf(state[s], of_c.v[s], y[i]);
        }
      }
      if constexpr (!FINAL) {
        const float mine = sum_of_four_lanes(y);
        if (exists && step < end)
          ((T *)a.out)[(((int64_t)k * a.batch + b) * a.steps + t) * a.width + e] = from_float<T>(mine);
      }
    }
  }
  if constexpr (FINAL) {
    if (!exists) return;
#pragma unroll
    for (int s = 0; s < OWN; ++s)
      if (lane * OWN + s < N) a.state[(line * a.width + e) * N + lane * OWN + s] = state[s];
    if (lane == 0) a.duration[line * a.width + e] = duration;
  }
}

// One thread per state: the states before the chunks from the chunks' contributions, in place.
template <class T> __global__ void __launch_bounds__(128) chain_kernel(const __grid_constant__ ScanArguments a) {
  const int64_t per_line = (int64_t)a.width * a.states, item = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (item >= 2 * a.batch * per_line) return;
  const int64_t line = item / per_line, i = item % per_line;  // line: (direction, sample)
  const float rate = Decay<T>::rate(a.a[line / a.batch * per_line + i]);
  float state = 0.0f;
  for (int chunk = 0; chunk < a.chunks; ++chunk) {
    float &here = a.state[(line * a.chunks + chunk) * per_line + i];
    const float contribution = here;
    here = state;
    state = Decay<T>(a.duration[(line * a.chunks + chunk) * a.width + i / a.states], rate).advance(state, contribution);
  }
}

// Sums COUNT values over the eight channels of a warp (lanes 4, 8 and 16 apart); the i-th channel of the warp then has the
// i-th eighth of them in v[0 …].
template <int COUNT> __device__ __forceinline__ void sum_over_channels(float (&v)[COUNT]) {
  int left = COUNT;
#pragma unroll
  for (int bit = 16; bit >= 4; bit /= 2) {
    const bool high = threadIdx.x & bit;
    left /= 2;
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i)
      if (i < left) {
        const float keep = high ? v[left + i] : v[i], give = high ? v[i] : v[left + i];
        v[i] = keep + __shfl_xor_sync(ALL_LANES, give, bit);
      }
  }
}

// Four lanes per channel, OWN states each. Block: (direction, sample, group of channels).
template <class T, int OWN>
__global__ void __launch_bounds__(BACKWARD_THREADS) scan_backward_kernel(const __grid_constant__ ScanArguments a) {
  constexpr int SEGMENT = OWN == 4 ? 8 : 4, PADDED = 4 * OWN, WARPS = BACKWARD_THREADS / 32, EACH = 2 * OWN / 8;
  float *staged = reinterpret_cast<float *>(shared_memory);  // (SEGMENT, 2, N)
  float *sums = staged + SEGMENT * 2 * a.states;             // (WARPS, SEGMENT, 2, PADDED)
  int item = (int)blockIdx.x;
  const int group = item % a.groups, N = a.states;
  item /= a.groups;
  const int b = item % a.batch, k = item / a.batch;
  const int lane = (int)threadIdx.x % 4, warp = (int)threadIdx.x / 32, base = (int)(threadIdx.x % 32 & ~3u);
  const int wanted = (group * BACKWARD_THREADS + (int)threadIdx.x) / 4;
  const bool exists = wanted < a.width;
  const int e = exists ? wanted : a.width - 1;
  const int64_t line = (int64_t)k * a.batch + b;
  const T *pooled = (const T *)a.pooled + k * a.pooled_stride[0] + b * a.pooled_stride[1] + e;
  const T *delta = (const T *)a.delta + k * a.delta_stride[0] + b * a.delta_stride[1] + e;
  const float bias = a.delta_bias[k * a.width + e];
  const int segments = (a.steps + SEGMENT - 1) / SEGMENT;

  float rate[OWN], grad_rate[OWN], grad_state[OWN], before[OWN];
#pragma unroll
  for (int s = 0; s < OWN; ++s) {
    const int n = lane * OWN + s;
    rate[s] = n < N ? Decay<T>::rate(a.a[((int64_t)k * a.width + e) * N + n]) : 0.0f;
    grad_rate[s] = grad_state[s] = before[s] = 0.0f;
  }
  float grad_bias = 0.0f;

  // A lane computes every fourth step of a segment.
  struct Step {
    float raw, pooled, length, grad;
  };
  const auto time_of = [&](int step) { return k ? a.steps - 1 - step : step; };
  const auto prepare = [&](int step, bool with_grad) {
    Step out = {0.0f, 0.0f, 0.0f, 0.0f};
    if (step >= a.steps) return out;
    const int t = time_of(step);
    out.raw = to_float(delta[t * a.delta_stride[2]]) + bias;
    out.pooled = to_float(pooled[t * a.pooled_stride[2]]);
    out.length = softplus(out.raw);
    if (with_grad && exists) out.grad = to_float(((const T *)a.grad_out)[(line * a.steps + t) * a.width + e]);
    return out;
  };

  // States before each segment.
  for (int segment = 0; segment + 1 < segments; ++segment) {
    const int first = segment * SEGMENT;
    __syncthreads();
    stage_bc(a, k, b, first, SEGMENT, a.steps, staged);
    __syncthreads();
#pragma unroll
    for (int quad = 0; quad < SEGMENT; quad += 4) {
      const Step mine = prepare(first + quad + lane, false);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float length = __shfl_sync(ALL_LANES, mine.length, base + i);
        const float drive = length * __shfl_sync(ALL_LANES, mine.pooled, base + i);
        const States<OWN> of_b(staged + (quad + i) * 2 * N, lane, N);
#pragma unroll
        for (int s = 0; s < OWN; ++s) before[s] = Decay<T>(length, rate[s]).advance(before[s], drive * of_b.v[s]);
      }
    }
    float *checkpoint = a.checkpoint + ((line * segments + segment + 1) * a.width + e) * PADDED + lane * OWN;
    if (exists)
#pragma unroll
      for (int s = 0; s < OWN; s += 4)
        *reinterpret_cast<float4 *>(checkpoint + s) = {before[s], before[s + 1], before[s + 2], before[s + 3]};
  }

  for (int segment = segments - 1; segment >= 0; --segment) {
    const int first = segment * SEGMENT, count = min(SEGMENT, a.steps - first);
    if (segment > 0 && segment < segments - 1) {
      const float *checkpoint = a.checkpoint + ((line * segments + segment) * a.width + e) * PADDED + lane * OWN;
#pragma unroll
      for (int s = 0; s < OWN; s += 4) {
        const float4 four = *reinterpret_cast<const float4 *>(checkpoint + s);
        before[s] = four.x, before[s + 1] = four.y, before[s + 2] = four.z, before[s + 3] = four.w;
      }
    } else if (segment == 0) {
#pragma unroll
      for (int s = 0; s < OWN; ++s) before[s] = 0.0f;
    }
    __syncthreads();
    stage_bc(a, k, b, first, SEGMENT, a.steps, staged);
    __syncthreads();

    Step mine[SEGMENT / 4];
    float state[SEGMENT][OWN];
#pragma unroll
    for (int quad = 0; quad < SEGMENT; quad += 4) {
      mine[quad / 4] = prepare(first + quad + lane, true);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int t = quad + i;
        const float length = __shfl_sync(ALL_LANES, mine[quad / 4].length, base + i);
        const float drive = length * __shfl_sync(ALL_LANES, mine[quad / 4].pooled, base + i);
        const States<OWN> of_b(staged + t * 2 * N, lane, N);
#pragma unroll
        for (int s = 0; s < OWN; ++s)
          state[t][s] = Decay<T>(length, rate[s]).advance(t ? state[t - 1][s] : before[s], drive * of_b.v[s]);
      }
    }

#pragma unroll
    for (int quad = SEGMENT - 4; quad >= 0; quad -= 4) {
      float grad_drive[4], grad_length[4];
#pragma unroll
      for (int i = 3; i >= 0; --i) {
        const int t = quad + i;
        const float length = __shfl_sync(ALL_LANES, mine[quad / 4].length, base + i);
        const float drive = length * __shfl_sync(ALL_LANES, mine[quad / 4].pooled, base + i);
        const float gy = __shfl_sync(ALL_LANES, mine[quad / 4].grad, base + i);
        grad_drive[i] = grad_length[i] = 0.0f;
        float of_bc[2 * OWN];
        const States<OWN> of_b(staged + t * 2 * N, lane, N), of_c(staged + (t * 2 + 1) * N, lane, N);
#pragma unroll
        for (int s = 0; s < OWN; ++s) {
          const float g = fmaf(gy, of_c.v[s], grad_state[s]);
          of_bc[s] = exists ? g * drive : 0.0f;
          of_bc[OWN + s] = gy * state[t][s];
          grad_drive[i] = fmaf(g, of_b.v[s], grad_drive[i]);
          grad_state[s] = Decay<T>(length, rate[s]).apply(g);
          const float grad_exponent = grad_state[s] * (t ? state[t - 1][s] : before[s]);
          grad_length[i] = fmaf(grad_exponent, rate[s], grad_length[i]);
          grad_rate[s] = fmaf(grad_exponent, length, grad_rate[s]);
        }
        sum_over_channels(of_bc);
        const int part = (int)threadIdx.x % 32 / 4;  // this channel's eighth of the 2 * OWN values
        // Highest bit first: channels 16, 8 and 4 lanes apart were halved in this order.
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
          const int value = part * EACH + j, which = value / OWN, s = value % OWN;
          sums[((warp * SEGMENT + t) * 2 + which) * PADDED + lane * OWN + s] = of_bc[j];
        }
      }
      const float g_drive = sum_of_four_lanes(grad_drive);
      const float g_length = sum_of_four_lanes(grad_length) * (1.0f / Decay<T>::rate(1.0f));
      const Step &step = mine[quad / 4];
      if (exists && quad + lane < count) {
        const int64_t at = (line * a.steps + time_of(first + quad + lane)) * a.width + e;
        const float g_raw = fmaf(g_drive, step.pooled, g_length) * sigmoid<float>(step.raw);
        grad_bias += g_raw;
        ((T *)a.grad_pooled)[at] = from_float<T>(g_drive * step.length);
        ((T *)a.grad_delta)[at] = from_float<T>(g_raw);
      }
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < count * 2 * N; i += BACKWARD_THREADS) {
      const int t = i / (2 * N), which = i / N % 2, n = i % N;
      float total = 0.0f;
      for (int w = 0; w < WARPS; ++w) total += sums[((w * SEGMENT + t) * 2 + which) * PADDED + n];
      a.partial_bc[(((int64_t)group * 2 * a.batch + line) * a.steps + time_of(first + t)) * 2 * N + which * N + n] = total;
    }
  }

  grad_bias += __shfl_xor_sync(ALL_LANES, grad_bias, 1);
  grad_bias += __shfl_xor_sync(ALL_LANES, grad_bias, 2);
  if (!exists) return;
  const int64_t channel = ((int64_t)b * 2 + k) * a.width + e;
  if (lane == 0) a.partial_bias[channel] = grad_bias;
#pragma unroll
  for (int s = 0; s < OWN; ++s)
    if (lane * OWN + s < N) a.partial_a[channel * N + lane * OWN + s] = grad_rate[s];
}

// One thread per element of B and C: sums over the groups of channels.
__global__ void __launch_bounds__(256)
    sum_bc_kernel(const float *partial, int64_t lines, int states, int groups, float *grad_b, float *grad_c) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, size = lines * 2 * states;
  if (i >= size) return;
  float total = 0.0f;
  for (int group = 0; group < groups; ++group) total += partial[group * size + i];
  const int64_t line = i / (2 * states);
  const int which = (int)(i / states % 2), n = (int)(i % states);
  (which ? grad_c : grad_b)[line * states + n] = total;
}

template <class T, int OWN> int forward(ScanArguments s, const cellvim_cuda_call &call) {
  s.groups = divide_up(s.width * 4, FORWARD_THREADS);
  const int64_t blocks = 2 * (int64_t)s.batch * s.chunks * s.groups;
  const size_t shared = STAGE * 2 * s.states * sizeof(float);
  if (s.chunks > 1) {
    CELLVIM_TRY(launch(call, scan_kernel<T, OWN, true>, blocks, FORWARD_THREADS, shared, s));
    CELLVIM_TRY(launch(call, chain_kernel<T>, divide_up<int64_t>(2 * (int64_t)s.batch * s.width * s.states, 128), 128, 0, s));
  }
  return launch(call, scan_kernel<T, OWN, false>, blocks, FORWARD_THREADS, shared, s);
}

template <class T, int OWN>
int backward(const cellvim_pooled_scan &a, ScanArguments s, const cellvim_cuda_call &call, Workspace &workspace,
             bool is_counting) {
  constexpr int SEGMENT = OWN == 4 ? 8 : 4;
  s.groups = divide_up(s.width * 4, BACKWARD_THREADS);
  const int64_t lines = 2 * (int64_t)s.batch, segments = divide_up(s.steps, SEGMENT);
  if (segments > 1) s.checkpoint = workspace.take<float>(lines * segments * s.width * 4 * OWN);
  s.partial_a = workspace.take<float>(lines * s.width * s.states);
  s.partial_bias = workspace.take<float>(lines * s.width);
  s.partial_bc = workspace.take<float>((int64_t)s.groups * lines * s.steps * 2 * s.states);
  if (is_counting) return CELLVIM_OK;
  const size_t shared = (SEGMENT * 2 * s.states + BACKWARD_THREADS / 32 * SEGMENT * 2 * 4 * OWN) * sizeof(float);
  CELLVIM_TRY(launch(call, scan_backward_kernel<T, OWN>, lines * s.groups, BACKWARD_THREADS, shared, s));
  const int64_t elements = lines * s.steps * 2 * s.states;
  CELLVIM_TRY(launch(call, sum_bc_kernel, divide_up<int64_t>(elements, 256), 256, 0, (const float *)s.partial_bc,
                     lines * s.steps, s.states, s.groups, a.grad_b, a.grad_c));
  const int64_t columns = 2 * (int64_t)s.width;
  CELLVIM_TRY(sum_rows(call, s.partial_a, s.batch, columns * s.states, 0, columns * s.states, a.grad_a));
  return sum_rows(call, s.partial_bias, s.batch, columns, 0, columns, a.grad_delta_bias);
}

}  // namespace

int pooled_scan(const cellvim_pooled_scan &a, bool is_backward, const cellvim_cuda_call &call, int64_t *bytes) {
  if (a.states < 1 || a.states > MAX_STATES) return CELLVIM_BAD_ARGUMENT;
  ScanArguments s = {};
  s.batch = (int)a.batch, s.steps = (int)a.steps, s.width = (int)a.width, s.states = (int)a.states;
  s.pooled = a.pooled, s.delta = a.delta, s.delta_bias = a.delta_bias, s.a = a.a, s.b = a.b, s.c = a.c;
  for (int i = 0; i < 3; ++i) {
    s.pooled_stride[i] = a.pooled_stride[i], s.delta_stride[i] = a.delta_stride[i];
    s.b_stride[i] = a.b_stride[i], s.c_stride[i] = a.c_stride[i];
  }
  s.out = a.out, s.grad_out = a.grad_out, s.grad_pooled = a.grad_pooled, s.grad_delta = a.grad_delta;
  s.chunk_steps = s.steps >= LONG ? CHUNK : (s.steps > 0 ? s.steps : 1);
  s.chunks = divide_up(s.steps, s.chunk_steps);
  Workspace workspace(call.workspace);
  if (!is_backward && s.chunks > 1) {
    s.state = workspace.take<float>(2 * a.batch * s.chunks * a.width * a.states);
    s.duration = workspace.take<float>(2 * a.batch * s.chunks * a.width);
  }
  const bool is_counting = bytes != nullptr;
  const bool is_empty = a.batch == 0 || a.steps == 0 || a.width == 0;
  const int status = for_type(a.dtype, [&](auto tag) -> int {
    using T = decltype(tag);
    if (is_backward)
      return s.states <= 16 ? backward<T, 4>(a, s, call, workspace, is_counting)
                            : backward<T, 16>(a, s, call, workspace, is_counting);
    if (is_counting || is_empty) return CELLVIM_OK;
    return s.states <= 16 ? forward<T, 4>(s, call) : forward<T, 16>(s, call);
  });
  if (bytes) *bytes = workspace.used();
  return status;
}

}  // namespace cellvim
