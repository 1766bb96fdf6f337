// conv_pool: causal convolution in both directions and SiLU, reduced directly to the pooled sequences.
//
// The unpooled convolution stays in registers. If the axes of a dense grid are (kept, pooled, kept), as in every FastVim
// and FastChannelVim, x is read once: a block processes a cell of the grid ("walk"), and each thread adds four channels
// to its own slots. Other plans are processed slot by slot and direction by direction ("gather"); neighbouring steps
// share a window, so that x is read twice, the second time mostly from the cache.
#include "conv_adjoint.cuh"
#include "ops.cuh"

namespace cellvim {
namespace {

enum class Mode { SUM, MAX, WEIGHTED };

struct PoolArguments {
  ConvSource conv;
  Plan plan;
  int batch, chunks;
  int cells, members, inner;     // walk: sizes of the (kept, pooled, kept) axes of a dense plan
  int runs, run_members;         // walk: parts of a cell, and members per part
  int block_cells;               // walk: cells per block, processed in turn; 1 if cells are divided, have several slots,
                                 // or fewer steps than a window
  float factor;                  // factor on every slot, times slot_weight unless that is null
  const float *slot_weight;      // (samples, P) or null
  const float *share;            // WEIGHTED: (2, B, L)
  void *out;                     // (2, B, P, E)
  int32_t *best;                 // MAX: (2, B, P, E)
  float *partial;                // (runs, 2, B, P, E), null if runs is 1
  int32_t *partial_best;
};

// Running sum or maximum of a slot for four channels, and the steps of the maxima.
template <Mode MODE> struct Slot {
  Vec value = splat(MODE == Mode::MAX ? -INFINITY : 0.0f);
  int best[VEC] = {-1, -1, -1, -1};

  // With `is_late` an equal value replaces the maximum: steps arrive last to first, and the first of equals counts.
  __device__ __forceinline__ void add(const Vec &u, float weight, int step, bool is_late) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      if (MODE == Mode::SUM) value[i] += u[i];
      if (MODE == Mode::WEIGHTED) value[i] = fmaf(weight, u[i], value[i]);
      if (MODE == Mode::MAX) {
        const bool wins = u[i] > value[i] || u[i] != u[i] || (is_late && u[i] == value[i]);  // NaN counts as the maximum
        if (wins) value[i] = u[i], best[i] = step;
      }
    }
  }
};

template <class T, Mode MODE>
__device__ __forceinline__ void write_slot(const PoolArguments &a, const Slot<MODE> &slot, int k, int b, int p, int e,
                                           Access access) {
  const int64_t at = (((int64_t)k * a.batch + b) * a.plan.slots + p) * a.conv.width + e;
  const float factor = a.slot_weight ? a.factor * a.slot_weight[(int64_t)a.plan.sample(b) * a.plan.slots + p] : a.factor;
  Vec value = slot.value;
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    if (MODE == Mode::MAX) {
      if (i < access.count) a.best[at + i] = slot.best[i];
      if (slot.best[i] < 0) value[i] = 0.0f;
    } else {
      value[i] *= factor;
    }
  }
  store((T *)a.out + at, value, access);
}

constexpr int LISTED = 256;  // steps per list of tokens in shared memory; a multiple of all window sizes

