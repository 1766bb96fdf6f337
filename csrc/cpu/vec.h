// Vector arithmetic in GCC's and clang's portable vector types: one source for AVX-512, AVX2, SSE and NEON.
//
// Every kernel file is compiled once per instruction set, in the namespace CELLVIM_ISA. Neither this file nor the
// kernels may use inline functions of the standard library, because the linker would share one copy between the sets.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#ifndef CELLVIM_ISA
#define CELLVIM_ISA isa_base
#endif

#define CELLVIM_INLINE static inline __attribute__((always_inline))
#define CELLVIM_LAMBDA __attribute__((always_inline))

namespace CELLVIM_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));

struct bf16 {
  uint16_t bits;
};

CELLVIM_INLINE vf splat(float s) { return s - vf{}; }

CELLVIM_INLINE vf load(const float *p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}

CELLVIM_INLINE vf load(const bf16 *p) {
  vh h;
  memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}

CELLVIM_INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

// Rounds to nearest even; NaN stays NaN.
CELLVIM_INLINE vh to_bf16(vf v) {
  const vu u = (vu)v;
  const vu rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const vu nan = (u >> 16) | 0x40u;
  return __builtin_convertvector(v == v ? rounded : nan, vh);
}

CELLVIM_INLINE void store(bf16 *p, vf v) {
  const vh h = to_bf16(v);
  memcpy(p, &h, sizeof h);
}

// The last vector of a row whose width is not a multiple of LANES: missing lanes are read as zero.
template <class T> CELLVIM_INLINE vf load_some(const T *p, int n) {
  T lanes[LANES];
  memset(lanes, 0, sizeof lanes);
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <class T> CELLVIM_INLINE void store_some(T *p, vf v, int n) {
  T lanes[LANES];
  store(lanes, v);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

template <bool FULL, class T> CELLVIM_INLINE vf load(const T *p, int n) { return FULL ? load(p) : load_some(p, n); }

template <bool FULL, class T> CELLVIM_INLINE void store(T *p, vf v, int n) {
  if (FULL)
    store(p, v);
  else
    store_some(p, v, n);
}

// Integers of the same width: steps of maxima.
CELLVIM_INLINE vi load_int(const int32_t *p, int n) {
  vi v = {};
  memcpy(&v, p, n == LANES ? sizeof v : n * sizeof *p);
  return v;
}

CELLVIM_INLINE void store_int(int32_t *p, vi v, int n) { memcpy(p, &v, n == LANES ? sizeof v : n * sizeof *p); }

// Lets a generic lambda choose between full and partial vectors at compile time.
template <bool VALUE> struct Choice {
  static constexpr bool value = VALUE;
};

CELLVIM_INLINE float sum(vf v) {
  float lanes[LANES];
  store(lanes, v);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// Operations that the portable types lack or that compilers do not generate: maximum and minimum that propagate a NaN in
// t, 2^n for integer n, rounding, and the reciprocal (an estimate with Newton steps is faster than a division).
#if defined(__AVX512F__)
CELLVIM_INLINE vf at_least(vf t, float low) { return (vf)_mm512_max_ps(_mm512_set1_ps(low), (__m512)t); }
CELLVIM_INLINE vf at_most(vf t, float high) { return (vf)_mm512_min_ps(_mm512_set1_ps(high), (__m512)t); }
CELLVIM_INLINE vf reciprocal(vf d) {
  const vf r = (vf)_mm512_rcp14_ps((__m512)d);
  return r * (2.0f - d * r);
}
#elif defined(__AVX__)
CELLVIM_INLINE vf at_least(vf t, float low) { return (vf)_mm256_max_ps(_mm256_set1_ps(low), (__m256)t); }
CELLVIM_INLINE vf at_most(vf t, float high) { return (vf)_mm256_min_ps(_mm256_set1_ps(high), (__m256)t); }
CELLVIM_INLINE vf reciprocal(vf d) {
  vf r = (vf)_mm256_rcp_ps((__m256)d);
  return r * (2.0f - d * r);
}
#else
CELLVIM_INLINE vf at_least(vf t, float low) { return t < low ? splat(low) : t; }
CELLVIM_INLINE vf at_most(vf t, float high) { return t > high ? splat(high) : t; }
CELLVIM_INLINE vf reciprocal(vf d) { return 1.0f / d; }
#endif

// 2^f for |f| <= 1/2. FAST: relative error 1e-7, for the sigmoid; otherwise 2e-9 before rounding. Both are exactly 1 at 0,
// so that products over thousands of scan steps stay accurate.
template <bool FAST> CELLVIM_INLINE vf exp2_fraction(vf f) {
  vf p;
  if (FAST) {
    p = f * 1.3264727253e-03f + 9.6715127859e-03f;
    p = p * f + 5.5507337445e-02f;
    p = p * f + 2.4022242083e-01f;
    p = p * f + 6.9314697760e-01f;
  } else {
    p = f * 1.5353362064e-04f + 1.3398874557e-03f;
    p = p * f + 9.6184373582e-03f;
    p = p * f + 5.5503324708e-02f;
    p = p * f + 2.4022647914e-01f;
    p = p * f + 6.9314720286e-01f;
  }
  return p * f + 1.0f;
}

// 2^t, at most 2^126 so that its sums and reciprocals stay finite. NaN is propagated.
template <bool FAST> CELLVIM_INLINE vf exp2(vf t) {
  t = at_most(t, 126.0f);
#if defined(__AVX512F__)
  const __m512 n = _mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (vf)_mm512_scalef_ps((__m512)exp2_fraction<FAST>(t - (vf)n), n);
#else
  t = at_least(t, -126.0f);
  const vf shifted = t + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the nearest integer
  const vf p = exp2_fraction<FAST>(t - (shifted - 12582912.0f));
  return (vf)((vu)p + ((vu)shifted << 23));
#endif
}

constexpr float LOG2E = 1.44269504088896341f;

CELLVIM_INLINE vf sigmoid(vf x) { return reciprocal(1.0f + exp2<true>(x * -LOG2E)); }

CELLVIM_INLINE vf silu(vf x) { return x * reciprocal(1.0f + exp2<true>(x * -LOG2E)); }

// max(x, 0) + log1p(exp(-|x|)), with the atanh series of the logarithm; relative error below 3e-7 everywhere.
CELLVIM_INLINE vf softplus(vf x) {
  const vf q = exp2<false>((x < 0.0f ? x : -x) * LOG2E);
  const vf s = q / (q + 2.0f);
  const vf z = s * s;
  vf p = z * 2.8178335237e-01f + 2.7960603012e-01f;
  p = p * z + 4.0024910232e-01f;
  p = p * z + 6.6666314684e-01f;
  p = p * z + 2.0f;
  return (x > 0.0f ? x : vf{}) + s * p;
}

// A zeroed array, aligned to a cache line. `allocate` returns whether there was enough memory.
template <class T> struct Buffer {
  T *data = nullptr;
  Buffer() = default;
  explicit Buffer(int64_t count) { allocate(count); }
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
  ~Buffer() { free(data); }
  bool allocate(int64_t count) {
    const size_t bytes = ((size_t)(count > 0 ? count : 1) * sizeof(T) + 63) / 64 * 64;
    data = (T *)aligned_alloc(64, bytes);
    if (data) memset((void *)data, 0, bytes);
    return data != nullptr;
  }
};

CELLVIM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
CELLVIM_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
CELLVIM_INLINE int64_t padded(int64_t width) { return divide_up(width, 16) * 16; }

}  // namespace CELLVIM_ISA
