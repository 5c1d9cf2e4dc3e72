"""Several processes over gloo: same gradients as one, exact resume, and failures that end the whole job."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from golden_utils import REPO, TINY_MAE
from image_utils import make_folder

import models_mae
from util.errors import UserError
from util.processes import collectives, group, parallel, watch
from util.weights.files import read_file

TINY = [
    *(
        "--model",
        "mae_vit_tiny_patch16",
        "--input_size",
        "32",
        "--patch_size",
        "8",
        "--decoder_embed_dim",
        "32",
    ),
    *("--decoder_depth", "1", "--decoder_num_heads", "2", "--epochs", "2", "--warmup_epochs", "1"),
    *("--num_workers", "0", "--vis_freq", "0", "--device", "cpu", "--log_dir", ""),
]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def launch(processes, *command, launcher="torch.distributed.run", **options):
    """Starts `command` in `processes` processes on this machine; returns the launcher's Popen."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if processes > 1:
        port = ["--master_addr", "127.0.0.1", "--master_port", free_port()]
        command = ["-m", launcher, "--nproc_per_node", str(processes), *port, *command]
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=REPO, env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True, **options,
    )  # fmt: skip


def run(processes, *command, **options):
    process = launch(processes, *command, **options)
    out, _ = process.communicate(timeout=240)
    return process.returncode, out


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"), 24)