// Reads x once. Block: (sample, cells, run, chunk of channels). MANY: consecutive steps belong to different slots of the
// cell's inner axis, whose sums are in shared memory, separately for each thread, and the block has one cell. Otherwise
// there is one slot, in registers.
template <class T, Mode MODE, bool MANY, bool WHOLE>
__global__ void __launch_bounds__(128) walk_kernel(const __grid_constant__ PoolArguments a) {
  constexpr int STEPS = STEPS_PER_TURN<T>;
  int item = (int)blockIdx.x;
  const int chunk = item % a.chunks, run = item / a.chunks % a.runs;
  item /= a.chunks * a.runs;
  const int groups = (a.cells + a.block_cells - 1) / a.block_cells, b = item / groups;
  int cell = item % groups * a.block_cells;
  const int e = (chunk * (int)blockDim.x + (int)threadIdx.x) * VEC;
  const bool exists = e < a.conv.width;
  const int inner = MANY ? a.inner : 1;
  const int to_cell = min(cell + a.block_cells, a.cells);
  const int first = (cell * a.members + run * a.run_members) * inner;
  const int last = ((to_cell - 1) * a.members + min((run + 1) * a.run_members, a.members)) * inner;

  // Shared memory: the list of tokens, then slot (k, c) per thread.
  int *list = reinterpret_cast<int *>(shared_memory);
  constexpr int PARTS = MODE == Mode::MAX ? 2 : 1;
  float4 *shared = reinterpret_cast<float4 *>(list + LISTED) + threadIdx.x;
  const auto place = [&](int k, int c) { return shared + (k * inner + c) * PARTS * (int)blockDim.x; };
  const auto read = [&](int k, int c) {
    Slot<MODE> slot;
    slot.value = unpack(Raw<float>{*place(k, c)});
    if (MODE == Mode::MAX) {
      const int4 best = reinterpret_cast<const int4 *>(place(k, c))[blockDim.x];
      slot.best[0] = best.x, slot.best[1] = best.y, slot.best[2] = best.z, slot.best[3] = best.w;
    }
    return slot;
  };
  const auto write = [&](int k, int c, const Slot<MODE> &slot) {
    *place(k, c) = {slot.value[0], slot.value[1], slot.value[2], slot.value[3]};
    if (MODE == Mode::MAX)
      reinterpret_cast<int4 *>(place(k, c))[blockDim.x] = {slot.best[0], slot.best[1], slot.best[2], slot.best[3]};
  };
  const Access access = a.conv.access<WHOLE>(e);
  const auto finish = [&](int k, int c, const Slot<MODE> &slot) {
    const int p = cell * inner + c;
    if (!a.partial) {
      write_slot<T, MODE>(a, slot, k, b, p, e, access);
      return;
    }
    const int64_t at = ((((int64_t)run * 2 + k) * a.batch + b) * a.plan.slots + p) * a.conv.width + e;
    store(a.partial + at, slot.value, access);
    if (MODE == Mode::MAX)
#pragma unroll
      for (int i = 0; i < VEC; ++i)
        if (i < access.count) a.partial_best[at + i] = slot.best[i];
  };
  // Slots of this cell, and of the next one if it begins within the same window.
  Slot<MODE> single[2], next[2];
  if (MANY)
    for (int k = 0; k < 2; ++k)
      for (int c = 0; c < inner; ++c) write(k, c, Slot<MODE>());

  Taps taps;
  const T *x = (const T *)a.conv.x + b * a.conv.x_batch;
  const float *share[2];
  for (int k = 0; k < 2; ++k) share[k] = a.share + ((int64_t)k * a.batch + b) * a.plan.length;
  Window<T, STEPS, WHOLE> window;
  if (exists) {
    taps = load_taps<WHOLE>(a.conv, e, SILU_SCALE<T>);
    Cursor start(a.plan, b, first - REACH);
    window.start(x, a.conv, e, start);
  }
  const int cell_steps = a.members * inner;
  int c = 0, left = a.block_cells > 1 ? cell_steps : last - first;  // steps to the end of the cell
  for (int listed = first; listed < last; listed += LISTED) {
    __syncthreads();
    ListedTokens::fill(a.plan, b, listed + REACH, LISTED, list);
    __syncthreads();
    if (!exists) continue;
    ListedTokens ahead(list);
    const int end = min(listed + LISTED, last);
    for (int step = listed; step < end; step += STEPS) {
      window.turn(x, a.conv, e, ahead);
#pragma unroll
      for (int t = 0; t < STEPS; ++t) {
        if (step + t >= last) break;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const Vec u = silu_of_scaled<T>(window.conv(taps, k, t));
          const float weight = MODE == Mode::WEIGHTED ? share[k][step + t] : 1.0f;
          if (MANY) {
            Slot<MODE> slot = read(k, c);
            slot.add(u, weight, step + t, false);
            write(k, c, slot);
          } else if (t < left) {
            single[k].add(u, weight, step + t, false);
          } else {
            next[k].add(u, weight, step + t, false);
          }
        }
        if (MANY && ++c == inner) c = 0;
      }
      if (MANY) continue;
      if (left <= STEPS) {
        for (int k = 0; k < 2; ++k) finish(k, 0, single[k]), single[k] = next[k], next[k] = Slot<MODE>();
        ++cell, left += cell_steps;
      }
      left -= STEPS;
    }
  }
  if (MANY && exists)
    for (int k = 0; k < 2; ++k)
      for (int i = 0; i < inner; ++i) finish(k, i, read(k, i));
}

