// conv_pool: causal convolution in both directions and SiLU, reduced directly to the pooled sequences.
//
// x is read once, and the unpooled convolution stays in registers. A work item processes a chunk of channels of one
// sample: it visits the tokens in the block's order and adds each to its slot.
#include "conv_adjoint.h"
#include "kernels.h"

namespace CELLVIM_ISA {
namespace {

constexpr int64_t TILE = 32;        // steps per load of the weights
constexpr int64_t SCORE_TILE = 16;  // steps per work item of the attention scores

enum class Mode { DIRECT, SUM, MAX, WEIGHTED };

// Per thread: running sums (or maxima) of the slots and steps of the maxima, (2, P, CHUNK) each.
struct Scratch {
  float *acc;
  int32_t *best;
};

bool pools_nothing(const cellvim_conv_pool &a) {
  const bool any = a.plan.pooled[0] || a.plan.pooled[1] || a.plan.pooled[2];
  return !a.plan.order && (a.pool == CELLVIM_POOL_NONE || !any);
}

Mode mode_of(const cellvim_conv_pool &a) {
  if (pools_nothing(a)) return Mode::DIRECT;
  if (a.pool == CELLVIM_POOL_MAX) return Mode::MAX;
  if (a.pool == CELLVIM_POOL_ATTENTION) return Mode::WEIGHTED;
  return Mode::SUM;
}

const float *slot_weight_of(const cellvim_conv_pool &a, int64_t b) {
  return a.plan.slot_weight + (a.plan.index_batch == 1 ? 0 : b) * a.plan.slots;
}

template <class T, int W, Mode MODE, bool FULL>
void pool_tile(const cellvim_conv_pool &a, const Tokens &tokens, const PackedTaps &packed, const T *const *rows,
               int64_t b, int64_t first, int64_t steps, int64_t e, int n, int64_t column, Scratch scratch) {
  const Taps<W> taps = Taps<W>::at(packed, e);
  const int64_t P = a.plan.slots, E = a.width, L = a.plan.length;
  convolve<TILE, T, W, FULL>(rows, steps, taps, e, n,
                       [&](int64_t t, vf c0, vf c1, const Window<T, W, FULL> &) CELLVIM_LAMBDA {
    const int64_t l = first + t;
    for (int k = 0; k < 2; ++k) {
      const vf u = silu(k ? c1 : c0);
      if (MODE == Mode::DIRECT) {
        store<FULL>((T *)a.out + ((k * a.batch + b) * L + l) * E + e, u, n);
        continue;
      }
      const int64_t at = (k * P + tokens.slot[k][l]) * CHUNK + column;
      float *acc = scratch.acc + at;
      const vf before = load(acc);
      if (MODE == Mode::SUM) store(acc, before + u);
      if (MODE == Mode::WEIGHTED) store(acc, before + u * a.share[(k * a.batch + b) * L + l]);
      if (MODE == Mode::MAX) {
        int32_t *best = scratch.best + at;
        const vi wins = (u > before) | (u != u);  // NaN counts as the maximum
        store(acc, wins ? u : before);
        store_int(best, wins ? vi{} + (int32_t)l : load_int(best, LANES), LANES);
      }
    }
  });
}

template <class T, int W, Mode MODE>
void pool_chunk(const cellvim_conv_pool &a, const Walk &walk, const PackedTaps &packed, const T *zeros, int64_t b,
                int64_t from, Scratch scratch) {
  const int64_t P = a.plan.slots, E = a.width, to = least(from + CHUNK, E);
  const Tokens tokens = walk.of(b);
  const T *x = (const T *)a.x + b * a.x_batch;
  if (MODE != Mode::DIRECT)
    for (int64_t i = 0; i < 2 * P * CHUNK; ++i) {
      scratch.acc[i] = MODE == Mode::MAX ? -__builtin_inff() : 0.0f;
      if (MODE == Mode::MAX) scratch.best[i] = -1;
    }
  const T *rows[2 * TILE + 2 * W];
  for (int64_t first = 0; first < tokens.count; first += TILE) {
    const int64_t steps = least(TILE, tokens.count - first);
    point_rows<T, W>(rows, tokens, first, TILE, x, a.x_token, zeros);
    CELLVIM_FOR_VECTORS(
        e, from, to,
        (pool_tile<T, W, MODE, true>(a, tokens, packed, rows, b, first, steps, e, LANES, e - from, scratch)),
        (pool_tile<T, W, MODE, false>(a, tokens, packed, rows, b, first, steps, e, (int)(to - e), e - from, scratch)));
  }
  if (MODE == Mode::DIRECT) return;
  const float *slot_weight = a.plan.order && a.pool == CELLVIM_POOL_MEAN ? slot_weight_of(a, b) : nullptr;
  const float dense = !a.plan.order && a.pool == CELLVIM_POOL_MEAN ? a.plan.mean_weight : 1.0f;
  for (int k = 0; k < 2; ++k)
    for (int64_t p = 0; p < P; ++p) {
      const int64_t at = ((k * a.batch + b) * P + p) * E;
      const float *acc = scratch.acc + (k * P + p) * CHUNK;
      const int32_t *best = scratch.best + (k * P + p) * CHUNK;
      const float factor = slot_weight ? slot_weight[p] : dense;
      for (int64_t e = from; e < to; e += LANES) {
        const int n = (int)least(LANES, to - e);
        vf v = load(acc + e - from);
        if (MODE == Mode::MAX) {
          const vi winner = load_int(best + e - from, LANES);
          v = winner < 0 ? vf{} : v;
          store_int(a.best + at + e, winner, n);
        } else {
          v *= factor;
        }
        if (n == LANES)
          store((T *)a.out + at + e, v);
        else
          store_some((T *)a.out + at + e, v, n);
      }
    }
}

// Dot products of u with one row per direction, for the steps of a tile: the attention score or its gradient.
template <class T, int W, bool PER_SLOT>
void dot_tile(const cellvim_conv_pool &a, const Tokens &tokens, const PackedTaps &packed, const T *zeros, int64_t b,
              int64_t first, const float *row, float *out) {
  const int64_t steps = least(SCORE_TILE, tokens.count - first), E = a.width, P = a.plan.slots, L = a.plan.length;
  const T *rows[2 * SCORE_TILE + 2 * W];
  point_rows<T, W>(rows, tokens, first, SCORE_TILE, (const T *)a.x + b * a.x_batch, a.x_token, zeros);
  vf total[2][SCORE_TILE] = {};
  auto add = [&](auto full, int64_t e, int n) CELLVIM_LAMBDA {
    constexpr bool FULL = decltype(full)::value;
    const Taps<W> taps = Taps<W>::at(packed, e);
    convolve<SCORE_TILE, T, W, FULL>(rows, steps, taps, e, n,
                         [&](int64_t t, vf c0, vf c1, const Window<T, W, FULL> &) CELLVIM_LAMBDA {
      for (int k = 0; k < 2; ++k) {
        const vf u = silu(k ? c1 : c0);
        if (PER_SLOT) {
          const int64_t slot = tokens.slot[k][first + t];
          total[k][t] += u * load<FULL>((const T *)a.grad_out + ((k * a.batch + b) * P + slot) * E + e, n);
        } else {
          total[k][t] += u * load(row + k * packed.stride + e);
        }
      }
    });
  };
  CELLVIM_FOR_VECTORS(e, 0, E, add(Choice<true>{}, e, LANES), add(Choice<false>{}, e, (int)(E - e)));
  for (int k = 0; k < 2; ++k)
    for (int64_t t = 0; t < steps; ++t) out[(k * a.batch + b) * L + first + t] = sum(total[k][t]);
}

template <class T, int W, bool PER_SLOT>
void dot_all(const cellvim_conv_pool &a, const Walk &walk, const PackedTaps &packed, const T *zeros, const float *row,
             float *out) {
  const int64_t tiles = divide_up(a.plan.length, SCORE_TILE);
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t item = 0; item < a.batch * tiles; ++item) {
    const int64_t b = item / tiles, first = item % tiles * SCORE_TILE;
    const Tokens tokens = walk.of(b);
    if (first < tokens.count) dot_tile<T, W, PER_SLOT>(a, tokens, packed, zeros, b, first, row, out);
  }
}

// Softmax of the scores (in place) over the tokens of each slot. `work` is (2, B, 2, P).
void softmax_by_slot(const cellvim_conv_pool &a, const Walk &walk, float *work) {
  const int64_t P = a.plan.slots, L = a.plan.length;
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t item = 0; item < 2 * a.batch; ++item) {
    const int64_t k = item / a.batch, b = item % a.batch;
    const Tokens tokens = walk.of(b);
    const int32_t *slot = tokens.slot[k];
    float *share = a.share + item * L, *top = work + item * 2 * P, *total = top + P;
    for (int64_t p = 0; p < P; ++p) top[p] = -__builtin_inff(), total[p] = 0.0f;
    for (int64_t l = 0; l < tokens.count; ++l)
      if (!(share[l] <= top[slot[l]])) top[slot[l]] = share[l];
    for (int64_t l = 0; l < tokens.count; l += LANES) {
      const int n = (int)least(LANES, tokens.count - l);
      float lanes[LANES] = {};
      for (int i = 0; i < n; ++i) lanes[i] = share[l + i] - top[slot[l + i]];
      store(lanes, exp2<false>(load(lanes) * LOG2E));
      for (int i = 0; i < n; ++i) total[slot[l + i]] += share[l + i] = lanes[i];
    }
    for (int64_t l = 0; l < tokens.count; ++l) share[l] /= total[slot[l]];
    for (int64_t l = tokens.count; l < L; ++l) share[l] = 0.0f;
  }
}

