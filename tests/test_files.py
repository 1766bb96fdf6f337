"""cellvim.files: atomic writes, and one interface for local paths and URLs."""

from __future__ import annotations

import os

import pytest

from cellvim import files
from cellvim.errors import OutputError


class TestAtomicPath:
    @pytest.mark.parametrize("kind", ["file", "folder"])
    def test_replaces_the_target_when_the_block_ends(self, tmp_path, kind):
        target = tmp_path / "out.zarr"
        for content in ("old", "new"):
            with files.atomic_path(target) as partial:
                assert partial.parent == tmp_path and partial.suffix == ".zarr"
                (partial.mkdir() if kind == "folder" else None)
                (partial / "data" if kind == "folder" else partial).write_text(content)
                assert not target.exists() or content == "new"
        assert (target / "data" if kind == "folder" else target).read_text() == "new"
        assert os.listdir(tmp_path) == ["out.zarr"]

    def test_a_folder_replaces_a_file(self, tmp_path):
        (tmp_path / "out").write_text("a file")
        with files.atomic_path(tmp_path / "out") as partial:
            partial.mkdir()
        assert (tmp_path / "out").is_dir() and os.listdir(tmp_path) == ["out"]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
    def test_keeps_the_target_when_the_block_fails(self, tmp_path, error):
        target = tmp_path / "out.npz"
        target.write_bytes(b"old")
        with (
            pytest.raises(OutputError if error is OSError else error),
            files.atomic_path(target) as partial,
        ):
            partial.write_bytes(b"half")
            raise error("no")
        assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["out.npz"]

    def test_a_missing_folder_is_an_output_error(self, tmp_path):
        with pytest.raises(OutputError, match="No such file"):
            files.write_atomic(tmp_path / "missing" / "file.json", "{}")


def test_files_beside_a_path_and_a_url(tmp_path):
    for path in (tmp_path / "a.json", (tmp_path / "b.json").as_uri()):
        assert not files.exists(path) and files.read_bytes(path) is None
        files.write_atomic(path, "{}")
        assert files.exists(path) and files.read_bytes(path) == b"{}"
        files.remove(path)
        files.remove(path)
        assert not files.exists(path)


def test_remove_does_not_follow_links(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("years of work")
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    files.remove(tmp_path / "link")
    assert (tmp_path / "theirs" / "thesis.txt").exists() and not files.exists(tmp_path / "link")
