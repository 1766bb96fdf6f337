// CUDA on the CPU, for tests: as much of the language and of the runtime as csrc/cuda uses.
//
// Kernels run block after block on one thread of the operating system. The threads of a block are fibers that take turns
// at barriers and shuffles, so that indexing, masks, reductions and gradients can be held against the definition without
// a GPU. What it finds beside wrong numbers: a missing barrier (run it with the threads in reverse order, and results
// change), shuffles among lanes that have left, barriers that not all reach, shared memory that is read before it is
// written (it starts as NaN) or written beyond what was asked for. Speed and memory ordering it knows nothing of.
#pragma once
#include <cmath>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// --------------------------------------------------------------------------------------------------------------------

namespace cellvim {
extern unsigned char shared_memory[];
}

namespace emulation {

constexpr size_t SHARED_BYTES = 227 * 1024, STACK_BYTES = 128 * 1024;

// The byte that shared memory is filled with before a block runs. Four times 0xff is a NaN and the integer -1, which
// passes for "no such step"; four times 0x7f is a large integer, so an index that was never written cannot pass.
inline unsigned char poison() {
  const char *value = std::getenv("CELLVIM_EMULATION_POISON");
  return value ? (unsigned char)std::strtol(value, nullptr, 16) : 0xff;
}

[[noreturn]] inline void fail(const char *message) {
  std::fprintf(stderr, "CUDA emulation: %s\n", message);
  std::abort();
}

struct Fiber {
  std::vector<char> stack = std::vector<char>(STACK_BYTES);
  ucontext_t entry;
  jmp_buf here;
  bool is_started, is_done;
};

struct Barrier {
  int members = 0, arrived = 0;
  unsigned generation = 0;

  void release_if_complete() {
    if (arrived && arrived >= members) arrived = 0, ++generation;
  }
};

inline std::vector<Fiber *> fibers;
inline std::function<void()> body;
inline jmp_buf scheduler;
inline int current;
inline Barrier block_barrier;
inline std::vector<Barrier> warp_barriers;
inline std::vector<std::vector<float>> exchanged;  // (warps, 32)

inline bool is_reversed() {
  const char *order = std::getenv("CELLVIM_EMULATION_ORDER");
  return order && !std::strcmp(order, "reverse");
}

inline void yield() {
  if (!_setjmp(fibers[current]->here)) _longjmp(scheduler, 1);
}

inline void wait(Barrier &barrier) {
  const unsigned generation = barrier.generation;
  ++barrier.arrived;
  barrier.release_if_complete();
  while (barrier.generation == generation) yield();
}

inline void enter() {
  body();
  fibers[current]->is_done = true;
  --block_barrier.members, --warp_barriers[current / 32].members;
  block_barrier.release_if_complete();
  if (warp_barriers[current / 32].arrived) fail("a lane left while others of its warp wait for a shuffle");
  _longjmp(scheduler, 1);
}

inline void resume(int thread) {
  current = thread;
  threadIdx.x = (unsigned)thread;
  if (_setjmp(scheduler)) return;
  Fiber &fiber = *fibers[thread];
  if (fiber.is_started) _longjmp(fiber.here, 1);
  fiber.is_started = true;
  setcontext(&fiber.entry);
}

inline void run_block(int threads, size_t shared) {
  while ((int)fibers.size() < threads) fibers.push_back(new Fiber);
  block_barrier = {};
  block_barrier.members = threads;
  warp_barriers.assign((size_t)(threads + 31) / 32, {});
  exchanged.assign(warp_barriers.size(), std::vector<float>(32));
  for (int t = 0; t < threads; ++t) {
    Fiber &fiber = *fibers[t];
    fiber.is_started = fiber.is_done = false;
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack.data();
    fiber.entry.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.entry, enter, 0);
    ++warp_barriers[t / 32].members;
  }
  const unsigned char filling = poison();
  std::memset(cellvim::shared_memory, filling, SHARED_BYTES);
  const bool reversed = is_reversed();
  for (bool is_over = false; !is_over;) {
    is_over = true;
    for (int i = 0; i < threads; ++i) {
      const int t = reversed ? threads - 1 - i : i;
      if (!fibers[t]->is_done) resume(t), is_over = false;
    }
  }
  for (size_t i = shared; i < SHARED_BYTES; ++i)
    if (cellvim::shared_memory[i] != filling) fail("shared memory was written beyond what was asked for");
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block_barrier); }

inline float __shfl_sync(unsigned, float value, int lane) {
  const int warp = emulation::current / 32, mine = emulation::current % 32;
  emulation::Barrier &barrier = emulation::warp_barriers[warp];
  if (barrier.members != 32) emulation::fail("a shuffle in a warp that has lost lanes");
  emulation::exchanged[warp][mine] = value;
  emulation::wait(barrier);
  const float result = emulation::exchanged[warp][lane & 31];
  emulation::wait(barrier);
  return result;
}
inline float __shfl_xor_sync(unsigned mask, float value, int bits) {
  return __shfl_sync(mask, value, (emulation::current % 32) ^ bits);
}

template <class To, class From> inline To reinterpret_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned bits) { return reinterpret_bits<float>(bits); }
inline float __int_as_float(int bits) { return reinterpret_bits<float>(bits); }
inline int __float_as_int(float value) { return reinterpret_bits<int>(value); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

// --------------------------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void *;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char *cudaGetErrorString(cudaError_t) { return "an emulated error"; }
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int bytes) {
  return bytes <= (int)emulation::SHARED_BYTES ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaMemsetAsync(void *at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(P...), A... arguments) {
  if (config->dynamicSmemBytes > emulation::SHARED_BYTES || config->blockDim.x > 1024) return cudaErrorInvalidValue;
  gridDim = config->gridDim, blockDim = config->blockDim;
  emulation::body = [=] { kernel(arguments...); };
  const bool reversed = emulation::is_reversed();
  for (unsigned i = 0; i < config->gridDim.x; ++i) {
    blockIdx.x = reversed ? config->gridDim.x - 1 - i : i;
    emulation::run_block((int)config->blockDim.x, config->dynamicSmemBytes);
  }
  return cudaSuccess;
}
