"""Meters and log lines."""

import json
import time

import pytest
import torch

from util.run.meters import MetricLogger, SmoothedValue
from util.run.run_log import make_log_writer, trim_log, write_log


def test_smoothed_value_mixes_numbers_and_tensors():
    meter = SmoothedValue(window_size=2)
    for value in (1.0, torch.tensor(2.0), 6):
        meter.update(value)
    assert (meter.value, meter.avg, meter.max, meter.global_avg) == (6.0, 4.0, 6.0, 3.0)
    assert str(meter) == "2.0000 (3.0000)"


def test_tensors_are_not_read_before_they_are_needed():
    class Watched:
        reads = 0

    original = torch.Tensor.tolist

    def watched(tensor):
        Watched.reads += 1
        return original(tensor)

    torch.Tensor.tolist, meter = watched, SmoothedValue()
    try:
        for _ in range(10):
            meter.update(torch.ones(()))
        assert Watched.reads == 0 and len(meter.pending) == 10
        assert meter.global_avg == 1.0 and Watched.reads == 1
    finally:
        torch.Tensor.tolist = original


def test_weights_of_updates():
    meter = SmoothedValue()
    meter.update(1.0, n=3)
    meter.update(torch.tensor(5.0), n=1)
    assert meter.global_avg == 2.0 and meter.count == 4


def test_log_lines(capsys):
    metrics = MetricLogger(images_per_step=8)
    for i in metrics.log_every(range(5), 2, "Epoch: [3]"):
        time.sleep(0.002)
        metrics.update(loss=torch.tensor(float(i)), nothing=None)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines[:-1]] == ["[0/5]", "[2/5]", "[4/5]"]
    for text in (
        "Epoch: [3]",
        "eta: 0:00:00",
        "loss: 2.0000 (2.0000)",
        "images/s: ",
        "data wait: ",
        "max mem: ",
    ):
        assert text in lines[2]
    assert "Total time" in lines[-1] and "nothing" not in lines[2]
    assert metrics.averages() == {"loss": 2.0} and metrics.loss.value == 4.0


def test_log_lines_go_on_inside_an_epoch(capsys):
    class Rest:
        def __len__(self):
            return 6

        def __iter__(self):
            return iter("cdef")

    metrics = MetricLogger()
    assert list(metrics.log_every(Rest(), 10, "E", start=2)) == list("cdef")
    assert "[5/6]" in capsys.readouterr().out


def test_unknown_meter():
    with pytest.raises(AttributeError, match="no meter loss"):
        _ = MetricLogger().loss


def test_log_file(tmp_path):
    write_log(tmp_path, {"train_loss": 0.5, "epoch": 0})
    write_log(tmp_path, {"train_loss": float("inf"), "epoch": 1})
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert lines == [{"train_loss": 0.5, "epoch": 0}, {"train_loss": None, "epoch": 1}]
    write_log("", {"epoch": 2})


def test_log_writer(tmp_path):
    assert make_log_writer("") is None
    writer = make_log_writer(tmp_path / "curves")
    writer.add_scalar("x", 1.0, 0)
    writer.close()
    assert list((tmp_path / "curves").glob("events.out.tfevents.*"))


def test_a_resumed_log_drops_what_will_come_again(tmp_path):
    for epoch in range(3):
        write_log(tmp_path, {"epoch": epoch})
    assert trim_log(tmp_path, 2) and not trim_log(tmp_path, 4) and trim_log("", 3)
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [0, 1]


def test_a_full_disk_ends_the_curves_and_not_the_run(tmp_path, capsys):
    writer = make_log_writer(tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    writer.writer.add_scalar = full
    writer.add_scalar("x", 1.0, 0)
    writer.add_scalar("x", 1.0, 1)
    writer.close()
    assert capsys.readouterr().err.count("no more TensorBoard curves: No space left on device") == 1
    write_log(tmp_path / "gone", {"epoch": 0})
    assert "log.txt: not written" in capsys.readouterr().err
