"""`--fsdp`: the numbers and checkpoints of DistributedDataParallel, and nothing that waits for ever."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from fsdp_worker import Run, muon_steps
from golden_utils import REPO, TINY_MAE, fill
from image_utils import make_folder
from test_distributed import FAILING, run, same
from test_distributed import TINY as SMALL
from transfer_utils import make_pictures

import main_finetune
import main_linprobe
import main_pretrain
import models_mae
from util.cli.parser import ArgumentParser, parse_args
from util.errors import UserError
from util.processes.fsdp import shard_model
from util.processes.parallel import check_fsdp
from util.weights import files
from util.weights.names import list_checkpoints


def state_of(path: Path) -> dict:
    """What must be the same in a checkpoint however it came about."""
    content = files.read_file(path)
    return {name: content[name] for name in ("model", "optimizer", "scaler", "epoch")}


def assert_close(first, second, tolerance: float):
    """The same structure, and tensors that differ by at most `tolerance` of their norm."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_close(first[key], second[key], tolerance)
    elif isinstance(first, list | tuple):
        for pair in zip(first, second, strict=True):
            assert_close(*pair, tolerance)
    elif isinstance(first, torch.Tensor):
        assert first.shape == second.shape and first.dtype == second.dtype
        assert (first - second).norm() <= tolerance * first.norm().clamp(min=1e-3)
    else:
        assert first == second


def check_runs(root: Path, tolerance: float, exact: bool):
    stats = json.loads((root / "stats.json").read_text())
    pairs = [("ddp", "fsdp"), ("ddp_scaled", "fsdp_scaled"), ("ddp_cross", "fsdp_cross")]
    pairs += [("ddp", "ddp_then_fsdp"), ("ddp", "fsdp_then_ddp")]
    for names in pairs:
        newest = [list_checkpoints(root / name)[0] for name in names]
        last = "checkpoint-0.pth" if "scaled" in names[0] else "checkpoint-1.pth"
        assert [path.name for path in newest] == [last, last]
        assert_close(*map(state_of, newest), tolerance)
        for epoch in range(-1, -1 - min(len(stats[name]) for name in names), -1):
            assert stats[names[0]][epoch] == pytest.approx(stats[names[1]][epoch], rel=tolerance)
    whole, parts = (state_of(root / name / "checkpoint-1.pth") for name in ("fsdp", "fsdp_then_fsdp"))
    assert_close(whole, parts, 0 if exact else tolerance)
    start = fill(models_mae.mae_vit(TINY_MAE), seed=1, std=0.1, skip="pos_embed").mask_token
    assert (whole["model"]["mask_token"] - start).abs().max() > 1e-3  # it did learn


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What two processes have written."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch shards on GPUs only")
    root = tmp_path_factory.mktemp("trained")
    code, out = run(2, "tests/fsdp_worker.py", "train", root, "cpu")
    assert code == 0 and "view tensor" not in out, out
    return root


def test_the_numbers_and_files_of_ddp_and_each_goes_on_from_the_others(trained, tmp_path):
    """With accumulation, clipping, fused steps, loss scaling, and a loss that is NaN on one process."""
    check_runs(trained, 1e-12, exact=True)
    one = Run(tmp_path / "one", sharded=False, resume=trained / "fsdp/checkpoint-0.pth")
    content = state_of(trained / "fsdp/checkpoint-0.pth")
    assert one.args.start_epoch == 1 and same(content["model"], one.bare.state_dict())
    assert_close(content["optimizer"]["state"], one.optimizer.state_dict()["state"], 0)


def test_muon_and_the_average_of_the_weights_are_those_of_one_process(trained, tmp_path):
    """Weights, average and the optimizer's state after three steps, in float64."""
    muon_steps(tmp_path / "one", sharded=False)
    folders = (tmp_path / "one", trained / "muon_ddp", trained / "muon_fsdp")
    one, ddp, fsdp = (files.read_file(folder / "checkpoint-0.pth") for folder in folders)
    assert [entry.get("use_muon") for entry in one["optimizer"]["state"].values()].count(True) > 10
    for other in (ddp, fsdp):
        for name in ("model", "model_ema", "optimizer"):
            assert_close(one[name], other[name], 1e-10)