// Combines the runs of a cell, in order. Block: (direction, sample, slot, chunk of channels).
template <class T, Mode MODE>
__global__ void __launch_bounds__(128) combine_kernel(const __grid_constant__ PoolArguments a) {
  int item = (int)blockIdx.x;
  const int chunk = item % a.chunks;
  item /= a.chunks;
  const int p = item % a.plan.slots, b = item / a.plan.slots % a.batch, k = item / a.plan.slots / a.batch;
  const int e = (chunk * (int)blockDim.x + (int)threadIdx.x) * VEC;
  if (e >= a.conv.width) return;
  const Access access = a.conv.access(e);
  Slot<MODE> slot;
  for (int run = 0; run < a.runs; ++run) {
    const int64_t at = ((((int64_t)run * 2 + k) * a.batch + b) * a.plan.slots + p) * a.conv.width + e;
    const Vec value = load(a.partial + at, access);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      if (MODE != Mode::MAX) slot.value[i] += value[i];
      if (MODE == Mode::MAX && i < access.count && (value[i] > slot.value[i] || value[i] != value[i]))
        slot.value[i] = value[i], slot.best[i] = a.partial_best[at + i];
    }
  }
  write_slot<T, MODE>(a, slot, k, b, p, e, access);
}

// Any plan. Block: (direction, sample, slot, chunk of channels). Direction 1 visits the steps from last to first, so that
// in both directions a neighbouring step needs one more token.
template <class T, Mode MODE>
__global__ void __launch_bounds__(128) gather_kernel(const __grid_constant__ PoolArguments a) {
  int item = (int)blockIdx.x;
  const int chunk = item % a.chunks;
  item /= a.chunks;
  const int p = item % a.plan.slots, b = item / a.plan.slots % a.batch, k = item / a.plan.slots / a.batch;
  const int e = (chunk * (int)blockDim.x + (int)threadIdx.x) * VEC;
  if (e >= a.conv.width) return;
  const Access access = a.conv.access(e);
  const T *x = (const T *)a.conv.x + b * a.conv.x_batch + e;
  const Taps all = load_taps(a.conv, e, SILU_SCALE<T>);
  Vec w[TAPS];
#pragma unroll
  for (int j = 0; j < TAPS; ++j) w[j] = k ? all.w[1][j] : all.w[0][j];
  const Vec bias = k ? all.bias[1] : all.bias[0];
  const int count = a.plan.steps_of(b), sign = k ? 1 : -1;
  const float *share = a.share + ((int64_t)k * a.batch + b) * a.plan.length;
  const auto token_of = [&](int s) {
    return s >= 0 && s < count ? load(x + (int64_t)token_at(a.plan, b, s) * a.conv.x_token, access) : splat(0.0f);
  };

  const Members members(a.plan, k, b, p);
  Slot<MODE> slot;
  Vec seen[TAPS];  // seen[TAPS - 1] is the current token
  int before = -2 - TAPS;
  for (int i = 0; i < members.count(); ++i) {
    const int s = members.step(k ? members.count() - 1 - i : i);
    if (s == before - sign) {
#pragma unroll
      for (int j = 0; j < REACH; ++j) seen[j] = seen[j + 1];
      seen[REACH] = token_of(s);
    } else {
#pragma unroll
      for (int j = 0; j < TAPS; ++j) seen[j] = token_of(s + sign * (REACH - j));
    }
    before = s;
    Vec c = bias;
#pragma unroll
    for (int j = 0; j < TAPS; ++j)
#pragma unroll
      for (int v = 0; v < VEC; ++v) c[v] = fmaf(w[j][v], seen[j][v], c[v]);
    slot.add(silu_of_scaled<T>(c), MODE == Mode::WEIGHTED ? share[s] : 1.0f, s, k == 1);
  }
  write_slot<T, MODE>(a, slot, k, b, p, e, access);
}

