// The C interface: selects the kernels of the best instruction set of this machine, once.
#include "cellvim_cpu.h"

#include <stdlib.h>
#include <string.h>

#define CELLVIM_DECLARE(isa)                          \
  namespace isa {                                     \
  int add_norm(const cellvim_add_norm &, bool);       \
  int conv_pool(const cellvim_conv_pool &, bool);     \
  int pooled_scan(const cellvim_pooled_scan &, bool); \
  int expand_gate(const cellvim_expand_gate &, bool); \
  }

namespace {

struct Kernels {
  const char *isa;
  int (*add_norm)(const cellvim_add_norm &, bool);
  int (*conv_pool)(const cellvim_conv_pool &, bool);
  int (*pooled_scan)(const cellvim_pooled_scan &, bool);
  int (*expand_gate)(const cellvim_expand_gate &, bool);
};

}  // namespace

#define CELLVIM_KERNELS(isa, name) \
  Kernels { name, isa::add_norm, isa::conv_pool, isa::pooled_scan, isa::expand_gate }

CELLVIM_DECLARE(isa_base)
#ifdef CELLVIM_HAS_X86_LEVELS
CELLVIM_DECLARE(isa_v3)
CELLVIM_DECLARE(isa_v4)
#endif

namespace {

#ifdef CELLVIM_HAS_X86_LEVELS
// CELLVIM_CPU_ISA=AVX2 or SSE2 excludes the wider sets, so that all can be tested on one machine.
bool allowed(const char *isa) {
  const char *most = getenv("CELLVIM_CPU_ISA");
  if (!most || !strcmp(most, "AVX-512")) return true;
  return strcmp(isa, "AVX-512") && !strcmp(most, "AVX2");
}
#endif

Kernels choose() {
#ifdef CELLVIM_HAS_X86_LEVELS
  __builtin_cpu_init();
  if (allowed("AVX-512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return CELLVIM_KERNELS(isa_v4, "AVX-512");
  if (allowed("AVX2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2"))
    return CELLVIM_KERNELS(isa_v3, "AVX2");
  return CELLVIM_KERNELS(isa_base, "SSE2");
#elif defined(__aarch64__)
  return CELLVIM_KERNELS(isa_base, "NEON");
#else
  return CELLVIM_KERNELS(isa_base, "the compiler's default");
#endif
}

const Kernels &kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace

extern "C" {

const char *cellvim_cpu_isa(void) { return kernels().isa; }
int cellvim_cpu_abi(void) { return CELLVIM_CPU_ABI; }

int cellvim_cpu_add_norm(const cellvim_add_norm *a) { return kernels().add_norm(*a, false); }
int cellvim_cpu_add_norm_backward(const cellvim_add_norm *a) { return kernels().add_norm(*a, true); }
int cellvim_cpu_conv_pool(const cellvim_conv_pool *a) { return kernels().conv_pool(*a, false); }
int cellvim_cpu_conv_pool_backward(const cellvim_conv_pool *a) { return kernels().conv_pool(*a, true); }
int cellvim_cpu_pooled_scan(const cellvim_pooled_scan *a) { return kernels().pooled_scan(*a, false); }
int cellvim_cpu_pooled_scan_backward(const cellvim_pooled_scan *a) { return kernels().pooled_scan(*a, true); }
int cellvim_cpu_expand_gate(const cellvim_expand_gate *a) { return kernels().expand_gate(*a, false); }
int cellvim_cpu_expand_gate_backward(const cellvim_expand_gate *a) { return kernels().expand_gate(*a, true); }
}
