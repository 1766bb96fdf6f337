"""Fixtures of the model tests."""

from __future__ import annotations

import pytest

from cellvim import ops


@pytest.fixture(params=[b.name for b in ops.describe_backends() if b.available])
def backend(request):
    """Run the test on each back-end of this machine in turn."""
    with ops.use_backend(request.param):
        yield request.param