// No pooling: u of every step is written. Block: (sample, run of steps, chunk of channels).
template <class T, bool WHOLE>
__global__ void __launch_bounds__(128) direct_kernel(const __grid_constant__ PoolArguments a) {
  constexpr int STEPS = STEPS_PER_TURN<T>;
  int *list = reinterpret_cast<int *>(shared_memory);  // LISTED
  int item = (int)blockIdx.x;
  const int chunk = item % a.chunks, run = item / a.chunks % a.runs, b = item / a.chunks / a.runs;
  const int e = (chunk * (int)blockDim.x + (int)threadIdx.x) * VEC;
  const int first = run * a.run_members, last = min(first + a.run_members, a.plan.length);
  ListedTokens::fill(a.plan, b, first - REACH, LISTED, list);
  __syncthreads();
  if (e >= a.conv.width) return;
  const Access access = a.conv.access<WHOLE>(e);
  const Taps taps = load_taps<WHOLE>(a.conv, e, SILU_SCALE<T>);
  const T *x = (const T *)a.conv.x + b * a.conv.x_batch;
  ListedTokens ahead(list);
  Window<T, STEPS, WHOLE> window;
  window.start(x, a.conv, e, ahead);
  for (int step = first; step < last; step += STEPS) {
    window.turn(x, a.conv, e, ahead);
#pragma unroll
    for (int t = 0; t < STEPS; ++t)
      if (step + t < last)
#pragma unroll
        for (int k = 0; k < 2; ++k)
          store((T *)a.out + (((int64_t)k * a.batch + b) * a.plan.length + step + t) * a.conv.width + e,
                silu_of_scaled<T>(window.conv(taps, k, t)), access);
  }
}

// --------------------------------------------------------------------------------------------------------------------
// Attention: scores, their softmax over a slot, and its gradient. An ablation of the paper: simple rather than fast.

struct ScoreArguments {
  ConvSource conv;
  Plan plan;
  int batch, tiles;
  const float *row;  // (2, E), or null to use grad
  const void *grad;  // (2, B, P, E)
  float *out;        // (2, B, L)
};

constexpr int SCORE_STEPS = 4;

// Dot product of u with one row per direction, or with the gradient of the step's slot. Block: (sample, four steps).
template <class T> __global__ void __launch_bounds__(128) score_kernel(const __grid_constant__ ScoreArguments a) {
  float *scratch = reinterpret_cast<float *>(shared_memory);  // (warps, 2 * SCORE_STEPS)
  const int b = (int)blockIdx.x / a.tiles, first = (int)blockIdx.x % a.tiles * SCORE_STEPS;
  const int E = a.conv.width, L = a.plan.length, count = a.plan.steps_of(b);
  const T *x = (const T *)a.conv.x + b * a.conv.x_batch;
  float dot[2][SCORE_STEPS] = {};
  for (int e = (int)threadIdx.x * VEC; e < E; e += (int)blockDim.x * VEC) {
    const Access access = a.conv.access(e);
    const Taps taps = load_taps(a.conv, e, SILU_SCALE<T>);
    Cursor here(a.plan, b, first), ahead(a.plan, b, first - REACH);
    Window<T, SCORE_STEPS> window;
    window.start(x, a.conv, e, ahead);
    window.turn(x, a.conv, e, ahead);
#pragma unroll
    for (int t = 0; t < SCORE_STEPS; ++t, here.next())
      if (here.exists())
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int64_t line = ((int64_t)k * a.batch + b) * a.plan.slots;
          const Vec u = silu_of_scaled<T>(window.conv(taps, k, t));
          const Vec r = a.row ? load_row(a.row + k * E, e, access, 0.0f)
                              : load((const T *)a.grad + (line + here.slot(k)) * E + e, access);
#pragma unroll
          for (int i = 0; i < VEC; ++i)
            if (i < access.count) dot[k][t] = fmaf(u[i], r[i], dot[k][t]);
        }
  }
  const int warp = (int)threadIdx.x / 32, warps = (int)blockDim.x / 32;
#pragma unroll
  for (int k = 0; k < 2; ++k)
#pragma unroll
    for (int t = 0; t < SCORE_STEPS; ++t) {
      const float total = sum_of_warp(dot[k][t]);
      if (threadIdx.x % 32 == 0) scratch[(warp * 2 + k) * SCORE_STEPS + t] = total;
    }
  __syncthreads();
  if (threadIdx.x >= 2 * SCORE_STEPS) return;
  const int k = (int)threadIdx.x / SCORE_STEPS, s = first + (int)threadIdx.x % SCORE_STEPS;
  float total = 0.0f;
  for (int w = 0; w < warps; ++w) total += scratch[w * 2 * SCORE_STEPS + (int)threadIdx.x];
  if (s < count) a.out[((int64_t)k * a.batch + b) * L + s] = total;
}

