"""The bundled datasets are complete and small, and have their source and licence."""

from __future__ import annotations

import pandas as pd
import pytest

from cellvim.data.bundled import bundled_dataset, bundled_datasets
from cellvim.errors import InputError


def test_bundled_plate_is_complete_and_small():
    folder = bundled_dataset("sbs_translocation")
    table = pd.read_csv(folder / "platemap.csv")
    images = sorted((folder / "images").glob("*.tif"))
    assert table["Metadata_pert_type"].value_counts().to_dict() == {"negcon": 16, "poscon": 8, "trt": 5}
    wells = {f"{p.stem[-4]}{p.stem[-2:]}" for p in images}
    assert wells == set(table["Well"]) and len(images) == 2 * len(wells)
    assert sum(p.stat().st_size for p in images) < 9e6


@pytest.mark.parametrize("name", sorted(bundled_datasets()))
def test_every_dataset_has_its_card_and_licence(name):
    folder = bundled_dataset(name)
    card = (folder / "card.md").read_text(encoding="utf-8")
    for word in ("source", "licence", "channels", "pixel size", "Labels", "Cautions"):
        assert word in card
    assert (folder / "LICENSE").is_file()


def test_unknown_dataset_lists_the_available_ones():
    with pytest.raises(InputError, match=r"'sbs' is not known to CellVim, which has jump_cp, sbs_translocation"):
        bundled_dataset("sbs")
