"""Runs with --schedule, --ema, --opt and --size_schedule: resumed, extended, averaged, and read by others."""

import json

import pytest
import torch
from golden_utils import TINY_MAE
from test_main_pretrain import names_in
from test_main_pretrain import run as run_tiny
from test_resuming import content_of, state_of_folder
from transfer_utils import make_mae, make_pictures, read_log, same_state, vit_test
from transfer_utils import run as run_script

import engine_pretrain
import main_finetune
import main_linprobe
import main_pretrain
import models_mae
import models_vit
from util.data.dataset import build_val_dataset
from util.data.loader import build_loader
from util.data.sampler import EvalSampler
from util.errors import UserError
from util.weights.files import read_file

SETS = {
    "muon": "--opt muon --lr 1e-2",
    "wsd and ema": "--schedule wsd --cooldown 1 --ema 0.8",
    "sizes and ema": "--size_schedule 16:0 32:0.5 --ema 0.8 --schedule constant",
}


def run(images, output, *flags):
    return run_tiny(images, output, "--model", "mae_nano", *flags)


@pytest.fixture(autouse=True, scope="module")
def small_models():
    """`mae_nano` and its encoder `vit_test`, of two blocks, 24 wide."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models_vit.MODELS, "vit_test", vit_test)
        patch.setitem(models_mae.MODELS, "mae_nano", lambda **sizes: models_mae.mae_vit(TINY_MAE, **sizes))
        yield


def same(first, second):
    """The same tensors and numbers, to the bit."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def check_same(first, second, *names):
    first, second = content_of(first), content_of(second)
    for name in names or ("model", "optimizer", "model_ema", "epoch", "stats"):
        assert (name in first) == (name in second), name
        assert same(first.get(name), second.get(name)), name


@pytest.mark.parametrize("words", SETS.values(), ids=SETS.keys())
def test_pre_training_stopped_anywhere_and_resumed_is_undisturbed(images, tmp_path, words):
    """Twice inside an epoch, the second time behind a change of size or a cooldown; 3 steps each."""
    flags = (*words.split(), "--vis_freq", "1")
    log = run(images, tmp_path / "whole", *flags)
    for steps in ("1", "4", "0"):
        again = run(images, tmp_path / "parts", *flags, "--resume", "auto", "--max_steps", steps)
    assert "checkpoint-1.pth" in names_in(tmp_path / "parts")
    check_same(*(tmp_path / name / "checkpoint-1.pth" for name in ("whole", "parts")))
    assert log == again and ("val_loss_ema" in log[1]) == ("--ema" in words)
    content = content_of(tmp_path / "whole/checkpoint-1.pth")
    assert ("model_ema" in content) == ("--ema" in words)
    assert content["model"]["pos_embed"].shape[1] == 17 and content["args"]["input_size"] == 32


@pytest.mark.parametrize("words", [SETS["muon"], SETS["wsd and ema"]], ids=["muon", "wsd and ema"])
def test_fine_tuning_with_layer_decay_stopped_and_resumed_is_undisturbed(tmp_path, words):
    pictures = make_pictures(tmp_path / "pictures", per_class=4)
    recipe = f"--batch_size 4 --epochs 2 --warmup_epochs 1 --layer_decay 0.6 --drop_path 0.2 {words}"
    run_script(main_finetune, recipe, data_path=pictures, output_dir=tmp_path / "whole")
    for steps in (1, 4, 0):
        more = f"{recipe} --resume auto --max_steps {steps}"
        run_script(main_finetune, more, data_path=pictures, output_dir=tmp_path / "parts")
    check_same(*(tmp_path / name / "checkpoint-1.pth" for name in ("whole", "parts")))
    log = read_log(tmp_path / "whole")
    assert log == read_log(tmp_path / "parts")
    if "--ema" in words:
        assert {"test_acc1_ema", "test_loss_ema"} <= log[1].keys()
        file = tmp_path / "whole/checkpoint-1.pth"
        read = read_file(file, "--resume", True, "model_ema")["model"]
        assert same_state(read, content_of(file)["model_ema"])
    groups = content_of(tmp_path / "whole/checkpoint-1.pth")["optimizer"]["param_groups"]
    assert len({group["lr_scale"] for group in groups}) > 2


