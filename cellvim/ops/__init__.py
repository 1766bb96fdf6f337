"""The fused ops of the mixer, one signature each, whatever runs them; see docs/kernels.md."""

from cellvim.ops.dispatch import (
    add_norm,
    conv_pool,
    describe_backends,
    expand_gate,
    pooled_scan,
    selected_backend,
    use_backend,
)
from cellvim.ops.matmul import linear
from cellvim.ops.scan_plan import ScanPlan, sequence_plan

__all__ = [
    "ScanPlan",
    "add_norm",
    "conv_pool",
    "describe_backends",
    "expand_gate",
    "linear",
    "pooled_scan",
    "selected_backend",
    "sequence_plan",
    "use_backend",
]
