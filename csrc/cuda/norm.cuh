// LayerNorm and RMSNorm of a row: the statistics and the gradient.
#pragma once
#include "reduce.cuh"

namespace cellvim {

struct Moments {
  float mean, scale;  // normalised = (row - mean) * scale
};

// Gradient of the row, given g = gradient of the normalised row and the row's means of g and of g * normalised.
__device__ __forceinline__ float norm_gradient(float g, float normalised, Moments m, float mean, float projection,
                                               int kind) {
  if (kind == CELLVIM_NORM_NONE) return g;
  return (g - (kind == CELLVIM_NORM_LAYER ? mean : 0.0f) - normalised * projection) * m.scale;
}

}  // namespace cellvim
