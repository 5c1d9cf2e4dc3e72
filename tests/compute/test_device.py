"""Which GPU can be used and in which precision, on GPUs that are imitated here."""

import argparse

import pytest
import torch

from util.compute import precision
from util.compute.precision import prepare_device, resolve_amp_dtype, resolve_device
from util.errors import UserError
from util.processes import collectives, group

GPU = torch.device("cuda", 0)
NO_KERNEL = """CUDA error: no kernel image is available for execution on the device
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace might be wrong.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1"""


@pytest.fixture
def old_gpu(monkeypatch):
    """A GPU of before Ampere, and what this torch can say of it."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: None)
    precision._warn_of_emulation.cache_clear()
    yield
    precision._warn_of_emulation.cache_clear()


def failing(message: str):
    def kernel(*args, device=None, **kwargs):
        assert device == GPU
        raise RuntimeError(message)

    return kernel


def test_d4_a_gpu_that_torch_has_no_kernels_for(old_gpu, monkeypatch):
    """An empty tensor can be made there; the first kernel fails."""
    monkeypatch.setattr(torch, "ones", failing(NO_KERNEL))
    text = (
        r"^--device cuda:0: torch \S+ has no kernels for Tesla V100 \(sm_70\), only for sm_80 sm_90; "
        r"install a torch .*, or take --device cpu$"
    )
    with pytest.raises(UserError, match=text):
        resolve_device("cuda")
    # Several processes use theirs before the script asks for its device
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for name, value in (("RANK", 0), ("WORLD_SIZE", 2), ("LOCAL_RANK", 0)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=text):
        group.init_distributed_mode(argparse.Namespace(device="cuda"))


def test_d4_other_errors_stay_what_they_are(old_gpu, monkeypatch):
    monkeypatch.setattr(torch, "ones", failing("CUDA error: out of memory\nand more"))
    with pytest.raises(UserError, match=r"^--device cuda: not usable here \(CUDA error: out of memory\)"):
        resolve_device("cuda")


@pytest.mark.gpu
def test_d4_a_real_gpu_runs_a_kernel():
    assert resolve_device("cuda") == GPU and resolve_device("auto") == GPU


def test_d13_bf16_where_it_is_imitated_is_warned_of_once(old_gpu, capsys):
    assert resolve_amp_dtype("auto", GPU) == torch.float16 and not capsys.readouterr().err
    for _ in range(2):
        assert resolve_amp_dtype("bf16", GPU) == torch.bfloat16
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "warning: --amp_dtype bf16: Tesla V100 only imitates it" in err
    assert resolve_amp_dtype("bf16", torch.device("cpu")) == torch.bfloat16 and not capsys.readouterr().err


def test_d13_no_warning_where_bf16_is_computed(old_gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: True)
    assert resolve_amp_dtype("bf16", GPU) == resolve_amp_dtype("auto", GPU) == torch.bfloat16
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("capability", "said"), [((7, 0), False), ((7, 5), False), ((8, 0), True)])
def test_d13_tf32_is_claimed_where_it_is(old_gpu, monkeypatch, capability, said):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    text = prepare_device(GPU, torch.float16)
    assert text.startswith("torch.float16") and ("TF32" in text) == said


@pytest.mark.parametrize(("backend", "given"), [("nccl", [3]), ("gloo", None)])
def test_d14_the_barrier_names_its_gpu(monkeypatch, backend, given):
    """NCCL warns of a barrier that must guess it."""
    calls = []
    monkeypatch.setattr(collectives, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.distributed, "barrier", lambda device_ids=None: calls.append(device_ids))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    collectives.barrier()
    assert calls == [given]
