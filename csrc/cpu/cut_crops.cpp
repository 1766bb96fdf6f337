// cut_crops: windows of a stored field to scaled float32 crops, each pixel read and written once.
#include "kernels.h"

namespace CELLVIM_ISA {
namespace {

// Where a mirrored field (its edge pixels twice) has the place i of a row or column of n.
CELLVIM_INLINE int64_t mirrored(int64_t i, int64_t n) {
  i %= 2 * n;
  if (i < 0) i += 2 * n;
  return i < n ? i : 2 * n - 1 - i;
}

struct AsStored {
  __attribute__((always_inline)) float operator()(float v) const { return v; }
};

// As numpy: subtract, multiply, then fmax and fmin, which turn a NaN into the bound.
template <bool NAN_TO_ZERO> struct Scaled {
  float low, factor, floor, ceiling;
  __attribute__((always_inline)) float operator()(float v) const {
    v = (v - low) * factor;
    if (NAN_TO_ZERO) v = v == v ? v : 0.0f;
    v = v > floor ? v : floor;
    return v < ceiling ? v : ceiling;
  }
};

// One row of a window: S pixels from place x0 of a row of W.
template <bool MIRROR, class T, class Scale>
CELLVIM_INLINE void cut_row(const T *__restrict__ row, int64_t x0, int64_t W, int64_t S, const Scale scale,
                            float *__restrict__ out) {
  if (x0 >= 0 && x0 + S <= W) {
    const T *from = row + x0;
    for (int64_t j = 0; j < S; ++j) out[j] = scale((float)from[j]);
    return;
  }
  for (int64_t j = 0; j < S; ++j) {
    const int64_t x = MIRROR ? mirrored(x0 + j, W) : x0 + j;
    out[j] = x >= 0 && x < W ? scale((float)row[x]) : 0.0f;
  }
}

template <bool MIRROR>
void mask_row(const int32_t *label, int32_t own, int64_t x0, int64_t W, int64_t S, float *out) {
  for (int64_t j = 0; j < S; ++j) {
    const int64_t x = MIRROR ? mirrored(x0 + j, W) : x0 + j;
    const int32_t there = x >= 0 && x < W ? label[x] : 0;
    if (there != 0 && there != own) out[j] = 0.0f;
  }
}

template <bool MIRROR, class T, class MakeScale> void cut(const cellvim_cut_crops &a, const MakeScale scale_of) {
  const int64_t S = a.size;
  for (int64_t n = 0; n < a.crops; ++n) {
    const int64_t y0 = a.first[2 * n], x0 = a.first[2 * n + 1];
    for (int64_t c = 0; c < a.channels; ++c) {
      const T *plane = (const T *)a.image + c * a.channel_stride;
      const auto scale = scale_of(c);
      float *out = a.out + (n * a.channels + c) * S * S;
      for (int64_t i = 0; i < S; ++i, out += S) {
        const int64_t y = MIRROR ? mirrored(y0 + i, a.height) : y0 + i;
        if (y < 0 || y >= a.height) {
          memset(out, 0, S * sizeof(float));
          continue;
        }
        cut_row<MIRROR>(plane + y * a.row_stride, x0, a.width, S, scale, out);
        if (a.labels) mask_row<MIRROR>(a.labels + y * a.width, a.numbers[n], x0, a.width, S, out);
      }
    }
  }
}

template <bool MIRROR, class T> void cut(const cellvim_cut_crops &a) {
  if (!a.low)
    cut<MIRROR, T>(a, [](int64_t) { return AsStored{}; });
  else if (a.floor < 0.0f)
    cut<MIRROR, T>(a, [&](int64_t c) { return Scaled<true>{a.low[c], a.factor[c], a.floor, a.ceiling}; });
  else
    cut<MIRROR, T>(a, [&](int64_t c) { return Scaled<false>{a.low[c], a.factor[c], a.floor, a.ceiling}; });
}

template <class T> void cut(const cellvim_cut_crops &a) {
  a.border == CELLVIM_BORDER_MIRROR ? cut<true, T>(a) : cut<false, T>(a);
}

}  // namespace

int cut_crops(const cellvim_cut_crops &a) {
  if (a.size < 1 || a.height < 1 || a.width < 1 || a.row_stride < a.width || (!a.low) != (!a.factor) ||
      (a.labels && !a.numbers))
    return CELLVIM_BAD_ARGUMENT;
  switch (a.dtype) {
    case CELLVIM_PIXEL_UINT8: cut<uint8_t>(a); break;
    case CELLVIM_PIXEL_UINT16: cut<uint16_t>(a); break;
    case CELLVIM_PIXEL_INT16: cut<int16_t>(a); break;
    case CELLVIM_PIXEL_FLOAT32: cut<float>(a); break;
    default: return CELLVIM_BAD_ARGUMENT;
  }
  return CELLVIM_OK;
}

}  // namespace CELLVIM_ISA
