"""The manifest of a run, beside its output: what depends on who ran it, when and where, and so is not in the output."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from cellvim.embedding.ledger import Failure
from cellvim.errors import OutputError
from cellvim.files import read_bytes

_PACKAGES = (
    "cellvim",
    "torch",
    "numpy",
    "scipy",
    "pandas",
    "scikit-image",
    "zarr",
    "anndata",
    "h5py",
    "pyarrow",
    "ray",
)


def manifest_name(output: str | Path) -> str:
    """Return where the manifest of an output lies."""
    return f"{str(output).rstrip('/')}.manifest.json"


def failures_name(output: str | Path) -> str:
    """Return where the table of an output's failures lies, if it has any."""
    return f"{str(output).rstrip('/')}.failures.csv"


def log_name(output: str | Path) -> str:
    """Return where the log of a run lies, where one is wanted."""
    return f"{str(output).rstrip('/')}.log.jsonl"


def make_manifest(
    output: str | Path,
    identity: Mapping[str, Any],
    digest: str,
    sessions: Sequence[Mapping[str, Any]],
    failures: Sequence[Failure],
    *,
    format: str,
    n_rows: int,
    n_fields: int,
) -> dict[str, Any]:
    """Return the manifest of a run that is through.

    Parameters
    ----------
    output
        What was made.
    identity, digest
        Of the job.
    sessions
        What each process that worked on it says of itself: command, host, versions, hardware, counts, seconds.
    failures
        Fields without rows.
    format, n_rows, n_fields
        Of the output.
    """
    return {
        "output": str(output),
        "format": format,
        "rows": n_rows,
        "fields": n_fields,
        "failed": [asdict(f) for f in failures],
        "weights_sha256": identity.get("weights"),
        "digest": digest,
        "started": min((s["started"] for s in sessions), default=None),
        "seconds": round(sum(s["seconds"] for s in sessions), 3),
        "sessions": [{k: v for k, v in s.items() if k != "alive"} for s in sessions],
        "identity": identity,
    }


def read_manifest(output: str | Path) -> dict[str, Any] | None:
    """Return the manifest of an output, or None if there is none."""
    try:
        content = read_bytes(manifest_name(output))
        return None if content is None else json.loads(content)
    except (OutputError, ValueError):
        return None


def hardware() -> dict[str, Any]:
    """Describe the machine: processor, cores, memory, GPUs."""
    import torch

    found: dict[str, Any] = {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(_memory() / 1e9, 1),
        "system": platform.platform(),
    }
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that take part."""
    found = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _memory() -> int:
    with suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 0


def processor_name() -> str:
    """Return the processor's name, as Linux tells it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    names = [] if not info.is_file() else [s for s in info.read_text().splitlines() if s.startswith("model name")]
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()
