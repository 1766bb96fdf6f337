"""Shared fixtures: where the real images and the published numbers lie."""

from __future__ import annotations

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real images that only a developer's machine has; a test that asks for it skips elsewhere."""
    path = SHARED / "data"
    if not path.is_dir():
        pytest.skip(f"needs the real images in {path.name}/ beside the repository; the bundled plate covers the rest")
    return path
