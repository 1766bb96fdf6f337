// expand_gate: expand the scanned steps to the tokens, add the skip, average the directions, normalise and gate.
//
// The convolution is recomputed from x (4 taps are cheaper than reading it from memory). A work item processes
// consecutive tokens of one sample; a tile of them stays in the cache between mixing and the norm over E.
#include "conv_adjoint.h"
#include "kernels.h"
#include "norm.h"

namespace CELLVIM_ISA {
namespace {

constexpr int64_t TILE = 16;   // steps mixed before they are normalised
constexpr int64_t GROUP = 64;  // steps per work item

// Parameters padded to full vectors; D is halved.
struct Parameters {
  PackedTaps taps;
  Buffer<float> half_skip, norm_weight, norm_bias;

  bool pack(const cellvim_expand_gate &a) {
    return taps.pack(a.weight, a.bias, a.width, a.taps) && pad_rows(half_skip, a.skip, 2, a.width, 0.0f, 0.5f) &&
           pad_rows(norm_weight, a.norm_weight, 1, a.width, 1.0f) && pad_rows(norm_bias, a.norm_bias, 1, a.width, 0.0f);
  }
};

// Writes the mixed tokens of one vector of channels to `mixed` (TILE, padded E): mean of expand(y) + D * u.
template <class T, int W, bool SKIP, bool FULL>
void mix_vector(const Parameters &parameters, const T *const *rows,
                const T *const (*y)[TILE], int64_t steps, int64_t e, int n, float *mixed) {
  const int64_t stride = parameters.taps.stride;
  if (!SKIP) {
    for (int64_t t = 0; t < steps; ++t)
      store(mixed + t * stride + e, (load<FULL>(y[0][t] + e, n) + load<FULL>(y[1][t] + e, n)) * 0.5f);
    return;
  }
  const Taps<W> taps = Taps<W>::at(parameters.taps, e);
  const vf d0 = load(parameters.half_skip.data + e), d1 = load(parameters.half_skip.data + stride + e);
  convolve<TILE, T, W, FULL>(rows, steps, taps, e, n,
                       [&](int64_t t, vf c0, vf c1, const Window<T, W, FULL> &) CELLVIM_LAMBDA {
    const vf expanded = (load<FULL>(y[0][t] + e, n) + load<FULL>(y[1][t] + e, n)) * 0.5f;
    store(mixed + t * stride + e, expanded + d0 * silu(c0) + d1 * silu(c1));
  });
}

template <class T, int W, bool SKIP>
void mix_tile(const cellvim_expand_gate &a, const Parameters &parameters, const Tokens &tokens, const T *zeros,
              int64_t b, int64_t first, int64_t steps, float *mixed) {
  const int64_t visited = least(steps, tokens.count - first);
  if (visited < steps) memset(mixed, 0, sizeof(float) * steps * parameters.taps.stride);
  if (visited <= 0) return;
  const T *rows[2 * TILE + 2 * W];
  const T *y[2][TILE];
  if (SKIP) point_rows<T, W>(rows, tokens, first, TILE, (const T *)a.x + b * a.x_batch, a.x_token, zeros);
  for (int k = 0; k < 2; ++k)
    for (int64_t t = 0; t < visited; ++t)
      y[k][t] = (const T *)a.y + ((k * a.batch + b) * a.plan.slots + tokens.slot[k][first + t]) * a.width;
  CELLVIM_FOR_VECTORS(
      e, 0, a.width, (mix_vector<T, W, SKIP, true>(parameters, rows, y, visited, e, LANES, mixed)),
      (mix_vector<T, W, SKIP, false>(parameters, rows, y, visited, e, (int)(a.width - e), mixed)));
}

template <class T>
void norm_and_gate(const cellvim_expand_gate &a, const Parameters &parameters, const float *row, const T *z, T *out) {
  const Moments m = moments(row, a.width, a.norm, a.eps);
  auto gate = [&](auto full, int64_t e, int n) CELLVIM_LAMBDA {
    constexpr bool FULL = decltype(full)::value;
    const vf normed = (load(row + e) - m.mean) * m.scale * load(parameters.norm_weight.data + e) +
                      load(parameters.norm_bias.data + e);
    store<FULL>(out + e, normed * silu(load<FULL>(z + e, n)), n);
  };
  CELLVIM_FOR_VECTORS(e, 0, a.width, gate(Choice<true>{}, e, LANES), gate(Choice<false>{}, e, (int)(a.width - e)));
}

template <class T, int W, bool SKIP>
int forward(const cellvim_expand_gate &a, const Walk &walk, const Parameters &parameters, const T *zeros) {
  const int64_t groups = divide_up(a.plan.stored, GROUP), each = TILE * parameters.taps.stride;
  Buffer<float> scratch(a.threads * each);
  if (!scratch.data) return CELLVIM_NO_MEMORY;
#pragma omp parallel for num_threads(a.threads) schedule(dynamic)
  for (int64_t item = 0; item < a.batch * groups; ++item) {
    const int64_t b = item / groups, from = item % groups * GROUP, to = least(from + GROUP, a.plan.stored);
    const Tokens tokens = walk.of(b);
    float *mixed = scratch.data + thread_number() * each;
    for (int64_t first = from; first < to; first += TILE) {
      const int64_t steps = least(TILE, to - first);
      mix_tile<T, W, SKIP>(a, parameters, tokens, zeros, b, first, steps, mixed);
      for (int64_t t = 0; t < steps; ++t) {
        const int64_t token = tokens.token[first + t];
        norm_and_gate(a, parameters, mixed + t * parameters.taps.stride,
                      (const T *)a.z + b * a.z_batch + token * a.z_token,
                      (T *)a.out + (b * a.plan.stored + token) * a.width);
      }
    }
  }
  return CELLVIM_OK;
}

// Computes grad_z and the gradient before the norm from the gradient of the output. `work` is a padded row of scratch.
template <class T>
void norm_and_gate_backward(const cellvim_expand_gate &a, const Parameters &parameters, const float *row, int64_t b,
                            int64_t token, float *work, float *sum_weight, float *sum_bias) {
  const Moments m = moments(row, a.width, a.norm, a.eps);
  const int64_t at = (b * a.plan.stored + token) * a.width;
  const T *z = (const T *)a.z + b * a.z_batch + token * a.z_token, *grad_out = (const T *)a.grad_out + at;
  T *grad_z = (T *)a.grad_z + at;
  float *grad_mixed = a.grad_mixed + at;
  vf total = vf{}, projection = vf{};
  auto gate = [&](auto full, int64_t e, int n) CELLVIM_LAMBDA {
    constexpr bool FULL = decltype(full)::value;
    const vf weight = load(parameters.norm_weight.data + e), bias = load(parameters.norm_bias.data + e);
    const vf normalised = (load(row + e) - m.mean) * m.scale;
    const vf zs = load<FULL>(z + e, n), s = sigmoid(zs), gated = zs * s, g = load<FULL>(grad_out + e, n);
    store<FULL>(grad_z + e, g * (normalised * weight + bias) * (s + gated * (1.0f - s)), n);
    const vf g_normed = g * gated, g_normalised = g_normed * weight;
    store(work + e, g_normalised);
    total += g_normalised;
    projection += g_normalised * normalised;
    store(sum_weight + e, load(sum_weight + e) + g_normed * normalised);
    store(sum_bias + e, load(sum_bias + e) + g_normed);
  };
  CELLVIM_FOR_VECTORS(e, 0, a.width, gate(Choice<true>{}, e, LANES), gate(Choice<false>{}, e, (int)(a.width - e)));
  const GradMoments gm = {a.norm == CELLVIM_NORM_LAYER ? sum(total) / (float)a.width : 0.0f,
                          sum(projection) / (float)a.width};
  auto finish = [&](auto full, int64_t e, int n) CELLVIM_LAMBDA {
    const vf normalised = (load(row + e) - m.mean) * m.scale;
    store<decltype(full)::value>(grad_mixed + e, norm_gradient(load(work + e), normalised, m, gm, a.norm), n);
  };
  CELLVIM_FOR_VECTORS(e, 0, a.width, finish(Choice<true>{}, e, LANES), finish(Choice<false>{}, e, (int)(a.width - e)));
}

// grad_y of a chunk of channels without a skip, where no convolution is differentiated.
void gather_grad_y(const Tokens &tokens, const float *mixed, int64_t width, int64_t slots, int64_t from, int64_t to,
                   float *grad_y) {
  for (int64_t l = 0; l < tokens.count; ++l)
    for (int k = 0; k < 2; ++k)
      for (int64_t e = from; e < to; ++e)
        grad_y[(k * slots + tokens.slot[k][l]) * CHUNK + e - from] += mixed[tokens.token[l] * width + e];
}

template <class T, int W, bool SKIP>
int backward(const cellvim_expand_gate &a, const Walk &walk, const Parameters &parameters, const T *zeros) {
  const int64_t P = a.plan.slots, E = a.width, stored = a.plan.stored, stride = parameters.taps.stride;
  const int64_t groups = divide_up(stored, GROUP), each = (TILE + 1) * stride, chunks = divide_up(E, CHUNK);
  const int64_t rows = adjoint_rows<W>() * stride;
  Buffer<float> scratch(a.threads * each), norm_sums(a.batch * groups * 2 * stride), sums(a.batch * rows),
      grad_y(a.threads * 2 * P * CHUNK);
  if (!scratch.data || !norm_sums.data || !sums.data || !grad_y.data) return CELLVIM_NO_MEMORY;

#pragma omp parallel for num_threads(a.threads) schedule(dynamic)
  for (int64_t item = 0; item < a.batch * groups; ++item) {
    const int64_t b = item / groups, from = item % groups * GROUP, to = least(from + GROUP, stored);
    const Tokens tokens = walk.of(b);
    float *mixed = scratch.data + thread_number() * each, *work = mixed + TILE * stride;
    for (int64_t first = from; first < to; first += TILE) {
      const int64_t steps = least(TILE, to - first);
      mix_tile<T, W, SKIP>(a, parameters, tokens, zeros, b, first, steps, mixed);
      for (int64_t t = 0; t < steps; ++t)
        norm_and_gate_backward<T>(a, parameters, mixed + t * stride, b, tokens.token[first + t], work,
                                  norm_sums.data + item * 2 * stride, norm_sums.data + (item * 2 + 1) * stride);
    }
  }

#pragma omp parallel for num_threads(a.threads) schedule(dynamic)
  for (int64_t item = 0; item < a.batch * chunks; ++item) {
    const int64_t b = item / chunks, from = item % chunks * CHUNK, to = least(from + CHUNK, E);
    const Tokens tokens = walk.of(b);
    float *gy = grad_y.data + thread_number() * 2 * P * CHUNK;
    memset(gy, 0, sizeof(float) * 2 * P * CHUNK);
    const float *mixed = a.grad_mixed + b * stored * E;
    if (SKIP) {
      AdjointSource source;
      source.mixed = mixed, source.grad_y = gy;
      for (int k = 0; k < 2; ++k) source.row[k] = parameters.half_skip.data + k * stride;
      AdjointItem<T, W> work(parameters.taps, tokens);
      work.x = (const T *)a.x + b * a.x_batch, work.x_token = a.x_token, work.zeros = zeros;
      work.width = E, work.from = from, work.to = to, work.slots = P;
      work.grad_x = (T *)a.grad_x + b * stored * E;
      work.sums = sums.data + b * rows;
      work.template run<Adjoint::EXPAND>(source);
    } else {
      gather_grad_y(tokens, mixed, E, P, from, to, gy);
    }
    for (int k = 0; k < 2; ++k)
      for (int64_t p = 0; p < P; ++p) {
        T *out = (T *)a.grad_y + ((k * a.batch + b) * P + p) * E;
        for (int64_t e = from; e < to; e += LANES)
          store_some(out + e, load(gy + (k * P + p) * CHUNK + e - from) * 0.5f, (int)least(LANES, to - e));
      }
  }

  if (SKIP) {
    reduce_adjoint(sums.data, a.batch, E, W, a.threads, a.grad_weight, a.grad_bias, a.grad_skip);
    for (int64_t i = 0; i < 2 * E; ++i) a.grad_skip[i] *= 0.5f;
  }
  if (a.norm != CELLVIM_NORM_NONE)
    for (int64_t e = 0; e < E; ++e) {
      float weight = 0.0f, bias = 0.0f;
      for (int64_t item = 0; item < a.batch * groups; ++item) {
        weight += norm_sums.data[item * 2 * stride + e];
        bias += norm_sums.data[(item * 2 + 1) * stride + e];
      }
      a.grad_norm_weight[e] = weight, a.grad_norm_bias[e] = bias;
    }
  return CELLVIM_OK;
}

template <class T, int W> int run(const cellvim_expand_gate &a, bool is_backward) {
  Walk walk(a.plan);
  Parameters parameters;
  Buffer<T> zeros(padded(a.width));
  if (walk.status != CELLVIM_OK) return walk.status;
  if (!zeros.data || !parameters.pack(a)) return CELLVIM_NO_MEMORY;
  if (a.skip)
    return is_backward ? backward<T, W, true>(a, walk, parameters, zeros.data)
                       : forward<T, W, true>(a, walk, parameters, zeros.data);
  return is_backward ? backward<T, W, false>(a, walk, parameters, zeros.data)
                     : forward<T, W, false>(a, walk, parameters, zeros.data);
}

template <class T> int run(const cellvim_expand_gate &a, bool is_backward) {
  switch (a.taps) {
    case 1: return run<T, 1>(a, is_backward);
    case 2: return run<T, 2>(a, is_backward);
    case 3: return run<T, 3>(a, is_backward);
    case 4: return run<T, 4>(a, is_backward);
  }
  return CELLVIM_BAD_ARGUMENT;
}

}  // namespace

int expand_gate(const cellvim_expand_gate &a, bool is_backward) {
  return a.dtype == CELLVIM_BFLOAT16 ? run<bf16>(a, is_backward) : run<float>(a, is_backward);
}

}  // namespace CELLVIM_ISA
