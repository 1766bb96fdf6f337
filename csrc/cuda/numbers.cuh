// Four neighbouring channels of a token in one memory access, and their arithmetic, always in float32.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <type_traits>

namespace cellvim {

using bf16 = __nv_bfloat16;
using half = __half;

constexpr int VEC = 4;  // channels per thread: 16 bytes of float32, 8 bytes of the 16-bit types
constexpr float LOG2E = 1.4426950408889634f;

// Values in memory.
template <class T> struct Raw {
  uint2 bits = {0u, 0u};
};
template <> struct Raw<float> {
  float4 bits = {0.0f, 0.0f, 0.0f, 0.0f};
};

// Four channels in registers.
struct Vec {
  float v[VEC];
  __device__ __forceinline__ float &operator[](int i) { return v[i]; }
  __device__ __forceinline__ float operator[](int i) const { return v[i]; }
};

__device__ __forceinline__ Vec splat(float value) { return {{value, value, value, value}}; }

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bf16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(half value) { return __half2float(value); }

template <class T> __device__ __forceinline__ T from_float(float value);
template <> __device__ __forceinline__ float from_float<float>(float value) { return value; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float value) { return __float2bfloat16_rn(value); }
template <> __device__ __forceinline__ half from_float<half>(float value) { return __float2half_rn(value); }

__device__ __forceinline__ Vec unpack(Raw<float> raw) { return {{raw.bits.x, raw.bits.y, raw.bits.z, raw.bits.w}}; }
__device__ __forceinline__ Vec unpack(Raw<bf16> raw) {
  return {{__uint_as_float(raw.bits.x << 16), __uint_as_float(raw.bits.x & 0xffff0000u),
           __uint_as_float(raw.bits.y << 16), __uint_as_float(raw.bits.y & 0xffff0000u)}};
}
__device__ __forceinline__ Vec unpack(Raw<half> raw) {
  const auto low = [](unsigned bits) { return __half2float(__ushort_as_half((unsigned short)(bits & 0xffffu))); };
  return {{low(raw.bits.x), low(raw.bits.x >> 16), low(raw.bits.y), low(raw.bits.y >> 16)}};
}

__device__ __forceinline__ Raw<float> pack(const Vec &v, float) { return {{v[0], v[1], v[2], v[3]}}; }
__device__ __forceinline__ unsigned two_bits(float low, float high, bf16) {
  return (unsigned)__bfloat16_as_ushort(__float2bfloat16_rn(low)) |
         (unsigned)__bfloat16_as_ushort(__float2bfloat16_rn(high)) << 16;
}
__device__ __forceinline__ unsigned two_bits(float low, float high, half) {
  return (unsigned)__half_as_ushort(__float2half_rn(low)) | (unsigned)__half_as_ushort(__float2half_rn(high)) << 16;
}
template <class T> __device__ __forceinline__ Raw<T> pack(const Vec &v, T tag) {
  Raw<T> raw;
  raw.bits = {two_bits(v[0], v[1], tag), two_bits(v[2], v[3], tag)};
  return raw;
}

// How a thread accesses memory: `whole` if its four channels exist and are aligned, otherwise one by one.
struct Access {
  bool whole;
  int count;  // number of this thread's channels that exist
};

__device__ __forceinline__ Raw<float> assemble(const float *from, int count) {
  Raw<float> raw;
  float *bits = &raw.bits.x;
  for (int i = 0; i < VEC; ++i)
    if (i < count) bits[i] = from[i];
  return raw;
}
template <class T> __device__ __forceinline__ Raw<T> assemble(const T *from, int count) {
  const unsigned short *bits = reinterpret_cast<const unsigned short *>(from);
  unsigned part[VEC] = {};
#pragma unroll
  for (int i = 0; i < VEC; ++i)
    if (i < count) part[i] = bits[i];
  Raw<T> raw;
  raw.bits = {part[0] | part[1] << 16, part[2] | part[3] << 16};
  return raw;
}

template <class T> __device__ __forceinline__ Raw<T> load_whole(const T *from) {
  Raw<T> raw;
  raw.bits = *reinterpret_cast<const decltype(raw.bits) *>(from);
  return raw;
}
template <class T> __device__ __forceinline__ Raw<T> load_raw(const T *from, Access access) {
  return access.whole ? load_whole(from) : assemble(from, access.count);
}
template <class T> __device__ __forceinline__ Vec load(const T *from, Access access) {
  return unpack(load_raw(from, access));
}

// The row of an array whose rows are `bytes` apart: one instruction, whereas a 64-bit product takes several.
template <class T> __device__ __forceinline__ T *row_at(T *first, int row, int bytes) {
  using Byte = typename std::conditional<std::is_const<T>::value, const char, char>::type;
  return reinterpret_cast<T *>(reinterpret_cast<Byte *>(first) + (int64_t)row * bytes);
}

// Copies four channels to shared memory asynchronously, without registers. Only the thread that copied them may read them
// after wait_for_copies().
template <class T> __device__ __forceinline__ void copy_ahead(Raw<T> *to, const T *from, Access access) {
#ifdef __CUDA_ARCH__
  if (access.whole) {
    const unsigned at = (unsigned)__cvta_generic_to_shared(to);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(sizeof(Raw<T>)) : "memory");
    return;
  }
#endif
  *to = load_raw(from, access);
}
__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

