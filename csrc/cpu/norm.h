// LayerNorm and RMSNorm of one row in the cache, and their gradients.
#pragma once
#include "cellvim_cpu.h"
#include "vec.h"

namespace CELLVIM_ISA {

struct Moments {
  float mean, scale;  // normalised = (row - mean) * scale
};

// `row` is padded with zeros to full vectors. Two passes, because the difference of large sums loses precision.
CELLVIM_INLINE Moments moments(const float *row, int64_t width, int32_t kind, float eps) {
  if (kind == CELLVIM_NORM_NONE) return {0.0f, 1.0f};
  float mean = 0.0f;
  if (kind == CELLVIM_NORM_LAYER) {
    vf total[2] = {};
    int64_t e = 0;
    for (; e + 2 * LANES <= width; e += 2 * LANES) total[0] += load(row + e), total[1] += load(row + e + LANES);
    for (; e < width; e += LANES) total[0] += load(row + e);
    mean = sum(total[0] + total[1]) / (float)width;
  }
  vf square[2] = {};
  int64_t e = 0;
  for (; e + 2 * LANES <= width; e += 2 * LANES)
    for (int i = 0; i < 2; ++i) {
      const vf d = load(row + e + i * LANES) - mean;
      square[i] += d * d;
    }
  for (; e + LANES <= width; e += LANES) {
    const vf d = load(row + e) - mean;
    square[0] += d * d;
  }
  float rest = 0.0f;
  for (; e < width; ++e) rest += (row[e] - mean) * (row[e] - mean);
  const float variance = (sum(square[0] + square[1]) + rest) / (float)width;
  return {mean, 1.0f / __builtin_sqrtf(variance + eps)};
}

// Means over a row for the gradient of the norm: of g and of g * normalised.
struct GradMoments {
  float mean, projection;
};

// Gradient of the row, given g = gradient of the normalised row.
CELLVIM_INLINE vf norm_gradient(vf g, vf normalised, Moments m, GradMoments gm, int32_t kind) {
  if (kind == CELLVIM_NORM_NONE) return g;
  return (g - gm.mean - normalised * gm.projection) * m.scale;
}

}  // namespace CELLVIM_ISA
