// bfloat16, for the emulation.
#pragma once
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits = 0;
};
inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float((unsigned)value.bits << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  unsigned bits = reinterpret_bits<unsigned>(value);
  __nv_bfloat16 out;
  out.bits = std::isnan(value) ? 0x7fff : (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  return out;
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