template <class T> __device__ __forceinline__ void store(T *to, const Vec &v, Access access) {
  if (access.whole) {
    const Raw<T> raw = pack(v, T{});
    *reinterpret_cast<decltype(Raw<T>::bits) *>(to) = raw.bits;
  } else {
#pragma unroll
    for (int i = 0; i < VEC; ++i)
      if (i < access.count) to[i] = from_float<T>(v[i]);
  }
}

// --------------------------------------------------------------------------------------------------------------------
// Special functions. The hardware's approximations cost one instruction of the special-function unit, which produces 16
// results per clock; two per SiLU limit these kernels for 16-bit tokens. bfloat16 tokens therefore use tanh (relative
// error 2^-11, below the rounding of a bfloat16); float32 and float16 tokens use an exponential and a reciprocal (2^-22).

__device__ __forceinline__ float exp2_approximate(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

__device__ __forceinline__ float tanh_approximate(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return tanhf(x);
#endif
}

// One instruction. Unlike a division, it returns 0 for divisors beyond 2^126.
__device__ __forceinline__ float reciprocal_approximate(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x > 0x1p126f ? 0.0f : 1.0f / x;
#endif
}

template <class T> __device__ __forceinline__ float sigmoid(float x) {
  return reciprocal_approximate(1.0f + exp2_approximate(-LOG2E * x));
}
template <> __device__ __forceinline__ float sigmoid<bf16>(float x) {
  return fmaf(0.5f, tanh_approximate(0.5f * x), 0.5f);
}

// SiLU of x, given SILU_SCALE * x. If only the SiLU of a convolution is needed, its taps are halved for bfloat16, which is
// exact and saves a multiplication per element and direction.
template <class T> constexpr float SILU_SCALE = 1.0f;
template <> constexpr float SILU_SCALE<bf16> = 0.5f;
template <class T> __device__ __forceinline__ float silu_of_scaled(float x) {
  return x * reciprocal_approximate(1.0f + exp2_approximate(-LOG2E * x));
}
template <> __device__ __forceinline__ float silu_of_scaled<bf16>(float half_x) {
  return fmaf(half_x, tanh_approximate(half_x), half_x);
}
template <class T> __device__ __forceinline__ float silu(float x) { return silu_of_scaled<T>(SILU_SCALE<T> * x); }

// exp(x) as scale * (1 + rest), so that h * exp(x) = scale * h + scale * rest * h stays exact near x = 0: an error of
// 1e-7 in a decay near 1 would grow to 1e-3 over a long scan. Uses only fused multiply-adds.
struct SplitExp {
  float scale, rest;
};
__device__ __forceinline__ SplitExp split_exp(float x) {
  x = fmaxf(x, -87.0f);
  const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = fmaf(x, LOG2E, rounder);
  const float whole = shifted - rounder;
  float f = fmaf(whole, -0.693145751953125f, x);
  f = fmaf(whole, -1.428606820309417e-6f, f);  // |f| <= 0.347
  float p = fmaf(f, 1.9841270e-4f, 1.3888889e-3f);
  p = fmaf(p, f, 8.3333333e-3f);
  p = fmaf(p, f, 4.1666667e-2f);
  p = fmaf(p, f, 1.6666667e-1f);
  p = fmaf(p, f, 0.5f);
  const float scale = __int_as_float((__float_as_int(shifted) << 23) + 0x3f800000);
  return {scale, fmaf(p * f, f, f)};
}

// log1p rather than log(1 + e), which would lose the digits of small steps.
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

}  // namespace cellvim