def test_a_probes_head_has_an_average_too(tmp_path):
    pictures = make_pictures(tmp_path / "pictures", per_class=4)
    torch.save({"model": make_mae().state_dict()}, tmp_path / "mae.pth")
    flags = f"--finetune {tmp_path}/mae.pth --epochs 2 --warmup_epochs 0 --batch_size 4 --ema 0.5"
    for more in ("", "--cache_features"):
        run_script(main_linprobe, flags, more, data_path=pictures, output_dir=tmp_path / f"out{more}")
        content = content_of(tmp_path / f"out{more}/checkpoint-1.pth")
        differ = [
            key
            for key, value in content["model_ema"].items()
            if not torch.equal(value, content["model"][key])
        ]
        assert differ and all(key.startswith("head.") for key in differ)
        assert "test_acc1_ema" in read_log(tmp_path / f"out{more}")[1]


def test_without_held_out_images_nothing_is_said_of_the_average(images, tmp_path, capsys):
    """The line stood above nothing."""
    flags = ("--ema", "0.6", "--vis_freq", "1", "--max_steps", "1")
    run(images, tmp_path / "with", *flags, "--batch_size", "8", "--epochs", "1")
    assert "with the average of the weights" in capsys.readouterr().out
    run(images / "train", tmp_path / "without", *flags, "--batch_size", "8", "--epochs", "1")
    assert "with the average of the weights" not in capsys.readouterr().out
    assert "model_ema" in content_of(tmp_path / "without/checkpoint-0.pth")


def test_the_average_is_evaluated_and_every_reader_takes_it(images, tmp_path):
    """`val_loss_ema` is that of a model with these weights; fine-tuning starts from them as from any."""
    out = tmp_path / "out"
    log = run(
        images,
        out,
        "--ema",
        "0.6",
        "--vis_freq",
        "1",
        "--epochs",
        "1",
        "--lr",
        "1e-2",
        "--warmup_epochs",
        "0",
    )
    content = content_of(out / "checkpoint-0.pth")
    args = main_pretrain.get_args_parser().parse_args([])
    vars(args).update(content["args"])
    model = main_pretrain.build_model(args)
    loader = build_loader(val_set := build_val_dataset(args), EvalSampler(len(val_set)), 4)
    for key, name in (("model", "val_loss"), ("model_ema", "val_loss_ema")):
        model.load_state_dict(content[key])
        assert engine_pretrain.evaluate(loader, model, torch.device("cpu"), args) == log[0][name]
    assert log[0]["val_loss"] != log[0]["val_loss_ema"]

    torch.save({"model": content["model_ema"], "args": content["args"]}, tmp_path / "alone.pth")
    tiny = "--batch_size 4 --epochs 1 --warmup_epochs 0 --max_steps 1"
    for name, more in (("a", f"--finetune {out}/checkpoint-0.pth --weights_key model_ema"),
                       ("b", f"--finetune {tmp_path}/alone.pth"),
                       ("c", f"--finetune {out}/checkpoint-0.pth")):  # fmt: skip
        run_script(main_finetune, tiny, more, data_path=images, output_dir=tmp_path / name)
    a, b, c = (content_of(next((tmp_path / name).glob("checkpoint-*.pth")))["model"] for name in "abc")
    assert same_state(a, b) and not same_state(a, c)
    more = (
        "--init",
        str(out / "checkpoint-0.pth"),
        "--weights_key",
        "model_ema",
        "--lr",
        "0",
        "--epochs",
        "1",
    )
    run(images, tmp_path / "d", *more)
    assert same_state(content_of(tmp_path / "d/checkpoint-0.pth")["model"], content["model_ema"])