@pytest.mark.gpu
def test_on_gpus(tmp_path):
    processes = str(min(torch.cuda.device_count(), 2))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes)
    code, out = run(1, *launcher, "tests/fsdp_worker.py", "train", tmp_path, "cuda")
    assert code == 0, out
    check_runs(tmp_path, 1e-4, exact=False)


@pytest.mark.slow
def test_another_number_of_processes_has_other_shares_of_the_same(tmp_path):
    """One process has all of them; of three, shares are uneven, and empty for small tensors."""
    Run(tmp_path / "one", sharded=False).train(1)
    file = tmp_path / "one/checkpoint-0.pth"
    for processes in ("1", "3"):
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes)
        code, out = run(1, *launcher, "tests/fsdp_worker.py", "reload", file, tmp_path / processes)
        assert code == 0, out
        assert_close(state_of(file), state_of(tmp_path / processes / "checkpoint-0.pth"), 0)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    make_folder(root / "train", 24, classes=2)
    make_folder(root / "val", 13, classes=2)  # 7 and 6 for two processes; for k-NN 13 and none
    return root


def command(script, images, output, *flags):
    tiny = SMALL if script == "main_pretrain.py" else CLASSIFIER
    return (script, "--data_path", images, "--output_dir", output, *tiny, "--batch_size", "4", *flags)


CLASSIFIER = ["--model", "vit_tiny_patch16", "--input_size", "32", "--patch_size", "8", "--epochs", "2"]
CLASSIFIER += ["--warmup_epochs", "1", "--num_workers", "0", "--device", "cpu", "--log_dir", ""]


def pretrain(processes, images, output, *flags):
    return run(processes, *command("main_pretrain.py", images, output, *flags))


def read_log(folder):
    records = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "run"} for record in records]


@pytest.mark.slow
def test_pictures_held_out_loss_and_neighbours_wait_for_nobody(images, tmp_path):
    """Two processes with different numbers of batches; one process measures the same on their checkpoint."""
    flags = ("--vis_freq", "1", "--knn_freq", "1", "--epochs", "1", "--clip_grad", "1")
    code, out = pretrain(2, images, tmp_path, *flags, "--fsdp")
    assert code == 0 and (tmp_path / "reconstruction-0.png").exists(), out
    (record,) = read_log(tmp_path)
    (tmp_path / "log.txt").unlink()  # as if killed between saving and measuring
    parser = ArgumentParser(parents=[main_pretrain.get_args_parser()])
    words = command("main_pretrain.py", images, tmp_path, *flags, "--resume", "auto")[1:]
    main_pretrain.main(parse_args(parser, [str(word) for word in words]))
    (again,) = read_log(tmp_path)
    assert record["knn_acc1"] == again["knn_acc1"] and record["train_loss"] == again["train_loss"]
    assert record["val_loss"] == pytest.approx(again["val_loss"], rel=1e-5)


@pytest.mark.slow
def test_stopped_inside_an_epoch_and_resumed_is_undisturbed_and_others_go_on_too(images, tmp_path):
    flags = ("--accum_iter", "2", "--epochs", "2", "--save_minutes", "0.0001")
    for name, more in [("ddp", ()), ("whole", ("--fsdp",))]:
        code, out = pretrain(2, images, tmp_path / name, *flags, *more)
        assert code == 0, out
    code, out = pretrain(2, images, tmp_path / "parts", *flags, "--fsdp", "--max_steps", "3")
    assert code == 0 and (tmp_path / "parts/checkpoint-1-step2.pth").exists(), out
    (tmp_path / "single").mkdir()
    (tmp_path / "single/checkpoint-1-step2.pth").write_bytes(
        (tmp_path / "parts/checkpoint-1-step2.pth").read_bytes()
    )
    code, out = pretrain(2, images, tmp_path / "parts", *flags, "--fsdp", "--resume", "auto")
    assert code == 0 and "going on at epoch 1, step 2" in out, out
    states = {name: state_of(tmp_path / name / "checkpoint-1.pth") for name in ("ddp", "whole", "parts")}
    assert_close(states["whole"], states["parts"], 0)
    # Of the norm, float32: gradients are averaged in another order, 6e-8 each, in steps of 1e-4 of the
    # weights
    assert_close(states["ddp"]["model"], states["whole"]["model"], 1e-6)
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "parts")
    flags = ("--accum_iter", "4", "--epochs", "2", "--resume", "auto")  # the same effective batch
    code, out = pretrain(1, images, tmp_path / "single", *flags)
    assert code == 0 and "going on at epoch 1, step 4" in out, out