// One thread per slot: softmax of its scores, in place. The bias of the score cancels.
__global__ void __launch_bounds__(128) softmax_kernel(const __grid_constant__ Plan plan, int batch, float *share) {
  const int64_t item = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (item >= 2 * (int64_t)batch * plan.slots) return;
  const int p = (int)(item % plan.slots), b = (int)(item / plan.slots % batch), k = (int)(item / plan.slots / batch);
  const Members members(plan, k, b, p);
  float *row = share + ((int64_t)k * batch + b) * plan.length;
  float top = -INFINITY, total = 0.0f;
  for (int i = 0; i < members.count(); ++i) {
    const float score = row[members.step(i)];
    if (!(score <= top)) top = score;
  }
  for (int i = 0; i < members.count(); ++i) {
    float &score = row[members.step(i)];
    score = expf(score - top);
    total += score;
  }
  for (int i = 0; i < members.count(); ++i) row[members.step(i)] /= total;
}

// One thread per slot: gradients of the scores from those of the shares, in place, and their sum over the slot.
__global__ void __launch_bounds__(128)
    softmax_grad_kernel(const __grid_constant__ Plan plan, int batch, const float *share, float *score, float *sums) {
  const int64_t item = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (item >= 2 * (int64_t)batch * plan.slots) return;
  const int p = (int)(item % plan.slots), b = (int)(item / plan.slots % batch), k = (int)(item / plan.slots / batch);
  const Members members(plan, k, b, p);
  const int64_t line = ((int64_t)k * batch + b) * plan.length;
  float mean = 0.0f, total = 0.0f;
  for (int i = 0; i < members.count(); ++i) {
    const int s = members.step(i);
    mean = fmaf(share[line + s], score[line + s], mean);
  }
  for (int i = 0; i < members.count(); ++i) {
    const int s = members.step(i);
    const float g = share[line + s] * (score[line + s] - mean);
    score[line + s] = g;
    total += g;
  }
  sums[item] = total;
}

template <class T>
int run_scores(const cellvim_conv_pool &a, const ConvSource &conv, const Plan &plan, const float *row, float *out,
               const cellvim_cuda_call &call) {
  ScoreArguments s = {conv, plan, (int)a.batch, divide_up(plan.length, SCORE_STEPS), row, a.grad_out, out};
  return launch(call, score_kernel<T>, (int64_t)s.batch * s.tiles, 128, 4 * 2 * SCORE_STEPS * sizeof(float), s);
}

// --------------------------------------------------------------------------------------------------------------------

constexpr size_t MOST_SHARED = 64 * 1024;  // limit for a block of the walk; plans that need more use the gather

// Sets the (kept, pooled, kept) axes of a dense plan; returns false if it has other axes.
bool find_cells(const cellvim_plan &plan, PoolArguments &a) {
  a.cells = a.members = a.inner = 1;
  for (int axis = 0; axis < 3; ++axis) {
    const int size = (int)plan.sizes[axis];
    if (size == 1) continue;
    if (plan.pooled[axis]) {
      if (a.inner > 1) return false;
      a.members *= size;
    } else {
      (a.members > 1 ? a.inner : a.cells) *= size;
    }
  }
  return true;
}