template <class T, int W, Mode MODE>
int forward(const cellvim_conv_pool &a, const Walk &walk, const PackedTaps &packed, const T *zeros) {
  const int64_t P = a.plan.slots;
  if (MODE == Mode::WEIGHTED) {
    Buffer<float> row, work(4 * a.batch * P);
    if (!work.data || !pad_rows(row, a.score_weight, 2, a.width, 0.0f)) return CELLVIM_NO_MEMORY;
    dot_all<T, W, false>(a, walk, packed, zeros, row.data, a.share);
    for (int64_t item = 0; item < 2 * a.batch; ++item)
      for (int64_t l = 0; l < a.plan.length; ++l) a.share[item * a.plan.length + l] += a.score_bias[item / a.batch];
    softmax_by_slot(a, walk, work.data);
  }
  const int64_t chunks = divide_up(a.width, CHUNK), each = MODE == Mode::DIRECT ? 0 : 2 * P * CHUNK;
  Buffer<float> acc(a.threads * each);
  Buffer<int32_t> best(MODE == Mode::MAX ? a.threads * each : 0);
  if (!acc.data || !best.data) return CELLVIM_NO_MEMORY;
#pragma omp parallel for num_threads(a.threads) schedule(dynamic)
  for (int64_t item = 0; item < a.batch * chunks; ++item) {
    const int64_t mine = thread_number() * each;
    pool_chunk<T, W, MODE>(a, walk, packed, zeros, item / chunks, item % chunks * CHUNK,
                           {acc.data + mine, best.data + (MODE == Mode::MAX ? mine : 0)});
  }
  return CELLVIM_OK;
}

