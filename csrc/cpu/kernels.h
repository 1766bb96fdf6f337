// The kernels of one instruction set, and their number of threads.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif

#include "cellvim_cpu.h"
#include "vec.h"

namespace CELLVIM_ISA {

CELLVIM_INLINE int64_t thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

int add_norm(const cellvim_add_norm &, bool is_backward);
int conv_pool(const cellvim_conv_pool &, bool is_backward);
int pooled_scan(const cellvim_pooled_scan &, bool is_backward);
int expand_gate(const cellvim_expand_gate &, bool is_backward);

}  // namespace CELLVIM_ISA
