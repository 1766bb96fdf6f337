"""The back ends for GPUs: on a GPU, and their selection on any machine."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from cases import conv_pool_inputs, dense_plan, error, expand_gate_inputs, in_float64, pooled_scan_inputs, run

from cellvim import ops
from cellvim.errors import BackendError
from cellvim.ops import compiled, cuda, dispatch, kernels, mamba_ssm, reference

needs_gpu = pytest.mark.skipif(not cuda.available(), reason=cuda.reason())
PLAN = dense_plan((5, 4, 3), (1, 0, 2), (False, True, False))


def test_cpu_tensors_are_refused():
    assert "tensors on cpu" in cuda.refusal(torch.zeros(1))
    with pytest.raises(BackendError, match="'cuda'"), ops.use_backend("cuda"):
        ops.pooled_scan(**pooled_scan_inputs(0, 1, 3, 8, 2))


def test_workspaces_are_asked_for_without_a_gpu():
    """Sizes are arithmetic alone; a struct that cannot be is refused before anything runs."""
    if cuda._library is None:
        pytest.skip(cuda.reason())
    library = cuda._library
    arguments = kernels.STRUCTS["pooled_scan"](batch=2, steps=1000, width=8, states=16)
    assert library.cellvim_cuda_pooled_scan_workspace(arguments, 0, 0) > 0
    arguments.states = 65
    assert library.cellvim_cuda_pooled_scan_workspace(arguments, 0, 0) == -3


class OnGpu(torch.Tensor):
    """A CPU tensor whose device is a GPU."""

    device = torch.device("cuda", 0)


@pytest.fixture
def gpu_without_library(monkeypatch, caplog):
    """A machine with a GPU and Triton, but without the CUDA library and mamba-ssm."""
    monkeypatch.setattr(cuda, "_library", None)
    monkeypatch.setattr(cuda, "_problem", "this installation has no libcellvim_cuda.so")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compiled, "available", lambda: True)
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "_chosen", None)
    mamba_ssm.load_scan.cache_clear()
    yield lambda: [r.getMessage() for r in caplog.records if r.name == "cellvim"]
    mamba_ssm.load_scan.cache_clear()


def test_a_gpu_without_libraries_compiles_the_plain_path_with_one_warning(gpu_without_library, monkeypatch):
    monkeypatch.setattr(compiled, "add_norm", lambda *args: "compiled")
    token = torch.zeros(1).as_subclass(OnGpu)
    assert [ops.add_norm(token, None, token, None) for _ in range(3)] == ["compiled"] * 3
    (message,) = gpu_without_library()
    assert "under torch.compile" in message and "no libcellvim_cuda.so" in message
    assert ops.selected_backend(OnGpu.device) == "compiled"


def selective_scan_fn(  # the signature of mamba-ssm 2.2
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """The selective scan of Mamba (Alg. 2), with the requirements of mamba-ssm's kernel on its inputs."""
    assert u.ndim == 3 and delta.shape == u.shape and B.shape == C.shape == (u.shape[0], A.shape[1], u.shape[2])
    assert u.dtype == delta.dtype == B.dtype == C.dtype and A.dtype == delta_bias.dtype == torch.float32
    assert all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in (u, delta, B, C))
    assert D is None and z is None and delta_softplus and not return_last_state
    dtype, u, delta, B, C = u.dtype, u.float(), delta.float(), B.float(), C.float()
    delta = torch.nn.functional.softplus(delta + delta_bias[:, None])
    state, outputs = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        state = torch.exp(delta[:, :, t, None] * A) * state + (delta * u)[:, :, t, None] * B[:, None, :, t]
        outputs.append((state * C[:, None, :, t]).sum(-1))
    return torch.stack(outputs, dim=-1).to(dtype)


@pytest.fixture
def mamba_installed(gpu_without_library, monkeypatch):
    """A stand-in for the installed package."""
    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn
    for module in ("selective_scan_cuda", "mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    return gpu_without_library


def test_the_scan_of_mamba_ssm_is_selected_on_a_gpu_without_the_library(mamba_installed, monkeypatch):
    assert ops.selected_backend(OnGpu.device) == "mamba_ssm"
    inputs = pooled_scan_inputs(0, 2, 7, 16, 4)
    on_gpu = {k: v.as_subclass(OnGpu) for k, v in inputs.items()}
    torch.testing.assert_close(ops.pooled_scan(**on_gpu).as_subclass(torch.Tensor), reference.pooled_scan(**inputs))
    (message,) = mamba_installed()
    assert "mamba-ssm" in message and "no libcellvim_cuda.so" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scan_of_mamba_ssm_and_its_gradients_equal_the_definition(mamba_installed, dtype):
    inputs = pooled_scan_inputs(1, 2, 7, 16, 4)
    expected = run(reference.pooled_scan, in_float64(inputs, dtype), 1, torch.float64)
    plain = run(reference.pooled_scan, inputs, 1, dtype)
    actual = run(mamba_ssm.pooled_scan, inputs, 1, dtype)
    assert set(actual) == set(expected) and any(name.startswith("grad") for name in actual)
    for key, value in expected.items():
        assert actual[key].dtype == plain[key].dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2 * max(error(plain[key], value), 2**-8)
        assert error(actual[key], value) <= tolerance, key


@pytest.mark.parametrize("problem", [OSError("libcudart.so.12: not found"), RuntimeError("no driver")])
def test_whatever_importing_mamba_ssm_raises_is_reported_once(gpu_without_library, monkeypatch, problem):
    attempts = []

    class Failing:
        def find_spec(self, name, path=None, target=None):
            if name == "selective_scan_cuda":
                attempts.append(name)
                raise problem

    monkeypatch.setattr(sys, "meta_path", [Failing(), *sys.meta_path])
    assert not mamba_ssm.available() and not mamba_ssm.available()
    assert str(problem) in mamba_ssm.reason() and type(problem).__name__ in mamba_ssm.reason()
    assert len(attempts) == 1
    with pytest.raises(BackendError, match="'mamba_ssm' is not available"), ops.use_backend("mamba_ssm"):
        pass


def test_an_absent_mamba_ssm_says_how_to_install_it(gpu_without_library, monkeypatch):
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)
    assert not mamba_ssm.available() and mamba_ssm.reason()


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
