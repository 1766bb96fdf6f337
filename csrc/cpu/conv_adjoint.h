// The gradient of SiLU(convolution) in both directions, for the backward passes of conv_pool and expand_gate.
//
// A work item processes all tokens of a chunk of channels of one sample, so that threads share no data. Sums over the
// batch are computed afterwards in the order of the batch.
#pragma once
#include "conv.h"

namespace CELLVIM_ISA {

constexpr int64_t CHUNK = 64;         // channels of a work item
constexpr int64_t ADJOINT_TILE = 16;  // steps processed at a time: their rows stay in the L1 cache

// Source of the gradient of u.
enum class Adjoint {
  SUM,        // factor * grad[slot]                                       (mean and no pooling)
  MAX,        // grad[slot] if this step is the maximum
  ATTENTION,  // share * grad[slot] + score gradient * score weight
  EXPAND      // D / 2 * gradient before the norm; also accumulates the gradients of D and y
};

struct AdjointSource {
  const void *grad[2] = {};       // (P, E) of this sample, directions 0 and 1
  const float *slot_factor = {};  // SUM: (P,) or null
  float factor = 1.0f;            // SUM, if slot_factor is null
  const int32_t *best[2] = {};    // MAX: (P, E)
  const float *share[2] = {};     // ATTENTION: (L,)
  const float *score[2] = {};     // ATTENTION: (L,), gradient of the score
  const float *row[2] = {};       // ATTENTION: score weight; EXPAND: D / 2; padded (E,)
  const float *mixed = {};        // EXPAND: (stored, E)
  float *grad_y = {};             // EXPAND: (2, P, CHUNK), accumulated for this chunk
};

// Number of rows of sums per work item: gradients of taps, biases, and score weight or D.
template <int W> constexpr int64_t adjoint_rows() { return 2 * W + 4; }

template <class T, int W> struct AdjointItem {
  const PackedTaps &packed;
  const Tokens &tokens;
  const T *x, *zeros;
  int64_t x_token, width, from, to;  // channels [from, to)
  int64_t slots;                     // P
  T *grad_x;                         // (stored, E)
  float *sums;                       // (adjoint_rows, padded E) of this sample

  AdjointItem(const PackedTaps &packed, const Tokens &tokens) : packed(packed), tokens(tokens) {}

  template <Adjoint MODE> void run(const AdjointSource &source) {
    const int64_t stride = packed.stride;
    for (int64_t r = 0; r < adjoint_rows<W>(); ++r)
      for (int64_t e = from; e < from + CHUNK && e < stride; ++e) sums[r * stride + e] = 0.0f;
    memset(dc, 0, sizeof dc);
    const T *rows[2 * ADJOINT_TILE + 2 * W];
    for (int64_t first = 0; first < tokens.count; first += ADJOINT_TILE) {
      const int64_t steps = least(ADJOINT_TILE, tokens.count - first);
      point_rows<T, W>(rows, tokens, first, ADJOINT_TILE, x, x_token, zeros);
      CELLVIM_FOR_VECTORS(e, from, to, (gather<MODE, true>(source, rows, first, steps, e, LANES)),
                          (gather<MODE, false>(source, rows, first, steps, e, (int)(to - e))));
      spread(first, steps);
    }
    for (int k = 0; k < 2; ++k) memset(dc[k] + HISTORY * CHUNK, 0, sizeof(float) * (W - 1) * CHUNK);
    spread(tokens.count, W - 1);
    for (int64_t l = tokens.count; l < tokens.all; ++l)
      for (int64_t e = from; e < to; ++e) grad_x[tokens.token[l] * width + e] = T{};
  }

 private:
  static constexpr int64_t HISTORY = 2 * (W - 1);
  alignas(64) float dc[2][(ADJOINT_TILE + HISTORY) * CHUNK];  // gradients before SiLU, preceded by those of the last tile

  template <Adjoint MODE, bool FULL>
  void gather(const AdjointSource &source, const T *const *rows, int64_t first, int64_t steps, int64_t e, int n) {
    const int64_t stride = packed.stride, column = e - from;
    const Taps<W> taps = Taps<W>::at(packed, e);
    float *sum_row = sums + e;
    vf gw[2][W], gb[2], extra[2], row[2];
    for (int k = 0; k < 2; ++k) {
      for (int j = 0; j < W; ++j) gw[k][j] = load(sum_row + (k * W + j) * stride);
      gb[k] = load(sum_row + (2 * W + k) * stride);
      extra[k] = load(sum_row + (2 * W + 2 + k) * stride);
      row[k] = source.row[k] ? load(source.row[k] + e) : vf{};
    }
    convolve<ADJOINT_TILE, T, W, FULL>(rows, steps, taps, e, n,
                         [&](int64_t t, vf c0, vf c1, const Window<T, W, FULL> &window) CELLVIM_LAMBDA {
      const int64_t l = first + t;
      vf mixed = vf{};
      if (MODE == Adjoint::EXPAND) mixed = load<FULL>(source.mixed + tokens.token[l] * width + e, n);
      for (int k = 0; k < 2; ++k) {
        const vf c = k ? c1 : c0;
        const vf s = sigmoid(c), u = c * s;
        const int64_t slot = tokens.slot[k][l];
        vf du;
        if (MODE == Adjoint::EXPAND) {
          du = row[k] * mixed;
          extra[k] += mixed * u;
          float *gy = source.grad_y + (k * slots + slot) * CHUNK + column;
          store(gy, load(gy) + mixed);
        } else {
          const vf g = load<FULL>((const T *)source.grad[k] + slot * width + e, n);
          if (MODE == Adjoint::SUM) {
            du = g * (source.slot_factor ? source.slot_factor[slot] : source.factor);
          } else if (MODE == Adjoint::MAX) {
            const vi winner = load_int(source.best[k] + slot * width + e, n);
            du = winner == (int32_t)l ? g : vf{};
          } else {
            const float ds = source.score[k][l];
            du = g * source.share[k][l] + row[k] * ds;
            extra[k] += u * ds;
          }
        }
        const vf d = du * (s + u * (1.0f - s));
        store(dc[k] + (HISTORY + t) * CHUNK + column, d);
        gb[k] += d;
        for (int j = 0; j < W; ++j) gw[k][j] += d * window.x[k ? 2 * W - 2 - j : j];
      }
    });
    for (int k = 0; k < 2; ++k) {
      for (int j = 0; j < W; ++j) store(sum_row + (k * W + j) * stride, gw[k][j]);
      store(sum_row + (2 * W + k) * stride, gb[k]);
      store(sum_row + (2 * W + 2 + k) * stride, extra[k]);
    }
  }

  // Writes grad_x of the last W-1 tokens of the previous tile and of all but the last W-1 of this one.
  void spread(int64_t first, int64_t steps) {
    const int64_t skip = first < W - 1 ? W - 1 - first : 0;
    for (int64_t e = from; e < to; e += LANES) {
      const Taps<W> taps = Taps<W>::at(packed, e);
      const int n = (int)least(LANES, to - e);
      const float *d0 = dc[0] + (W - 1) * CHUNK + e - from, *d1 = dc[1] + e - from;
      for (int64_t i = skip; i < steps; ++i) {
        vf g = vf{};
        for (int j = 0; j < W; ++j) {
          g += taps.w[0][j] * load(d0 + (i + W - 1 - j) * CHUNK);
          g += taps.w[1][j] * load(d1 + (i + j) * CHUNK);
        }
        T *out = grad_x + tokens.token[first - (W - 1) + i] * width + e;
        if (n == LANES)
          store(out, g);
        else
          store_some(out, g, n);
      }
    }
    for (int k = 0; k < 2; ++k) memmove(dc[k], dc[k] + steps * CHUNK, sizeof(float) * HISTORY * CHUNK);
  }
};

// Sums (B, rows, padded E) over the batch into grad_weight (2, E, W) and the (2, E) rows; null outputs are skipped.
CELLVIM_INLINE void reduce_adjoint(const float *sums, int64_t batch, int64_t width, int64_t taps,
                                   [[maybe_unused]] int threads, float *grad_weight, float *grad_bias, float *grad_extra) {
  const int64_t stride = padded(width), rows = 2 * taps + 4;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const bool is_weight = row < 2 * taps, is_bias = !is_weight && row < 2 * taps + 2;
    float *out = is_weight ? grad_weight : is_bias ? grad_bias : grad_extra;
    if (!out) continue;
    for (int64_t e = 0; e < width; ++e) {
      float total = 0.0f;
      for (int64_t b = 0; b < batch; ++b) total += sums[(b * rows + row) * stride + e];
      if (is_weight)
        out[(row / taps * width + e) * taps + row % taps] = total;
      else
        out[(row - 2 * taps) % 2 * width + e] = total;
    }
  }
}

}  // namespace CELLVIM_ISA
