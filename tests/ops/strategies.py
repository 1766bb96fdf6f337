"""Random plans, for hypothesis."""

from __future__ import annotations

from cases import dense_plan, indexed_plan
from hypothesis import strategies as st

from cellvim.ops.scan_plan import ScanPlan


@st.composite
def plans(draw: st.DrawFn, batch: int) -> tuple[ScanPlan, int]:
    """A plan and the number of tokens it needs."""
    if draw(st.booleans()):
        tokens, slots = draw(st.integers(1, 24)), draw(st.integers(1, 7))
        return indexed_plan(draw(st.integers(0, 2**16)), batch, tokens, slots, draw(st.booleans())), tokens
    sizes = draw(st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)))
    pooled = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    plan = dense_plan(sizes, draw(st.permutations(range(3))), pooled, draw(st.sampled_from([1.0, 0.25])))
    return plan, sizes[0] * sizes[1] * sizes[2]
