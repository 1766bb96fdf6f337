"""The CUDA back-end on a GPU, and what surrounds it on any machine."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from cases import conv_pool_inputs, dense_plan, error, expand_gate_inputs, pooled_scan_inputs

from cellvim.errors import BackendError
from cellvim.ops import compiled, cuda, dispatch, kernels, mamba_ssm, reference

needs_gpu = pytest.mark.skipif(not cuda.available(), reason=cuda.reason())
PLAN = dense_plan((5, 4, 3), (1, 0, 2), (False, True, False))


def test_cpu_tensors_are_refused():
    assert "runs on CUDA GPUs" in cuda.refusal(torch.zeros(1))
    with pytest.raises(BackendError, match="'cuda'"):
        cuda.pooled_scan(**pooled_scan_inputs(0, 1, 3, 8, 2))


def test_workspaces_are_asked_for_without_a_gpu():
    """Sizes are arithmetic alone; a struct that cannot be is refused before anything runs."""
    if cuda._library is None:
        pytest.skip(cuda.reason())
    library = cuda._library
    arguments = kernels.STRUCTS["pooled_scan"](batch=2, steps=1000, width=8, states=16)
    assert library.cellvim_cuda_pooled_scan_workspace(arguments, 0, 0) > 0
    arguments.states = 65
    assert library.cellvim_cuda_pooled_scan_workspace(arguments, 0, 0) == -3


def test_a_gpu_without_the_library_compiles_the_plain_path_and_says_so_once(monkeypatch, caplog):
    class OnGpu(torch.Tensor):
        """A tensor on the CPU that says that it lies on a GPU."""

        device = torch.device("cuda", 0)

    monkeypatch.setattr(cuda, "_library", None)
    monkeypatch.setattr(cuda, "_reason", "this install has no CUDA kernels")
    monkeypatch.setattr(compiled, "available", lambda: True)
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.setattr(dispatch, "_chosen", None)
    token = torch.zeros(1).as_subclass(OnGpu)
    assert [dispatch._backend(token) for _ in range(3)] == [compiled] * 3
    messages = [r.getMessage() for r in caplog.records if r.name == "cellvim"]
    assert len(messages) == 1 and "under torch.compile" in messages[0] and "no CUDA kernels" in messages[0]


@pytest.mark.slow
def test_the_compiled_path_equals_the_plain_one(monkeypatch):
    monkeypatch.setattr(compiled, "_compile", lambda op: torch.compile(op, dynamic=False, backend="aot_eager"))
    inputs = {k: v for k, v in conv_pool_inputs(0, 2, 60, 16, 4).items() if "score" not in k}
    torch.testing.assert_close(
        compiled.conv_pool(**inputs, plan=PLAN, pool="mean"), reference.conv_pool(**inputs, plan=PLAN, pool="mean")
    )
    inputs = expand_gate_inputs(0, 2, 60, PLAN.slots, 16, 4)
    torch.testing.assert_close(compiled.expand_gate(**inputs, plan=PLAN), reference.expand_gate(**inputs, plan=PLAN))
    inputs = pooled_scan_inputs(0, 2, 5, 16, 4)
    torch.testing.assert_close(compiled.pooled_scan(**inputs), reference.pooled_scan(**inputs))


@needs_gpu
def test_every_check_of_the_gpu_script_passes():
    from benchmarks import gpu_check

    groups = gpu_check.groups(examples=4)
    tasks = [task for name in groups if name not in ("memcheck", "racecheck") for task in groups[name]]
    assert not [row for task in tasks for row in task.run() if not row["ok"]]


@pytest.mark.skipif(not mamba_ssm.available(), reason=mamba_ssm.reason())
@pytest.mark.parametrize("steps", [14, 300])
def test_the_scan_of_mamba_ssm_is_ours(steps):
    inputs = pooled_scan_inputs(0, 2, steps, 64, 16)
    exact = reference.pooled_scan(**{k: v.double() for k, v in inputs.items()})
    actual = mamba_ssm.pooled_scan(**{k: v.cuda() for k, v in inputs.items()})
    assert error(actual.cpu(), exact) < 1e-5


def test_mamba_ssm_is_not_imported_to_ask_for_it():
    import sys

    assert mamba_ssm.reason()
    assert "mamba_ssm" not in sys.modules or find_spec("mamba_ssm") is not None
