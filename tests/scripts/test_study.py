"""study.py: rows and their errors, runs that are kept and resumed, the table and the picture."""

import json
import re

import numpy as np
import pytest
from golden_utils import REPO
from image_utils import make_folder
from PIL import Image

import main_evaluate
import main_pretrain
import study
from util.cli.parser import ArgumentParser, parse_args
from util.errors import TrainingError, UserError
from util.recipes.study_rows import read_rows
from util.recipes.study_runs import Run, RunJob, Runner
from util.run import owner

TINY = (
    "--model mae_vit_tiny_patch16 --input_size 16 --patch_size 8 --decoder_embed_dim 8 --decoder_depth 1 "
    "--decoder_num_heads 1 --batch_size 4 --epochs 2 --warmup_epochs 0 --num_workers 0 --device cpu"
)
SCRIPTS = {"main_pretrain.py": main_pretrain, "main_evaluate.py": main_evaluate}


def parsed(*words):
    return parse_args(ArgumentParser(parents=[study.get_args_parser()]), list(map(str, words)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("study") / "d"
    make_folder(root / "train", 12, classes=2, height=20, width=20)
    make_folder(root / "val", 6, classes=2, height=20, width=20)
    return root


@pytest.fixture
def calls(monkeypatch):
    """The scripts run here instead of in processes; gives the list of those that were called."""
    made = []

    def call(runner, run, environment, script, words):
        made.append((script, run.name, list(words)))
        parser = ArgumentParser(parents=[SCRIPTS[script].get_args_parser()])
        SCRIPTS[script].main(parse_args(parser, list(words)))
        owner.release()
        return 0, 2.0, 1.5

    monkeypatch.setattr(Runner, "call", call)
    return made


def rows_file(tmp_path, text):
    path = tmp_path / "rows.txt"
    path.write_text(text)
    return path


def test_a_study_ends_with_a_table_and_is_made_once(data, tmp_path, calls, capsys):
    rows = rows_file(
        tmp_path, f"all: {TINY} --data_path {data}\nlow: --mask_ratio 0.5  # paper 1.0 / 2.0\nhigh:\n"
    )
    command = parsed(rows, "--seeds", 2, "--output_dir", tmp_path / "out")
    text = study.main(command)
    assert [(script, name) for script, name, _ in calls] == [
        (script, f"{row}, seed {seed}")
        for seed in (0, 1)
        for row in ("low", "high")
        for script in ("main_pretrain.py", "main_evaluate.py")
    ]
    record = json.loads((tmp_path / "out" / "study.json").read_text())
    for row in ("low", "high"):
        for seed in (0, 1):
            place = tmp_path / "out" / row / f"seed-{seed}"
            log = [json.loads(line) for line in (place / "log.txt").read_text().splitlines()]
            card = json.loads((place / "card" / "card.json").read_text())["columns"]["encoder"]["rows"]
            assert record[row]["val_loss"][seed] == log[-1]["val_loss"]
            assert record[row]["linear"][seed] == card["linear_norm"]["score"]
            assert record[row]["knn"][seed] == card["knn"]["score"]
            assert not list(place.glob("*.pth"))
    assert record["low"]["val_loss"][0] != record["low"]["val_loss"][1]
    lines = text.splitlines()
    assert lines[2].startswith("| low | 2 of 2 | ") and lines[2].endswith("| 2 ± 0 | 2 ± 0 | 1.0 / 2.0 |")
    mean = sum(record["low"]["val_loss"]) / 2
    assert f"| {mean:.4f} ± " in lines[2]
    assert Image.open(tmp_path / "out" / "study.png").size[0] > 900
    del calls[:]
    assert study.main(command) == text and not calls


def test_a_killed_run_resumes_and_its_time_is_left_out(data, tmp_path, calls, monkeypatch):
    rows = rows_file(tmp_path, f"one: {TINY} --data_path {data}\ntwo: {TINY} --data_path {data} --blr 1e-2\n")
    command = parsed(rows, "--seeds", 1, "--output_dir", tmp_path / "out")
    whole = Runner.call

    def killed(runner, run, environment, script, words):
        if run.row.name == "two":
            whole(runner, run, environment, script, [*words, "--max_steps", "2"])
            raise KeyboardInterrupt  # as if the study were killed: nothing is written any more
        return whole(runner, run, environment, script, words)

    monkeypatch.setattr(Runner, "call", killed)
    with pytest.raises(KeyboardInterrupt):
        study.main(command)
    assert "| 0 of 1 |" in study.main(parsed(rows, "--seeds", 1, "--output_dir", tmp_path / "out", "--table"))
    monkeypatch.setattr(Runner, "call", whole)
    del calls[:]
    lines = study.main(command).splitlines()
    assert [call[:2] for call in calls] == [
        ("main_pretrain.py", "two, seed 0"),
        ("main_evaluate.py", "two, seed 0"),
    ]
    log = (tmp_path / "out" / "two" / "seed-0" / "log.txt").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == [0, 1]  # it went on
    assert lines[2].endswith("| 2 | 2 |") and lines[3].endswith("|  |  |")


def test_a_failed_run_is_told_and_the_rest_is_made(data, tmp_path, calls, monkeypatch):
    rows = rows_file(tmp_path, f"bad: {TINY} --data_path {data}\ngood: {TINY} --data_path {data}\n")
    whole = Runner.call

    def call(runner, run, environment, script, words):
        if run.row.name == "good":
            return whole(runner, run, environment, script, words)
        (run.folder / "out.txt").write_text("some\nthe loss is not finite\n\n")
        return 1, 1.0, 1.0

    monkeypatch.setattr(Runner, "call", call)
    with pytest.raises(TrainingError, match=r"1 of 2 runs failed.*bad, seed 0: the loss is not finite"):
        study.main(parsed(rows, "--seeds", 1, "--output_dir", tmp_path / "out"))
    table = (tmp_path / "out" / "study.md").read_text()
    assert "| bad | 0 of 1 |" in table and "| good | 1 of 1 |" in table


def test_runs_that_end_in_their_first_epoch_have_no_figures(data, tmp_path, calls, capsys):
    """They write no log.txt, which was a traceback; a picture that is not there was named."""
    rows = rows_file(tmp_path, f"all: {TINY} --data_path {data} --max_steps 1\nlow: --mask_ratio 0.5\n")
    words = (rows, "--seeds", 1, "--card", "none", "--output_dir", tmp_path / "out")
    assert "| low | 1 of 1 |  |" in study.main(parsed(*words))
    assert not (tmp_path / "out/low/seed-0/log.txt").exists()
    assert "study.json; nothing to draw yet" in capsys.readouterr().out
    assert not (tmp_path / "out/study.png").exists() and len(calls) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: --mask_ration 0.5 --nonsense 3", r"row 'a': .*--mask_ration 0.5 --nonsense 3"),
        ("a: --mask_ratio 1.5", r"row 'a': --mask_ratio 1.5: must lie between 0 and 1"),
        ("a: --mask_ratio 0.99", r"row 'a': --mask_ratio 0.99: keeps none of 4 patches"),
        ("a: --mask_ratio many", r"row 'a': .*invalid float value: 'many'"),
        ("a: --seed 0", r"row 'a': --seed: the study sets it"),
        ("a: --model mae_vit_none", r"row 'a': .*mae_vit_none"),
        ("a\n", r"rows.txt, line 2: a: no row; write NAME: FLAGS"),
        ("a/b: --blr 1", r"line 2: a/b: --blr 1: no row"),
        ("a b:\nA_B:\n", r"line 3: 'A_B': is a second row of that name"),
        ("a:\nall: --blr 1", r"line 3: 'all': comes before the rows"),
        ("a: --output_dir 'x", r"line 2: .*No closing quotation"),
        ("# none", r"holds no row"),
    ],
)
def test_bad_rows_are_one_line_before_the_first_run(text, words, tmp_path, calls):
    rows = rows_file(tmp_path, f"all: {TINY} --card none\n{text}\n".replace(" --card none", ""))
    with pytest.raises(UserError, match=words) as error:
        study.main(parsed(rows, "--card", "none", "--output_dir", tmp_path / "out"))
    assert "\n" not in str(error.value) and not calls and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--mask file --mask_file none.png", "--mask_file none.png: "),
        ("--mask file --mask_file none", "--mask_file none: "),
        ("--mask file --mask_file {data}", r"--mask_file .*: holds no mask of 12 of 12 images"),
        ("--teacher none.pth", "--teacher none.pth: "),
        ("--target teacher --teacher {data}/train/c0/000.jpg", r"--teacher .*000\.jpg: "),
        ("--target pca --target_size 1000", "--target_size 1000: a patch has 192 numbers"),
        ("--init none.pth", "--init none.pth: "),
        ("--extend_from none.pth --schedule constant", "--extend_from none.pth: "),
        ("--size_schedule 16:0 24:0.5", "--size_schedule 16:0 24:0.5: must end with --input_size"),
        ("--mean 0.5 0.5", "--mean"),
    ],
)
def test_the_files_of_every_row_are_read_before_the_first_run(flags, words, data, tmp_path, calls, capsys):
    """They were found when their run began, hours later. --table makes no run and needs no files."""
    text = f"all: {TINY} --data_path {data}\ngood: --target lowpass\nbad: {flags.format(data=data)}\n"
    place = (rows_file(tmp_path, text), "--card", "none", "--output_dir", tmp_path / "out")
    with pytest.raises(UserError, match=f"row 'bad': {words}") as error:
        study.main(parsed(*place))
    assert "\n" not in str(error.value) and not calls and not (tmp_path / "out").exists()
    assert not capsys.readouterr().out
    assert "| bad | 0 of 3 |" in study.main(parsed(*place, "--table"))