def test_an_average_begins_late_and_another_optimizer_is_an_error(images, tmp_path, capsys):
    out = tmp_path / "out"
    run(images, out, "--epochs", "1")
    for more in (("--opt", "muon"), ("--opt_args", "eps=1e-6")):
        with pytest.raises(UserError, match=f"{more[0]} .*was trained with .*; go on with that"):
            run(images, out, "--epochs", "2", "--resume", "auto", *more)
    capsys.readouterr()
    run(images, out, "--epochs", "2", "--resume", "auto", "--ema", "0.5")
    text = "".join(capsys.readouterr())
    assert "holds no average, so that it begins with the weights there" in text
    assert "settings differ from the checkpoint's: epochs 1 -> 2, ema None -> 0.5" in text
    assert "model_ema" in content_of(out / "checkpoint-1.pth")


WSD = ("--schedule", "wsd", "--cooldown", "1", "--warmup_epochs", "1", "--ema", "0.8")


@pytest.fixture(scope="module")
def stable(images, tmp_path_factory):
    """Folder of a run of 3 epochs with a cooldown of one; it saved before that, unasked."""
    out = tmp_path_factory.mktemp("stable")
    run(images, out, *WSD, "--epochs", "3")
    assert {"checkpoint-0.pth", "checkpoint-1.pth", "checkpoint-2.pth"} <= set(names_in(out))
    return out


def test_extended_is_what_a_longer_run_would_have_been(images, stable, tmp_path, capsys):
    """To the bit, also from inside an epoch; a new run with a log and an id of its own."""
    before = state_of_folder(stable)
    whole = run(images, tmp_path / "whole", *WSD, "--epochs", "4", "--vis_freq", "1")
    capsys.readouterr()
    flags = (*WSD, "--epochs", "4", "--vis_freq", "1", "--extend_from", str(stable / "checkpoint-1.pth"))
    log = run(images, tmp_path / "more", *flags)
    text = capsys.readouterr()
    assert "going on at epoch 2" in text.out and "settings differ" not in text.err
    check_same(*(tmp_path / name / "checkpoint-3.pth" for name in ("whole", "more")))
    assert log == whole[1:]  # begins with the epoch that it goes on from
    ids = [content_of(folder / name)["run"]["id"] for folder, name in
           ((stable, "checkpoint-2.pth"), (tmp_path / "more", "checkpoint-3.pth"))]  # fmt: skip
    assert ids[0] != ids[1] and state_of_folder(stable) == before

    run(images, tmp_path / "part", *WSD, "--epochs", "3", "--max_steps", "5")
    flags = (*flags[:-1], str(tmp_path / "part/checkpoint-1-step2.pth"))
    run(images, tmp_path / "inside", *flags)
    check_same(*(tmp_path / name / "checkpoint-3.pth" for name in ("whole", "inside")))


def test_the_same_command_with_resume_auto_goes_on(images, stable, tmp_path, monkeypatch):
    """Killed before its first save, it starts from the file again, as the run it is; then from its own."""
    flags = (*WSD, "--epochs", "4", "--extend_from", str(stable / "checkpoint-1.pth"), "--resume", "auto")
    run(images, tmp_path / "whole", *flags)

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(main_pretrain, "train_one_epoch", kill)
        run(images, tmp_path / "parts", *flags)
    run(images, tmp_path / "parts", *flags, "--max_steps", "8")
    assert names_in(tmp_path / "parts")[0] == "checkpoint-2-step2.pth"
    run(images, tmp_path / "parts", *flags)
    check_same(*(tmp_path / name / "checkpoint-3.pth" for name in ("whole", "parts")))
    ids = {json.loads(line)["run"] for line in (tmp_path / "parts/log.txt").read_text().splitlines()}
    assert ids and content_of(stable / "checkpoint-1.pth")["run"]["id"] not in ids


