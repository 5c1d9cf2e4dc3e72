"""The launchers on a real SLURM cluster of two nodes on this machine (`make test-slurm`)."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_utils import REPO
from image_utils import make_folder
from slurm_cluster import running_cluster, wait_for, why_not

from util.weights.files import read_file
from util.weights.names import list_checkpoints

pytestmark = pytest.mark.slurm

# The model is as small as it gets: what takes time here are SLURM's clocks
TINY = "--model mae_vit_tiny_patch16 --input_size 32 --patch_size 8 --decoder_embed_dim 32 --decoder_depth 1"
TINY += " --decoder_num_heads 2 --batch_size 4 --warmup_epochs 1 --vis_freq 0 --save_freq 1000 --print_freq 8"
TWO_NODES = "--nodes 2 --gpus_per_node 0 --tasks_per_node 1"
IMAGES = 128  # 16 steps an epoch
FINAL_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


@pytest.fixture(scope="module")
def cluster():
    if reason := why_not():
        if os.environ.get("SLURM_TEST_REQUIRED"):
            pytest.fail(f"no cluster here: {reason}")
        pytest.skip(f"no cluster here: {reason}")
    with running_cluster() as running:
        # gloo would take the interface of the host's name
        running.env.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", PYTHONPATH=str(REPO))
        yield running


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"), IMAGES)


def launcher(cluster, images, *flags):
    """Runs submitit_pretrain.py; returns its finished process."""
    command = [sys.executable, str(REPO / "submitit_pretrain.py"), "--data_path", str(images), *TINY.split()]
    command += ["--num_workers", "1", *" ".join(flags).split()]
    return cluster.run(*command, check=False, timeout=600)


def submitted(done):
    """(job id, folder) of a submission."""
    match = re.match(r"submitted job (\d+); .*: (/.*)\n", done.stdout)
    assert done.returncode == 0 and match, done.stdout + done.stderr
    return match[1], Path(match[2])


def log_of(folder):
    """Everything that the job's processes wrote."""
    return "".join(f"== {path.name}\n{path.read_text()}" for path in sorted(folder.glob("*_log.*")))


def wait_for_state(cluster, job_id, states, seconds):
    def job_in_state():
        job = cluster.job(job_id)
        return job if job.get("JobState") in states else None

    try:
        return wait_for(f"job {job_id} in state {states}", job_in_state, seconds)
    except TimeoutError as error:
        raise AssertionError(f"{error}: {cluster.job(job_id)}") from None


def wait_until_trained(folder, seconds=120, step=r"Epoch: \[[1-9]"):
    """Waits until the log shows the second epoch."""
    path = wait_for(f"a log in {folder}", lambda: next(iter(folder.glob("*_0_log.out")), None), seconds)
    wait_for(f"an epoch in {path}", lambda: re.search(step, path.read_text()), seconds)


def final_weights(folder):
    newest = list_checkpoints(folder)[0]
    return newest.name, read_file(newest)["model"]


def assert_same_weights(first, second):
    (name, weights), (other_name, others) = final_weights(first), final_weights(second)
    assert name == other_name and weights.keys() == others.keys()
    different = [key for key in weights if not torch.equal(weights[key], others[key])]
    assert not different, f"{len(different)} of {len(weights)} tensors differ"


@pytest.fixture(scope="module")
def undisturbed(cluster, images, tmp_path_factory):
    """A function from a number of epochs to the folder of such a run on two processes, without SLURM."""
    known = {}

    def run(epochs):
        if epochs not in known:
            jobs = tmp_path_factory.mktemp("undisturbed")
            flags = f"--cluster local --gpus_per_node 0 --tasks_per_node 2 --epochs {epochs}"
            done = launcher(cluster, images, flags, f"--job_dir {jobs}/%j")
            assert done.returncode == 0, done.stdout + done.stderr
            (known[epochs],) = jobs.iterdir()
        return known[epochs]

    return run


def test_srun_without_a_launcher_on_two_nodes(cluster, images, undisturbed, tmp_path):
    """The processes find each other by SLURM's variables alone."""
    flags = f"--data_path {images} --num_workers 1 --device cpu --epochs 3 --output_dir {tmp_path}"
    script = [sys.executable, str(REPO / "main_pretrain.py"), *TINY.split(), *flags.split(), "--log_dir", ""]
    done = cluster.run("srun", "--nodes=2", "--ntasks=2", *script, timeout=300)
    assert "4 x 2 processes" in done.stdout
    assert_same_weights(undisturbed(3), tmp_path)


