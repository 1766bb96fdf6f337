"""The fused ops of the models, which run on one of several back ends; see docs/kernels.md."""

from cellvim.ops.dispatch import (
    add_norm,
    conv_pool,
    describe_backends,
    expand_gate,
    linear,
    pooled_scan,
    selected_backend,
    use_backend,
)
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
