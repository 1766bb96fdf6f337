// pooled_scan: softplus, discretisation and the selective scan in both directions, with the states in registers.
//
// A work item processes a group of channels of one sample and direction. The backward pass recomputes the states from
// checkpoints, one segment at a time, and sums the gradients of B and C over its vectors before summing over lanes.
#include "conv.h"
#include "kernels.h"

namespace CELLVIM_ISA {
namespace {

constexpr int MAX_STATES = 64;
constexpr int64_t FORWARD_GROUP = 64;    // channels per work item
constexpr int64_t BACKWARD_GROUP = 128;  // larger, for fewer partial sums of B and C
constexpr int64_t SEGMENT = 64;          // steps whose states the backward pass keeps

// N is the number of states if it is known at compile time, otherwise 0.
template <int N> CELLVIM_INLINE int states_of(const cellvim_pooled_scan &a) { return N ? N : (int)a.states; }

// A of one vector of channels: (N) vectors, times `factor`.
template <int N> CELLVIM_INLINE void load_a(const cellvim_pooled_scan &a, int k, int64_t e, int n, float factor, vf *out) {
  for (int s = 0; s < states_of<N>(a); ++s) {
    float lanes[LANES] = {};
    for (int i = 0; i < n; ++i) lanes[i] = factor * a.a[(k * a.width + e + i) * a.states + s];
    out[s] = load(lanes);
  }
}

CELLVIM_INLINE int64_t offset(const int64_t *stride, int k, int64_t b) { return k * stride[0] + b * stride[1]; }

// Inputs of one direction of one sample, starting at channel e.
template <class T> struct Steps {
  const T *pooled, *delta;
  const float *b, *c;
  int64_t pooled_step, delta_step, b_step, c_step;
  vf bias;

  Steps(const cellvim_pooled_scan &a, const float *delta_bias, int k, int64_t sample, int64_t e)
      : pooled((const T *)a.pooled + offset(a.pooled_stride, k, sample) + e),
        delta((const T *)a.delta + offset(a.delta_stride, k, sample) + e),
        b(a.b + offset(a.b_stride, k, sample)),
        c(a.c + offset(a.c_stride, k, sample)),
        pooled_step(a.pooled_stride[2]),
        delta_step(a.delta_stride[2]),
        b_step(a.b_stride[2]),
        c_step(a.c_stride[2]),
        bias(load(delta_bias + k * padded(a.width) + e)) {}
};

template <class T, int N, bool FULL>
void scan_vector(const cellvim_pooled_scan &a, const float *delta_bias, int k, int64_t sample, int64_t e, int n) {
  const Steps<T> in(a, delta_bias, k, sample, e);
  const int states = states_of<N>(a);
  vf decay_rate[N ? N : MAX_STATES], h[N ? N : MAX_STATES];
  load_a<N>(a, k, e, n, LOG2E, decay_rate);
  for (int s = 0; s < states; ++s) h[s] = vf{};
  T *out = (T *)a.out + (k * a.batch + sample) * a.steps * a.width + e;
  for (int64_t i = 0; i < a.steps; ++i) {
    const int64_t t = k ? a.steps - 1 - i : i;
    const vf dt = softplus(load<FULL>(in.delta + t * in.delta_step, n) + in.bias);
    const vf drive = dt * load<FULL>(in.pooled + t * in.pooled_step, n);
    const float *b = in.b + t * in.b_step, *c = in.c + t * in.c_step;
    vf y = vf{};
    for (int s = 0; s < states; ++s) {
      h[s] = exp2<false>(dt * decay_rate[s]) * h[s] + drive * b[s];
      y += h[s] * c[s];
    }
    store<FULL>(out + t * a.width, y, n);
  }
}

template <class T, int N> int forward(const cellvim_pooled_scan &a) {
  Buffer<float> bias;
  if (!pad_rows(bias, a.delta_bias, 2, a.width, 0.0f)) return CELLVIM_NO_MEMORY;
  const int64_t groups = divide_up(a.width, FORWARD_GROUP);
#pragma omp parallel for num_threads(a.threads) schedule(dynamic)
  for (int64_t item = 0; item < 2 * a.batch * groups; ++item) {
    const int64_t sample = item / groups % a.batch, from = item % groups * FORWARD_GROUP;
    const int k = (int)(item / groups / a.batch);
    const int64_t to = least(from + FORWARD_GROUP, a.width);
    CELLVIM_FOR_VECTORS(e, from, to, (scan_vector<T, N, true>(a, bias.data, k, sample, e, LANES)),
                        (scan_vector<T, N, false>(a, bias.data, k, sample, e, (int)(to - e))));
  }
  return CELLVIM_OK;
}

// Scratch of one thread, in vectors.
template <int N> struct Scratch {
  vf *state, *decay;        // (SEGMENT, N) of the current vector of channels
  vf *sum_b, *sum_c;        // (SEGMENT, N), summed over the group's vectors
  vf *checkpoint;           // (segments, vectors, N) states before each segment
  vf *grad_state, *grad_a;  // (vectors, N)

  static int64_t size(const cellvim_pooled_scan &a) {
    const int64_t vectors = BACKWARD_GROUP / LANES, segments = divide_up(a.steps, SEGMENT);
    return (4 * SEGMENT + (segments + 2) * vectors) * states_of<N>(a);
  }
  Scratch(const cellvim_pooled_scan &a, vf *at) {
    const int64_t vectors = BACKWARD_GROUP / LANES, states = states_of<N>(a);
    state = at, decay = state + SEGMENT * states;
    sum_b = decay + SEGMENT * states, sum_c = sum_b + SEGMENT * states;
    grad_state = sum_c + SEGMENT * states, grad_a = grad_state + vectors * states;
    checkpoint = grad_a + vectors * states;
  }
};

// Partial results of a work item for the sums over channel groups and samples.
struct Partial {
  float *a, *bias;  // (2, B, padded E, N), (2, B, padded E)
  float *b, *c;     // (groups, 2, B, P, N)
};

// Advances the states of one vector by `count` steps from `first`; stores states and decays if KEEP.
template <class T, int N, bool FULL, bool KEEP>
CELLVIM_INLINE void advance(const cellvim_pooled_scan &a, const Steps<T> &in, const vf *decay_rate, int k, int64_t first,
                            int64_t count, int n, vf *h, Scratch<N> &scratch) {
  const int states = states_of<N>(a);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = k ? a.steps - 1 - (first + i) : first + i;
    const vf dt = softplus(load<FULL>(in.delta + t * in.delta_step, n) + in.bias);
    const vf drive = dt * load<FULL>(in.pooled + t * in.pooled_step, n);
    const float *b = in.b + t * in.b_step;
    for (int s = 0; s < states; ++s) {
      const vf decay = exp2<false>(dt * decay_rate[s]);
      h[s] = decay * h[s] + drive * b[s];
      if (KEEP) scratch.decay[i * states + s] = decay, scratch.state[i * states + s] = h[s];
    }
  }
}

template <class T, int N, bool FULL>
void segment_backward(const cellvim_pooled_scan &a, const float *delta_bias, int k, int64_t sample, int64_t e, int n,
                      int64_t segment, int64_t vector, Scratch<N> &scratch, float *sum_bias) {
  const Steps<T> in(a, delta_bias, k, sample, e);
  const int states = states_of<N>(a);
  const int64_t vectors = BACKWARD_GROUP / LANES;
  const int64_t first = segment * SEGMENT, count = least(SEGMENT, a.steps - first);
  const vf *before = scratch.checkpoint + (segment * vectors + vector) * states;
  vf h[N ? N : MAX_STATES], rate[N ? N : MAX_STATES];
  for (int s = 0; s < states; ++s) h[s] = before[s];
  load_a<N>(a, k, e, n, LOG2E, rate);
  advance<T, N, FULL, true>(a, in, rate, k, first, count, n, h, scratch);

  vf *gh = scratch.grad_state + vector * states, *ga = scratch.grad_a + vector * states;
  vf gbias = load(sum_bias);
  const int64_t base = (k * a.batch + sample) * a.steps * a.width + e;
  for (int64_t i = count - 1; i >= 0; --i) {
    const int64_t t = k ? a.steps - 1 - (first + i) : first + i, at = base + t * a.width;
    const vf raw = load<FULL>(in.delta + t * in.delta_step, n) + in.bias;
    const vf p = load<FULL>(in.pooled + t * in.pooled_step, n);
    const vf dt = softplus(raw), drive = dt * p;
    const vf gy = load<FULL>((const T *)a.grad_out + at, n);
    const float *b = in.b + t * in.b_step, *c = in.c + t * in.c_step;
    const vf *state = scratch.state + i * states, *decay = scratch.decay + i * states;
    const vf *earlier = i > 0 ? state - states : before;
    vf *sum_b = scratch.sum_b + i * states, *sum_c = scratch.sum_c + i * states;
    vf g_drive = vf{}, g_rate = vf{};  // g_rate: sum of the gradients of dt * A, times A * log2(e)
    for (int s = 0; s < states; ++s) {
      const vf g = gh[s] + gy * c[s];
      sum_c[s] += gy * state[s];
      sum_b[s] += g * drive;
      g_drive += g * b[s];
      const vf passed = g * decay[s];
      gh[s] = passed;
      const vf g_exponent = passed * earlier[s];
      g_rate += g_exponent * rate[s];
      ga[s] += g_exponent * dt;
    }
    const vf g_dt = g_rate * (1.0f / LOG2E) + g_drive * p;
    const vf g_raw = g_dt * sigmoid(raw);
    gbias += g_raw;
    store<FULL>((T *)a.grad_pooled + at, g_drive * dt, n);
    store<FULL>((T *)a.grad_delta + at, g_raw, n);
  }
  store(sum_bias, gbias);
}

template <class T, int N>
void group_backward(const cellvim_pooled_scan &a, const float *delta_bias, int k, int64_t sample, int64_t group,
                    Scratch<N> scratch, Partial partial) {
  const int states = states_of<N>(a);
  const int64_t vectors = BACKWARD_GROUP / LANES, segments = divide_up(a.steps, SEGMENT), stride = padded(a.width);
  const int64_t from = group * BACKWARD_GROUP, to = least(from + BACKWARD_GROUP, a.width);
  float *sum_bias = partial.bias + (k * a.batch + sample) * stride;
  memset((void *)scratch.grad_state, 0, sizeof(vf) * 2 * vectors * states);

  auto checkpoint = [&](auto full, int64_t e, int n) {
    const Steps<T> in(a, delta_bias, k, sample, e);
    vf h[N ? N : MAX_STATES], rate[N ? N : MAX_STATES];
    load_a<N>(a, k, e, n, LOG2E, rate);
    for (int s = 0; s < states; ++s) h[s] = vf{};
    for (int64_t segment = 0; segment < segments; ++segment) {
      vf *out = scratch.checkpoint + (segment * vectors + (e - from) / LANES) * states;
      for (int s = 0; s < states; ++s) out[s] = h[s];
      if (segment + 1 < segments)
        advance<T, N, decltype(full)::value, false>(a, in, rate, k, segment * SEGMENT, SEGMENT, n, h, scratch);
    }
  };
  CELLVIM_FOR_VECTORS(e, from, to, checkpoint(Choice<true>{}, e, LANES), checkpoint(Choice<false>{}, e, (int)(to - e)));

  for (int64_t segment = segments - 1; segment >= 0; --segment) {
    memset((void *)scratch.sum_b, 0, sizeof(vf) * 2 * SEGMENT * states);
    CELLVIM_FOR_VECTORS(e, from, to,
                        (segment_backward<T, N, true>(a, delta_bias, k, sample, e, LANES, segment, (e - from) / LANES,
                                                      scratch, sum_bias + e)),
                        (segment_backward<T, N, false>(a, delta_bias, k, sample, e, (int)(to - e), segment,
                                                       (e - from) / LANES, scratch, sum_bias + e)));
    const int64_t first = segment * SEGMENT, count = least(SEGMENT, a.steps - first);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = k ? a.steps - 1 - (first + i) : first + i;
      const int64_t at = (((group * 2 + k) * a.batch + sample) * a.steps + t) * states;
      for (int s = 0; s < states; ++s) {
        partial.b[at + s] = sum(scratch.sum_b[i * states + s]);
        partial.c[at + s] = sum(scratch.sum_c[i * states + s]);
      }
    }
  }
  float *sum_a = partial.a + (k * a.batch + sample) * stride * states;
  for (int64_t e = from; e < to; e += LANES)
    for (int s = 0; s < states; ++s) {
      float lanes[LANES];
      store(lanes, scratch.grad_a[(e - from) / LANES * states + s]);
      for (int i = 0; i < LANES; ++i) sum_a[(e + i) * states + s] = lanes[i];
    }
}