template <class T, int W, Adjoint MODE>
int backward(const cellvim_conv_pool &a, const Walk &walk, const PackedTaps &packed, const T *zeros) {
  const int64_t P = a.plan.slots, E = a.width, L = a.plan.length, rows = adjoint_rows<W>() * packed.stride;
  Buffer<float> score, score_weight, sums(a.batch * rows);
  if (!sums.data) return CELLVIM_NO_MEMORY;
  if (MODE == Adjoint::ATTENTION) {
    // Gradient of the softmax: share * (dot - mean of dot over the slot), dot = grad . u.
    Buffer<float> mean(2 * a.batch * P);
    if (!mean.data || !score.allocate(2 * a.batch * L) || !pad_rows(score_weight, a.score_weight, 2, E, 0.0f))
      return CELLVIM_NO_MEMORY;
    dot_all<T, W, true>(a, walk, packed, zeros, nullptr, score.data);
    a.grad_score_bias[0] = a.grad_score_bias[1] = 0.0f;
    for (int64_t item = 0; item < 2 * a.batch; ++item) {
      const Tokens tokens = walk.of(item % a.batch);
      const int32_t *slot = tokens.slot[item / a.batch];
      float *ds = score.data + item * L, *average = mean.data + item * P;
      const float *share = a.share + item * L;
      for (int64_t l = 0; l < tokens.count; ++l) average[slot[l]] += share[l] * ds[l];
      for (int64_t l = 0; l < tokens.count; ++l) {
        ds[l] = share[l] * (ds[l] - average[slot[l]]);
        a.grad_score_bias[item / a.batch] += ds[l];
      }
    }
  }
  const int64_t chunks = divide_up(E, CHUNK);
#pragma omp parallel for num_threads(a.threads) schedule(dynamic)
  for (int64_t item = 0; item < a.batch * chunks; ++item) {
    const int64_t b = item / chunks, from = item % chunks * CHUNK;
    const Tokens tokens = walk.of(b);
    AdjointSource source;
    for (int k = 0; k < 2; ++k) {
      const int64_t sample = k * a.batch + b;
      source.grad[k] = (const T *)a.grad_out + sample * P * E;
      if (MODE == Adjoint::MAX) source.best[k] = a.best + sample * P * E;
      if (MODE == Adjoint::ATTENTION) {
        source.share[k] = a.share + sample * L;
        source.score[k] = score.data + sample * L;
        source.row[k] = score_weight.data + k * packed.stride;
      }
    }
    const bool is_mean = a.pool == CELLVIM_POOL_MEAN;
    source.slot_factor = a.plan.order && is_mean ? slot_weight_of(a, b) : nullptr;
    source.factor = !a.plan.order && is_mean && !pools_nothing(a) ? a.plan.mean_weight : 1.0f;
    AdjointItem<T, W> work(packed, tokens);
    work.x = (const T *)a.x + b * a.x_batch;
    work.x_token = a.x_token;
    work.zeros = zeros;
    work.width = E, work.from = from, work.to = least(from + CHUNK, E);
    work.grad_x = (T *)a.grad_x + b * a.plan.stored * E;
    work.sums = sums.data + b * rows;
    work.template run<MODE>(source);
  }
  reduce_adjoint(sums.data, a.batch, E, W, a.threads, a.grad_weight, a.grad_bias,
                 MODE == Adjoint::ATTENTION ? a.grad_score_weight : nullptr);
  return CELLVIM_OK;
}

