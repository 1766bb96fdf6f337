// Tokens: the order in which a block visits the stored tokens of one sample, and the slot that pools each of them.
//
// Dense grids and explicit indices are both converted to two tables (one int32 per token), so that the kernels support
// a single kind of plan and never copy, flip or transpose an array of tokens.
#pragma once
#include "cellvim_cpu.h"
#include "vec.h"

namespace CELLVIM_ISA {

struct Tokens {
  const int32_t *token;    // (all) stored token at each step; after `count`, the stored tokens that no step visits
  const int32_t *slot[2];  // (count) scan step per direction
  int64_t count, all;
};

class Walk {
 public:
  int status = CELLVIM_OK;

  explicit Walk(const cellvim_plan &plan) : indexed_(plan.order != nullptr), stored_(plan.stored), length_(plan.length) {
    const int64_t samples = indexed_ ? plan.index_batch : 1;
    if (!token_.allocate(samples * plan.stored) || !slot_.allocate(2 * samples * plan.length) ||
        !count_.allocate(samples)) {
      status = CELLVIM_NO_MEMORY;
      return;
    }
    samples_ = samples;
    if (indexed_)
      for (int64_t b = 0; b < samples && status == CELLVIM_OK; ++b) read_indices(plan, b);
    else
      read_grid(plan);
  }

  Tokens of(int64_t sample) const {
    const int64_t b = samples_ == 1 ? 0 : sample;
    const int32_t *slot = slot_.data + 2 * b * length_;
    return {token_.data + b * stored_, {slot, indexed_ ? slot + length_ : slot}, count_.data[b], stored_};
  }

 private:
  bool indexed_;
  int64_t stored_, length_, samples_ = 1;
  Buffer<int32_t> token_, slot_;
  Buffer<int64_t> count_;

  void read_grid(const cellvim_plan &plan) {
    if (plan.length != plan.stored) {
      status = CELLVIM_BAD_ARGUMENT;
      return;
    }
    int64_t slot_stride[3], step = 1;
    for (int a = 2; a >= 0; --a) {
      slot_stride[a] = plan.pooled[a] ? 0 : step;
      if (!plan.pooled[a]) step *= plan.sizes[a];
    }
    int64_t l = 0;
    for (int64_t i = 0; i < plan.sizes[0]; ++i)
      for (int64_t j = 0; j < plan.sizes[1]; ++j)
        for (int64_t k = 0; k < plan.sizes[2]; ++k, ++l) {
          const int64_t at = i * plan.strides[0] + j * plan.strides[1] + k * plan.strides[2];
          if (l >= plan.length || at < 0 || at >= plan.stored) {
            status = CELLVIM_BAD_INDEX;
            return;
          }
          token_.data[l] = (int32_t)at;
          slot_.data[l] = (int32_t)(i * slot_stride[0] + j * slot_stride[1] + k * slot_stride[2]);
        }
    count_.data[0] = l;
    if (l != plan.length || step != plan.slots) status = CELLVIM_BAD_ARGUMENT;
  }

  void read_indices(const cellvim_plan &plan, int64_t b) {
    const int64_t *order = plan.order + b * plan.length;
    int64_t count = 0;
    while (count < plan.length && order[count] >= 0) ++count;
    for (int64_t l = count; l < plan.length; ++l)
      if (order[l] >= 0) status = CELLVIM_BAD_INDEX;  // missing tokens must be at the end
    Buffer<uint8_t> visited(plan.stored);
    if (!visited.data) {
      status = CELLVIM_NO_MEMORY;
      return;
    }
    int32_t *token = token_.data + b * plan.stored;
    for (int64_t l = 0; l < count; ++l) {
      if (order[l] >= plan.stored || visited.data[order[l]]) {
        status = CELLVIM_BAD_INDEX;
        return;
      }
      visited.data[order[l]] = 1;
      token[l] = (int32_t)order[l];
    }
    int64_t rest = count;
    for (int64_t t = 0; t < plan.stored; ++t)
      if (!visited.data[t]) token[rest++] = (int32_t)t;
    for (int k = 0; k < 2; ++k) {
      const int64_t *slot = plan.slot + (k * plan.index_batch + b) * plan.length;
      int32_t *out = slot_.data + (2 * b + k) * plan.length;
      for (int64_t l = 0; l < count; ++l) {
        if (slot[l] < 0 || slot[l] >= plan.slots) {
          status = CELLVIM_BAD_INDEX;
          return;
        }
        out[l] = (int32_t)slot[l];
      }
    }
    count_.data[b] = count;
  }
};

}  // namespace CELLVIM_ISA
