"""Build csrc/cuda with nvcc, without CMake or a wheel, on a GPU machine where CellVim is not installed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = REPOSITORY / "csrc" / "cuda"
COMPILE_SECONDS = 180  # time limit for each file


def find_nvcc() -> str | None:
    """Return the CUDA compiler on the PATH, in CUDA_HOME, or in the toolkit's default folder."""
    places = [shutil.which("nvcc"), os.path.join(os.environ.get("CUDA_HOME", ""), "bin", "nvcc")]
    return next((p for p in [*places, "/usr/local/cuda/bin/nvcc"] if p and os.access(p, os.X_OK)), None)


def build(architecture: str) -> Path:
    """Compile for one architecture such as ``sm_90`` unless the library is up to date; return its path.

    Raises
    ------
    RuntimeError
        nvcc was not found, or failed; the message contains its output.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was not found: add that of the CUDA toolkit (12 or later) to the PATH.")
    version = _run([nvcc, "--version"])
    flags = ["-std=c++17", "-O3", f"-arch={architecture}", "-cudart", "static"]
    flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    files = sorted([*SOURCES.glob("*.cu*"), *SOURCES.glob("*.h"), REPOSITORY / "csrc" / "cpu" / "cellvim_cpu.h"])
    digest = hashlib.sha256(" ".join([version, *flags]).encode() + b"".join(p.read_bytes() for p in files))
    folder = REPOSITORY / "build" / "cuda" / digest.hexdigest()[:16]
    library = folder / "libcellvim_cuda.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        out = folder / f"{source.stem}.{os.getpid()}.o"
        _run([nvcc, *flags, "-c", str(source), "-o", str(out)])
        return str(out)

    sources = sorted(SOURCES.glob("*.cu"), key=lambda p: -p.stat().st_size)  # the longest first
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    unfinished = folder / f"{os.getpid()}.partial"
    _run([nvcc, "-shared", f"-arch={architecture}", "-cudart", "static", *objects, "-o", str(unfinished)])
    unfinished.rename(library)
    for path in objects:
        os.remove(path)
    return library


def provide() -> str:
    """Provide CellVim's CUDA library: the installed one, a given one, or one built for this GPU.

    Call it before `cellvim.ops` is imported. Returns a description of the library.

    Raises
    ------
    RuntimeError
        There is no GPU, or the library cannot be built.
    """
    import torch

    if named := os.environ.get("CELLVIM_CUDA_LIBRARY"):
        return f"CELLVIM_CUDA_LIBRARY names {named}"
    installed = REPOSITORY / "cellvim" / "ops" / "libcellvim_cuda.so"
    if installed.is_file():
        return f"{installed.relative_to(REPOSITORY)} is there"
    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no GPU.")
    major, minor = torch.cuda.get_device_capability()
    library = build(f"sm_{major}{minor}")
    os.environ["CELLVIM_CUDA_LIBRARY"] = str(library)
    return f"built {library.relative_to(REPOSITORY)}"


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILE_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{' '.join(command[:2])} … took more than {COMPILE_SECONDS} s.") from error
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:2])} … failed:\n{done.stderr[-3000:]}")
    return done.stdout