@pytest.mark.slow
def test_fine_tuning(tmp_path):
    """With frozen blocks, drop path and mixup; evaluated after each epoch, and alone in one process."""
    pictures = make_pictures(tmp_path / "images", per_class=12)
    flags = ("--trainable_blocks", "2", "--mixup", "0.8", "--accum_iter", "2", "--clip_grad", "1")
    logs = []
    for name, more in [("ddp", ()), ("fsdp", ("--fsdp",))]:
        code, out = run(2, *command("main_finetune.py", pictures, tmp_path / name, *flags, *more))
        assert code == 0, out
        logs.append(read_log(tmp_path / name))
        assert (tmp_path / name / "confusion.png").exists()
    # Weights agree to 1e-6 of their norm (below); losses, of some 20 layers on them, to a hundred times that
    assert logs[0] == [pytest.approx(line, rel=1e-4) for line in logs[1]]
    states = [state_of(tmp_path / name / "checkpoint-1.pth") for name in ("ddp", "fsdp")]
    assert_close(states[0]["model"], states[1]["model"], 1e-6)
    parser = ArgumentParser(parents=[main_finetune.get_args_parser()])
    words = ["--eval", "--fsdp", "--resume", str(tmp_path / "fsdp/checkpoint-1.pth"), "--device", "cpu"]
    words += ["--data_path", str(pictures), "--num_workers", "0", "--output_dir", str(tmp_path / "report")]
    main_finetune.main(parse_args(parser, words))
    assert (tmp_path / "report/per_class.txt").read_text() == (tmp_path / "fsdp/per_class.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "action, message, saved",
    [
        ("return normalize(*args) * float('nan')", "the loss is nan; no process made this step", False),
        ("os.kill(os.getpid(), signal.SIGTERM)", "SIGTERM: saved; the same command with --resume auto", True),
        ("os.kill(os.getpid(), signal.SIGKILL)", "lost contact with another process", False),
    ],
)
def test_what_ends_a_run(images, tmp_path, action, message, saved):
    script = tmp_path / "script.py"
    script.write_text(FAILING.format(repo=str(REPO), action=action))
    flags = command("main_pretrain.py", images, tmp_path, "--epochs", "1000", "--save_freq", "1000", "--fsdp")
    code, out = run(2, script, *flags[1:])
    assert code != 0 and message in out, out
    assert bool(list(tmp_path.glob("checkpoint-1-step*.pth"))) == saved
    if saved:
        more = ("--resume", "auto", "--epochs", "1000", "--save_freq", "1000", "--max_steps", "9", "--fsdp")
        code, out = pretrain(2, images, tmp_path, *more)
        assert code == 0 and "going on at epoch 1, step" in out, out


def test_where_it_cannot_work(images, tmp_path, monkeypatch, capsys):
    parser = ArgumentParser(parents=[main_pretrain.get_args_parser()])
    words = [str(word) for word in command("main_pretrain.py", images, tmp_path / "out", "--fsdp")[1:]]
    with pytest.raises(UserError, match="--fsdp: shares a model among several processes"):
        main_pretrain.main(parse_args(parser, words))
    assert not (tmp_path / "out").exists()
    check_fsdp(Namespace(fsdp=True, eval=True, distributed=False))  # nothing is trained
    check_fsdp(Namespace(fsdp=True))  # where a job is submitted
    with pytest.raises(SystemExit):
        ArgumentParser(parents=[main_linprobe.get_args_parser()]).parse_args(["--fsdp"])
    assert "unrecognized arguments: --fsdp" in capsys.readouterr().err
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    with pytest.raises(UserError, match="--fsdp: needs NCCL, which torch for Windows has not"):
        shard_model(models_mae.mae_vit(TINY_MAE), torch.device("cuda"))
    monkeypatch.setattr(torch.cpu, "Stream", object)  # as in torch 2.6
    with pytest.raises(UserError, match=r"--fsdp: does not work on CPU with torch \d"):
        shard_model(models_mae.mae_vit(TINY_MAE), torch.device("cpu"))