def test_what_is_submitted_is_what_a_dry_run_prints(cluster, images, tmp_path):
    flags = f"{TWO_NODES} --epochs 1 --job_dir {tmp_path}/%j --partition main --mem_gb 0.5 --comment hello"
    dry = launcher(cluster, images, flags, "--dry_run")
    job_id, folder = submitted(launcher(cluster, images, flags))
    assert (folder / f"{job_id}_submission.sh").read_text() == dry.stdout
    wait_for_state(cluster, job_id, {"COMPLETED"}, 120)
    assert final_weights(folder)[0] == "checkpoint-0.pth" and (folder / "log.txt").exists(), log_of(folder)
    assert list(folder.glob("events.*")), "curves"


def test_slurms_refusal_is_one_line(cluster, images, tmp_path):
    done = launcher(cluster, images, f"{TWO_NODES} --job_dir {tmp_path}/%j --partition nowhere")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "SLURM refused the job: invalid partition specified: nowhere" in done.stderr
    done = launcher(cluster, images, f"--nodes 3 --gpus_per_node 0 --job_dir {tmp_path}/%j")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "SLURM refused the job" in done.stderr


def test_a_mistake_inside_the_job_fails_it_with_its_status(cluster, tmp_path):
    job_id, folder = submitted(
        launcher(cluster, "/nowhere/at/all", f"{TWO_NODES} --job_dir {tmp_path}/%j --epochs 1")
    )
    job = wait_for_state(cluster, job_id, FINAL_STATES, 120)
    assert job["JobState"] == "FAILED" and job["ExitCode"] == "2:0" and job["Restarts"] == "0"
    assert "main_pretrain: error: " in log_of(folder) and "/nowhere/at/all" in log_of(folder)


def test_a_cancelled_job_saves_and_stays_cancelled(cluster, images, tmp_path):
    job_id, folder = submitted(
        launcher(cluster, images, f"{TWO_NODES} --job_dir {tmp_path}/%j --epochs 2000 --timeout 30")
    )
    wait_until_trained(folder)
    cluster.run("scancel", job_id)
    job = wait_for_state(cluster, job_id, FINAL_STATES, 60)
    assert job["JobState"] == "CANCELLED" and job["Restarts"] == "0", log_of(folder)
    assert "SIGTERM: saved" in log_of(folder) and final_weights(folder)[0] != "checkpoint-0.pth"


def test_preempted_and_timed_out_and_requeued_ends_with_the_undisturbed_weights(
    cluster, images, undisturbed, tmp_path, capsys
):
    """Limit 2 minutes, signal 60 seconds before: SLURM signals the job 30 to 60 seconds after each start."""
    # As many epochs as take 90 seconds here, but for the starts
    log = log_of(undisturbed(3))
    seconds = [float(text) for text in re.findall(r"Total time: .* \(([0-9.]+) s / it", log)]
    epochs = math.ceil(90 / (min(seconds[1:]) * IMAGES / 8))
    flags = f"{TWO_NODES} --job_dir {tmp_path}/%j --epochs {epochs} --timeout 2 --signal_delay_s 60"
    job_id, folder = submitted(launcher(cluster, images, flags))
    wait_until_trained(folder)
    cluster.run("scontrol", "requeue", job_id)  # what pre-emption does: SIGTERM, and SLURM itself requeues
    job = wait_for_state(cluster, job_id, FINAL_STATES, 1200)
    log = log_of(folder)
    assert job["JobState"] == "COMPLETED", log
    resumed = [name for name in re.findall(r"resume: \S+/(checkpoint-\S+\.pth), going on at", log)]
    with capsys.disabled():
        print(f"\nrequeued {job['Restarts']} times, going on from {', '.join(resumed)}; {epochs} epochs")
    assert int(job["Restarts"]) == len(resumed) >= 2, log
    assert any("step" in name for name in resumed), "no start ended inside an epoch"
    assert "SIGTERM: saved" in log and f"SIGUSR2: saved; job {job_id} starts again" in log
    assert_same_weights(undisturbed(epochs), folder)


def test_nothing_listens_elsewhere_than_on_loopback(cluster):
    if shutil.which("ss") is None:
        pytest.skip("no ss here to list sockets with")
    listening = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True).stdout.splitlines()
    own = [line for line in listening if re.search(r'"(slurm\w+|munged|srun)"', line)]
    assert len(own) >= 3 and all(line.split()[3].startswith("127.0.0.1:") for line in own), own