template <class T, int W> int run(const cellvim_conv_pool &a, bool is_backward) {
  Walk walk(a.plan);
  PackedTaps packed;
  Buffer<T> zeros(padded(a.width));
  if (walk.status != CELLVIM_OK) return walk.status;
  if (!zeros.data || !packed.pack(a.weight, a.bias, a.width, W)) return CELLVIM_NO_MEMORY;
  switch (mode_of(a)) {
    case Mode::DIRECT:
      return is_backward ? backward<T, W, Adjoint::SUM>(a, walk, packed, zeros.data)
                         : forward<T, W, Mode::DIRECT>(a, walk, packed, zeros.data);
    case Mode::SUM:
      return is_backward ? backward<T, W, Adjoint::SUM>(a, walk, packed, zeros.data)
                         : forward<T, W, Mode::SUM>(a, walk, packed, zeros.data);
    case Mode::MAX:
      return is_backward ? backward<T, W, Adjoint::MAX>(a, walk, packed, zeros.data)
                         : forward<T, W, Mode::MAX>(a, walk, packed, zeros.data);
    case Mode::WEIGHTED:
      return is_backward ? backward<T, W, Adjoint::ATTENTION>(a, walk, packed, zeros.data)
                         : forward<T, W, Mode::WEIGHTED>(a, walk, packed, zeros.data);
  }
  return CELLVIM_BAD_ARGUMENT;
}

template <class T> int run(const cellvim_conv_pool &a, bool is_backward) {
  switch (a.taps) {
    case 1: return run<T, 1>(a, is_backward);
    case 2: return run<T, 2>(a, is_backward);
    case 3: return run<T, 3>(a, is_backward);
    case 4: return run<T, 4>(a, is_backward);
  }
  return CELLVIM_BAD_ARGUMENT;
}

}  // namespace

int conv_pool(const cellvim_conv_pool &a, bool is_backward) {
  return a.dtype == CELLVIM_BFLOAT16 ? run<bf16>(a, is_backward) : run<float>(a, is_backward);
}

}  // namespace CELLVIM_ISA