@pytest.fixture(scope="module", params=[pytest.param("float32", marks=pytest.mark.slow), "float64"])
def one_process(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("one") / "grads.pt"
    code, out = run(1, "tests/dist_worker.py", path, 16, 1, request.param)
    assert code == 0, out
    return request.param, torch.load(path)


@pytest.mark.parametrize(
    "processes, batch, accum_iter, launcher",
    [
        (1, 4, 4, None),
        pytest.param(2, 8, 1, "torch.distributed.run", marks=pytest.mark.slow),
        (2, 4, 2, "torch.distributed.launch"),
    ],
)
def test_processes_and_accumulation_give_the_large_batchs_gradients(
    one_process, processes, batch, accum_iter, launcher, tmp_path
):
    dtype, expected = one_process
    code, out = run(
        processes, "tests/dist_worker.py", tmp_path / "g.pt", batch, accum_iter, dtype, launcher=launcher
    )
    assert code == 0, out
    # Of the norm. Gradients of 16 images are added up in another order: sqrt(16) roundings of 6e-8 or
    # 1.1e-16, and those of the products before them
    tolerance = 1e-12 if dtype == "float64" else 1e-6
    grads = torch.load(tmp_path / "g.pt")
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert (grad - expected[name]).norm() <= tolerance * expected[name].norm().clamp(min=1e-3), name


def pretrain(processes, images, output, *flags):
    return run(processes, "main_pretrain.py", "--data_path", images, "--output_dir", output, *TINY, *flags)


def weights(path):
    return read_file(path)["model"]


def log_of(folder):
    """log.txt without the run's id."""
    return re.sub(r', "run": "\w+"', "", (folder / "log.txt").read_text())


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_a12_processes_stopped_inside_an_epoch_and_resumed_are_undisturbed_ones(images, tmp_path, processes):
    """Weights and log. With three, how gradients are added up depends on their place in a bucket."""
    flags = ("--batch_size", str(8 // processes))  # 3 or 4 steps an epoch
    code, out = pretrain(processes, images, tmp_path / "whole", *flags)
    assert code == 0, out
    steps = str(4 if processes == 2 else 5)
    code, out = pretrain(processes, images, tmp_path / "parts", *flags, "--max_steps", steps)
    assert code == 0 and (tmp_path / "parts" / "checkpoint-1-step1.pth").exists(), out
    code, out = pretrain(processes, images, tmp_path / "parts", *flags, "--resume", "auto")
    assert code == 0 and "going on at epoch 1, step 1" in out, out
    assert same(weights(tmp_path / "whole/checkpoint-1.pth"), weights(tmp_path / "parts/checkpoint-1.pth"))
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")


def test_a12_gradients_keep_their_places_from_the_first_step_on():
    """Laid out anew after the first step, they would be added up otherwise in a resumed run's first one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = models_mae.mae_vit(TINY_MAE)
        frozen = {name: value.clone() for name, value in model.state_dict().items()}
        wrapped = parallel.wrap_model(model, torch.device("cpu"))
        places = []
        for _ in range(3):
            assert all(p.grad is None for p in model.parameters())
            wrapped(torch.randn(2, 3, 32, 32))[0].backward()
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            places.append(
                {name: (g.untyped_storage().nbytes(), g.storage_offset()) for name, g in grads.items()}
            )
            model.zero_grad()
        assert places[0] == places[1] == places[2]
        assert same(frozen, model.state_dict())
        probe = torch.nn.BatchNorm1d(2)  # a model with buffers, as main_linprobe.py's
        wrapped = parallel.wrap_model(probe, torch.device("cpu"))
        wrapped(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
        assert wrapped.broadcast_buffers and probe.num_batches_tracked == 1
        torch.testing.assert_close(probe.running_mean, torch.tensor([0.2, 0.3]))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_images_that_grow_and_an_average_stopped_inside_a_phase_are_undisturbed(images, tmp_path):
    flags = ("--batch_size", "4", "--size_schedule", "16:0", "32:0.5", "--ema", "0.8", "--schedule", "wsd")
    code, out = pretrain(2, images, tmp_path / "whole", *flags)
    assert code == 0 and out.count("Epoch: [1] images of 32x32 pixels, 16 patches") == 1, out
    for steps in ("2", "5", "0"):
        code, out = pretrain(2, images, tmp_path / "parts", *flags, "--resume", "auto", "--max_steps", steps)
        assert code == 0, out
    whole, parts = (read_file(tmp_path / name / "checkpoint-1.pth") for name in ("whole", "parts"))
    assert same(whole["model"], parts["model"]) and same(whole["model_ema"], parts["model_ema"])
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")


@pytest.mark.slow
def test_another_number_of_processes_goes_on_at_the_same_sample(images, tmp_path):
    """The same position with the same effective batch, or a reason why not."""
    flags = ("--batch_size", "4")
    code, out = pretrain(2, images, tmp_path / "other", *flags, "--max_steps", "4")
    assert code == 0, out
    code, out = pretrain(1, images, tmp_path / "other", "--batch_size", "6", "--resume", "auto")
    assert code == 2 and "effective batch 8 -> 6" in out
    code, out = pretrain(
        1, images, tmp_path / "other", "--batch_size", "4", "--accum_iter", "2", "--resume", "auto"
    )
    assert code == 0 and "going on at epoch 1, step 2" in out, out


@pytest.mark.slow
def test_a_mistake_is_said_once_and_ends_all(images, tmp_path):
    code, out = pretrain(2, images, tmp_path, "--batch_size", "13")
    assert code != 0 and "2 x 13 is more than the 24 images" in out
    assert len([line for line in out.splitlines() if line.startswith("[rank")]) == 1


FAILING = """
import sys, os, signal, torch
sys.path.insert(0, {repo!r})
import main_pretrain
from util.cli.parser import ArgumentParser, run_script
from util.errors import TrainingError
from util.processes import collectives
from util.run import steps
normalize, calls = steps.normalize_batch, []
def broken(*args):
    calls.append(1)
    if collectives.get_rank() == 1 and len(calls) == 4:
        {action}
    return normalize(*args)
steps.normalize_batch = broken
run_script(main_pretrain.main, ArgumentParser(parents=[main_pretrain.get_args_parser()]))
"""


@pytest.mark.parametrize(
    "action, message",
    [
        ("return normalize(*args) * float('nan')", "the loss is nan; no process made this step; images: "),
        pytest.param(
            "os.kill(os.getpid(), signal.SIGKILL)",
            "lost contact with another process",
            marks=pytest.mark.needs("posix"),
        ),
        pytest.param("raise TrainingError('broken')", "script.py: error: broken", marks=pytest.mark.slow),
        pytest.param("raise RuntimeError('a bug')", "RuntimeError: a bug", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_fails_takes_all_down_within_seconds(images, tmp_path, action, message):
    script = tmp_path / "script.py"
    script.write_text(FAILING.format(repo=str(REPO), action=action))
    flags = ("--batch_size", "4", "--epochs", "1000")
    process = launch(2, script, "--data_path", images, "--output_dir", tmp_path, *TINY, *flags)
    lines, failed = [], None
    for line in process.stdout:
        lines.append(line)
        if "Epoch: [0] Total" in line and failed is None:
            failed = time.monotonic()
    assert process.wait(timeout=30) != 0
    out = "".join(lines)
    assert failed is not None and time.monotonic() - failed < 30, out
    assert message in out, out
    assert sum(line.startswith("[rank") for line in lines) == 1, out  # one process has the word


KILLED_WORKER = """
import sys, os, signal, torch
sys.path.insert(0, {repo!r})
import main_pretrain
from util.cli.parser import ArgumentParser, run_script
from util.data.dataset import ImageDataset
read = ImageDataset._samples
def read_or_die(dataset, epoch, *args):
    if epoch == 1 and os.environ["RANK"] == "1" and torch.utils.data.get_worker_info():
        os.kill(os.getpid(), signal.SIGKILL)
    return read(dataset, epoch, *args)
ImageDataset._samples = read_or_die
run_script(main_pretrain.main, ArgumentParser(parents=[main_pretrain.get_args_parser()]))
"""


@pytest.mark.slow
@pytest.mark.needs("posix")
def test_c5_a_killed_loader_worker_of_one_process_has_both_save(images, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(KILLED_WORKER.format(repo=str(REPO)))
    flags = ("--batch_size", "4", "--accum_iter", "2")
    code, out = pretrain(2, images, tmp_path / "whole", *flags)
    assert code == 0, out
    words = ["--data_path", images, "--output_dir", tmp_path / "parts", *TINY, *flags, "--num_workers", "1"]
    code, out = run(2, script, *words)
    assert code == 1 and (tmp_path / "parts" / "checkpoint-1-step2.pth").exists(), out
    assert (
        len(re.findall(r"error: loader worker \d+ was killed \(SIGKILL\).*; saved; --resume auto", out)) == 1
    )
    assert "[rank 1] warning: loader worker" in out
    code, out = pretrain(2, images, tmp_path / "parts", *flags, "--resume", "auto")
    assert code == 0 and "going on at epoch 1, step 2" in out, out
    assert same(weights(tmp_path / "whole/checkpoint-1.pth"), weights(tmp_path / "parts/checkpoint-1.pth"))
    logs = [log_of(tmp_path / name) for name in ("whole", "parts")]
    assert logs[0] == logs[1]


TRIED_TWICE = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {repo!r})
from util.cli.parser import ArgumentParser, run_script
from util.errors import TrainingError
from util.processes import collectives, group

def main(args):
    first, args.device = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0", "cpu"
    other_is_there = Path(__file__).with_name("there")
    if not first and os.environ["RANK"] == "1":
        other_is_there.touch()
    elif not first:  # comes late: what the first try left must not be taken for its word
        while not other_is_there.exists():
            time.sleep(0.1)
        time.sleep(1)
    group.init_distributed_mode(args)
    if first and args.rank == 1:
        raise TrainingError("the first try fails")
    time.sleep(3)  # the watch looks at its store
    sys.stdout.write(f"complete {{collectives.gather(args.rank)}}\\n")  # one write: two share the pipe
    group.shut_down()

run_script(main, ArgumentParser())
"""


@pytest.mark.slow
def test_torchrun_tries_again(tmp_path):
    """Both tries meet at the launcher's store, where the first one has left its addresses and its reason."""
    script = tmp_path / "script.py"
    script.write_text(TRIED_TWICE.format(repo=str(REPO)))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts", "1")
    code, out = run(1, *torchrun, script)
    assert code == 0 and out.count("script.py: error: the first try fails") == 1, out
    assert out.count("complete [0, 1]") == 2, out


@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(n, marks=pytest.mark.slow) for n in ("SIGUSR1", "SIGUSR2", "SIGINT"))]
)
@pytest.mark.needs("posix")
def test_signals_save_and_leave_with_the_requeue_status(images, tmp_path, name):
    flags = ("--batch_size", "4", "--epochs", "100000", "--num_workers", "1")
    process = launch(1, "main_pretrain.py", "--data_path", images, "--output_dir", tmp_path, *TINY, *flags)
    for line in process.stdout:
        if "Epoch: [0]" in line:
            break
    os.killpg(process.pid, getattr(signal, name))  # as schedulers do: to the workers too
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    assert f"{name}: saved; the same command with --resume auto goes on" in out
    assert list(tmp_path.glob("checkpoint-*.pth")), out


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_gpus_exchange_through_gloo_where_there_is_no_nccl(monkeypatch, backend):
    def begin(name, **_):
        raise ValueError(f"by {name}")

    monkeypatch.setattr(group.dist, "is_nccl_available", lambda: backend == "nccl")
    monkeypatch.setattr(group.dist, "init_process_group", begin)
    monkeypatch.setattr(group, "check_kernels", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    for name, value in dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", **address).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"could not join the others: by {backend}$"):
        group.init_distributed_mode(Namespace(device="cuda"))


@pytest.mark.parametrize("libuv", [True, False])
def test_the_watch_connects_as_the_others_do(monkeypatch, libuv):
    """Windows: torch may have no libuv, and refuses whoever asks for it."""
    store = torch.distributed.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=libuv
    )
    monkeypatch.setattr(watch.threading, "Thread", lambda **_: SimpleNamespace(start=lambda: None))
    watch.start(0, 1, store, "part")
    try:
        monkeypatch.setattr(
            watch.dist, "TCPStore", lambda *_, use_libuv, **__: pytest.fail(f"libuv {use_libuv}")
        )
        with pytest.raises(pytest.fail.Exception, match=f"libuv {libuv}"):
            watch._connect()
    finally:
        watch._thread = watch._place = None


