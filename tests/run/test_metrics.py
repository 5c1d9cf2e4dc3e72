"""Meters and log lines."""

import io
import json
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import torch

from util.run import run_log
from util.run.meters import MetricLogger, SmoothedValue, peak_memory_mb
from util.run.run_log import StepCurves, make_log_writer, trim_log, write_log


@pytest.mark.parametrize("left_after", [1, 3, 9])
def test_the_time_of_a_step_where_the_loop_is_left_early(left_after, monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    for number in MetricLogger().log_every(range(5), 1):
        now += 2
        if number + 1 == left_after:
            break
    assert "(2.0000 s / it" in capsys.readouterr().out.splitlines()[-1]


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
        *([] if peak_memory_mb() is None else ["max mem: "]),
    ):
        assert text in lines[2]
    assert "Total time" in lines[-1] and "nothing" not in lines[2]
    assert metrics.averages() == {"loss": 2.0} and metrics.loss.value == 4.0
    assert capsys.readouterr().out == "Averaged stats: loss: 2.0000 (2.0000)\n"  # b10


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


def test_a15_meters_and_curves_keep_the_value_of_the_time(tmp_path):
    points = []
    writer = Namespace(add_scalar=lambda *point: points.append(point))
    logger, curves = MetricLogger(), StepCurves(writer)
    value, number = torch.tensor(8.0, requires_grad=True) * 1, np.array(3.0)
    logger.update(loss=value, lr=number)
    curves.add(0.5, loss=value)
    with torch.no_grad():
        value /= 4
        number /= 3
    curves.write()
    assert logger.loss.value == 8.0 and logger.lr.value == 3.0 and points == [("loss", 8.0, 500)]


def test_a13_lines_of_other_tools_stay_in_a_resumed_log(tmp_path):
    write_log(tmp_path, {"epoch": 0})
    write_log(tmp_path, {"knn_acc1": 25.0, "finetune": "checkpoint-0.pth"})
    with open(tmp_path / "log.txt", "a", encoding="utf-8") as file:
        file.write("# my own words\n")
    write_log(tmp_path, {"epoch": 1})
    assert trim_log(tmp_path, 1)
    assert (tmp_path / "log.txt").read_text().splitlines() == [
        '{"epoch": 0}', '{"knn_acc1": 25.0, "finetune": "checkpoint-0.pth"}', "# my own words"]  # fmt: skip


@pytest.mark.parametrize(
    "rubbish",
    [b"\xff\xfe", b"\0" * 64, b'{"epoch": 1, "train_lo', b'{"a":' * 100_000, b'{"epoch": "x"}\n[1]'],
)
def test_a4_rubbish_in_the_log_does_not_end_a_run(tmp_path, rubbish, capsys):
    write_log(tmp_path, {"epoch": 0})
    with open(tmp_path / "log.txt", "ab") as file:
        file.write(rubbish)
    write_log(tmp_path, {"epoch": 1})
    assert (tmp_path / "log.txt").read_bytes().endswith(b'\n{"epoch": 1}\n')
    assert trim_log(tmp_path, 2)
    lines = (tmp_path / "log.txt").read_bytes().splitlines()
    assert [lines[0], lines[-1]] == [b'{"epoch": 0}', b'{"epoch": 1}']
    dropped = "lines that cannot be read were dropped: 1" in capsys.readouterr().err
    assert dropped == (len(lines) == 2) == (b"[1]" not in rubbish)


def test_a2_records_wait_until_the_disk_has_room(tmp_path, monkeypatch, capsys):
    class Full(io.FileIO):
        def write(self, data):
            super().write(bytes(data)[:5])
            raise OSError(28, "No space left on device")

    write_log(tmp_path, {"epoch": 0})
    opened = lambda path, mode: io.BufferedRandom(Full(path, "a+"))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(run_log, "open", opened, raising=False)
        for epoch in (1, 2):
            write_log(tmp_path, {"epoch": epoch})
    assert (tmp_path / "log.txt").read_text() == '{"epoch": 0}\n'
    assert capsys.readouterr().err.count("log.txt: not written yet: No space left on device") == 1
    write_log(tmp_path, {"epoch": 3})
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").open()] == [0, 1, 2, 3]


def test_a2_the_curves_end_quietly_when_their_thread_meets_a_full_disk(tmp_path, capsys):
    writer = make_log_writer(tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    records = writer.writer.file_writer.event_writer._async_writer._worker._record_writer
    records.write = records.flush = full
    for step in range(30):  # more than the queue takes
        writer.add_scalar("x", 1.0, step)
    writer.flush()
    writer.close()
    assert capsys.readouterr().err == "warning: no more TensorBoard curves: No space left on device\n"


def test_c2_without_a_way_to_know_the_peak_memory(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "resource", None)
    list(MetricLogger().log_every(range(2), 1, "E"))
    out = capsys.readouterr().out
    assert "[1/2]" in out and "max mem" not in out
