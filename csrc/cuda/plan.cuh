// ScanPlan on the device: the order in which a block visits the stored tokens of a sample, the scan step (slot) that
// pools each of them, and the tokens of a slot.
//
// Dense grids of at most three axes are traversed by counting. Irregular sets of tokens are given as 64-bit indices, which
// a small kernel converts to 32-bit tables and, if an op needs them, to lists of steps per slot.
#pragma once
#include "launch.cuh"

namespace cellvim {

struct Plan {
  int length, stored, slots, samples;  // samples: of the tables, 1 if all samples are alike
  // Dense
  int sizes[3], token_stride[3], slot_stride[3];
  int kept_size[3], kept_step[3], group_size[3], group_step[3];  // slot -> its first step, member -> further steps
  int group;                                                     // tokens per slot
  float mean_weight;
  // Indexed
  bool indexed;
  int tokens;                // length of a row of `token`
  const int32_t *token;      // (samples, tokens): stored token of each step; then the stored tokens that no step visits
  const int32_t *slot;       // (2, samples, L)
  const int32_t *count;      // (samples): steps that have a token
  const int32_t *start;      // (2, samples, P + 1), into `steps`
  const int32_t *steps;      // (2, samples, L): steps ordered by slot
  const float *slot_weight;  // (samples, P)

  __device__ __forceinline__ int sample(int b) const { return samples == 1 ? 0 : b; }
  __device__ __forceinline__ int steps_of(int b) const { return indexed ? count[sample(b)] : length; }
};

// Visits the steps one by one. Outside the sequence, `token` is -1 and `slot` is undefined.
class Cursor {
 public:
  __device__ __forceinline__ Cursor(const Plan &plan, int b, int step) : plan_(plan), step_(step) {
    count_ = plan.steps_of(b);
    if (plan.indexed) {
      token_table_ = plan.token + (int64_t)plan.sample(b) * plan.tokens;
      slot_table_ = plan.slot + (int64_t)plan.sample(b) * plan.length;
    } else {
      const int at = step < 0 ? 0 : step;
      i2_ = at % plan.sizes[2];
      const int rest = at / plan.sizes[2];
      i1_ = rest % plan.sizes[1];
      const int i0 = rest / plan.sizes[1];
      token_ = i0 * plan.token_stride[0] + i1_ * plan.token_stride[1] + i2_ * plan.token_stride[2];
      slot_ = i0 * plan.slot_stride[0] + i1_ * plan.slot_stride[1] + i2_ * plan.slot_stride[2];
    }
  }
  __device__ __forceinline__ bool exists() const { return step_ >= 0 && step_ < count_; }
  __device__ __forceinline__ int step() const { return step_; }
  __device__ __forceinline__ int token() const {
    if (!exists()) return -1;
    return plan_.indexed ? token_table_[step_] : token_;
  }
  __device__ __forceinline__ int slot(int k) const {
    if (!plan_.indexed) return slot_;
    return slot_table_[(int64_t)k * plan_.samples * plan_.length + step_];
  }
  __device__ __forceinline__ void next() {
    if (step_++ < 0 || plan_.indexed) return;
    token_ += plan_.token_stride[2], slot_ += plan_.slot_stride[2];
    if (++i2_ < plan_.sizes[2]) return;
    i2_ = 0;
    token_ += plan_.token_stride[1] - plan_.sizes[2] * plan_.token_stride[2];
    slot_ += plan_.slot_stride[1] - plan_.sizes[2] * plan_.slot_stride[2];
    if (++i1_ < plan_.sizes[1]) return;
    i1_ = 0;
    token_ += plan_.token_stride[0] - plan_.sizes[1] * plan_.token_stride[1];
    slot_ += plan_.slot_stride[0] - plan_.sizes[1] * plan_.slot_stride[1];
  }