template <class T, int N> int backward(const cellvim_pooled_scan &a) {
  const int64_t groups = divide_up(a.width, BACKWARD_GROUP), stride = padded(a.width), states = states_of<N>(a);
  const int64_t samples = 2 * a.batch, row = samples * a.steps * states, each = Scratch<N>::size(a);
  Buffer<float> bias, sum_a(samples * stride * states), sum_bias(samples * stride), sum_b(groups * row),
      sum_c(groups * row);
  Buffer<vf> scratch(a.threads * each);
  if (!pad_rows(bias, a.delta_bias, 2, a.width, 0.0f) || !sum_a.data || !sum_bias.data || !sum_b.data || !sum_c.data ||
      !scratch.data)
    return CELLVIM_NO_MEMORY;
  const Partial partial = {sum_a.data, sum_bias.data, sum_b.data, sum_c.data};
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < samples * groups; ++item)
      group_backward<T, N>(a, bias.data, (int)(item / groups / a.batch), item / groups % a.batch, item % groups,
                           Scratch<N>(a, scratch.data + thread_number() * each), partial);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < row; ++i) {
      float b = 0.0f, c = 0.0f;
      for (int64_t group = 0; group < groups; ++group) b += sum_b.data[group * row + i], c += sum_c.data[group * row + i];
      a.grad_b[i] = b, a.grad_c[i] = c;
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < 2 * a.width; ++i) {
      const int64_t k = i / a.width, e = i % a.width;
      float total = 0.0f;
      for (int64_t b = 0; b < a.batch; ++b) total += sum_bias.data[(k * a.batch + b) * stride + e];
      a.grad_delta_bias[i] = total;
      for (int64_t s = 0; s < states; ++s) {
        total = 0.0f;
        for (int64_t b = 0; b < a.batch; ++b) total += sum_a.data[((k * a.batch + b) * stride + e) * states + s];
        a.grad_a[i * states + s] = total;
      }
    }
  }
  return CELLVIM_OK;
}

template <class T> int run(const cellvim_pooled_scan &a, bool is_backward) {
  if (a.states < 1 || a.states > MAX_STATES) return CELLVIM_BAD_ARGUMENT;
  if (a.states == 16) return is_backward ? backward<T, 16>(a) : forward<T, 16>(a);
  return is_backward ? backward<T, 0>(a) : forward<T, 0>(a);
}

}  // namespace

int pooled_scan(const cellvim_pooled_scan &a, bool is_backward) {
  return a.dtype == CELLVIM_BFLOAT16 ? run<bf16>(a, is_backward) : run<float>(a, is_backward);
}

}  // namespace CELLVIM_ISA
