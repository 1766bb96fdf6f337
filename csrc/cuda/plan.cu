// Canonical form of dense plans, and the tables of indexed ones.
#include "plan.cuh"

namespace cellvim {
namespace {

constexpr int THREADS = 256;

// One block per (direction, sample). Slots search their steps one after the other: O(P * L / THREADS), without atomics,
// and the lists are ordered.
__global__ void __launch_bounds__(THREADS) tables_kernel(Plan plan, const int64_t *order, const int64_t *slot,
                                                         int32_t *visited, int32_t *token_out, int32_t *slot_out,
                                                         int32_t *count_out, int32_t *start_out, int32_t *steps_out) {
  int *scratch = reinterpret_cast<int *>(shared_memory);  // THREADS
  const int row = (int)blockIdx.x, b = row % plan.samples, k = row / plan.samples, t = (int)threadIdx.x;
  const int L = plan.length, P = plan.slots;
  order += (int64_t)b * L, slot += (int64_t)row * L;
  token_out += (int64_t)b * plan.tokens, slot_out += (int64_t)row * L, visited += (int64_t)b * plan.stored;

  int count = L;  // steps before the first missing token
  for (int l = t; l < L; l += THREADS)
    if (order[l] < 0 || order[l] >= plan.stored) {
      count = l;
      break;
    }
  scratch[t] = count;
  __syncthreads();
  for (int i = 0; i < THREADS; ++i) count = min(count, scratch[i]);
  __syncthreads();

  int identity = 1;
  for (int l = t; l < L; l += THREADS) {
    const int64_t s = slot[l];
    const bool fits = l < count && s >= 0 && s < P;
    slot_out[l] = fits ? (int)s : 0;
    if (l < count && s != l) identity = 0;
  }
  if (k == 0) {
    if (t == 0) count_out[b] = count;
    for (int i = t; i < plan.stored; i += THREADS) visited[i] = 0;
    __syncthreads();
    for (int l = t; l < count; l += THREADS) {
      token_out[l] = (int)order[l];
      visited[order[l]] = 1;
    }
    __syncthreads();
    // Each thread processes a range of the stored tokens, and writes after those of the threads before it.
    const int stretch = (plan.stored + THREADS - 1) / THREADS, from = t * stretch;
    const int to = min(from + stretch, plan.stored);
    int mine = 0;
    for (int i = from; i < to; ++i) mine += !visited[i];
    scratch[t] = mine;
    __syncthreads();
    int at = count;
    for (int i = 0; i < t; ++i) at += scratch[i];
    for (int i = from; i < to; ++i)
      if (!visited[i] && at < plan.tokens) token_out[at++] = i;  // the limit only matters if a token is visited twice
    __syncthreads();
  }
  if (!start_out) return;
  start_out += (int64_t)row * (P + 1), steps_out += (int64_t)row * L;
  scratch[t] = identity;
  __syncthreads();  // also makes slot_out visible to the block
  for (int i = 0; i < THREADS; ++i) identity &= scratch[i];
  __syncthreads();
  if (identity && count <= P) {
    for (int p = t; p <= P; p += THREADS) start_out[p] = min(p, count);
    for (int l = t; l < count; l += THREADS) steps_out[l] = l;
    return;
  }

  int before = 0;  // steps of the slots of earlier rounds
  for (int first = 0; first < P; first += THREADS) {
    const int p = first + t;
    int mine = 0;
    if (p < P)
      for (int l = 0; l < count; ++l) mine += slot_out[l] == p;
    scratch[t] = mine;
    __syncthreads();
    int at = before, all = 0;
    for (int i = 0; i < THREADS; ++i) {
      if (i < t) at += scratch[i];
      all += scratch[i];
    }
    __syncthreads();
    before += all;
    if (p < P) {
      start_out[p] = at;
      for (int l = 0; l < count && mine > 0; ++l)
        if (slot_out[l] == p) {
          steps_out[at++] = l;
          --mine;
        }
    }
  }
  if (t == 0) start_out[P] = before;
}

}  // namespace

int make_plan(const cellvim_plan &from, bool needs_groups, Workspace &workspace, Plan &plan) {
  plan = Plan{};
  const int64_t limit = 0x7fffffff;
  if (from.length < 0 || from.stored < 0 || from.slots < 0 || from.length > limit || from.stored > limit ||
      from.slots > limit)
    return CELLVIM_BAD_ARGUMENT;
  plan.length = (int)from.length, plan.stored = (int)from.stored, plan.slots = (int)from.slots;
  plan.mean_weight = from.mean_weight;
  plan.indexed = from.order != nullptr;
  plan.samples = 1;
  if (plan.indexed) {
    plan.samples = (int)from.index_batch;
    plan.slot_weight = from.slot_weight;
    plan.tokens = plan.length > plan.stored ? plan.length : plan.stored;
    plan.token = workspace.take<int32_t>(from.index_batch * (plan.tokens + plan.stored));  // and a flag for each
    plan.slot = workspace.take<int32_t>(2 * from.index_batch * from.length);
    plan.count = workspace.take<int32_t>(from.index_batch);
    if (needs_groups) {
      plan.start = workspace.take<int32_t>(2 * from.index_batch * (from.slots + 1));
      plan.steps = workspace.take<int32_t>(2 * from.index_batch * from.length);
    }
    return CELLVIM_OK;
  }
  if (from.length != from.stored || from.sizes[0] * from.sizes[1] * from.sizes[2] != from.length)
    return CELLVIM_BAD_ARGUMENT;
  int64_t last = 0;
  for (int a = 0; a < 3; ++a) {
    if (from.sizes[a] > 1 && from.strides[a] < 0) return CELLVIM_BAD_INDEX;
    if (from.sizes[a] > 0) last += (from.sizes[a] - 1) * from.strides[a];
  }
  if (from.length > 0 && last >= from.stored) return CELLVIM_BAD_INDEX;

  // Innermost axis first: axes of length 1 are dropped, and neighbours with compatible strides are merged.
  int axes = 0, sizes[3], strides[3];
  bool away[3];
  for (int a = 2; a >= 0; --a) {
    const int size = (int)from.sizes[a], stride = (int)from.strides[a];
    if (size == 1) continue;
    const bool pooled = from.pooled[a] != 0;
    if (axes && away[axes - 1] == pooled && stride == sizes[axes - 1] * strides[axes - 1]) {
      sizes[axes - 1] *= size;
    } else {
      sizes[axes] = size, strides[axes] = stride, away[axes++] = pooled;
    }
  }
  int slot_step = 1, step = 1;
  plan.group = 1;
  for (int a = 2; a >= 0; --a) {
    const int i = 2 - a;
    plan.kept_size[a] = plan.group_size[a] = plan.sizes[a] = 1;
    if (i >= axes) continue;
    plan.sizes[a] = sizes[i], plan.token_stride[a] = strides[i];
    plan.slot_stride[a] = away[i] ? 0 : slot_step;
    (away[i] ? plan.group_size : plan.kept_size)[a] = sizes[i];
    (away[i] ? plan.group_step : plan.kept_step)[a] = step;
    (away[i] ? plan.group : slot_step) *= sizes[i];
    step *= sizes[i];
  }
  return slot_step == plan.slots ? CELLVIM_OK : CELLVIM_BAD_ARGUMENT;
}

int fill_tables(const cellvim_plan &from, bool needs_groups, const Plan &plan, const cellvim_cuda_call &call) {
  if (!plan.indexed) return CELLVIM_OK;
  return launch(call, tables_kernel, 2 * plan.samples, THREADS, THREADS * sizeof(int), plan, from.order, from.slot,
                const_cast<int32_t *>(plan.token) + (int64_t)plan.samples * plan.tokens,
                const_cast<int32_t *>(plan.token), const_cast<int32_t *>(plan.slot),
                const_cast<int32_t *>(plan.count), const_cast<int32_t *>(needs_groups ? plan.start : nullptr),
                const_cast<int32_t *>(needs_groups ? plan.steps : nullptr));
}

}  // namespace cellvim
