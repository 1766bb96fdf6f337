"""A small plate and embeddings of its cells."""

from __future__ import annotations

from pathlib import Path

import anndata
import pytest
from report_rows import CHANNELS, WELLS, make_embeddings
from synthetic_plate import draw_field, write_plate


@pytest.fixture(scope="session")
def plate(tmp_path_factory) -> Path:
    fields = {well: [draw_field(i, 6)] for i, well in enumerate(WELLS)}
    return write_plate(tmp_path_factory.mktemp("images") / "plate.zarr", fields, CHANNELS)


@pytest.fixture
def embeddings(plate) -> anndata.AnnData:
    return make_embeddings(plate)