def test_cooled_down_at_once_and_constant_goes_on(images, stable, tmp_path):
    """From a stable checkpoint one may also end: `--epochs` so that the cooldown begins there."""
    constant = ("--schedule", "constant", "--epochs", "3")
    run(images, tmp_path / "constant", *constant, "--save_freq", "1")
    file = str(tmp_path / "constant/checkpoint-2.pth")
    log = run(
        images,
        tmp_path / "down",
        "--extend_from",
        file,
        "--schedule",
        "wsd",
        "--epochs",
        "5",
        "--cooldown",
        "2",
    )
    assert [line["epoch"] for line in log] == [2, 3, 4]
    assert log[0]["train_lr"] > log[1]["train_lr"] > log[2]["train_lr"] > 0
    log = run(images, tmp_path / "on", "--extend_from", file, "--schedule", "constant", "--epochs", "4")
    assert log[0]["train_lr"] == pytest.approx(log[1]["train_lr"], rel=1e-12) and len(log) == 2


def test_what_cannot_be_extended_is_one_line_and_nothing_is_written(images, stable, tmp_path):
    run(images, tmp_path / "cosine", "--epochs", "1")
    content = content_of(stable / "checkpoint-1.pth")
    torch.save({"model": content["model"]}, tmp_path / "alone.pth")
    torch.save({**content, "args": {**content["args"], "epochs": "x"}}, tmp_path / "odd.pth")
    cosine, end, good = (
        tmp_path / "cosine/checkpoint-0.pth", stable / "checkpoint-2.pth", stable / "checkpoint-1.pth"
    )  # fmt: skip
    longer = (*WSD, "--epochs", "9")
    for file, flags, message in [
        (cosine, longer, "is of a cosine, which falls from the warm-up on"),
        (end, longer, "holds 3 epochs, and its run's stable phase ends after 2; take an earlier one"),
        (
            good,
            (*WSD, "--epochs", "2"),
            "holds 2 epochs, and this run's stable phase ends after 1; pass more --epochs",
        ),
        (
            good,
            ("--schedule", "constant", "--epochs", "2"),
            "this run's stable phase ends after 2; pass more --epochs",
        ),
        (good, ("--epochs", "9"), "needs --schedule wsd, or constant"),
        (good, (*longer, "--resume", str(end)), "leave the other out"),
        (tmp_path / "alone.pth", longer, "holds weights without their optimizer; --init"),
        (tmp_path / "odd.pth", longer, "does not say how long its run was to be"),
        (tmp_path / "none.pth", longer, "--extend_from .*none.pth"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            run(images, tmp_path / "out", *flags, "--extend_from", str(file))
        assert "\n" not in str(error.value) and not list(tmp_path.glob("out/[!.]*"))
    # What a resumed run may not have either names the flag that was given
    for change, flags, message in [
        ({"args": {**content["args"], "pixel_range": 5}}, (), "pixel_range"),
        ({"optimizer": 5}, (), "optimizer"),
        ({"optimizer": {**content["optimizer"], "param_groups": []}}, (), "its optimizer state does not fit"),
        ({"model": {"norm.bias": torch.ones(2)}}, (), "norm.bias"),
        ({"model_ema": {}}, ("--ema", "0.9"), "model_ema"),
        ({"epoch": 0, "step": 1}, ("--clip_grad", "1"), "was saved inside an epoch, and"),
        ({"epoch": 0, "step": 1, "samples": 8, "effective_batch": 7}, (), "epoch with an effective"),
    ]:
        torch.save({**content, **change}, tmp_path / "other.pth")
        with pytest.raises(UserError, match=f"--extend_from .*other.pth.*{message}") as error:
            run(images, tmp_path / "out", *longer, *flags, "--extend_from", str(tmp_path / "other.pth"))
        assert "--resume" not in str(error.value)
    before = state_of_folder(stable)
    for more in ((), ("--resume", "auto")):
        with pytest.raises(UserError, match=r"holds --extend_from .*; pass a folder of its own"):
            run(images, stable, *longer, "--extend_from", str(good), *more)
    assert state_of_folder(stable) == before