template <class T, Mode MODE>
int forward(PoolArguments a, const cellvim_plan &plan, bool is_direct, const cellvim_cuda_call &call,
            Workspace &workspace, bool is_counting) {
  const Chunks chunks = chunks_of(a.conv.width, 128);
  a.chunks = chunks.count;
  a.runs = 1;
  if (is_direct) {
    constexpr int RUN = 96;
    static_assert(RUN + 2 * REACH + STEPS_PER_TURN<T> <= LISTED, "a run's tokens are listed at once");
    a.run_members = RUN, a.runs = divide_up(a.plan.length, a.run_members);
    if (is_counting) return CELLVIM_OK;
    return launch(call, a.conv.whole ? direct_kernel<T, true> : direct_kernel<T, false>,
                  (int64_t)a.batch * a.runs * a.chunks, chunks.threads, LISTED * sizeof(int), a);
  }
  const size_t each = 2 * (size_t)chunks.threads * VEC * sizeof(float) * (MODE == Mode::MAX ? 2 : 1);
  const bool walks = !a.plan.indexed && find_cells(plan, a) && (a.inner == 1 || a.inner * each <= MOST_SHARED);
  if (!walks) {
    if (is_counting) return CELLVIM_OK;
    return launch(call, gather_kernel<T, MODE>, 2 * (int64_t)a.batch * a.plan.slots * a.chunks, chunks.threads, 0, a);
  }
  // Few long cells are divided, independently of the batch size: an image's sums must not depend on other images.
  const int most = clamp(a.members * a.inner / 64, 1, a.members > 0 ? a.members : 1);
  a.runs = clamp(8 / (a.cells > 0 ? a.cells : 1), 1, most);
  a.run_members = divide_up(a.members, a.runs);
  a.runs = divide_up(a.members, a.run_members > 0 ? a.run_members : 1);
  // Many short cells are processed by the same block, which then starts fewer windows.
  const bool is_one_a_block = a.runs > 1 || a.inner > 1 || a.members < STEPS_PER_TURN<T>;
  a.block_cells = is_one_a_block ? 1 : clamp(112 / clamp(a.members, 1, 112), 1, a.cells > 0 ? a.cells : 1);
  if (a.runs > 1) {
    const int64_t size = (int64_t)a.runs * 2 * a.batch * a.plan.slots * a.conv.width;
    a.partial = workspace.take<float>(size);
    if (MODE == Mode::MAX) a.partial_best = workspace.take<int32_t>(size);
  }
  if (is_counting) return CELLVIM_OK;
  const int64_t blocks = (int64_t)a.batch * divide_up(a.cells, a.block_cells) * a.runs * a.chunks;
  constexpr bool CAN = MODE == Mode::SUM;  // the other pools are ablations: one kernel for all widths
  const bool whole = CAN && a.conv.whole;
  const size_t shared = LISTED * sizeof(int) + (a.inner > 1 ? a.inner * each : 0);
  if (a.inner == 1)
    CELLVIM_TRY(launch(call, whole ? walk_kernel<T, MODE, false, CAN> : walk_kernel<T, MODE, false, false>, blocks,
                       chunks.threads, shared, a));
  else
    CELLVIM_TRY(launch(call, whole ? walk_kernel<T, MODE, true, CAN> : walk_kernel<T, MODE, true, false>, blocks,
                       chunks.threads, shared, a));
  if (a.runs == 1) return CELLVIM_OK;
  return launch(call, combine_kernel<T, MODE>, 2 * (int64_t)a.batch * a.plan.slots * a.chunks, chunks.threads, 0, a);
}

template <class T>
int forward(const cellvim_conv_pool &a, const ConvSource &conv, const Plan &plan, bool is_direct,
            const cellvim_cuda_call &call, Workspace &workspace, bool is_counting) {
  PoolArguments p = {};
  p.conv = conv, p.plan = plan, p.batch = (int)a.batch;
  p.out = a.out, p.best = a.best, p.share = a.share;
  p.factor = a.pool == CELLVIM_POOL_MEAN && !plan.indexed ? plan.mean_weight : 1.0f;
  p.slot_weight = a.pool == CELLVIM_POOL_MEAN && plan.indexed ? plan.slot_weight : nullptr;
  if (a.pool == CELLVIM_POOL_MAX && !is_direct)
    return forward<T, Mode::MAX>(p, a.plan, is_direct, call, workspace, is_counting);
  if (a.pool != CELLVIM_POOL_ATTENTION || is_direct)
    return forward<T, Mode::SUM>(p, a.plan, is_direct, call, workspace, is_counting);
  if (!is_counting) {
    if (plan.indexed) CELLVIM_TRY(zero(call, a.share, 2 * a.batch * plan.length * (int64_t)sizeof(float)));
    CELLVIM_TRY(run_scores<T>(a, conv, plan, a.score_weight, a.share, call));
    CELLVIM_TRY(launch(call, softmax_kernel, divide_up<int64_t>(2 * a.batch * plan.slots, 128), 128, 0, plan,
                       (int)a.batch, a.share));
  }
  return forward<T, Mode::WEIGHTED>(p, a.plan, is_direct, call, workspace, is_counting);
}

