// The depthwise convolution in both directions over a short tile of tokens, in registers.
//
// Direction 0 reads the tokens before the current one, direction 1 those after it: a window of 2W-1 tokens contains
// both. Tokens before the first and after the last are zero.
#pragma once
#include "tokens.h"

namespace CELLVIM_ISA {

// Taps and biases of both directions, transposed to (2W + 2, padded E) so that a vector of channels is contiguous.
struct PackedTaps {
  Buffer<float> rows;
  int64_t stride = 0;

  bool pack(const float *weight, const float *bias, int64_t width, int64_t taps) {
    stride = padded(width);
    if (!rows.allocate((2 * taps + 2) * stride)) return false;
    for (int64_t k = 0; k < 2; ++k)
      for (int64_t e = 0; e < width; ++e) {
        for (int64_t j = 0; j < taps; ++j) rows.data[(k * taps + j) * stride + e] = weight[(k * width + e) * taps + j];
        rows.data[(2 * taps + k) * stride + e] = bias ? bias[k * width + e] : 0.0f;
      }
    return true;
  }
};

// Copies (2, E) or (E,) rows, padded to full vectors. Null rows are filled with `otherwise`.
CELLVIM_INLINE bool pad_rows(Buffer<float> &out, const float *rows, int64_t count, int64_t width, float otherwise,
                             float factor = 1.0f) {
  const int64_t stride = padded(width);
  if (!out.allocate(count * stride)) return false;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t e = 0; e < width; ++e) out.data[r * stride + e] = factor * (rows ? rows[r * width + e] : otherwise);
  return true;
}

template <int W> struct Taps {
  vf w[2][W], bias[2];

  CELLVIM_INLINE Taps at(const PackedTaps &packed, int64_t e) {
    Taps taps;
    const float *row = packed.rows.data + e;
    for (int k = 0; k < 2; ++k)
      for (int j = 0; j < W; ++j, row += packed.stride) taps.w[k][j] = load(row);
    taps.bias[0] = load(row);
    taps.bias[1] = load(row + packed.stride);
    return taps;
  }
};

// x[W - 1] is the current token, x[0] the oldest one that direction 0 reads.
template <class T, int W, bool FULL> struct Window {
  vf x[2 * W - 1];

  inline __attribute__((always_inline)) void start(const T *const *rows, int64_t e, int n) {
    for (int j = 0; j < 2 * W - 2; ++j) x[j + 1] = load<FULL>(rows[j] + e, n);
  }
  inline __attribute__((always_inline)) void step(const T *next, int n) {
    for (int j = 0; j < 2 * W - 2; ++j) x[j] = x[j + 1];
    x[2 * W - 2] = load<FULL>(next, n);
  }
  inline __attribute__((always_inline)) vf forward(const Taps<W> &taps) const {
    vf c = taps.bias[0];
    for (int j = 0; j < W; ++j) c += taps.w[0][j] * x[j];
    return c;
  }
  inline __attribute__((always_inline)) vf backward(const Taps<W> &taps) const {
    vf c = taps.bias[1];
    for (int j = 0; j < W; ++j) c += taps.w[1][j] * x[2 * W - 2 - j];
    return c;
  }
};

// Points rows[j] to token first - (W - 1) + j for j < 2 * tile + 2W - 2, and to zeros beyond the ends: the rows of this
// tile and, for prefetching, of the next.
template <class T, int W>
CELLVIM_INLINE void point_rows(const T **rows, const Tokens &tokens, int64_t first, int64_t tile, const T *x,
                               int64_t stride, const T *zeros) {
  for (int64_t j = 0; j < 2 * tile + 2 * W - 2; ++j) {
    const int64_t l = first - (W - 1) + j;
    rows[j] = l >= 0 && l < tokens.count ? x + tokens.token[l] * stride : zeros;
  }
}

// Calls emit(t, c0, c1, window) for each step of the tile with the convolutions of both directions before SiLU, and
// prefetches the rows of the next tile.
template <int64_t TILE, class T, int W, bool FULL, class Emit>
CELLVIM_INLINE void convolve(const T *const *rows, int64_t steps, const Taps<W> &taps, int64_t e, int n, Emit emit) {
  Window<T, W, FULL> window;
  window.start(rows, e, n);
  for (int64_t t = 0; t < steps; ++t) {
    window.step(rows[t + 2 * W - 2] + e, n);
    __builtin_prefetch(rows[t + 2 * W - 2 + TILE] + e);
    emit(t, window.forward(taps), window.backward(taps), window);
  }
}

// Runs the body for each vector of [from, to): the full vectors, then the last partial one.
#define CELLVIM_FOR_VECTORS(e, from, to, call_full, call_part)      \
  do {                                                              \
    int64_t e = (from);                                             \
    for (; e + LANES <= (to); e += LANES) call_full;                \
    if (e < (to)) call_part;                                        \
  } while (0)

}  // namespace CELLVIM_ISA