 private:
  const Plan &plan_;
  int step_, count_;
  int i1_ = 0, i2_ = 0, token_ = 0, slot_ = 0;
  const int32_t *token_table_ = nullptr, *slot_table_ = nullptr;
};

// The steps that one slot pools, ascending.
class Members {
 public:
  __device__ __forceinline__ Members(const Plan &plan, int k, int b, int p) : plan_(plan) {
    if (plan.indexed) {
      const int64_t row = (int64_t)k * plan.samples + plan.sample(b);
      const int32_t *start = plan.start + row * (plan.slots + 1) + p;
      first_ = start[0], count_ = start[1] - start[0];
      list_ = plan.steps + row * plan.length + first_;
    } else {
      const int p2 = p % plan.kept_size[2], rest = p / plan.kept_size[2];
      const int p1 = rest % plan.kept_size[1], p0 = rest / plan.kept_size[1];
      first_ = p0 * plan.kept_step[0] + p1 * plan.kept_step[1] + p2 * plan.kept_step[2];
      count_ = plan.group;
    }
  }
  __device__ __forceinline__ int count() const { return count_; }
  __device__ __forceinline__ int step(int i) const {
    if (plan_.indexed) return list_[i];
    const int i2 = i % plan_.group_size[2], rest = i / plan_.group_size[2];
    const int i1 = rest % plan_.group_size[1], i0 = rest / plan_.group_size[1];
    return first_ + i0 * plan_.group_step[0] + i1 * plan_.group_step[1] + i2 * plan_.group_step[2];
  }

 private:
  const Plan &plan_;
  int first_, count_;
  const int32_t *list_ = nullptr;
};

// The stored token of an existing step. In an indexed plan, the steps from the last to `stored` represent the tokens that
// no step visits.
__device__ __forceinline__ int token_at(const Plan &plan, int b, int step) {
  if (plan.indexed) return plan.token[(int64_t)plan.sample(b) * plan.tokens + step];
  const int i2 = step % plan.sizes[2], rest = step / plan.sizes[2];
  return rest / plan.sizes[1] * plan.token_stride[0] + rest % plan.sizes[1] * plan.token_stride[1] +
         i2 * plan.token_stride[2];
}

// The slot of an existing step in direction k.
__device__ __forceinline__ int slot_at(const Plan &plan, int b, int k, int step) {
  if (plan.indexed) return plan.slot[((int64_t)k * plan.samples + plan.sample(b)) * plan.length + step];
  const int i2 = step % plan.sizes[2], rest = step / plan.sizes[2];
  return rest / plan.sizes[1] * plan.slot_stride[0] + rest % plan.sizes[1] * plan.slot_stride[1] +
         i2 * plan.slot_stride[2];
}

// Lists of steps in shared memory: the threads of a block compute them together, once, instead of each at every step.
// Both have the interface of a Cursor at the first step of the list.
class ListedTokens {
 public:
  __device__ __forceinline__ explicit ListedTokens(const int *list) : at_(list) {}
  __device__ __forceinline__ int token() const { return *at_; }
  __device__ __forceinline__ void next() { ++at_; }

  // `count` steps starting at `from`; the caller synchronises the block before the list is read.
  __device__ __forceinline__ static void fill(const Plan &plan, int b, int from, int count, int *list) {
    const int steps = plan.steps_of(b);
    for (int i = (int)threadIdx.x; i < count; i += (int)blockDim.x)
      list[i] = from + i >= 0 && from + i < steps ? token_at(plan, b, from + i) : -1;
  }

 private:
  const int *at_;
};
class ListedSlots {
 public:
  __device__ __forceinline__ explicit ListedSlots(const int2 *list) : at_(list) {}
  __device__ __forceinline__ bool exists() const { return at_->x >= 0; }
  __device__ __forceinline__ int slot(int k) const { return k ? at_->y : at_->x; }
  __device__ __forceinline__ void next() { ++at_; }

  __device__ __forceinline__ static void fill(const Plan &plan, int b, int from, int count, int2 *list) {
    const int steps = plan.steps_of(b);
    for (int i = (int)threadIdx.x; i < count; i += (int)blockDim.x) {
      const bool exists = from + i < steps;
      list[i] = {exists ? slot_at(plan, b, 0, from + i) : -1, exists ? slot_at(plan, b, 1, from + i) : -1};
    }
  }

 private:
  const int2 *at_;
};

// Fills `plan` and, if it is indexed, allocates its tables in the workspace. `needs_groups`: Members will be used.
int make_plan(const cellvim_plan &from, bool needs_groups, Workspace &workspace, Plan &plan);
// Enqueues the kernel that fills the tables; nothing for a dense plan.
int fill_tables(const cellvim_plan &from, bool needs_groups, const Plan &plan, const cellvim_cuda_call &call);

}  // namespace cellvim