def test_processes_must_agree(monkeypatch):
    args = type("Args", (), {})()
    args.lr, args.rank = 0.1, 0
    monkeypatch.setattr(collectives, "gather", lambda own: [own, {**own, "lr": "0.2"}])
    with pytest.raises(UserError, match=r"rank 1 has lr = 0\.2, rank 0 has 0\.1"):
        collectives.check_agreement(args)


def test_launchers_environments(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_")) or name in (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "MASTER_ADDR",
        ):
            monkeypatch.delenv(name)
    args = type("Args", (), {"local_rank": -1, "dist_on_itp": False})()

    def found(**env):
        with monkeypatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            return group.find_processes(args)

    assert found() is None
    assert found(RANK="3", WORLD_SIZE="8", LOCAL_RANK="1") == (3, 8, 1)
    args.local_rank = 2
    assert found(RANK="2", WORLD_SIZE="4") == (2, 4, 2)  # launchers of old times pass a flag
    slurm = dict(
        SLURM_PROCID="5", SLURM_STEP_NUM_TASKS="8", SLURM_LOCALID="1", SLURM_JOB_ID="17", SLURM_STEP_ID="0"
    )
    slurm.update(SLURM_STEP_NODELIST="127.0.0.1", MASTER_ADDR="x", MASTER_PORT="1", LOCAL_WORLD_SIZE="4")
    assert found(**slurm) == (5, 8, 1)
    args.dist_on_itp = True
    with pytest.raises(UserError, match="OMPI_COMM_WORLD_RANK"):
        found()
    ompi = {
        f"OMPI_COMM_WORLD_{name}": value
        for name, value in [("RANK", "1"), ("SIZE", "2"), ("LOCAL_RANK", "0")]
    }
    assert found(**ompi) == (1, 2, 0)


