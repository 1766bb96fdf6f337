"""Shared fixtures: where the real images and the published numbers lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch is imported: threads that wait by spinning make models several times slower on a busy machine.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if "PYTEST_XDIST_WORKER" in os.environ:  # the processes share the cores; tests of threads set their own number
    os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real images that only a developer's machine has; a test that asks for it skips elsewhere."""
    path = SHARED / "data"
    if not path.is_dir():
        pytest.skip(f"needs the real images in {path.name}/ beside the repository; the bundled plate covers the rest")
    return path