def test_what_is_to_be_studied_is_said_once(tmp_path, calls):
    for words in ([], ["rows.txt", "--study", "ratio"]):
        with pytest.raises(UserError, match="one of both"):
            study.main(parsed(*words))
    with pytest.raises(UserError, match=r"none\.txt: cannot be read"):
        study.main(parsed(tmp_path / "none.txt"))
    rows = rows_file(tmp_path, f"a: {TINY} --data_path {REPO / 'recipes'}\n")
    with pytest.raises(UserError, match="--card none does without"):
        study.main(parsed(rows))


def test_other_flags_in_the_same_folder_are_an_error(data, tmp_path, calls):
    place = ["--seeds", 1, "--card", "none", "--output_dir", tmp_path / "out"]
    study.main(parsed(rows_file(tmp_path, f"a: {TINY} --data_path {data}\n"), *place))
    other = rows_file(tmp_path, f"a: {TINY} --data_path {data} --blr 1\n")
    with pytest.raises(UserError, match=r"row 'a': .* was made with --model .*another --output_dir"):
        study.main(parsed(other, *place))


@pytest.mark.parametrize("name", study.STUDIES)
def test_built_in_rows_are_taken(name):
    known = {word for action in main_pretrain.get_args_parser()._actions for word in action.option_strings}
    flags = {word for row in read_rows(REPO / "recipes" / f"study_{name}.txt") for word in row.flags}
    flags = {word for word in flags if word.startswith("--")}
    assert flags and flags <= known


