// The one block's shared memory.
#include "cuda_runtime.h"

namespace cellvim {
alignas(128) unsigned char shared_memory[emulation::SHARED_BYTES];
}