@pytest.mark.parametrize(
    ("processes", "omp", "threads"), [("4", None, [2]), ("16", None, [1]), ("4", "3", []), ("1", None, [])]
)
def test_c10_processes_of_a_machine_share_its_cores(monkeypatch, processes, omp, threads):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    group._share_cores()
    assert taken == threads


@pytest.mark.parametrize("gpus, number", [(8, 3), (1, 0)])
def test_a_process_that_sees_its_own_gpu_only_takes_that(monkeypatch, gpus, number):
    """As under srun --gpus-per-task 1; and what then fails is said in one line."""
    environment = dict(RANK="3", WORLD_SIZE="8", LOCAL_RANK="3", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def refuse(*args, **named):
        raise RuntimeError("NCCL error\nLast error:\nDuplicate GPU detected : rank 3 and rank 0")

    taken, args = [], type("Args", (), {"device": "cuda", "dist_on_itp": False})()
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(group, "check_kernels", lambda device: None)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *args, **named: iter([(store, 3, 8)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    with pytest.raises(UserError, match="rank 3 of 8: could not join the others: Duplicate GPU detected"):
        group.init_distributed_mode(args)
    assert args.gpu == number and taken == [number]


@pytest.mark.slow
def test_logs_of_a_timed_save_do_not_differ(images, tmp_path):
    """--save_minutes writes inside epochs and changes nothing else."""
    flags = ("--batch_size", "4", "--epochs", "1")
    code, out = pretrain(1, images, tmp_path / "a", *flags)
    assert code == 0, out
    code, out = pretrain(1, images, tmp_path / "b", *flags, "--save_minutes", "0.0001")
    assert code == 0, out
    first, second = log_of(tmp_path / "a"), log_of(tmp_path / "b")
    assert first == second and json.loads(first)["epoch"] == 0
    assert same(weights(tmp_path / "a/checkpoint-0.pth"), weights(tmp_path / "b/checkpoint-0.pth"))


LEAVING = """
import sys
import torch
import torch.distributed as dist
from util.processes import collectives, group

rank, folder = int(sys.argv[1]), sys.argv[2]
for i in range(50):
    dist.init_process_group("gloo", init_method=f"file://{folder}/{i}", rank=rank, world_size=2)
    for _ in range(2):
        collectives.all_reduce_sum(torch.ones(1))
    group.shut_down()
"""


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8), reason="newer torch lets the threads go on"
)
def test_leaving_waits_for_no_thread_that_waits_for_us(tmp_path):
    """One of 50 hung with torch 2.6, before `shut_down` let gloo's threads finish."""
    command = [sys.executable, "-c", LEAVING]
    children = [subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=REPO) for rank in range(2)]
    try:
        assert [child.wait(timeout=90) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
