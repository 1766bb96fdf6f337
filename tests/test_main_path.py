"""One `cellvim embed` executes few files, and docs/architecture.md lists them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from synthetic_plate import draw_field, write_plate

import cellvim

REPOSITORY = Path(__file__).resolve().parents[1]
MAX_FILES = 30

PROFILER = """
import json, sys, threading

package, output, *arguments = sys.argv[1:]
executed = set()

def record(frame, event, argument):
    if event == "call" and frame.f_code.co_name != "<module>" and frame.f_code.co_filename.startswith(package):
        executed.add(frame.f_code.co_filename[len(package) + 1 :])

from cellvim.cli import main

threading.setprofile(record)
sys.setprofile(record)
code = main(arguments)
sys.setprofile(None)
with open(output, "w") as file:
    json.dump({"code": code, "files": sorted(executed)}, file)
"""


def documented_files() -> list[str]:
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.split("## The files of one", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^\|[^|]*\| `([\w/]+\.py)` \|", section, flags=re.MULTILINE)


def test_one_embed_executes_the_documented_files(tmp_path):
    plate = write_plate(tmp_path / "plate.zarr", {"A01": [draw_field(0)]}, ["DNA", "GFP"])
    script, found = tmp_path / "profiler.py", tmp_path / "files.json"
    script.write_text(PROFILER)
    command = ["embed", str(plate), "-o", "embeddings.zarr", "--model", "fastchannelvim_multichannel"]
    package = str(Path(cellvim.__file__).parent)
    subprocess.run([sys.executable, str(script), package, str(found), *command], cwd=tmp_path, check=True, timeout=300)
    result = json.loads(found.read_text())
    assert result["code"] == 0 and (tmp_path / "embeddings.zarr").is_dir()
    assert len(result["files"]) <= MAX_FILES
    assert {*result["files"], "errors.py"} == set(documented_files())  # no error is raised here
    assert len(documented_files()) == len(set(documented_files()))
