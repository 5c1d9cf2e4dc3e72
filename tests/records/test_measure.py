"""records/measure.py: what its table says of known figures, and that a turn measures what it should."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from golden_utils import REPO
from scipy import stats

sys.path.insert(0, str(REPO / "records"))

import measure

from util.cli.parser import ArgumentParser, parse_args
from util.errors import UserError


def turn(seconds, loss, probe, knn):
    return {"seconds": seconds, "loss": loss, "probe": probe, "knn": knn}


def test_the_table_of_known_figures():
    runs = {}
    for seed, noise in enumerate([0.1, -0.2, 0.15, 0.05, -0.1, 0.2]):
        runs[f"painted baseline {seed}"] = turn(100 + noise, 0.6, 30 + noise, 12.0)
        runs[f"painted fast {seed}"] = turn(40 - noise, 0.5 + noise / 100, 30, 12.0 + noise)
    found = measure.compared([(runs[f"painted baseline {i}"], runs[f"painted fast {i}"]) for i in range(6)])
    ratios = [
        math.log(runs[f"painted baseline {i}"]["seconds"] / runs[f"painted fast {i}"]["seconds"])
        for i in range(6)
    ]
    t = np.mean(ratios) / (np.std(ratios, ddof=1) / 6**0.5)
    assert found["seconds"][2] == pytest.approx(stats.t.sf(t, 5), rel=1e-9)
    assert found["loss"][2] < 1e-6 and found["knn"][2] > 0.1  # lower is better of one, higher of the other
    line = measure.table(runs).splitlines()[2]
    assert (
        line.startswith("| painted | 6 | 100.0 -> 40.0 (p ")
        and f"| {math.exp(np.mean(ratios)):.2f} |" in line
    )
    del runs["painted fast 5"]
    assert measure.table(runs).splitlines()[2].startswith("| painted | 5 |")


def test_the_probe_finds_what_is_linear():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 8, generator=generator)
    labels = (x[:, 3] > 0).long()
    assert measure.probe(x[:200], labels[:200], x[200:], labels[200:]) > 90
    assert measure.probe(x[:200], labels[:200], -x[200:], labels[200:]) < 20


def test_a_record_is_measured_once(tmp_path, monkeypatch, capsys):
    small = "--model mae_vit_tiny_patch16 --decoder_embed_dim 8 --decoder_depth 1 --decoder_num_heads 1"
    monkeypatch.setattr(
        measure,
        "COMMON",
        f"{small} --num_workers 0 --norm_pix_loss --batch_size 32 --device cpu --vis_freq 0",
    )
    monkeypatch.setattr(
        measure,
        "TASKS",
        {name: "--input_size 16 --patch_size 8 --in_chans 1" for name in ("painted", "digits")},
    )
    for name in measure.RECIPES:
        (tmp_path / name).write_text(
            "--max_steps 2 --epochs 1 --warmup_epochs 0\n" + "--opt lion\n" * (name == "fast")
        )
    monkeypatch.setitem(measure.RECIPES, "baseline", str(tmp_path / "baseline"))
    words = [
        "--tasks",
        "digits",
        "--seeds",
        "2",
        "--fast",
        str(tmp_path / "fast"),
        "--json",
        str(tmp_path / "r.json"),
    ]
    args = parse_args(ArgumentParser(parents=[measure.get_args_parser()]), words)
    calls, whole = [], measure.measure

    def counted(*words):
        calls.append(words)
        return turn(1.0, 1.0, 1.0, 1.0) if "--data_path" not in words[1] else whole(*words)

    monkeypatch.setattr(measure, "measure", counted)
    measure.main(args)
    runs = json.loads((tmp_path / "r.json").read_text())
    assert list(runs) == ["digits baseline 0", "digits fast 0", "digits fast 1", "digits baseline 1"]
    assert all(run["seconds"] > 0 and run["loss"] > 0 and run["probe"] > 15 for run in runs.values())
    assert runs["digits baseline 0"]["loss"] != runs["digits fast 0"]["loss"]
    del calls[:]
    measure.main(args)
    assert len(calls) == 1 and "| digits | 2 |" in capsys.readouterr().out
    args.tasks = ["cells"]
    with pytest.raises(UserError, match="--cells DIR"):
        measure.main(args)