def test_rows_of_other_losses_are_told_apart_by_their_values():
    one, same = ("--norm_pix_loss", "--mask_ratio", "0.75"), ("--norm_pix_loss", "--mask_ratio", "0.75")
    assert study._of_loss((*one, "--epochs", "3")) == study._of_loss(("--opt", "muon", *same)) == one
    assert study._of_loss(("--mask_ratio=0.5", "--epochs", "3")) == ("--mask_ratio=0.5",)
    assert study._of_loss(("--epochs", "3")) == ()


def test_the_paper_stands_beside_its_rows():
    rows = {row.name: row.paper for row in read_rows(REPO / "recipes" / "study_masks.txt")}
    assert rows["random 0.75"] == "84.9 / 73.5" and rows["inverse block 0.75"] == ""
    assert all(re.fullmatch(r"\d\d\.\d / \d\d\.\d|", paper) for paper in rows.values())


@pytest.mark.needs("posix")
def test_signals_reach_the_runs(tmp_path, monkeypatch):
    """A run's process gets SIGTERM, no other starts, and the study says that it can go on: status 75."""
    code = (
        "import signal, sys, time, os; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
        "os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    )
    monkeypatch.setattr("util.recipes.study_runs.REPO", tmp_path)
    (tmp_path / "main_pretrain.py").write_text(code.replace("; ", "\n"))
    row = read_rows(rows_file(tmp_path, "a:\n"))[0]
    runs = [Run(row, seed, tmp_path / f"{seed}", None) for seed in range(2)]
    with pytest.raises(SystemExit) as stop:
        Runner(1).make(runs)
    assert stop.value.code == 75
    assert runs[0].state()["ends"] == 1 and not runs[0].state()["trained"]
    assert not (tmp_path / "1").exists()  # nothing of it has begun


def test_gpus_are_dealt():
    places = Runner(3, ["4", "7"]).places
    assert [places.get()["CUDA_VISIBLE_DEVICES"] for _ in range(3)] == ["4", "7", "4"]


def test_a_job_for_each_run(data, tmp_path, capsys):
    rows = rows_file(tmp_path, f"a: {TINY} --data_path {data}\n")
    words = ["--cluster", "slurm", "--dry_run", "--timeout", "77", "--job_dir", tmp_path / "j"]
    study.main(parsed(rows, "--output_dir", tmp_path / "out", *words))
    script = capsys.readouterr().out
    assert "#SBATCH --time=77" in script and "#SBATCH --nodes=1" in script and "--requeue" in script


def test_a_job_trains_and_cards(data, tmp_path, monkeypatch):
    from util.slurm.job import TrainingJob

    rows = rows_file(tmp_path, f"a: {TINY} --data_path {data}\n")
    run = study.planned(parsed(rows, "--seeds", 1, "--output_dir", tmp_path / "out"))[0]
    args = parse_args(ArgumentParser(parents=[main_pretrain.get_args_parser()]), run.training)
    monkeypatch.setattr(TrainingJob, "__call__", lambda self: main_pretrain.main(self.args))
    RunJob(run, args, keep=False)()
    state = run.state()
    assert set(state["figures"]) == {"train_loss", "val_loss", "knn", "linear"}
    assert state["starts"] == state["ends"] == 1 and state["seconds"] > 0


def test_the_picture_has_a_dot_for_each_seed():
    rows = {"a": [1.0, 3.0], "b": [], "c": [2.0]}
    picture = study.draw_study(
        {"one": rows, "two": {name: [v * 10 for v in values] for name, values in rows.items()}}
    )
    assert picture.size == (230 + 2 * 318 + 18, 18 + 26 * 4 + 26 + 18)
    pixels = np.asarray(picture)
    for ink in ((0, 114, 178), (0, 158, 115)):  # of the first row and the third
        assert (pixels == ink).all(-1).any()
