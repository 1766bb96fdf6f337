"""A plate behind s3:// reads as the folder does (slow: needs a local server, `pip install 'moto[server]'`)."""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from cellvim.data.plate import describe, open_plate
from cellvim.errors import PlateError


@pytest.fixture
def bucket(tmp_path):
    """Run moto's server on loopback; yield the storage options and an empty bucket's name."""
    s3fs = pytest.importorskip("s3fs")
    program = os.environ.get("CELLVIM_MOTO_SERVER") or shutil.which("moto_server")
    if program is None:
        pytest.skip("needs moto_server on the PATH or in CELLVIM_MOTO_SERVER: pip install 'moto[server]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (tmp_path / "moto.log").open("w") as log:
        server = subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        options = {"key": "a", "secret": "b", "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{port}"}}
        s3fs.S3FileSystem(**options).mkdir("bucket")
        yield options, "bucket"
    finally:
        server.terminate()
        server.wait(20)


@pytest.mark.slow
def test_plate_in_a_bucket_reads_as_the_folder(bucket, make_plate, tmp_path):
    import s3fs

    options, name = bucket
    path = make_plate()
    s3fs.S3FileSystem(**options).put(str(path), f"{name}/plate.zarr", recursive=True)
    plate, folder = open_plate(f"s3://{name}/plate.zarr", storage_options=options), open_plate(path)
    assert {**describe(plate), "path": ""} == {**describe(folder), "path": ""}
    for field, same in zip(plate.fields, folder.fields, strict=True):
        np.testing.assert_array_equal(field.read(), same.read())
    np.testing.assert_array_equal(plate.fields[1].read(["RNA"]), folder.fields[1].read(["RNA"]))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(plate)).fields[2].read(), folder.fields[2].read())
    for url in (f"s3://{name}/none.zarr", "s3://nobucket/p.zarr"):
        with pytest.raises(PlateError, match="cannot be reached"):
            open_plate(url, storage_options=options)
    # on the command line: the environment has the address, and nothing is printed to stderr at exit
    client = {"AWS_ENDPOINT_URL": options["client_kwargs"]["endpoint_url"]}
    environment = os.environ | client | {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    command = [sys.executable, "-m", "cellvim.cli", "info", f"s3://{name}/plate.zarr"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "3 (A01 to B03)" in done.stdout and done.stderr == "", done
