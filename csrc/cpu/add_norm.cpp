// add_norm: residual addition and normalisation, one row of D at a time.
#include "conv.h"
#include "kernels.h"
#include "norm.h"

namespace CELLVIM_ISA {
namespace {

constexpr int64_t ROWS = 64;  // per work item

struct Parameters {
  Buffer<float> weight, bias;

  bool pack(const cellvim_add_norm &a) {
    return pad_rows(weight, a.weight, 1, a.width, 1.0f) && pad_rows(bias, a.bias, 1, a.width, 0.0f);
  }
};

template <class T> void add_norm_row(const cellvim_add_norm &a, const Parameters &parameters, int64_t r, float *row) {
  const int64_t D = a.width;
  const T *hidden = (const T *)a.hidden + r * D;
  const float *residual = a.residual ? a.residual + r * D : nullptr;
  auto add = [&](auto full, int64_t e, int n) CELLVIM_LAMBDA {
    constexpr bool FULL = decltype(full)::value;
    vf total = load<FULL>(hidden + e, n);
    if (residual) total += load<FULL>(residual + e, n);
    store(row + e, total);
    store<FULL>(a.total + r * D + e, total, n);
  };
  CELLVIM_FOR_VECTORS(e, 0, D, add(Choice<true>{}, e, LANES), add(Choice<false>{}, e, (int)(D - e)));
  const Moments m = moments(row, D, a.kind, a.eps);
  T *out = (T *)a.normed + r * D;
  auto norm = [&](auto full, int64_t e, int n) CELLVIM_LAMBDA {
    store<decltype(full)::value>(
        out + e, (load(row + e) - m.mean) * m.scale * load(parameters.weight.data + e) + load(parameters.bias.data + e),
        n);
  };
  CELLVIM_FOR_VECTORS(e, 0, D, norm(Choice<true>{}, e, LANES), norm(Choice<false>{}, e, (int)(D - e)));
}

template <class T>
void add_norm_row_backward(const cellvim_add_norm &a, const Parameters &parameters, int64_t r, float *row, float *work,
                           float *sum_weight, float *sum_bias) {
  const int64_t D = a.width;
  const T *grad_normed = a.grad_normed ? (const T *)a.grad_normed + r * D : nullptr;
  const float *grad_total = a.grad_total ? a.grad_total + r * D : nullptr, *total = a.total + r * D;
  for (int64_t e = 0; e < D; e += LANES) store(row + e, load_some(total + e, (int)least(LANES, D - e)));
  const Moments m = moments(row, D, a.kind, a.eps);
  vf mean = vf{}, projection = vf{};
  auto sums = [&](auto full, int64_t e, int n) CELLVIM_LAMBDA {
    const vf normalised = (load(row + e) - m.mean) * m.scale;
    const vf g = grad_normed ? load<decltype(full)::value>(grad_normed + e, n) : vf{};
    const vf g_normalised = g * load(parameters.weight.data + e);
    store(work + e, g_normalised);
    mean += g_normalised;
    projection += g_normalised * normalised;
    store(sum_weight + e, load(sum_weight + e) + g * normalised);
    store(sum_bias + e, load(sum_bias + e) + g);
  };
  CELLVIM_FOR_VECTORS(e, 0, D, sums(Choice<true>{}, e, LANES), sums(Choice<false>{}, e, (int)(D - e)));
  const GradMoments gm = {a.kind == CELLVIM_NORM_LAYER ? sum(mean) / (float)D : 0.0f, sum(projection) / (float)D};
  auto finish = [&](auto full, int64_t e, int n) CELLVIM_LAMBDA {
    constexpr bool FULL = decltype(full)::value;
    const vf normalised = (load(row + e) - m.mean) * m.scale;
    vf g = norm_gradient(load(work + e), normalised, m, gm, a.kind);
    if (grad_total) g += load<FULL>(grad_total + e, n);
    store<FULL>(a.grad_residual + r * D + e, g, n);
    if (a.grad_hidden) store<FULL>((T *)a.grad_hidden + r * D + e, g, n);
  };
  CELLVIM_FOR_VECTORS(e, 0, D, finish(Choice<true>{}, e, LANES), finish(Choice<false>{}, e, (int)(D - e)));
}

template <class T> int run(const cellvim_add_norm &a, bool is_backward) {
  const int64_t items = divide_up(a.rows, ROWS), stride = padded(a.width);
  Parameters parameters;
  Buffer<float> scratch(a.threads * 2 * stride), sums(is_backward ? items * 2 * stride : 0);
  if (!scratch.data || !sums.data || !parameters.pack(a)) return CELLVIM_NO_MEMORY;
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t item = 0; item < items; ++item) {
    float *row = scratch.data + thread_number() * 2 * stride;
    for (int64_t r = item * ROWS; r < least((item + 1) * ROWS, a.rows); ++r)
      if (is_backward)
        add_norm_row_backward<T>(a, parameters, r, row, row + stride, sums.data + item * 2 * stride,
                                 sums.data + (item * 2 + 1) * stride);
      else
        add_norm_row<T>(a, parameters, r, row);
  }
  if (is_backward)
    for (int64_t e = 0; e < a.width; ++e) {
      float weight = 0.0f, bias = 0.0f;
      for (int64_t item = 0; item < items; ++item)
        weight += sums.data[item * 2 * stride + e], bias += sums.data[(item * 2 + 1) * stride + e];
      a.grad_weight[e] = weight;
      if (a.grad_bias) a.grad_bias[e] = bias;
    }
  return CELLVIM_OK;
}

}  // namespace

int add_norm(const cellvim_add_norm &a, bool is_backward) {
  return a.dtype == CELLVIM_BFLOAT16 ? run<bf16>(a, is_backward) : run<float>(a, is_backward);
}

}  // namespace CELLVIM_ISA
