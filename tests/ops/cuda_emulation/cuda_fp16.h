// float16, for the emulation.
#pragma once
#include "cuda_runtime.h"

struct __half {
  uint16_t bits = 0;
};
inline float __half2float(__half value) { return (float)reinterpret_bits<_Float16>(value.bits); }
inline __half __float2half_rn(float value) {
  __half out;
  out.bits = reinterpret_bits<uint16_t>((_Float16)value);
  return out;
}
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(unsigned short bits) {
  __half out;
  out.bits = bits;
  return out;
}