template <class T>
int backward(const cellvim_conv_pool &a, const ConvSource &conv, const Plan &plan, bool is_direct,
             const cellvim_cuda_call &call, Workspace &workspace, bool is_counting) {
  AdjointArguments adjoint = {};
  adjoint.conv = conv, adjoint.plan = plan, adjoint.batch = (int)a.batch;
  adjoint.grad = a.grad_out, adjoint.grad_x = a.grad_x;
  adjoint.best = a.best, adjoint.share = a.share;
  const bool is_mean = a.pool == CELLVIM_POOL_MEAN && !is_direct;
  adjoint.factor = is_mean && !plan.indexed ? plan.mean_weight : 1.0f;
  adjoint.slot_weight = is_mean && plan.indexed ? plan.slot_weight : nullptr;
  const int threads = plan_adjoint(adjoint, call.device, workspace);
  const bool is_attention = a.pool == CELLVIM_POOL_ATTENTION && !is_direct;
  float *score = nullptr, *sums = nullptr;
  if (is_attention) {
    score = workspace.take<float>(2 * a.batch * plan.length);
    sums = workspace.take<float>(2 * a.batch * plan.slots);
  }
  if (is_counting) return CELLVIM_OK;
  if (is_attention) {
    adjoint.score = score, adjoint.row = a.score_weight;
    CELLVIM_TRY(run_scores<T>(a, conv, plan, nullptr, score, call));
    CELLVIM_TRY(launch(call, softmax_grad_kernel, divide_up<int64_t>(2 * a.batch * plan.slots, 128), 128, 0, plan,
                       (int)a.batch, (const float *)a.share, score, sums));
    for (int k = 0; k < 2; ++k)
      CELLVIM_TRY(sum_rows(call, sums + k * a.batch * plan.slots, a.batch * plan.slots, 1, 0, 1,
                           a.grad_score_bias ? a.grad_score_bias + k : nullptr));
    CELLVIM_TRY((run_adjoint<T, Adjoint::ATTENTION>(adjoint, threads, call)));
  } else if (a.pool == CELLVIM_POOL_MAX && !is_direct) {
    CELLVIM_TRY((run_adjoint<T, Adjoint::MAX>(adjoint, threads, call)));
  } else {
    CELLVIM_TRY((run_adjoint<T, Adjoint::SUM>(adjoint, threads, call)));
  }
  return sum_adjoint(call, adjoint.partial, adjoint.workers, conv.width, conv.taps, 1.0f, a.grad_weight, a.grad_bias,
                     is_attention ? a.grad_score_weight : nullptr);
}

}  // namespace

int conv_pool(const cellvim_conv_pool &a, bool is_backward, const cellvim_cuda_call &call, int64_t *bytes) {
  if (a.taps < 1 || a.taps > TAPS) return CELLVIM_BAD_ARGUMENT;
  Workspace workspace(call.workspace);
  bool is_direct = !a.plan.order && a.pool == CELLVIM_POOL_NONE;
  is_direct |= !a.plan.order && !a.plan.pooled[0] && !a.plan.pooled[1] && !a.plan.pooled[2];
  cellvim_plan walked = a.plan;
  if (is_direct)
    for (int64_t &away : walked.pooled) away = 0;
  Plan plan;
  CELLVIM_TRY(make_plan(walked, true, workspace, plan));
  ConvSource conv = conv_source(a.x, a.x_batch, a.x_token, a.width, a.taps, a.dtype, a.weight, a.bias);
  const size_t vector = VEC * size_of(a.dtype);
  conv.whole &= is_aligned(a.out, vector) && is_aligned(a.grad_out, vector) && is_aligned(a.grad_x, vector);
  if (!bytes) CELLVIM_TRY(fill_tables(a.plan, true, plan, call));
  const int status = for_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    return is_backward ? backward<T>(a, conv, plan, is_direct, call, workspace, bytes != nullptr)
                       : forward<T>(a, conv, plan, is_direct, call, workspace, bytes != nullptr);
  });
  if (bytes) *bytes = workspace.used();
  return status;
}

}  // namespace cellvim
