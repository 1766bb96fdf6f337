// The C interface of the CPU kernels, which cellvim/ops/native.py calls through ctypes.
//
// B batch, L tokens, P scan steps, E inner width, N states, W taps. Every op takes one struct; the backward functions
// take the same struct as the forward ones, with the gradient pointers set. Arrays without strides are contiguous.
// Results do not depend on the number of threads, and a sample's forward result does not depend on the other samples.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#pragma GCC visibility push(default)
#endif

#define CELLVIM_CPU_ABI 1

enum cellvim_status { CELLVIM_OK = 0, CELLVIM_BAD_INDEX = 1, CELLVIM_NO_MEMORY = 2, CELLVIM_BAD_ARGUMENT = 3 };
enum cellvim_dtype { CELLVIM_FLOAT32 = 0, CELLVIM_BFLOAT16 = 1 };
enum cellvim_pool { CELLVIM_POOL_NONE = 0, CELLVIM_POOL_MEAN = 1, CELLVIM_POOL_MAX = 2, CELLVIM_POOL_ATTENTION = 3 };
enum cellvim_norm { CELLVIM_NORM_NONE = 0, CELLVIM_NORM_LAYER = 1, CELLVIM_NORM_RMS = 2 };

// ScanPlan: a dense grid if order is null, otherwise explicit indices.
struct cellvim_plan {
  int64_t length;           // L, number of steps in the block's order
  int64_t stored;           // number of tokens per sample of x
  int64_t slots;            // P
  int64_t sizes[3], strides[3], pooled[3];
  int64_t index_batch;      // 1 or B: number of samples in order, slot and slot_weight
  const int64_t *order;     // (index_batch, L), padded with -1 at the end of shorter samples
  const int64_t *slot;      // (2, index_batch, L)
  const float *slot_weight; // (index_batch, P)
  float mean_weight;        // dense grids: factor on a slot's sum
};

struct cellvim_add_norm {
  int64_t rows, width;
  int32_t dtype, kind, threads;
  float eps;
  const void *hidden;    // (rows, D)
  const float *residual; // (rows, D) or null
  const float *weight, *bias;
  void *normed;
  float *total;            // (rows, D): written by the forward, read by the backward
  const void *grad_normed; // or null
  const float *grad_total; // or null
  float *grad_residual;    // (rows, D)
  void *grad_hidden;       // bfloat16 only: grad_residual rounded
  float *grad_weight, *grad_bias;
};

struct cellvim_conv_pool {
  struct cellvim_plan plan;
  int64_t batch, width, taps;
  int32_t dtype, pool, threads;
  const void *x; // (B, stored, E)
  int64_t x_batch, x_token;
  const float *weight, *bias;             // (2, E, W), (2, E) or null
  const float *score_weight, *score_bias; // (2, E), (2,)
  void *out;                              // (2, B, P, E)
  int32_t *best;                          // max: (2, B, P, E), step of the maximum in the block's order, -1 if none
  float *share;                           // attention: (2, B, L), the softmax
  const void *grad_out;                   // (2, B, P, E)
  void *grad_x;                           // (B, stored, E)
  float *grad_weight, *grad_bias, *grad_score_weight, *grad_score_bias;
};

struct cellvim_pooled_scan {
  int64_t batch, steps, width, states;
  int32_t dtype, threads;
  const void *pooled, *delta;                         // (2, B, P, E)
  int64_t pooled_stride[3], delta_stride[3];          // of direction, batch and step
  const float *delta_bias, *a;                        // (2, E), (2, E, N)
  const float *b, *c;                                 // (2, B, P, N)
  int64_t b_stride[3], c_stride[3];
  void *out;                                          // (2, B, P, E)
  const void *grad_out;
  void *grad_pooled, *grad_delta;
  float *grad_delta_bias, *grad_a, *grad_b, *grad_c;
};

struct cellvim_expand_gate {
  struct cellvim_plan plan;
  int64_t batch, width, taps;
  int32_t dtype, norm, threads;
  float eps;
  const void *x, *z; // (B, stored, E)
  int64_t x_batch, x_token, z_batch, z_token;
  const void *y;     // (2, B, P, E)
  const float *weight, *bias, *skip; // skip (2, E) or null
  const float *norm_weight, *norm_bias;
  void *out;         // (B, stored, E)
  const void *grad_out;
  void *grad_x, *grad_z, *grad_y;
  float *grad_mixed; // (B, stored, E) scratch: gradient before the norm; may be grad_x itself if that is float32
  float *grad_weight, *grad_bias, *grad_skip, *grad_norm_weight, *grad_norm_bias;
};

// The instruction set selected for this machine, e.g. "x86-64-v4".
const char *cellvim_cpu_isa(void);
// Incremented whenever a struct changes, so that Python rejects a library of another version.
int cellvim_cpu_abi(void);

int cellvim_cpu_add_norm(const struct cellvim_add_norm *);
int cellvim_cpu_add_norm_backward(const struct cellvim_add_norm *);
int cellvim_cpu_conv_pool(const struct cellvim_conv_pool *);
int cellvim_cpu_conv_pool_backward(const struct cellvim_conv_pool *);
int cellvim_cpu_pooled_scan(const struct cellvim_pooled_scan *);
int cellvim_cpu_pooled_scan_backward(const struct cellvim_pooled_scan *);
int cellvim_cpu_expand_gate(const struct cellvim_expand_gate *);
int cellvim_cpu_expand_gate_backward(const struct cellvim_expand_gate *);

#ifdef __cplusplus
#pragma GCC visibility pop
}
#endif
