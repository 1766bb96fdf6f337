"""Other tools read our plates as we do, and we theirs (slow: with a Python that has them, in CELLVIM_OTHER_PYTHON).

They bring dependencies that do not go with ours: `python -m venv v; v/bin/pip install ome-zarr 'ngff-zarr[validate]'
--pre iohub`, then `CELLVIM_OTHER_PYTHON=v/bin/python make test-slow`.
"""

from __future__ import annotations

import json
import os
import subprocess

import numpy as np
import pytest

from cellvim.data.plate import open_plate

READ = {
    "ome_zarr": """
from ome_zarr.io import parse_url
from ome_zarr.reader import Reader
node = next(iter(Reader(parse_url(path))()))
show(kind=node.specs[0].__class__.__name__, names=node.metadata["channel_names"], sum=total(node.data[0]))
""",
    "ngff_zarr": """
import ngff_zarr
plate = ngff_zarr.from_hcs_zarr(path, validate=True)
images = [plate.get_well(*w.path.split("/")).get_image(i) for w in plate.metadata.wells for i in range(2)]
one = images[0].images[0]
show(names=[c.label for c in images[0].metadata.omero.channels], sum=sum(total(i.images[0].data) for i in images),
     scale=one.scale["x"], unit=one.axes_units["x"])
""",
    "iohub": """
from iohub import open_ome_zarr
plate = open_ome_zarr(path, mode="r")
images = [position for _, position in plate.positions()]
show(names=plate.channel_names, sum=sum(total(i["0"][:]) for i in images), scale=images[0].scale[-1])
""",
}
WRITE = {
    "ome_zarr": """
import zarr, ome_zarr.format as formats, ome_zarr.writer as writer
made = {"0.4": formats.FormatV04(), "0.5": formats.FormatV05()}[version]
root = zarr.open_group(path, mode="w", zarr_format=2 if version == "0.4" else 3)
writer.write_plate_metadata(root, ["A", "B"], ["1", "2"], ["A/1", "B/2"], fmt=made)
for well in ("A/1", "B/2"):
    group = root.require_group(well)
    writer.write_well_metadata(group, ["0"], fmt=made)
    writer.write_image(image[:, None], group.require_group("0"), axes="czyx", fmt=made)
""",
    "iohub": """
from iohub import open_ome_zarr
with open_ome_zarr(path, layout="hcs", mode="w-", channel_names=["DAPI", "GFP"], version=version) as plate:
    for well in (("A", "1", "0"), ("B", "2", "0")):
        plate.create_position(*well).create_image("0", image[None, :, None])
""",
}
PROLOGUE = """
import json, sys, warnings
import numpy as np
warnings.simplefilter("ignore")
path, version = sys.argv[1:3]
image = np.random.default_rng(0).integers(0, 999, (2, 64, 80)).astype("uint16")
total = lambda data: int(np.asarray(data).astype("uint64").sum())
show = lambda **values: print(json.dumps(values))
"""


def run(module: str, script: str, path, version: str = "") -> dict:
    python = os.environ.get("CELLVIM_OTHER_PYTHON")
    if python is None:
        pytest.skip("needs a Python with other tools in CELLVIM_OTHER_PYTHON")
    if subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode:
        pytest.skip(f"{python} has no {module}")
    command = [python, "-c", PROLOGUE + script, str(path), version]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}


@pytest.mark.slow
@pytest.mark.parametrize("module", READ)
def test_other_tools_read_our_plates(make_plate, module):
    path = make_plate(wells=("A01", "B03"), size=(64, 80))
    shown_values = run(module, READ[module], path)
    assert shown_values.pop("names") == ["DNA", "ER", "RNA"]
    shown = [f for f in open_plate(path).fields if f.site == "1" or module != "ome_zarr"]  # it shows a field a well
    assert shown_values.pop("sum") == sum(int(f.read().astype("uint64").sum()) for f in shown)
    assert shown_values in ({"kind": "Plate"}, {"scale": 0.598, "unit": "micrometer"}, {"scale": 0.598})


@pytest.mark.slow
@pytest.mark.parametrize("module", WRITE)
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_we_read_the_plates_of_other_tools(tmp_path, module, version):
    run(module, WRITE[module], tmp_path / "p.zarr", version)
    plate = open_plate(tmp_path / "p.zarr")
    assert plate.wells == ["A01", "B02"] and plate.ome_version == version
    image = np.random.default_rng(0).integers(0, 999, (2, 64, 80)).astype("uint16")
    for field in plate.fields:
        np.testing.assert_array_equal(field.read(), image)
