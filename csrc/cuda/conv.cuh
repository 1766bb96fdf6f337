// The depthwise convolution in both directions, in registers, along the block's sequence.
//
// Direction 0 reads the tokens before the current one, direction 1 those after it: a window of 2 * TAPS - 1 tokens
// contains both. Fewer than TAPS taps are padded with zeros in front. Tokens before the first step and after the last
// are zero.
#pragma once
#include "plan.cuh"
#include "reduce.cuh"

namespace cellvim {

constexpr int TAPS = 4;
constexpr int REACH = TAPS - 1;  // tokens that a convolution reads besides the current one

// Inputs of every convolution.
struct ConvSource {
  const void *x;
  int64_t x_batch;
  int x_token, width, taps;
  const float *weight, *bias;  // (2, E, taps), (2, E) or null
  bool whole;                  // rows of x, other token arrays and weights are aligned to VEC values

  // WHOLE: `whole` is known to be true, and no code for the other case is generated.
  template <bool WHOLE = false> __device__ __forceinline__ Access access(int e) const {
    if (WHOLE) return {true, VEC};
    return {whole && e + VEC <= width, min(width - e, VEC)};
  }
};

struct Taps {
  Vec w[2][TAPS], bias[2];
};

// Taps and biases times a power of two, which is exact.
template <bool WHOLE = false>
__device__ __forceinline__ Taps load_taps(const ConvSource &from, int e, float scale = 1.0f) {
  static_assert(TAPS == VEC, "a channel's taps are one access");
  const Access access = from.access<WHOLE>(e);
  Taps taps;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const float *channel = from.weight + (int64_t)(k * from.width + e + i) * from.taps;
      if (from.taps == TAPS && access.whole) {
        const Vec all = unpack(load_whole(channel));
#pragma unroll
        for (int j = 0; j < TAPS; ++j) taps.w[k][j][i] = scale * all[j];
      } else {
#pragma unroll
        for (int j = 0; j < TAPS; ++j) {
          const int tap = j - (TAPS - from.taps);
          taps.w[k][j][i] = tap >= 0 && i < access.count ? scale * channel[tap] : 0.0f;
        }
      }
    }
    taps.bias[k] = load_row(from.bias ? from.bias + k * from.width : nullptr, e, access, 0.0f);
#pragma unroll
    for (int i = 0; i < VEC; ++i) taps.bias[k][i] *= scale;
  }
  return taps;
}

// Tokens of STEPS consecutive steps and REACH on either side. When the loops over the steps are unrolled, all indices are
// constants: the window stays in registers, and only the overlap of two windows is copied. `ahead` is a Cursor or a list
// with the same interface.
template <class T, int STEPS, bool WHOLE = false> struct Window {
  Vec x[STEPS + 2 * REACH];
  int token[STEPS + 2 * REACH];

  // Loads the overlap before the current step of `ahead`, and advances `ahead` by REACH steps.
  template <class Ahead>
  __device__ __forceinline__ void start(const T *x_of_sample, const ConvSource &from, int e, Ahead &ahead) {
    load_rows<2 * REACH>(x_of_sample, from, e, ahead, STEPS);
  }
  // Loads the next STEPS steps: x[REACH + t] is then the current token of the t-th step.
  template <class Ahead>
  __device__ __forceinline__ void turn(const T *x_of_sample, const ConvSource &from, int e, Ahead &ahead) {
#pragma unroll
    for (int j = 0; j < 2 * REACH; ++j) x[j] = x[STEPS + j], token[j] = token[STEPS + j];
    load_rows<STEPS>(x_of_sample, from, e, ahead, 2 * REACH);
  }
  // Convolution at the t-th step, before SiLU.
  __device__ __forceinline__ Vec conv(const Taps &taps, int k, int t) const {
    Vec c = taps.bias[k];
#pragma unroll
    for (int j = 0; j < TAPS; ++j)
#pragma unroll
      for (int i = 0; i < VEC; ++i)
        c[i] = fmaf(taps.w[k][j][i], x[k ? t + 2 * REACH - j : t + j][i], c[i]);
    return c;
  }

 private:
  // All loads are issued before the first result is used.
  template <int COUNT, class Ahead>
  __device__ __forceinline__ void load_rows(const T *x_of_sample, const ConvSource &from, int e, Ahead &ahead, int to) {
    Raw<T> raw[COUNT];
    const Access access = from.access<WHOLE>(e);
    const T *x_of_thread = x_of_sample + e;
    const int row = from.x_token * (int)sizeof(T);
#pragma unroll
    for (int j = 0; j < COUNT; ++j, ahead.next()) token[to + j] = ahead.token();
    if (access.whole) {
#pragma unroll
      for (int j = 0; j < COUNT; ++j)
        if (token[to + j] >= 0) raw[j] = load_whole(row_at(x_of_thread, token[to + j], row));
    } else {
#pragma unroll
      for (int j = 0; j < COUNT; ++j)
        if (token[to + j] >= 0) raw[j] = assemble(row_at(x_of_thread, token[to + j], row), access.count);
    }
#pragma unroll
    for (int j = 0; j < COUNT; ++j) x[to + j] = unpack(raw[j]);
  }
};

// u of a convolution whose taps were scaled by SILU_SCALE<T>.
template <class T> __device__ __forceinline__ Vec silu_of_scaled(const Vec &c) {
  Vec u;
#pragma unroll
  for (int i = 0; i < VEC; ++i) u[i] = silu_of_scaled<T>(c[i]);
  return u;
}

// Steps per window: more of them hide more latency, as long as there are enough registers.
template <class T> constexpr int STEPS_PER_TURN = 8;
template <> constexpr int STEPS_PER_TURN<float> = 4;

inline ConvSource conv_source(const void *x, int64_t x_batch, int64_t x_token, int64_t width, int64_t taps,
                              int32_t dtype, const float *weight, const float *bias) {
  const size_t vector = VEC * size_of(dtype);
  const bool whole = width % VEC == 0 && x_batch % VEC == 0 && x_token % VEC == 0 && is_aligned(x, vector) &&
                     is_aligned(weight, 16) && is_aligned(bias, 16);
  return {x, x_batch, (int)x_token, (int)width, (int)taps, weight, bias, whole};
}

}  // namespace cellvim
